"""`TransfusionTrainer`: transformers' Trainer with two losses that stay means, averaged weights, and a time budget."""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.processing_utils import ProcessorMixin
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, SaveStrategy
from transformers.utils import logging

from ..hyper_connections import is_undecayed_parameter
from ..inputs import learned_labels
from ..latents import image_block_ids, patch_image_index
from ..model_card import CARD_FILE
from ..pipeline import save_pipeline_parts
from ..sharing import prepare_card, share
from .averaging import EmaCallback
from .budget import RESOLUTION, BudgetProgressCallback, TimeBudget
from .collator import IGNORE_INDEX, TransfusionDataCollator
from .distributed import named_weights, whole_tensors
from .metering import LevelSums, SpeedMeter
from .resuming import ResumingTrainer, Snapshot
from .sharding import SharedStream, divide
from .speed import not_compiling


logger = logging.get_logger(__name__)

# Paths of this machine, and secrets; they mean nothing elsewhere.
PRIVATE_ARGUMENTS = ("deepspeed", "hub_token", "logging_dir", "output_dir", "resume_from_checkpoint", "run_name")

# Batches as each process makes them: slices of one would cut images.
UNDIVIDED_BATCHES = {"dispatch_batches": False, "split_batches": False, "even_batches": True}


def count_targets(batch: dict[str, Any], config: Any) -> Tensor:
    """(2,) float: how many text tokens, and how many patches, have a loss in `batch`."""
    targets = learned_labels(batch["input_ids"], batch["labels"], config, batch.get("document_ids"))
    num_tokens = (targets != IGNORE_INDEX).sum()
    num_patches = torch.zeros_like(num_tokens)
    if (latent_patches := batch.get("latent_patches")) is not None:
        image_index = patch_image_index(batch["image_grids"], len(latent_patches))
        loss_mask = batch.get("image_loss_mask")
        num_patches += len(latent_patches) if loss_mask is None else loss_mask[image_index].sum()
    return torch.stack([num_tokens, num_patches]).float()


class LossSums:
    """Sums of both losses and of what they are means over, for means over many batches."""

    def __init__(self) -> None:
        self.entries: list[Tensor] = []

    def add(self, losses: Tensor, divisors: Tensor, counts: Tensor) -> None:
        """Add the text and the image loss (2,) of a batch, which are sums over `counts` (2,) divided by `divisors`."""
        self.entries.append(torch.cat([losses.detach() * divisors, counts]))

    def pop_means(self, trainer: Trainer) -> Tensor:
        """(2,) means over all processes since the last call; 0 where nothing was learned."""
        if not self.entries:
            return torch.zeros(2)
        total = torch.stack(self.entries).sum(dim=0)
        self.entries.clear()
        total = trainer.accelerator.reduce(total, "sum").cpu()
        return total[:2] / total[2:].clamp(min=1)


class EpochCallback(TrainerCallback):
    """Tells the dataset the epoch, as accelerate does only where there is one process, and streams where to go on."""

    def __init__(self) -> None:
        self.is_resumed = False
        self.order: torch.Generator | None = None  # of rows that are grouped by length

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note whether there were steps before."""
        self.is_resumed = state.global_step > 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call `set_epoch` of a dataset that has one."""
        dataset = kwargs["train_dataloader"].dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch))
        if self.order is not None:
            self.order.manual_seed((args.seed if args.data_seed is None else args.data_seed) + int(state.epoch))
        if isinstance(dataset, SharedStream) and dataset.is_deferred:
            is_skipping = self.is_resumed and not args.ignore_data_skip
            dataset.num_skipped = state.global_step * args.gradient_accumulation_steps if is_skipping else 0
        self.is_resumed = False


class TransfusionTrainer(ResumingTrainer):
    """Trains a Transfusion model.

    Beyond transformers' Trainer:

    * Both losses are means over all tokens, and all patches, of an optimizer step, however it is divided into
      accumulation steps and processes. They are logged apart, as `text_loss` and `image_loss`, the latter also for
      each quarter of the noise schedule; beside them tokens a second, MFU and the peak of memory.
    * A loss that is not finite stops the training and names the samples.
    * With `ema_decay`, an average of the weights is kept. Evaluation, `averaged_weights` and the final `save_model`
      use it; checkpoints hold both.
    * With `max_minutes`, the learning rate follows the clock and training ends in time.
    * Datasets with `set_epoch` are told the epoch, in every process.
    * Evaluation draws the same noise each time, and leaves the random state of the training as it was.
    * `save_model` leaves a folder that transformers and diffusers load, if the processor is given as
      `processing_class`. Checkpoints hold the processor too, unless its VAE is larger than what is trained.
    * Checkpoints are exact, whole or not there, and written beside the training, as `ResumingTrainer` says.
    * A saved model has `training_args.json` in place of the pickle `training_args.bin`, without paths (`output_dir`,
      `logging_dir`, `run_name`, ...). No pickle is written or read.
    * `push_to_hub` uploads what `save_model` writes and nothing else: no checkpoints, and no TensorBoard files, whose
      names hold that of this machine.

    Args:
        model: A `TransfusionForMultimodalGeneration`; None with `model_init`.
        args: As for Trainer.
        data_collator: By default `TransfusionDataCollator(model.config)`.
        ema_decay: For example 0.999.
        max_minutes: In place of `max_steps` or `num_train_epochs`.
        kwargs: As for Trainer.

    Raises:
        ValueError: Settings that would train something wrong.
    """

    train_dataset: Any

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        *,
        ema_decay: float | None = None,
        max_minutes: float | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, str):
            raise ValueError(f"model={model!r}; load it first: AutoModel.from_pretrained({model!r}).")
        if model is not None:
            self._use_cache = model.config.use_cache
        super().__init__(model, args, data_collator, **kwargs)
        if data_collator is None:
            self.data_collator = TransfusionDataCollator(self.model.config)
        if isinstance(self.data_collator, TransfusionDataCollator):
            self.data_collator = dataclasses.replace(self.data_collator, with_sample_ids=True)
        self._train_sums, self._level_sums, self._meter = LossSums(), LevelSums(), SpeedMeter()
        self._eval_sums = LossSums()
        self._epochs = EpochCallback()
        self._ema = None if ema_decay is None else EmaCallback(ema_decay)
        self._budget = None if max_minutes is None else TimeBudget(max_minutes)
        self._check_settings()
        self.add_callback(self._epochs)
        if self._ema is not None:
            self.add_callback(self._ema)
        if self._budget is not None:
            self.add_callback(self._budget)
            if self.pop_callback(ProgressCallback) is not None:
                self.add_callback(BudgetProgressCallback(self._budget))

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer does; each process makes its own batches, and under FSDP2 bfloat16 is for products alone.

        Raises:
            ValueError: The first version of FSDP.
        """
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = False  # every batch uses every parameter
        super().create_accelerator_and_postprocess()
        for name, value in UNDIVIDED_BATCHES.items():
            setattr(self.accelerator.dataloader_config, name, value)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.fsdp_version != 2:
                raise ValueError(
                    f"fsdp_version is {plugin.fsdp_version}, whose flat weights are not supported; set it to 2."
                )
            if plugin.mixed_precision_policy is not None:
                # accelerate's would round timesteps, losses and summed gradients to bfloat16
                exact = {"reduce_dtype": torch.float32, "output_dtype": None, "cast_forward_inputs": False}
                plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, **exact)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        model = super()._wrap_model(model, training, dataloader)
        if self.is_fsdp_enabled and "forward" not in vars(model):
            model.forward = self.accelerator.autocast()(model.forward)  # as accelerate does without FSDP
        return model

    def _check_settings(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs and would cut batches where an image is in two; start one "
                f"process for each, `torchrun --nproc_per_node {self.args.n_gpu} ...`, or set CUDA_VISIBLE_DEVICES."
            )
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "The model computes its losses itself; leave label_smoothing_factor and compute_loss_func out."
            )
        if self.args.hub_token is not None:
            raise ValueError(
                "hub_token would lie in the arguments that are saved; use `hf auth login` or the variable HF_TOKEN."
            )
        if self.args.push_to_hub and self.args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"hub_strategy={self.args.hub_strategy.value!r} would upload checkpoints, which hold "
                "paths; set 'end' or 'every_save'."
            )
        if self._ema is not None and self.is_deepspeed_enabled:
            raise ValueError("ema_decay: DeepSpeed keeps the weights to itself; leave it out, or use FSDP2.")
        if self.is_deepspeed_enabled and self.args.save_strategy != SaveStrategy.NO:
            raise ValueError(
                "Checkpoints: DeepSpeed keeps the weights to itself; set save_strategy='no', or use FSDP2."
            )
        is_divided = self.is_fsdp_enabled or getattr(self.model, "is_distributed_loading_by_transformers", False)
        if is_divided and hasattr(self.model, "peft_config") and self.args.save_strategy != SaveStrategy.NO:
            raise ValueError(
                "Checkpoints hold no adapters of a sharded model; set save_strategy='no', or train them without FSDP "
                "and tp_size."
            )
        if getattr(self.train_dataset, "num_passes", None) is not None:
            raise ValueError(
                f"num_passes={self.train_dataset.num_passes} of the training rows: their epochs would be alike, and "
                "could not be resumed; set num_passes=None, and max_steps of the arguments."
            )
        if getattr(getattr(self.model.config, "distributed_config", None), "fsdp_mixed_precision", False):
            raise ValueError(
                "DistributedConfig(fsdp_mixed_precision=True) would round timesteps to bfloat16; set bf16=True of the "
                "training arguments in its place."
            )
        if self._ema is not None and self.args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end would leave the average of the last step; leave out one of them.")
        if self._budget is not None and (self.args.max_steps > 0 or self.args.warmup_steps >= 1):
            raise ValueError(
                f"With max_minutes, max_steps={self.args.max_steps} must be left out, and warmup_steps="
                f"{self.args.warmup_steps} must be a share of the time, below 1."
            )

    def call_model_init(self, trial: Any = None) -> Any:
        """A new model of `model_init`."""
        model = super().call_model_init(trial)
        self._use_cache = model.config.use_cache
        return model

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within `with trainer.averaged_weights():` the model has its averaged weights, where there are any."""
        if self._ema is None or self._ema.average is None:
            return nullcontext()
        return self._ema.average.swapped_into(self.model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay: neither norms and biases, nor static parameters of residual streams."""
        vectors = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}  # group norms too
        names = super().get_decay_parameter_names(model)
        return [name for name in names if name not in vectors and not is_undecayed_parameter(name)]

    # -- batches

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        """As Trainer makes it, with rows divided among processes without loss or repetition (see sharding.py)."""
        is_stream = isinstance(dataset, IterableDataset)
        rows = SharedStream(dataset, batch_size) if is_stream else dataset
        loader = super()._get_dataloader(rows, description, batch_size, sampler_fn, is_training, dataloader_key)
        if is_training or is_stream:
            loader = divide(loader)
        if dataloader_key is not None and self.args.dataloader_persistent_workers:
            self._eval_dataloaders[dataloader_key] = loader
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As Trainer makes it; rows grouped by length have one order in all processes, however a step is divided."""
        sampler = super()._get_train_sampler(train_dataset)
        self._epochs.order = None
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size = self.get_total_train_batch_size(self.args)
            sampler.generator = self._epochs.order = torch.Generator()
        return sampler

    # -- losses

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, Any]:
        """Take the batches of one optimizer step, and tell each over how much both losses are means."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = torch.stack([count_targets(batch, self.model.config) for batch in batches]).sum(dim=0)
            counts = self.accelerator.reduce(counts.to(device), "sum").clamp(min=1)
            for batch in batches:
                batch["num_items_in_batch"], batch["num_image_items_in_batch"] = counts
        return batches, num_items_in_batch

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch; in training, such that Trainer's mean over batches and processes is the step's loss."""
        inputs = dict(inputs)
        sample_ids = inputs.pop("sample_ids", None)
        is_step = "num_items_in_batch" in inputs
        if is_step:
            inputs["skip_logits"] = True
        outputs = model(**inputs)
        self._require_finite(outputs, sample_ids, inputs.get("timesteps"))
        counts = count_targets(inputs, self.model.config)
        losses = torch.stack([outputs["text_loss"], outputs["image_loss"]]).float()
        loss = outputs["loss"]
        if is_step:
            divisors = torch.stack([inputs["num_items_in_batch"], inputs["num_image_items_in_batch"]])
            self._train_sums.add(losses, divisors, counts)
            self._level_sums.add(self.model.config, inputs, outputs.get("image_prediction"))
            self._meter.add(inputs)
            # What Trainer divides by, and what data parallelism does.
            loss = loss * (self.current_gradient_accumulation_steps * self.accelerator.num_processes)
        else:
            self._eval_sums.add(losses, counts, counts)
        return (loss, outputs) if return_outputs else loss

    def _require_finite(self, outputs: Any, sample_ids: list[str] | None, timesteps: Tensor | None) -> None:
        if not torch.isfinite(outputs["loss"]):
            drawn = "" if timesteps is None else f", timesteps of images {timesteps.tolist()}"
            raise ValueError(
                f"The loss is not finite at step {self.state.global_step + 1}: text {outputs['text_loss'].item()}, "
                f"image {outputs['image_loss'].item()}, samples {sample_ids}{drawn}. The weights are those of the "
                "step before. Look at these samples; if they are sound, lower learning_rate or max_grad_norm."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with both losses where Trainer logs their sum."""
        if "loss" in logs:
            text_loss, image_loss = self._train_sums.pop_means(self).tolist()
            logs |= {"text_loss": text_loss, "image_loss": image_loss, **self._level_sums.pop(self)}
            logs |= self._meter.pop(self)
        super().log(logs, start_time)

    # -- evaluation

    @contextmanager
    def _unpacked(self) -> Iterator[None]:
        """Within this, rows are not packed: who evaluates wants to know how many there are, and which came twice."""
        collator = self.data_collator
        if getattr(collator, "packed_length", None) is not None:
            self.data_collator = dataclasses.replace(collator, packed_length=None)
        try:
            yield
        finally:
            self.data_collator = collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As Trainer makes it, of rows that are not packed."""
        with self._unpacked():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Likewise."""
        with self._unpacked():
            return super().get_test_dataloader(test_dataset)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Evaluate a batch, without logits where nobody asks for them."""
        inputs = {**self._without_repeated_rows(inputs), "skip_logits": prediction_loss_only}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Take the losses off the rows by which accelerate fills the last batch of several processes."""
        state, size = (
            self.accelerator.gradient_state,
            self.get_tp_size(),
        )  # tensor-parallel processes have the same rows
        if self.accelerator.num_processes == size or not state.end_of_dataloader or state.remainder < 1:
            return inputs
        num_rows = len(inputs["input_ids"])
        kept = min(max(state.remainder - self.accelerator.process_index // size * num_rows, 0), num_rows)
        inputs = {**inputs, "labels": inputs["labels"].clone()}
        inputs["labels"][kept:] = IGNORE_INDEX
        if "latent_patches" in inputs:
            blocks = image_block_ids(inputs["input_ids"][:kept], self.model.config.image_token_id)
            num_images = (blocks.amax(dim=1) + 1).sum()
            is_kept = torch.arange(len(inputs["image_grids"]), device=num_images.device) < num_images
            inputs["image_loss_mask"] = inputs.get("image_loss_mask", is_kept) & is_kept
        return inputs

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate with averaged weights and noise of its own; losses are means over all tokens and patches."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with self.averaged_weights(), not_compiling(), torch.random.fork_rng(devices):
            # Tensor-parallel processes have the same rows, and the same noise.
            torch.manual_seed(self.args.seed + self.args.process_index // self.get_tp_size())
            self._eval_sums = LossSums()
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if output.metrics.get(f"{metric_key_prefix}_loss") is not None:
            text_loss, image_loss = self._eval_sums.pop_means(self).tolist()
            loss = text_loss + self.model.config.image_loss_weight * image_loss
            means = {"loss": loss, "text_loss": text_loss, "image_loss": image_loss}
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    # -- time budget

    def _is_done(self) -> bool:
        return super()._is_done() or (self._budget is not None and self._budget.fraction >= 1.0)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple:
        """As Trainer counts them, but without an end where the clock sets it."""
        values = super().set_initial_training_values(*args, **kwargs)
        if self._budget is None:
            return values
        _, steps_per_epoch, num_examples, _, batch_size, steps_in_epoch, _ = values
        endless = sys.maxsize
        return endless, steps_per_epoch, num_examples, endless * batch_size, batch_size, steps_in_epoch, endless

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The scheduler of the arguments, over the steps of the training or over its time."""
        return super().create_scheduler(num_training_steps if self._budget is None else RESOLUTION, optimizer)

    # -- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and processor for transformers and diffusers, with averaged weights if there are any."""
        self._save_final(output_dir or self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub("Model save", revision=self.args.hub_revision)

    def _save_final(self, folder: str) -> None:
        with self.averaged_weights():
            self._save_whole(folder)
        model = self.accelerator.unwrap_model(self.model)
        is_adapter = not isinstance(model, PreTrainedModel) or model._hf_peft_config_loaded
        if self.args.should_save and isinstance(self.processing_class, ProcessorMixin) and not is_adapter:
            save_pipeline_parts(folder, model.config)

    def _save_whole(self, folder: str) -> None:
        if self.is_fsdp_enabled:  # of a sharded state dict Trainer would leave out the model
            weights = named_weights(self.model)
            self._save(folder, whole_tensors({name: weight for weight, name in weights.items()}))
        else:
            super().save_model(folder, _internal_call=True)

    def _saves_processor(self) -> bool:
        """Whether checkpoints hold the processor: its VAE, if any, is not larger than what is trained."""
        vae = getattr(self.processing_class, "vae", None)  # a tokenizer has none
        if vae is None or sum(weight.numel() for weight in vae.parameters()) <= self.get_num_trainable_parameters():
            return self.processing_class is not None
        logger.warning_once(
            "Checkpoints are saved without the processor, whose VAE is larger than what is trained. To use one: "
            "TransfusionPipeline(AutoModel.from_pretrained(checkpoint), processor)."
        )
        return False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        card = folder / CARD_FILE
        own_card = card.read_bytes() if card.exists() else None
        config = self.accelerator.unwrap_model(self.model).config
        config.use_cache, use_cache = self._use_cache, config.use_cache  # Trainer turned it off, for training
        try:
            super()._save(output_dir, state_dict)
        finally:
            config.use_cache = use_cache
        if self.args.should_save:
            # PEFT writes a card with the path of the model, or puts that into the one that is there.
            if own_card is None:
                card.unlink(missing_ok=True)
            else:
                card.write_bytes(own_card)
            (folder / TRAINING_ARGS_NAME).unlink()
            self._write_arguments(folder)

    def _write_arguments(self, folder: Path) -> None:
        shared = {name: value for name, value in self.args.to_dict().items() if name not in PRIVATE_ARGUMENTS}
        (folder / "training_args.json").write_text(json.dumps(shared, indent=2) + "\n", encoding="utf-8")

    # -- checkpoints

    def _snapshot_model(self) -> Snapshot:
        write_model = super()._snapshot_model()
        average = self._ema and self._ema.average
        write_average = None if average is None else average.snapshot(self.model)  # all processes have shares
        if not self.args.should_save:
            return write_model
        processor = self.processing_class if self._saves_processor() else None

        def write(folder: Path) -> None:
            write_model(folder)
            (folder / CARD_FILE).unlink(missing_ok=True)  # PEFT's has the path of the model
            self._write_arguments(folder)
            if processor is not None:
                processor.save_pretrained(folder)
            if write_average is not None:
                write_average(folder)

        return write

    def _saved_config(self) -> Any:
        config = super()._saved_config()
        config.use_cache = self._use_cache  # Trainer turned it off, for training
        return config

    def _fingerprint(self) -> dict[str, Any]:
        collator = self.data_collator
        of_collator = {name: getattr(collator, name, None) for name in ("text_dropout", "packed_length")}
        return super()._fingerprint() | of_collator | {"ema_decay": self._ema and self._ema.decay}

    def _restore_model(self, folder: Path) -> None:
        super()._restore_model(folder)
        if self._ema is not None:
            self._ema.checkpoint = folder

    def _process_state(self) -> dict[str, Any]:
        sums = {"loss_sums": self._train_sums.entries, "level_sums": self._level_sums.entries}
        return super()._process_state() | sums

    def _shared_sums(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        sums: dict[str, Any] = {"loss_sums": [], "level_sums": []}
        if self.args.process_index == 0:
            sums = {name: [entry for state in states for entry in state[name]] for name in sums}
        return super()._shared_sums(states) | sums

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As Trainer does; what an earlier training has not logged is not of this one."""
        self._train_sums, self._level_sums, self._meter = LossSums(), LevelSums(), SpeedMeter()
        return super()._init_training_state(*args, **kwargs)

    def _restore_process(self, state: dict[str, Any]) -> None:
        super()._restore_process(state)
        for sums, name in ((self._train_sums, "loss_sums"), (self._level_sums, "level_sums")):
            sums.entries = [entry.to(self.args.device) for entry in state[name]]

    # -- sharing

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        card: Any = None,
        tags: str | Sequence[str] | None = None,
    ) -> Any:
        """Upload what `save_model` writes, and nothing else, with a model card.

        Args:
            commit_message: What the Hub shows beside the files.
            blocking: Of no use: the call returns when all is uploaded.
            token: By default that of `hf auth login` or the variable HF_TOKEN.
            revision: A branch, by default `hub_revision` of the arguments, or else main.
            private: Whether a new repository is.
            card, tags: As for `push_to_hub` of a model.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with tempfile.TemporaryDirectory() as folder:
            self._save_final(folder)  # in every process
            if not self.is_world_process_zero():
                return None
            return share(
                folder,
                self._repo_id(),
                self._card_kind(folder),
                card,
                private=self.args.hub_private_repo if private is None else private,
                token=token,
                revision=revision or self.args.hub_revision,
                tags=self._all_tags(tags),
                commit_message=commit_message,
            )

    def create_model_card(self, card: Any = None, tags: str | Sequence[str] | None = None) -> None:
        """Write a model card into `output_dir`, as `push_to_hub` would; one that a person wrote stays."""
        if self.is_world_process_zero():
            folder = self.args.output_dir
            prepare_card(Path(folder), self._repo_id(), self._card_kind(folder), card, self._all_tags(tags))

    def _repo_id(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _card_kind(self, folder: str) -> str:
        return "pipeline" if Path(folder, "model_index.json").exists() else "model"

    def _all_tags(self, tags: str | Sequence[str] | None) -> list[str]:
        own = self.accelerator.unwrap_model(self.model).model_tags or ()
        return [*([tags] if isinstance(tags, str) else tags or []), *own]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the model as it is now; Trainer would upload all of `output_dir`."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        try:
            self.push_to_hub(f"Training in progress, step {self.state.global_step}")
        except Exception as error:  # of the network, for which no training should end
            logger.warning(f"Step {self.state.global_step} was not uploaded, and the training goes on: {error!r}")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for name in ("sample_seed", "sample_id"):
            if name not in self._signature_columns:
                self._signature_columns.append(name)


__all__ = ["EpochCallback", "LossSums", "TransfusionTrainer", "count_targets"]
