import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from tests.fake_hub import make_fake_hub
from tests.test_pipeline import make_pipeline
from tests.tiny import tiny_config, tiny_model
from tests.training.tiny_rows import RowList, largest_difference, ragged_rows, training_row
from transfusion import TransfusionPipeline
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration
from transfusion.training import trainer as trainer_module
from transfusion.training.collator import TransfusionDataCollator
from transfusion.training.trainer import TransfusionTrainer, count_targets


ROOT = Path(__file__).parents[2]
LEARNING_RATE = 0.05
PICKLES = {".bin", ".pt", ".pth", ".pkl"}


def arguments(output_dir: Any, **options: Any) -> TrainingArguments:
    """Arguments of a short, silent training on the CPU."""
    defaults: dict[str, Any] = {"disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    return TrainingArguments(output_dir=str(output_dir), **{**defaults, "report_to": "none", **options})


def sgd_trainer(
    model: TransfusionForMultimodalGeneration,
    rows: Dataset,
    output_dir: Any,
    ema_decay: float | None = None,
    packed_length: int | None = None,
    **options: Any,
) -> TransfusionTrainer:
    """Plain gradient descent over the rows in their order."""
    defaults: dict[str, Any] = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    defaults |= {"max_grad_norm": 0.0, "learning_rate": LEARNING_RATE}
    args = arguments(output_dir, **{**defaults, **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
    collator = TransfusionDataCollator(model.config, text_dropout=0.3, packed_length=packed_length)
    optimizers = (optimizer, None)
    return TransfusionTrainer(model, args, collator, train_dataset=rows, optimizers=optimizers, ema_decay=ema_decay)


def one_step(objective: str) -> tuple[dict[str, torch.Tensor], Any]:
    """The weights after one step on all twelve rows, written out, and the losses of that step."""
    model = tiny_model(objective=objective)
    out = model(**TransfusionDataCollator(model.config, text_dropout=0.3)(ragged_rows()))
    out.loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    return model.state_dict(), out


@pytest.mark.parametrize("packed_length", [None, 24])
@pytest.mark.parametrize("division", [(12, 1), (4, 3), (1, 12)])
def test_a_step_does_not_depend_on_its_division(
    division: tuple[int, int], packed_length: int | None, objective: str, tmp_path: Path
) -> None:
    expected, out = one_step(objective)
    model = tiny_model(objective=objective)
    batch_size, accumulation = division
    options: dict[str, Any] = {"packed_length": packed_length}
    options |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer = sgd_trainer(model, RowList(ragged_rows()), tmp_path, max_steps=1, **options)
    trainer.train()
    assert largest_difference(model.state_dict(), expected) < 1e-12
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(out.loss.item(), abs=1e-5)
    assert logged["text_loss"] == pytest.approx(out.text_loss.item(), abs=1e-5)
    assert logged["image_loss"] == pytest.approx(out.image_loss.item(), abs=1e-5)


def test_evaluation_does_not_pack(tmp_path: Path) -> None:
    rows = RowList(ragged_rows())
    trainer = sgd_trainer(tiny_model(objective="flow"), rows, tmp_path, packed_length=24)
    padded = sgd_trainer(tiny_model(objective="flow"), rows, tmp_path)
    assert "document_ids" in next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" in next(iter(trainer.get_eval_dataloader(rows)))
    assert "attention_mask" in next(iter(trainer.get_test_dataloader(rows)))
    assert trainer.evaluate(rows)["eval_loss"] == padded.evaluate(rows)["eval_loss"]


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Two epochs, one step each: 2 processes x 2 steps x 3 rows, and 1 x 1 x 12; evaluated with the average."""
    model, rows = tiny_model(objective="flow"), RowList(ragged_rows())
    alone = sgd_trainer(model, rows, tmp_path, ema_decay=0.9, per_device_train_batch_size=12, num_train_epochs=2)
    alone.train()
    evaluated = alone.evaluate(rows)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "tests/training/two_processes.py"), str(tmp_path), "3", "2"]
    finished = subprocess.run(command + script, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert largest_difference(load_file(tmp_path / "weights.safetensors"), model.state_dict()) < 1e-12
    for together, single in zip(results["log"][:2], alone.state.log_history[:2], strict=True):
        for name in ("loss", "text_loss", "image_loss"):
            assert together[name] == pytest.approx(single[name], abs=1e-5), name
    assert results["epochs"] == [0, 1]
    assert results["evaluated"]["eval_loss"] == pytest.approx(evaluated["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("row", [training_row(5, 6, 2), training_row((2, 2))], ids=["text", "image"])
def test_every_parameter_has_a_gradient(row: dict[str, Any]) -> None:
    """Of whatever batch, so that data parallelism need not look for parameters without one."""
    model = tiny_model(objective="flow", qk_norm=True)
    model(**TransfusionDataCollator(model.config)([row])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_process_makes_its_batches_and_looks_for_no_unused_parameters(tmp_path: Path) -> None:
    args = arguments(tmp_path, accelerator_config={"dispatch_batches": True, "split_batches": True})
    accelerator = TransfusionTrainer(tiny_model(), args).accelerator
    assert accelerator.dispatch_batches is False and not accelerator.split_batches
    assert accelerator.ddp_handler.find_unused_parameters is False


def test_plain_trainer_averages_micro_batches(objective: str, tmp_path: Path) -> None:
    """Without this package's trainer a step is the mean over its micro-batches' losses."""
    collator = TransfusionDataCollator(tiny_config(objective=objective), text_dropout=0.3)
    expected = tiny_model(objective=objective)
    rows = ragged_rows()
    losses = [expected(**collator(rows[start : start + 4])).loss for start in (0, 4, 8)]
    (sum(losses) / 3).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    model = tiny_model(objective=objective)
    args = arguments(
        tmp_path,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        remove_unused_columns=False,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    trainer = Trainer(model, args, collator, train_dataset=RowList(rows), optimizers=(optimizer, None))
    trainer.train()
    assert largest_difference(model.state_dict(), expected.state_dict()) < 1e-12
    assert trainer.state.log_history[0]["loss"] == pytest.approx((sum(losses) / 3).item(), abs=1e-5)


def test_logged_losses_are_means_over_all_that_was_learned(tmp_path: Path) -> None:
    """Over three steps of unlike numbers of tokens and patches, with weights that stand still."""
    model, rows = tiny_model(), ragged_rows()
    options: dict[str, Any] = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "logging_steps": 3}
    trainer = sgd_trainer(model, RowList(rows), tmp_path, max_steps=3, **options)
    trainer.train()
    out = model.eval()(**TransfusionDataCollator(model.config, text_dropout=0.3)(rows))
    logged = trainer.state.log_history[0]
    assert logged["text_loss"] == pytest.approx(out.text_loss.item(), abs=1e-5)
    assert logged["image_loss"] == pytest.approx(out.image_loss.item(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [5, 12])
def test_evaluation_is_a_mean_over_all_that_is_learned(batch_size: int, tmp_path: Path) -> None:
    model, rows = tiny_model(), ragged_rows()
    args = arguments(tmp_path, per_device_eval_batch_size=batch_size)
    metrics = TransfusionTrainer(model, args, TransfusionDataCollator(model.config, 0.3)).evaluate(RowList(rows))
    out = model(**TransfusionDataCollator(model.config, 0.3)(rows))
    for name in ("loss", "text_loss", "image_loss"):
        assert metrics[f"eval_{name}"] == pytest.approx(out[name].item(), abs=1e-5)


def test_predictions_have_logits(tmp_path: Path) -> None:
    rows = [training_row(5, 6, (1, 2), 2, seed=seed) for seed in range(4)]
    predicted = TransfusionTrainer(tiny_model(), arguments(tmp_path)).predict(RowList(rows))
    assert predicted.predictions.shape == (4, 7, 100)


def test_count_of_targets() -> None:
    # a b <boi> p p p p <eoi> <eos>: b, <boi> and <eos> are learned, and 4 patches.
    row = training_row(5, 6, (2, 2), 2)
    assert count_targets(TransfusionDataCollator(tiny_config(), 0.0)([row]), tiny_config()).tolist() == [3, 4]
    context = {**training_row(5, (1, 1), 6, (2, 3), 2), "image_loss_mask": torch.tensor([True, False])}
    # a <boi> p <eoi> b <boi> p p p p p p <eoi> <eos>: all but a, and the patch of the first image alone.
    assert count_targets(TransfusionDataCollator(tiny_config(), 0.0)([context]), tiny_config()).tolist() == [4, 1]


def test_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    rows = [training_row(5, (1, 2), 2, seed=seed) for seed in range(6)]
    rows[3]["latent_patches"] = torch.full((2, 12), 1e30)  # finite, but not its square
    model = tiny_model(objective="flow").float()
    trainer = sgd_trainer(model, RowList(rows), tmp_path, per_device_train_batch_size=2, num_train_epochs=1)
    with pytest.raises(
        ValueError, match=r"not finite at step 2: .*\['sample-2', 'sample-3'\], timesteps of images \[\d"
    ):
        trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_loss_that_is_not_finite_stops_the_evaluation(tmp_path: Path) -> None:
    rows = [training_row(5, (1, 2), 2, seed=9, latent_patches=torch.full((2, 12), 1e30))]
    with pytest.raises(ValueError, match="sample-9"):
        TransfusionTrainer(tiny_model(objective="flow").float(), arguments(tmp_path)).evaluate(RowList(rows))


class NoisyRows(RowList):
    """Rows whose seed depends on the epoch; notes what was asked for."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.epoch = -1
        self.asked: list[tuple[int, int]] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked.append((self.epoch, index))
        return {**self.rows[index], "sample_seed": 100 * self.epoch + index}


def test_dataset_is_told_the_epoch(tmp_path: Path) -> None:
    rows = NoisyRows(ragged_rows())
    sgd_trainer(tiny_model(), rows, tmp_path, per_device_train_batch_size=6, num_train_epochs=3).train()
    assert sorted(rows.asked) == [(epoch, index) for epoch in range(3) for index in range(12)]


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_seeds_and_names_reach_the_collator(remove_unused_columns: bool, tmp_path: Path) -> None:
    rows = [{**row, "caption": "not for the model"} for row in ragged_rows()]
    options = {"per_device_train_batch_size": 12, "remove_unused_columns": remove_unused_columns}
    trainer = sgd_trainer(tiny_model(), RowList(rows), tmp_path, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch.pop("sample_ids") == [row["sample_id"] for row in rows]
    expected = TransfusionDataCollator(tiny_config(), 0.3)(rows)
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)


def test_half_precision_training(tmp_path: Path) -> None:
    model = tiny_model(objective="flow").float()
    args = arguments(tmp_path, bf16=True, max_steps=30, learning_rate=3e-3, logging_steps=10, seed=0)
    trainer = TransfusionTrainer(model, args, train_dataset=RowList(ragged_rows()), ema_decay=0.9)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("patch_codec", ["linear", "unet"])
def test_weight_decay_spares_norms(patch_codec: str, tmp_path: Path) -> None:
    model = tiny_model(qk_norm=True, patch_codec=patch_codec)
    trainer = TransfusionTrainer(model, arguments(tmp_path), train_dataset=RowList([]))
    decayed = set(trainer.get_decay_parameter_names(model))
    for name, parameter in model.named_parameters():
        assert (name in decayed) == (parameter.ndim > 1), name


@pytest.mark.parametrize("kind", ["static", "dynamic", "manifold"])
def test_weight_decay_spares_static_parameters_of_streams(kind: str, tmp_path: Path) -> None:
    model = tiny_model(num_residual_streams=2, hyper_connections=kind)
    args = arguments(tmp_path, weight_decay=0.5)
    groups = TransfusionTrainer(model, args, train_dataset=RowList([])).create_optimizer().param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim < 2 or name.endswith("_connection.static_mix")
        assert decays[id(parameter)] == (0.0 if spared else 0.5), name


def test_final_model_has_averaged_weights_and_no_pickle(tmp_path: Path) -> None:
    model = tiny_model().float()
    args = arguments(tmp_path, max_steps=5, learning_rate=1e-2)
    trainer = TransfusionTrainer(model, args, train_dataset=RowList(ragged_rows()), ema_decay=0.9)
    trainer.train()
    trainer.save_model()
    loaded = TransfusionForMultimodalGeneration.from_pretrained(tmp_path)
    with trainer.averaged_weights():
        average = {name: value.clone() for name, value in model.state_dict().items()}
    assert largest_difference(loaded.state_dict(), average) == 0
    assert largest_difference(average, model.state_dict()) > 1e-4
    assert loaded.config.use_cache is True
    assert not [path for path in tmp_path.rglob("*") if path.suffix in PICKLES]
    assert json.loads((tmp_path / "training_args.json").read_text())["learning_rate"] == 1e-2


def test_the_final_folder_is_a_pipeline_and_so_is_a_checkpoint(tmp_path: Path) -> None:
    drawer = make_pipeline()
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    rows = RowList([caption_row(drawer)])
    trainer = TransfusionTrainer(drawer.model, args, train_dataset=rows, processing_class=drawer.processor)
    trainer.train()
    trainer.save_model()
    for loaded in (
        DiffusionPipeline.from_pretrained(tmp_path),
        TransfusionPipeline.from_pretrained(tmp_path / "checkpoint-1"),
    ):
        assert loaded("a heart", num_inference_steps=1).images[0].size == (16, 16)


def test_checkpoints_leave_out_a_vae_that_is_larger_than_what_is_trained(tmp_path: Path) -> None:
    drawer = make_pipeline()
    drawer.model.requires_grad_(False).lm_head.requires_grad_(True)
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    rows = RowList([caption_row(drawer)])
    trainer = TransfusionTrainer(drawer.model, args, train_dataset=rows, processing_class=drawer.processor)
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-1" / "processor_config.json").exists()
    assert trainer.processing_class is drawer.processor


def caption_row(pipeline: Any) -> dict[str, Any]:
    row = pipeline.processor(text=["a heart"], return_labels=True)
    return {name: torch.tensor(row[name][0]) for name in ("input_ids", "labels")}


def test_evaluation_is_the_same_each_time_and_leaves_the_training_alone(tmp_path: Path) -> None:
    """With a collator that leaves the noise to the model."""
    rows = RowList(ragged_rows())
    collate = TransfusionDataCollator(tiny_config(objective="flow"))

    def without_noise(batch: list[dict[str, Any]]) -> dict[str, Any]:
        made = collate(batch)
        return {name: value for name, value in made.items() if name not in ("noise", "timesteps")}

    trainer = TransfusionTrainer(tiny_model(objective="flow").float(), arguments(tmp_path), without_noise)
    state = torch.get_rng_state()
    losses = [trainer.evaluate(rows)["eval_loss"] for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_may_be_made_by_a_function(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=1)
    trainer = TransfusionTrainer(
        model_init=lambda: tiny_model().float(), args=args, train_dataset=RowList(ragged_rows()), ema_decay=0.9
    )
    trainer.train()
    trainer.save_model()
    assert TransfusionForMultimodalGeneration.from_pretrained(tmp_path).config.use_cache is True
    with pytest.raises(ValueError, match="model='user/name'; load it first"):
        TransfusionTrainer("user/name", args)
    with pytest.raises(ValueError, match=r"config is a TransfusionProcessor; give model.config"):
        TransfusionDataCollator(make_pipeline().processor)


def test_settings_are_put_back_where_saving_fails(tmp_path: Path) -> None:
    model = tiny_model().float()
    trainer = TransfusionTrainer(model, arguments(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        trainer.save_model(str(tmp_path / "file" / "final"))
    assert model.config.use_cache is False


def test_only_the_model_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each checkpoint too; not what lies beside it."""
    (tmp_path / "hub").mkdir()
    hub = make_fake_hub(tmp_path / "hub", monkeypatch)
    drawer = make_pipeline()
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "push_to_hub": True}
    args = arguments(tmp_path / "mine", hub_model_id="user/name", **options)
    rows = RowList([caption_row(drawer)])
    trainer = TransfusionTrainer(drawer.model, args, train_dataset=rows, processing_class=drawer.processor)
    (tmp_path / "mine" / "diary.txt").write_text("private")
    trainer.train()
    trainer.push_to_hub(card={"license": "mit"}, tags="emoji")
    messages = [commit["commit_message"] for commit in hub.commits]
    assert messages == ["Training in progress, step 1", "Training in progress, step 2", "End of training"]
    trainer.save_model()
    written = {path.relative_to(tmp_path / "mine").as_posix() for path in (tmp_path / "mine").rglob("*")}
    names = set(hub.repositories["user/name"])
    assert {"README.md", "model.safetensors", "training_args.json", "model_index.json"} <= names
    assert names - {"README.md"} <= written and not [name for name in names if "checkpoint" in name or "diary" in name]
    card = hub.repositories["user/name"]["README.md"].decode()
    assert "license: mit" in card and "emoji" in card and "TransfusionPipeline" in card
    trainer.create_model_card({"license": "mit"})
    assert "license: mit" in (tmp_path / "mine" / "README.md").read_text()


def test_evaluation_uses_averaged_weights(tmp_path: Path) -> None:
    model, rows = tiny_model().float(), RowList(ragged_rows())
    args = arguments(tmp_path, max_steps=5, learning_rate=1e-2, per_device_eval_batch_size=12)
    trainer = TransfusionTrainer(model, args, train_dataset=rows, ema_decay=0.9)
    trainer.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluated = trainer.evaluate(rows)["eval_loss"]
    assert largest_difference(model.state_dict(), before) == 0
    with trainer.averaged_weights():
        expected = model(**TransfusionDataCollator(model.config)(rows.rows)).loss.item()
    assert evaluated == pytest.approx(expected, rel=1e-5)


def test_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Weights and average, bit for bit, from the middle of an epoch."""
    results = []
    for resume in (None, str(tmp_path / "checkpoint-4"), True):
        model = tiny_model().float()
        options = {"save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 4, "max_steps": 8}
        args = arguments(tmp_path, learning_rate=1e-2, **options)
        trainer = TransfusionTrainer(model, args, train_dataset=NoisyRows(ragged_rows()), ema_decay=0.9)
        if resume is True:
            (tmp_path / "checkpoint-8").rename(tmp_path / "last-8")
        trainer.train(resume_from_checkpoint=resume)
        with trainer.averaged_weights():
            average = {name: value.clone() for name, value in model.state_dict().items()}
        results.append((model.state_dict(), average))
    for weights, average in results[1:]:
        assert largest_difference(weights, results[0][0]) == 0
        assert largest_difference(average, results[0][1]) == 0


def test_resume_without_the_average_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    rows = RowList(ragged_rows())
    TransfusionTrainer(tiny_model().float(), arguments(tmp_path, **options), train_dataset=rows).train()
    again = TransfusionTrainer(
        tiny_model().float(), arguments(tmp_path, **options | {"max_steps": 4}), train_dataset=rows, ema_decay=0.9
    )
    with pytest.raises(ValueError, match="ema_decay was None and is 0.9"):
        again.train(resume_from_checkpoint=True)


BEST = {"save_strategy": "steps", "eval_strategy": "steps"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_minutes": 1.0, "args": {"max_steps": 3}}, "max_steps=3"),
        ({"max_minutes": 1.0, "args": {"warmup_steps": 50}}, "warmup_steps=50"),
        ({"max_minutes": 0.0}, "max_minutes is 0.0"),
        ({"args": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor"),
        ({"args": {"hub_token": "secret"}}, "hub_token"),
        ({"args": {"push_to_hub": True, "hub_strategy": "checkpoint"}}, "would upload checkpoints"),
        ({"ema_decay": 0.9, "args": {"load_best_model_at_end": True, **BEST}}, "load_best_model_at_end"),
    ],
)
def test_settings_that_do_not_go_together(
    options: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_fake_hub(tmp_path, monkeypatch)
    args = arguments(tmp_path, **options.pop("args", {}))
    with pytest.raises(ValueError, match=reason):
        TransfusionTrainer(tiny_model(), args, eval_dataset=RowList([]), **options)


def test_checkpoints_of_deepspeed_are_refused(tmp_path: Path) -> None:
    """FSDP2 and tensor parallelism have them."""
    trainer = TransfusionTrainer(tiny_model(), arguments(tmp_path, save_strategy="steps"))
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="set save_strategy='no', or use FSDP2"):
        trainer._check_settings()


# -- what one training leaves to the next


class FiniteStream(IterableDataset):
    """Four rows, which are made when they are asked for."""

    num_passes: int | None = None

    def __iter__(self) -> Iterator[Any]:
        return (make() for make in self.deferred())

    def deferred(self, start: int = 0) -> Iterator[Any]:
        return (partial(dict, row) for row in ragged_rows()[start:4])

    def blank(self) -> dict[str, Any]:
        return training_row(5, 2, sample_id="blank")


def seen_rows(trainer: TransfusionTrainer) -> list[Any]:
    """Names of the rows of each batch from now on."""
    seen: list[Any] = []
    collate: Any = trainer.data_collator

    def note(rows: Any) -> Any:
        seen.append([row["sample_id"] for row in rows])
        return collate(rows)

    setattr(trainer, "data_collator", note)  # noqa: B010
    return seen


def test_a_finite_stream_comes_again(tmp_path: Path) -> None:
    """Real rows in each epoch; of a resumed training the rows that it had come as blank ones, once."""
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    names = [[f"sample-{number}" for number in pair] for pair in ((0, 1), (2, 3))]
    rows = FiniteStream()
    for resume, expected in ((False, 2 * names), (True, [["blank"] * 2, names[1], *names])):
        trainer = TransfusionTrainer(tiny_model(), arguments(tmp_path, max_steps=4, **options), train_dataset=rows)
        seen = seen_rows(trainer)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if resume else None)
        assert seen[:4] == expected


def test_passes_of_a_stream_are_refused(tmp_path: Path) -> None:
    rows = FiniteStream()
    rows.num_passes = 2
    with pytest.raises(ValueError, match="num_passes=2 .*set num_passes=None"):
        TransfusionTrainer(tiny_model(), arguments(tmp_path, max_steps=1), train_dataset=rows)


def test_rows_grouped_by_length_have_one_order(tmp_path: Path) -> None:
    """Whatever a process has drawn before, and however a step is divided; another in each epoch."""
    orders = []
    rows = [{**row, "sample_id": str(number)} for number, row in enumerate(4 * ragged_rows())]
    for seed, batch_size in ((1, 8), (2, 4)):
        options: dict[str, Any] = {"train_sampling_strategy": "group_by_length", "num_train_epochs": 2}
        options |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
        trainer = TransfusionTrainer(tiny_model(), arguments(tmp_path, **options), train_dataset=RowList(rows))
        seen = seen_rows(trainer)
        torch.manual_seed(seed)
        trainer.train()
        orders.append([name for batch in seen for name in batch])
    assert orders[0] == orders[1]
    first, second = orders[0][:48], orders[0][48:]
    assert first != second and sorted(first) == sorted(second) == sorted(row["sample_id"] for row in rows)


def test_an_upload_that_fails_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor the upload at its end passes in silence."""
    make_fake_hub(tmp_path, monkeypatch)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the network is down")

    monkeypatch.setattr(trainer_module, "share", fail)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "push_to_hub": True}
    args = arguments(tmp_path / "mine", hub_model_id="user/name", **options)
    trainer = TransfusionTrainer(tiny_model(), args, train_dataset=RowList(ragged_rows()))
    monkeypatch.setattr(logging.getLogger("transfusion"), "propagate", True)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "Step 1 was not uploaded" in caplog.text and "the network is down" in caplog.text
    with pytest.raises(ConnectionError, match="the network is down"):
        trainer.push_to_hub()


def test_tensor_parallel_processes_evaluate_with_one_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{name: value for name, value in row.items() if name != "sample_seed"} for row in ragged_rows()]
    losses = []
    trainer = TransfusionTrainer(tiny_model(), arguments(tmp_path))
    for index, size in ((0, 1), (1, 2), (1, 1)):
        monkeypatch.setattr(TrainingArguments, "process_index", index)
        monkeypatch.setattr(trainer, "get_tp_size", lambda size=size: size)
        losses.append(trainer.evaluate(RowList(rows))["eval_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_what_was_not_logged_is_not_of_the_next_training(tmp_path: Path) -> None:
    model, rows = tiny_model(), RowList(ragged_rows())
    trainer = TransfusionTrainer(model, arguments(tmp_path, max_steps=3, logging_steps=9), train_dataset=rows)
    trainer.train()
    trainer.args.logging_steps = 1
    trainer.train()
    first = trainer.state.log_history[0]
    expected = first["text_loss"] + model.config.image_loss_weight * first["image_loss"]
    assert first["loss"] == pytest.approx(expected, abs=1e-3)


def test_checkpoints_of_sharded_adapters_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))
    trainer = TransfusionTrainer(model, arguments(tmp_path, save_strategy="steps"))
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="no adapters of a sharded model; set save_strategy='no'"):
        trainer._check_settings()
    trainer.args.save_strategy = SaveStrategy.NO
    trainer._check_settings()
