import errno
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import tiny_config, tiny_model
from tests.training.resumable import (
    PLAIN,
    Act,
    AugmentedRows,
    RowList,
    differences,
    outcome,
    plain_model,
    random_events,
    run,
    tiny_trainer,
    trainer_with_best,
)
from tests.training.tiny_rows import ragged_rows, training_row
from transfusion import TransfusionForMultimodalGeneration
from transfusion.training import checkpoints
from transfusion.training.checkpoints import find_complete, verify
from transfusion.training.resuming import load_weights
from transfusion.training.trainer import TransfusionTrainer


ROOT = Path(__file__).parents[2]
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.training.resumable"])


def trained(output_dir: Path, resume: bool | str | None = None, **options: Any) -> dict[str, Any]:
    """The outcome of a training; a resumed one saves no more unless told to."""
    if resume is not None:
        options = {"save_strategy": "no", **options}
    trainer = tiny_trainer(output_dir, **options)
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer)


@pytest.fixture(scope="module", autouse=True)
def fast_disk() -> Iterator[None]:
    """Nothing here loses power; what is synced, test_checkpoints.py tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda number: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A training that never stopped, with a checkpoint of each of its six steps, and its outcome."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained(folder)


def copied(whole: tuple[Path, dict[str, Any]], folder: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(whole[0] / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


# In an epoch, at its end, in the second, at its end.
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_resumed_training_ends_as_one_that_never_stopped(
    step: int, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Weights, average, optimizer, and all that is logged; logs are of three steps, before and after the stop."""
    folder, expected = whole
    assert len(expected["log"]) == 2
    assert not differences(trained(tmp_path, str(folder / f"checkpoint-{step}")), expected)


def test_steps_are_random(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """What the other tests compare changes with each thing that is drawn."""
    _, expected = whole
    assert differences(trained(tmp_path / "seed", save_strategy="no", seed=1), expected)
    config = tiny_config(objective="flow")
    model = TransfusionForMultimodalGeneration(config)
    assert differences(trained(tmp_path / "dropout", save_strategy="no", model=model), expected)
    rows = RowList([{**row, "sample_seed": number} for number, row in enumerate(ragged_rows())])
    for row in rows.rows:
        row |= {"latent_patches": row["latent_patches"].float()} if "latent_patches" in row else {}
    assert differences(trained(tmp_path / "rows", save_strategy="no", rows=rows), expected)


OPTIONS: dict[str, dict[str, Any]] = {
    "two workers": {"dataloader_num_workers": 2},
    "muon": {"muon": True},
    "grouped by length": {
        "train_sampling_strategy": "group_by_length"
    },  # its order is drawn from the global generator
    "no average": {"ema_decay": None},
    "epochs": {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch"},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_whatever_the_options(kind: str, tmp_path: Path) -> None:
    expected = trained(tmp_path, **OPTIONS[kind])
    for step in (2, 4) if kind == "epochs" else (3, 4):
        found = trained(tmp_path / "again", str(tmp_path / f"checkpoint-{step}"), **OPTIONS[kind])
        assert not differences(found, expected), step


def test_stopped_twice(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copied(whole, tmp_path, 1)
    trainer = tiny_trainer(
        tmp_path, callbacks=[Act(4, lambda: setattr(trainer.control, "should_training_stop", True))]
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert not differences(trained(tmp_path, True), whole[1])


def test_the_loss_at_the_end_is_that_of_the_steps_since(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    options: dict[str, Any] = {"logging_steps": 1, "save_strategy": "no"}
    every = tiny_trainer(tmp_path, **options)
    every.train()
    losses = [entry["loss"] for entry in every.state.log_history if "loss" in entry]
    resumed = tiny_trainer(tmp_path).train(resume_from_checkpoint=str(whole[0] / "checkpoint-2"))
    assert resumed.training_loss == pytest.approx(sum(losses[2:]) / 4, abs=1e-4)


def test_a_checkpoint_is_a_model_without_pickles(whole: tuple[Path, dict[str, Any]]) -> None:
    folder = whole[0] / "checkpoint-6"
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    loaded = TransfusionForMultimodalGeneration.from_pretrained(folder)
    average = TransfusionForMultimodalGeneration.from_pretrained(folder / "ema")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, whole[1][f"model.{name}"])
        assert torch.equal(average.state_dict()[name], whole[1][f"average.{name}"])
    assert loaded.config.use_cache and average.config.use_cache
    assert json.loads((folder / "run.json").read_text())["versions"]["torch"] == torch.__version__


# -- harm


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 1)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last ^ 1]))


FILES = ["model.safetensors", "config.json", "ema/model.safetensors", "optimizer.json", "optimizer.safetensors"]
FILES += [
    "scheduler.json",
    "process-0.json",
    "process-0.safetensors",
    "trainer_state.json",
    "run.json",
    "manifest.json",
]


HARMS: list[Callable[[Path], None]] = [truncate, empty, flip, Path.unlink]


@pytest.mark.parametrize("name", FILES)
def test_a_harmed_checkpoint_is_refused(name: str, whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """It is named, whatever the harm, before anything of it is used."""
    for number, damage in enumerate(HARMS):
        folder = copied(whole, tmp_path / str(number), 2)
        damage(folder / "checkpoint-2" / name)
        with pytest.raises(ValueError, match=f"checkpoint-2.*{name.rpartition('/')[2]}"):
            tiny_trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        with pytest.raises(ValueError, match="has no complete checkpoint to resume from"):
            tiny_trainer(folder).train(resume_from_checkpoint=True)


def test_the_one_before_is_used(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the newest is harmed, empty, or was left as a draft; and the harmed one is replaced."""
    copied(whole, tmp_path, 1, 2, 3)
    flip(tmp_path / "checkpoint-3" / "optimizer.safetensors")
    empty(tmp_path / "checkpoint-2" / "manifest.json")
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-1").rename(tmp_path / "replaced-checkpoint-1")
    shutil.copytree(whole[0] / "checkpoint-5", tmp_path / "incomplete-checkpoint-5")
    assert not differences(trained(tmp_path, True, save_strategy="steps"), whole[1])
    for name in ("checkpoint-3", "checkpoint-2", "checkpoint-4", "incomplete-checkpoint-5"):
        assert name in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in range(1, 7)}
    for path in tmp_path.iterdir():
        verify(path)


@pytest.mark.parametrize("resume", [True, "none/checkpoint-3"])
def test_resuming_from_nothing_is_refused(resume: bool | str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no complete checkpoint|where there is no folder"):
        trained(tmp_path, resume)


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=1, save_only_model=True)
    assert not list(tmp_path.rglob("optimizer*"))
    with pytest.raises(ValueError, match="checkpoint-1 has no optimizer.json"):
        trained(tmp_path, True)


class Canary:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


def test_pickles_are_never_opened(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(whole, tmp_path, 3) / "checkpoint-3"
    names = ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin"]
    names += ["pytorch_model.bin", "adapter_model.bin", "ema/pytorch_model.bin", "pytorch_model_fsdp.bin"]
    for name in names:
        torch.save(Canary(tmp_path / "canary"), folder / name)
    torch.load(folder / "optimizer.pt", weights_only=False)
    (tmp_path / "canary").unlink()  # they work

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", refuse)
    assert not differences(trained(tmp_path, True), whole[1])
    assert not (tmp_path / "canary").exists()


# -- what must not change


CHANGES: dict[str, dict[str, Any]] = {
    "rows per step was 8 and is 12": {"per_device_train_batch_size": 3},
    "rows per step was 8 and is 4": {"gradient_accumulation_steps": 2},
    "learning_rate was 0.01 and is 0.02": {"learning_rate": 0.02},
    "seed was 42 and is 1": {"seed": 1},
    "ema_decay was 0.9 and is None": {"ema_decay": None},
    "dataset length was 12 and is 3": {"rows": RowList(ragged_rows()[:3])},
    "config.num_hidden_layers was 2 and is 1": {
        "model": TransfusionForMultimodalGeneration(tiny_config(num_hidden_layers=1, attention_dropout=0.1))
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_training_is_refused(change: str, whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"checkpoint-3 is of another training: .*{change}"):
        trained(tmp_path, str(whole[0] / "checkpoint-3"), **CHANGES[change])


def test_other_data_is_refused(tmp_path: Path) -> None:
    class Named(AugmentedRows):
        fingerprint = "first"

    trained(tmp_path, rows=Named())
    Named.fingerprint = "second"
    with pytest.raises(ValueError, match="dataset fingerprint was 'first' and is 'second'"):
        trained(tmp_path, True, rows=Named())


@pytest.mark.parametrize("muon", [True, False])
def test_another_optimizer_is_refused(muon: bool, tmp_path: Path) -> None:
    trained(tmp_path, muon=muon, max_steps=1)
    with pytest.raises(ValueError, match="checkpoint is of the optimizers|optimizer was"):
        trained(tmp_path, True, muon=not muon)


def test_a_longer_training_and_other_versions_are_named(
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied(whole, tmp_path, 3)
    monkeypatch.setattr(platform, "python_version", lambda: "4.0")
    trained(tmp_path, True, max_steps=7)
    assert "was to have 6 steps and now has 7" in caplog.text
    assert "python was '3." in caplog.text and "and is '4.0'" in caplog.text


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tied, untied = (tiny_model(tie_word_embeddings=tied).float() for tied in (True, False))
    for name, model in (("tied", tied), ("untied", untied)):
        trainer = TransfusionTrainer(model, tiny_trainer(tmp_path).args)
        checkpoints.write_checkpoint(tmp_path / name / "checkpoint-1", trainer._snapshot_model())
    with torch.no_grad():
        other = tiny_model(tie_word_embeddings=True).float()
        other.lm_head.weight.zero_()
    load_weights(other, tmp_path / "tied" / "checkpoint-1")
    assert all(torch.equal(value, tied.state_dict()[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match="have other weights: .*lm_head.weight"):
        load_weights(untied, tmp_path / "tied" / "checkpoint-1")


def test_weights_in_several_files_are_loaded(tmp_path: Path) -> None:
    """Those that the manifest knows, not an index that was added."""
    model, other = tiny_model(), tiny_model()
    for size in ("20KB", "1GB"):
        folder, save = tmp_path / size, partial(model.save_pretrained, max_shard_size=size)
        checkpoints.write_checkpoint(folder, save)
        with torch.no_grad():
            [parameter.zero_() for parameter in other.parameters()]
        if size == "1GB":
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "planted.safetensors"}}')
        load_weights(other, folder)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    assert len(list((tmp_path / "20KB").glob("model-*.safetensors"))) > 2


# -- writing


@pytest.mark.parametrize(("owner", "operation", "there"), [(checkpoints, "clean_up", []), (os, "fsync", [3])])
def test_the_training_goes_on_while_a_checkpoint_is_written(
    owner: Any, operation: str, there: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a disk that does nothing until two steps later: what is written is what was, and the next one waits."""
    is_free, original, seen = threading.Event(), getattr(owner, operation), []

    def look() -> None:
        seen.append([path.name for path in tmp_path.iterdir()])
        is_free.set()

    expected = trained(tmp_path / "other", save_strategy="no")
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    monkeypatch.setattr(owner, operation, lambda *args: is_free.wait(60) and original(*args))
    assert not differences(trained(tmp_path, save_steps=3, callbacks=[Act(5, look)]), expected)
    assert seen == [[f"incomplete-checkpoint-{step}" for step in there]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]
    assert not differences(trained(tmp_path, str(tmp_path / "checkpoint-3")), expected)


def full_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full after so many files."""
    left = [count]

    def full(number: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


def test_a_disk_that_is_full_stops_the_training_at_the_next_step(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait() -> None:
        pending = trainer._writer._pending
        while pending is not None and not pending.done():
            pass

    trainer = tiny_trainer(tmp_path, callbacks=[Act(3, wait)], save_steps=2)
    full_after(3, monkeypatch)
    with pytest.raises(OSError, match="checkpoint-2 could not be written: .*No space left"):
        trainer.train()
    assert trainer.state.global_step <= 3
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_stops_the_training_at_the_end(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(whole, tmp_path, 5)
    full_after(3, monkeypatch)
    with pytest.raises(OSError, match="checkpoint-6 could not be written: .*No space left"):
        trained(tmp_path, True, save_strategy="steps")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert find_complete(tmp_path) == tmp_path / "checkpoint-5"


def with_small_files(output_dir: Path) -> None:
    """As a full disk, files cannot grow after the second checkpoint."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    tiny_trainer(output_dir, save_steps=2, callbacks=[Act(3, limit)]).train()


def test_files_that_cannot_grow(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """By the system's own error, in the middle of a file."""
    process = FORKS.Process(target=with_small_files, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert not differences(trained(tmp_path, True), whole[1])


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """Even if it was still being written."""
    rows = [training_row(5, (1, 2), 2, seed=seed) for seed in range(6)]
    for row in rows:
        row["latent_patches"] = row["latent_patches"].float()
    rows[5]["latent_patches"] = torch.full((2, 12), 1e30)
    options: dict[str, Any] = {"gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential"}
    with pytest.raises(ValueError, match="not finite at step 3: .*sample-5.*timesteps"):
        trained(tmp_path, rows=RowList(rows), **options)
    assert find_complete(tmp_path) == tmp_path / "checkpoint-2"
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize("best", [2, 6])
def test_the_last_and_the_best_are_kept(best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best is loaded at the end, when it has been written."""
    monkeypatch.setattr(os, "fsync", lambda number: time.sleep(0.01))
    trainer = trainer_with_best(tmp_path, best, save_total_limit=2)
    trainer.train()
    others = {2: "checkpoint-6", 6: "checkpoint-5"}
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{best}", others[best]}
    weights = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in weights.items())


def test_the_best_that_was_saved_is_kept(tmp_path: Path) -> None:
    """The third step is better, and was not saved."""
    trainer = trainer_with_best(tmp_path, 3, save_steps=2, save_total_limit=1)
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-6"}
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in weights.items())


def test_settings_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_on_each_node=True"):
        tiny_trainer(tmp_path, save_on_each_node=True)
    with pytest.raises(ValueError, match="auto_find_batch_size=True: .*set per_device_train_batch_size"):
        tiny_trainer(tmp_path, auto_find_batch_size=True)
    tiny_trainer(tmp_path, auto_find_batch_size=True, save_strategy="no")


@pytest.mark.parametrize("done", [3, 6])
def test_a_training_that_is_done_takes_no_step(done: int, whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Within an epoch, and at the end of one."""
    trainer = tiny_trainer(tmp_path, max_steps=done, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(whole[0] / f"checkpoint-{done}"))
    assert trainer.state.global_step == done
    weights = load_file(whole[0] / f"checkpoint-{done}" / "model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in weights.items())


def test_a_training_whose_time_is_over_takes_no_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": -1, "max_minutes": 1.0}
    first, again = (tiny_trainer(tmp_path, **options) for _ in range(2))
    first.add_callback(Act(3, lambda: setattr(first._budget, "start", float("-inf"))))  # from when on it is over
    first.train()
    again.train(resume_from_checkpoint=True)
    assert first.state.global_step == again.state.global_step == 4


def test_an_adapter_of_the_model_itself(tmp_path: Path) -> None:
    """Of `add_adapter`: it is saved alone, and resumes; one of another shape is refused."""

    def adapted(rank: int = 2) -> Any:
        model = plain_model().float()
        model.add_adapter(peft.LoraConfig(r=rank, target_modules="all-linear", lora_dropout=0.1), "style")
        return model

    options: dict[str, Any] = {"ema_decay": None}
    expected = trained(tmp_path, model=adapted(), **options)
    assert not (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    found = trained(tmp_path / "again", str(tmp_path / "checkpoint-3"), model=adapted(), **options)
    assert not differences(found, expected)
    other = plain_model().float()
    other.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the adapter 'default' have other weights"):
        load_weights(other, tmp_path / "checkpoint-3")


# -- kills


def killed(output_dir: Path, events: list[int], **options: Any) -> tuple[list[int], int]:
    """Kill a training at each of the events in turn, going on each time: up to which step there were checkpoints, and
    how often one was being written.
    """
    steps, num_in_save = [], 0
    for event in events:
        process = FORKS.Process(target=run, args=(output_dir, None, event), kwargs=options)
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        names = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
        found = find_complete(output_dir)
        assert found is not None or not [name for name in names if name.startswith("checkpoint")]
        steps.append(int(found.name.rpartition("-")[2]) if found is not None else 0)
        num_in_save += any(name.startswith("incomplete") for name in names)
    return steps, num_in_save


def test_killed_ten_times_at_random_a_training_ends_the_same(tmp_path: Path) -> None:
    """By SIGKILL, at steps and at operations on files, of which a checkpoint takes some twenty."""
    options: dict[str, Any] = {"max_steps": 30, "save_total_limit": 1}
    run(tmp_path / "whole", tmp_path / "whole.safetensors", save_strategy="no", max_steps=30)
    steps, num_in_save = killed(tmp_path / "cut", random_events(10, 60, seed=0), **options)
    assert steps == sorted(steps) and len(set(steps)) > 4
    assert num_in_save > 2
    run(tmp_path / "cut", tmp_path / "cut.safetensors", **options)
    assert not differences(load_file(tmp_path / "cut.safetensors"), load_file(tmp_path / "whole.safetensors"))


# -- several processes, and other divisions of a step


def nearly_same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether weights, average and optimizer are the same but for rounding, and logs but for that of logging."""
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)
    return found["log"] == [pytest.approx(entry, abs=1e-4) for entry in expected["log"]]


@pytest.mark.distributed
def test_two_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They resume exactly, stop by the signal of one, report the error of one; and one resumes what two began."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "tests/training/two_resuming.py"), str(tmp_path)]
    finished = subprocess.run(command + script, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    results = [json.loads((tmp_path / f"results-{rank}.json").read_text()) for rank in range(2)]
    for found in results:
        assert found["resumed"] == [] and found["after a signal"] == [] and found["code"] == 143
        assert found["differ"]
    assert "No space left" in results[1]["full"] and "Another process could not write" in results[0]["full"]
    assert results[0]["left"] == ["checkpoint-2"]
    assert "has no complete checkpoint" in results[0]["none"] and "refused the checkpoint" in results[1]["none"]
    with pytest.raises(ValueError, match="rows per step was 8 and is 4"):
        trained(tmp_path / "one", str(tmp_path / "whole" / "checkpoint-3"), per_device_train_batch_size=1)
    whole = trained(tmp_path / "alone", model=plain_model(), save_strategy="no", **PLAIN)
    # After the first of three steps that are logged together.
    one = trained(tmp_path / "one", str(tmp_path / "plain" / "checkpoint-4"), model=plain_model(), **PLAIN)
    assert "world_size was 2 and is 1" in caplog.text
    assert nearly_same(one, whole)


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_a_step_may_be_divided_otherwise(accumulation: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The rows of each step, and all that is drawn for them, are the same."""
    whole = trained(tmp_path, model=plain_model(), **PLAIN)
    options = PLAIN | {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    found = trained(tmp_path, str(tmp_path / "checkpoint-4"), model=plain_model(), **options)
    assert f"gradient_accumulation_steps was 4 and is {accumulation}" in caplog.text
    assert nearly_same(found, whole)
    assert differences(found, whole)
