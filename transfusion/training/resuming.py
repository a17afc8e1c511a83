"""`ResumingTrainer`: Trainer with checkpoints from which a training goes on as if it had never stopped."""

import copy
import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Sized
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import safetensors
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from .checkpoints import (
    BackgroundWriter,
    Processes,
    clean_up,
    find_complete,
    read_manifest,
    require,
    rotate,
    verify,
    write_checkpoint,
)
from .distributed import is_sharded, model_writer, named_weights, whole_tensors
from .distributed import load_weights as load_whole_weights
from .signals import SaveOnSignal, ignore_signals
from .states import (
    State,
    host_copy,
    optimizer_state,
    random_states,
    read_state,
    restore_optimizer,
    restore_random_states,
)


logger = logging.getLogger(__name__)

RUN_FILE, STATE_FILE, WEIGHTS_INDEX = "run.json", "trainer_state.json", "model.safetensors.index.json"
# How the rows of a step are divided.
DIVISION = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps")
# Arguments on which the steps depend, apart from these and from the length of the training.
FIXED_ARGUMENTS = (
    "train_sampling_strategy",
    "dataloader_drop_last",
    "seed",
    "data_seed",
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
)
# Of a config, what says where and by what it was made.
VOLATILE = frozenset(
    ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache")
    + ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
)
RESUME_REMEDY = "Resume from another checkpoint, or start anew without resuming."

# Writes into the folder of a checkpoint what was copied when it was made.
Snapshot = Callable[[Path], None]


class EpochStart(TrainerCallback):
    """Notes the random states at the start of an epoch, from which samplers and workers draw; resumed, sets them."""

    def __init__(self) -> None:
        self.states: dict[str, Any] | None = None
        self.resumed: dict[str, Any] | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set or note them."""
        if self.resumed is not None:
            is_boundary = float(state.epoch).is_integer()
            restore_random_states(self.resumed["random" if is_boundary else "epoch_random"], args.device)
            self.resumed = None
        self.states = random_states(args.device)


class ResumingTrainer(Trainer):
    """Trainer with exact checkpoints: a resumed training ends with the bits of one that never stopped.

    A folder `checkpoint-N` holds safetensors and JSON: the model as `save_pretrained` writes it, the states of
    optimizer, scheduler and random generators, the sums of losses not yet logged, the trainer's state with step and
    epoch, and what must not change (`run.json`), with a hash of each file (`manifest.json`). No pickle is written, and
    none is read.

    * A checkpoint is whole or is not there. Those that are not as they were written are named and skipped.
    * The training stops only for the copy to host memory; a thread writes, and an error of it stops the training at
      the next step, or at its end.
    * Resuming with other data, rows per step or settings is refused. With a warning, the length of the training may
      change, and how the rows of a step are divided among processes and accumulation steps: the steps have the same
      rows then, but are rounded otherwise, and dropout falls otherwise.

    Models and optimizers that are sharded are gathered in the first process, and divided anew when they are loaded.
    """

    def __init__(
        self, model: PreTrainedModel | None = None, args: TrainingArguments | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        only_model = args is not None and args.save_only_model
        if args is not None and getattr(model, "is_distributed_loading_by_transformers", False):
            args.save_only_model = True  # or Trainer would refuse, which cannot save the optimizer of such a model
        super().__init__(model, args, *rest, **kwargs)
        self.args.save_only_model = only_model or (args is None and self.args.save_only_model)
        self._writer = BackgroundWriter()
        self._processes: Processes | None = None
        self._epoch_start = EpochStart()
        self._resumed_process: dict[str, Any] = {}
        self._saved_world_size = 0
        self.add_callback(self._epoch_start)
        if self.args.save_on_each_node:
            raise ValueError("save_on_each_node=True: all processes write one checkpoint; set it to False.")
        if self.args.auto_find_batch_size and self.args.save_strategy != SaveStrategy.NO:
            raise ValueError(
                "auto_find_batch_size=True: a checkpoint of a batch size that was found could not be resumed; find it "
                "with save_strategy='no', and set per_device_train_batch_size to it."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint: a folder, or True for the last complete one in `output_dir`.

        Raises:
            ValueError: No such checkpoint, one that lacks something or is not as it was written, or settings that are
                not those of the checkpoint.
            OSError: A checkpoint could not be written.
        """
        folder = self._checkpoint_to_resume(resume_from_checkpoint)
        try:
            return super().train(folder, **kwargs)
        finally:
            for callback in self._signal_callbacks():
                callback.give_back()
            self._writer.wait()

    def _signal_callbacks(self) -> list[SaveOnSignal]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, SaveOnSignal)]

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer makes it; a signal that stops the training leaves its workers alone."""
        loader = super()._get_dataloader(*args, **kwargs)
        if self._signal_callbacks():
            inner = loader.base_dataloader  # accelerate's has no options of its own
            inner.worker_init_fn = partial(ignore_signals, inner.worker_init_fn)
        return loader

    def _checkpoint_to_resume(self, given: str | bool | None) -> str | None:
        """The checkpoint that is meant, which the first process compares with its manifest."""
        if given is None or given is False:
            return None
        found, error = torch.full((), -1), None
        if self.args.process_index == 0:
            try:
                found.fill_(self._find_checkpoint(given))
            except ValueError as caught:
                error = caught
        if self.args.world_size > 1:
            dist.broadcast(found := found.to(self.args.device), 0)
        if error is not None:
            raise error
        if found < 0:
            raise ValueError(f"The first process refused the checkpoint {given!r}; its own error says why.")
        return str(Path(self.args.output_dir, f"checkpoint-{found}")) if given is True else str(given)

    def _find_checkpoint(self, given: str | bool) -> int:
        """The step of the newest complete checkpoint; 0 of a given one that is complete."""
        if not isinstance(given, bool):
            if not Path(given).is_dir():
                raise ValueError(f"resume_from_checkpoint is {given!r}, where there is no folder.")
            verify(Path(given))
            return 0
        output_dir = Path(self.args.output_dir)
        clean_up(output_dir)
        if (found := find_complete(output_dir)) is None:
            raise ValueError(f"{output_dir} has no complete checkpoint to resume from; start without.")
        return int(found.name.rpartition("-")[2])

    # -- saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Copy all that a checkpoint holds, and let a thread write it."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        begin = time.perf_counter()
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        self._writer.wait()  # before what is to be written is copied: two copies would be in memory
        kept = {folder.name, self._best_name(folder)}
        snapshots, processes = self._snapshots(), self._own_processes()
        blocked = time.perf_counter() - begin

        def write_all(draft: Path) -> None:
            for snapshot in snapshots:
                snapshot(draft)

        def write() -> None:
            write_checkpoint(folder, write_all, processes)
            if processes.is_first:
                rotate(folder.parent, self.args.save_total_limit, kept)
                took = time.perf_counter() - begin
                logger.info("%s: written in %.0f ms; the training stood for %.0f", folder, 1e3 * took, 1e3 * blocked)

        self._writer.submit(write)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _best_name(self, folder: Path) -> str:
        """The name of the best checkpoint that was saved, maybe `folder`; all processes note where it is."""
        best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
        if best == folder or best.exists():
            self.state.best_model_checkpoint = str(best)
        return Path(self.state.best_model_checkpoint or folder).name

    def _own_processes(self) -> Processes:
        if self._processes is None:
            is_alone = self.args.world_size == 1
            self._processes = Processes(None if is_alone else dist.new_group(backend="gloo"))
        return self._processes

    def _snapshots(self) -> list[Snapshot]:
        """Copies of all that this process writes."""
        snapshots = [self._snapshot_model()]
        if not self.args.save_only_model:
            process = State(self._process_state())
            name = _process_name(self.args.process_index)
            snapshots += [self._snapshot_optimizer(), lambda draft: process.write(draft, name)]
        if self.args.should_save:
            snapshots.append(self._snapshot_run())
        return snapshots

    def _process_state(self) -> dict[str, Any]:
        """What each process has of its own."""
        return {
            "random": random_states(self.args.device),
            "epoch_random": self._epoch_start.states,
            "running_loss": self._tr_loss,
            "last_logged": self._globalstep_last_logged,
        }

    def _snapshot_run(self) -> Snapshot:
        """The trainer's state, the scheduler's, the arguments, and what must not change."""
        callbacks = [*self.callback_handler.callbacks, self.control]
        exported = [callback for callback in callbacks if isinstance(callback, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=exported).stateful_callbacks
        state, run = copy.deepcopy(self.state), self._run()
        schedule = State({"scheduler": self.lr_scheduler.state_dict(), "scaler": self._scaler_state()})

        def write(draft: Path) -> None:
            state.save_to_json(str(draft / STATE_FILE))
            (draft / RUN_FILE).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
            if not self.args.save_only_model:
                schedule.write(draft, "scheduler")

        return write

    def _scaler_state(self) -> dict[str, Any] | None:
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.state_dict()

    def _snapshot_model(self) -> Snapshot:
        model = self.accelerator.unwrap_model(self.model)
        if is_sharded(model):
            whole = whole_tensors({name: weight for weight, name in named_weights(model).items()})
            return model_writer(model, self._saved_config(), whole)
        if not self.args.should_save:
            return lambda draft: None
        weights = host_copy(_saved_weights(model))
        if isinstance(model, PreTrainedModel):
            model = copy.copy(model)  # of which saving changes the config, while the original is trained
            model.config = self._saved_config()
        return lambda draft: model.save_pretrained(draft, state_dict=weights)

    def _saved_config(self) -> Any:
        return copy.deepcopy(self.accelerator.unwrap_model(self.model).config)

    def _snapshot_optimizer(self) -> Snapshot:
        is_kept = self.args.should_save
        if not is_kept and not is_sharded(self.model):
            return lambda draft: None
        state = State(optimizer_state(self._own_optimizer(), self.model), is_kept)
        return (lambda draft: state.write(draft, "optimizer")) if is_kept else lambda draft: None

    def _own_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's is around it

    # -- what must not change

    def _run(self) -> dict[str, Any]:
        """What must not change, how the rows of a step are divided, and the versions of packages."""
        package = sys.modules[__name__.partition(".")[0]]
        packages = (package, torch, transformers, accelerate, safetensors, np)
        versions = {package.__name__: str(package.__version__) for package in packages}
        versions |= {"python": platform.python_version()}
        division = {name: getattr(self.args, name) for name in DIVISION}
        return {"fingerprint": self._fingerprint(), "division": division, "versions": versions}

    def _fingerprint(self) -> dict[str, Any]:
        """By name, what the steps depend on, as JSON has it."""
        data: Any = self.train_dataset
        model = self.accelerator.unwrap_model(self.model)
        found = {name: getattr(self.args, name) for name in FIXED_ARGUMENTS}
        found |= {"optimizer": type(self._own_optimizer()).__name__} if self.optimizer is not None else {}
        found["rows per step"] = self.get_total_train_batch_size(self.args)
        found["dataset length"] = len(data) if isinstance(data, Sized) else None
        found["dataset fingerprint"] = getattr(data, "fingerprint", getattr(data, "_fingerprint", None))
        found |= {"adapters": getattr(model, "peft_config", None)}
        found |= {f"config.{name}": value for name, value in model.config.to_dict().items()}
        return _as_json(found)

    def _check_run(self, folder: Path) -> dict[str, Any]:
        """Compare this run with that of a checkpoint, which is returned."""
        saved = json.loads(require(folder, RUN_FILE, RESUME_REMEDY).read_text(encoding="utf-8"))
        run = self._run()
        if changes := _changes(saved["fingerprint"], run["fingerprint"]):
            raise ValueError(f"{folder} is of another training: {changes}. Set that back, or start anew.")
        if changes := _changes(saved["division"], run["division"]):
            logger.warning("%s: %s. Steps have the same rows, and differ by rounding.", folder, changes)
        if changes := _changes(saved["versions"], run["versions"]):
            logger.warning("%s: %s. Results may differ in the last bits.", folder, changes)
        return saved

    # -- resuming, at the places where Trainer does

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._saved_world_size = self._check_run(folder)["division"]["world_size"]
        processes = [f"{_process_name(index)}.json" for index in range(self._saved_world_size)]
        for name in (STATE_FILE, "optimizer.json", "scheduler.json", *processes):
            require(folder, name, RESUME_REMEDY)
        self._restore_model(folder)

    def _restore_model(self, folder: Path) -> None:
        load_weights(self.accelerator.unwrap_model(self.model), folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        steps = TrainerState.load_from_json(str(Path(checkpoint, STATE_FILE))).max_steps
        if steps != self.state.max_steps:
            change = f"was to have {steps} steps and now has {self.state.max_steps}"
            logger.warning("The training %s: learning rates are from now on those of the new length.", change)
        self._restore_optimizer(Path(checkpoint))
        schedule = read_state(Path(checkpoint), "scheduler")
        self.lr_scheduler.load_state_dict(_of_groups(schedule["scheduler"], len(self.optimizer.param_groups)))
        if (scaler := self.accelerator.scaler) is not None:
            scaler.load_state_dict(schedule["scaler"])
        self._resumed_process = self._read_process(Path(checkpoint))
        self._epoch_start.resumed = self._resumed_process

    def _restore_optimizer(self, folder: Path) -> None:
        restore_optimizer(self._own_optimizer(), self.model, read_state(folder, "optimizer"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """It came with the scheduler."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore what each process has of its own."""
        if checkpoint is not None:
            self._restore_process(self._resumed_process)

    def _read_process(self, folder: Path) -> dict[str, Any]:
        """What this process has of its own; if there were more or fewer, the first takes over the sums of all."""
        index, world_size, saved_size = self.args.process_index, self.args.world_size, self._saved_world_size
        if world_size == saved_size:
            return read_state(folder, _process_name(index))
        states = [read_state(folder, _process_name(number)) for number in range(saved_size)]
        return states[index % saved_size] | self._shared_sums(states)

    def _shared_sums(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Of the sums in `states` of the processes that were, this one's part, if it is not one of as many."""
        total = torch.stack([state["running_loss"] for state in states]).sum(dim=0)
        share = self.args.world_size / len(states) if self.args.process_index == 0 else 0.0
        return {"running_loss": total * share}  # of which the log has the mean over processes

    def _restore_process(self, state: dict[str, Any]) -> None:
        self._tr_loss = state["running_loss"].to(self.args.device)
        self._total_loss_scalar -= self._tr_loss.item()  # the mean at the end is over the steps of this call
        self._globalstep_last_logged = state["last_logged"]
        restore_random_states(state["random"], self.args.device)

    def _load_best_model(self) -> None:
        if any(callback.has_stopped for callback in self._signal_callbacks()):
            return  # the training is not done
        load_weights(self.accelerator.unwrap_model(self.model), Path(self.state.best_model_checkpoint))

    # -- errors of the thread

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's, if the last checkpoint was written."""
        self._writer.check()
        return super().training_step(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._writer.wait()  # the best model may be in it
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # or the last one would be deleted
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer does, which would take one more step of a training that was done when it was resumed."""
        if self._is_done():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _is_done(self) -> bool:
        return self.state.global_step >= self.state.max_steps


def _of_groups(schedule: dict[str, Any], count: int) -> dict[str, Any]:
    """A scheduler's state for `count` groups, where all have the same: tensor parallelism makes more of them."""
    return {
        name: values[:1] * count if isinstance(values, list) and values == values[:1] * len(values) else values
        for name, values in schedule.items()
    }


def _process_name(index: int) -> str:
    return f"process-{index}"


def _changes(was: dict[str, Any], now: dict[str, Any]) -> str:
    names = sorted(name for name in was.keys() & now.keys() if was[name] != now[name])
    return ", ".join(f"{name} was {was[name]!r} and is {now[name]!r}" for name in names)


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if hasattr(value, "to_dict"):  # of an adapter
            return {name: inner for name, inner in value.to_dict().items() if name not in VOLATILE}
        return sorted(value) if isinstance(value, set) else str(value)

    kept = {name: value for name, value in values.items() if name.removeprefix("config.") not in VOLATILE}
    return json.loads(json.dumps(kept, default=plain))


def _saved_weights(model: Any) -> dict[str, Tensor]:
    """What `save_pretrained` of `model` writes: all, or adapters alone."""
    weights = model.state_dict()
    if isinstance(model, PreTrainedModel):
        return weights
    from peft import get_peft_model_state_dict

    adapters = [get_peft_model_state_dict(model, adapter_name=name) for name in model.peft_config]
    places = {tensor.data_ptr() for adapter in adapters for tensor in adapter.values()}
    return {name: tensor for name, tensor in weights.items() if tensor.data_ptr() in places}


def load_weights(model: Any, folder: Path) -> None:
    """Load what a checkpoint has of `model`: all weights, or an adapter.

    Raises:
        ValueError: It lacks some, or has others.
    """
    if isinstance(model, PreTrainedModel) and model._hf_peft_config_loaded:
        _load_own_adapter(model, folder)
        return
    if not isinstance(model, PreTrainedModel):
        name = model.active_adapter
        inside = "" if name == "default" else f"{name}/"  # as PEFT saves them
        path = require(folder, f"{inside}adapter_model.safetensors", RESUME_REMEDY)
        model.load_adapter(path.parent, name, is_trainable=True)
        return
    names = {"model.safetensors"}
    if WEIGHTS_INDEX in read_manifest(folder)["files"]:
        names = set(json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    weights: dict[str, Tensor] = {}
    for name in sorted(names):
        weights |= load_file(require(folder, name, RESUME_REMEDY))
    if is_sharded(model):
        load_whole_weights({name: weight for weight, name in named_weights(model).items()}, weights)
        return
    loaded = model.load_state_dict(weights, strict=False)
    own = model.state_dict()
    places = {own[name].data_ptr() for name in weights.keys() & own.keys()}
    if wrong := loaded.unexpected_keys + [name for name in loaded.missing_keys if own[name].data_ptr() not in places]:
        raise ValueError(f"{folder} and the model have other weights: {wrong[:5]}. {RESUME_REMEDY}")


def _load_own_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Load the adapter of a checkpoint into that which `add_adapter` gave `model`."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    name = model.active_adapters()[0]
    saved = load_file(require(folder, "adapter_model.safetensors", RESUME_REMEDY))
    weights = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items()}
    if wrong := sorted(weights.keys() ^ get_peft_model_state_dict(model, adapter_name=name).keys()):
        raise ValueError(f"{folder} and the adapter {name!r} have other weights: {wrong[:5]}. {RESUME_REMEDY}")
    set_peft_model_state_dict(model, weights, name)


__all__ = ["FIXED_ARGUMENTS", "EpochStart", "ResumingTrainer", "load_weights"]
