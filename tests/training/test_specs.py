import copy
from pathlib import Path
from typing import Any

import pytest

from transfusion.configuration import PRESETS
from transfusion.training.specs import parse_spec, read_spec


RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
LEAST: dict[str, Any] = {
    "output_dir": "runs/x",
    "model": {"preset": "demo"},
    "data": {"sources": [{"kind": "imagefolder", "path": "pictures"}]},
    "length": {"max_steps": 3},
}


def with_entry(place: str, value: Any) -> dict[str, Any]:
    """The least file with one entry set."""
    entries = copy.deepcopy(LEAST)
    inner: Any = entries
    *sections, last = place.split(".")
    for section in sections:
        inner = inner[int(section)] if section.isdigit() else inner.setdefault(section, {})
    inner[last] = value
    return entries


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_valid(file: Path) -> None:
    spec = read_spec(file)
    assert spec.model.preset is None or spec.model.preset in PRESETS


def test_the_paper_recipe_has_the_papers_optimizer() -> None:
    """Section 4.1: AdamW, betas 0.9 and 0.95, 3e-4 to 1.5e-5 along a cosine, 4,000 steps of warm-up, decay 0.1."""
    training = read_spec(RECIPES / "paper-0.16b.yaml").training
    assert (training.optimizer, training.betas, training.epsilon) == ("adamw", (0.9, 0.95), 1e-8)
    assert (training.learning_rate, training.warmup, training.weight_decay) == (3e-4, 4000, 0.1)
    assert training.learning_rate * training.final_share == pytest.approx(1.5e-5)
    assert (training.max_grad_norm, training.packed_length) == (1.0, 4096)


@pytest.mark.parametrize("written", ["1e-3", "0.001", "1.0e-3"])
def test_a_number_is_a_number(written: str, tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-3 for text."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "output_dir: x\nmodel: {preset: demo}\nlength: {max_steps: 3}\n"
        f"data: {{sources: [{{kind: imagefolder, path: p}}]}}\ntraining: {{learning_rate: {written}}}\n"
    )
    assert read_spec(file).training.learning_rate == 0.001
    changed = read_spec(file, ["training.learning_rate=2e-4", "length.max_steps=7", "watch.prompts=[a b, c]"])
    assert (changed.training.learning_rate, changed.length.max_steps) == (2e-4, 7)
    assert changed.watch.prompts == ("a b", "c")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("training.lerning_rate", 1, "training.lerning_rate is unknown; did you mean learning_rate"),
        ("data.sources.0.pth", "x", r"data.sources\[0\].pth is unknown; did you mean path"),
        ("zzz", 1, "zzz is unknown; known here: output_dir, model"),
        ("model.lora", {"rnak": 3}, "model.lora.rnak is unknown; did you mean rank"),
        ("training.learning_rate", "fast", "training.learning_rate: Input should be a valid number"),
        ("training.batch_size", 2.5, "training.batch_size: Input should be a valid integer"),
        ("training.learning_rate", 0, "learning_rate is 0"),
        ("training.optimizer", "sgd", "optimizer is 'sgd'; allowed: adamw, muon"),
        ("training.schedule", "linear", "schedule is 'linear'; allowed: cosine, constant"),
        ("training.final_share", 2, "final_share is 2.0; give a share"),
        ("length.max_minutes", 3, "give one of max_steps, max_minutes, num_epochs"),
        ("length", {"max_steps": 0}, "max_steps is 0; give a number above 0"),
        ("model.text_model", "y", "Given are text_model and preset; give one of"),
        ("model", {"checkpoint": "x", "vae": "y"}, "vae: not read with checkpoint; leave it out"),
        ("model.freeze_text", True, "freeze_text: not read with preset; leave it out"),
        ("model.lora", {"rank": 0}, "rank is 0; give 1 or more"),
        ("watch.trackers", ["wandb"], "trackers is 'wandb'; allowed: tensorboard, trackio"),
        ("watch.pictures", ["no.png"], "no.png is no file"),
        ("checkpoints.keep_best", True, "keep_best needs losses to compare"),
        ("training.attention", "fast", "attention is 'fast'; allowed: eager, sdpa, flex_attention"),
        ("data.sources", [], "sources is empty"),
    ],
)
def test_what_is_wrong_is_named(place: str, value: Any, message: str) -> None:
    parse_spec(LEAST)
    with pytest.raises(ValueError, match=message):
        parse_spec(with_entry(place, value))


def test_averages_and_adapters_exclude_each_other() -> None:
    entries = with_entry("model.lora", {"rank": 4}) | {"training": {"ema_decay": 0.9}}
    with pytest.raises(ValueError, match="adapters are not averaged"):
        parse_spec(entries)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file"):
        read_spec(tmp_path / "none.yaml")
    file = tmp_path / "run.yaml"
    file.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        read_spec(file)
    file.write_text("- a")
    with pytest.raises(ValueError, match="holds a list"):
        read_spec(file)
    file.write_text("output_dir: x")
    with pytest.raises(ValueError, match="model: Field required|model: Missing required argument"):
        read_spec(file)
    with pytest.raises(ValueError, match="output_dir has no entries below it"):
        read_spec(file, ["output_dir.x=1"])


def test_what_excludes_each_other_is_refused() -> None:
    held_out = {"validation": copy.deepcopy(LEAST["data"])}
    with pytest.raises(
        ValueError, match="keep_best needs a checkpoint at each evaluation: every is 5 and sample_every"
    ):
        parse_spec(with_entry("checkpoints", {"every": 5, "keep_best": True}) | held_out)
    both = with_entry("checkpoints", {"every": 5, "keep_best": True}) | held_out | {"watch": {"sample_every": 5}}
    assert parse_spec(both).checkpoints.keep_best
    with pytest.raises(ValueError, match="A stream has no end that is known; give max_steps"):
        stream = {"sources": [{"kind": "stream", "path": "p"}]}
        parse_spec(LEAST | {"data": stream, "length": {"max_minutes": 3}})
    with pytest.raises(ValueError, match="freeze_text trains weights of pictures"):
        parse_spec(LEAST | {"model": {"text_model": "x", "freeze_text": True, "lora": {"rank": 2}}})
    with pytest.raises(ValueError, match="image_size: not read with checkpoint"):
        parse_spec(LEAST | {"model": {"checkpoint": "x", "image_size": 128}})


def test_numbers_of_the_config_are_numbers_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "output_dir: x\nmodel: {preset: demo, config: {rms_norm_eps: 1e-6, hidden_act: silu, patch_size: 2}}\n"
        "length: {max_steps: 3}\ndata: {sources: [{kind: imagefolder, path: 3e5x}]}\n"
    )
    spec = read_spec(file)
    assert spec.model.config == {"rms_norm_eps": 1e-6, "hidden_act": "silu", "patch_size": 2}
    assert spec.data.sources[0].path == "3e5x"
