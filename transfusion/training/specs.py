"""`RunSpec`: a whole training as a YAML file states it; every entry is typed, and unknown ones are errors.

```yaml
output_dir: runs/mine
model: {preset: demo, config: {patch_codec: unet}}
data: {sources: [{kind: imagefolder, path: my_pictures}]}
length: {max_steps: 1000}
training: {learning_rate: 3e-4}
```
"""

import difflib
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml import YAMLError

from ..data.specs import DataSpec
from .recipes import Recipe, check_duration


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "constant")
TRACKERS = ("tensorboard", "trackio")


def _choose(**chosen: tuple[Any, Sequence[str]]) -> None:
    for name, (value, allowed) in chosen.items():
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")


@dataclass(frozen=True)
class LoraSpec:
    """Adapters (LoRA, arXiv:2106.09685) in place of training all weights.

    Attributes:
        rank: Of the adapters.
        alpha: They count alpha / rank.
        targets: The layers with an adapter: names with commas between, or `"all-linear"`.
        merge: Add them to the weights at the end, and save a whole model.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: str = "all-linear"
    merge: bool = False

    def __post_init__(self) -> None:
        """Check the rank."""
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; give 1 or more.")


@dataclass(frozen=True)
class ModelSpec:
    """What is trained: one of a checkpoint, a language model and a preset.

    Attributes:
        checkpoint: A folder or a name on the Hub, of a Transfusion model with its processor.
        text_model: A language model of the Llama family, with its tokenizer, to begin with.
        preset: A name in `transfusion.configuration.PRESETS`, from scratch.
        config: Fields of `TransfusionConfig` in place of the preset's, or beside those of the language model.
        freeze_text: With `text_model`: train only weights of pictures, in each layer.
        lora: Train adapters.
        tokenizer: With `preset`: a folder or a name on the Hub; by default the one that ships with the package.
        vae: A folder or a name on the Hub with an autoencoder of diffusers in `vae/`; by default the one that ships;
            `"none"`: pixels are the latents. Not with `checkpoint`, which has one.
        image_size: Side of the pictures in pixels, 64 without; not with `checkpoint`.
    """

    checkpoint: str | None = None
    text_model: str | None = None
    preset: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    freeze_text: bool = False
    lora: LoraSpec | None = None
    tokenizer: str | None = None
    vae: str | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        """Check that there is one beginning, and nothing that it does not read."""
        beginnings = {name: getattr(self, name) for name in ("checkpoint", "text_model", "preset")}
        given = [name for name, value in beginnings.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"Given are {' and '.join(given) or 'none'}; give one of {', '.join(beginnings)}.")
        of_others = {
            "checkpoint": ("config", "tokenizer", "vae", "image_size", "freeze_text"),
            "text_model": ("tokenizer",),
            "preset": ("freeze_text",),
        }
        unread = {name: getattr(self, name) for name in of_others[given[0]]}
        if wrong := [name for name, value in unread.items() if value]:
            raise ValueError(f"{', '.join(wrong)}: not read with {given[0]}; leave it out.")
        if self.freeze_text and self.lora is not None:
            raise ValueError("freeze_text trains weights of pictures, lora adapters of all: leave out one of them.")


@dataclass(frozen=True)
class LengthSpec:
    """How long to train: one of these.

    Attributes:
        max_steps: Optimizer steps.
        max_minutes: Minutes by the clock, which the learning rate follows.
        num_epochs: Times through the data.
    """

    max_steps: int | None = None
    max_minutes: float | None = None
    num_epochs: float | None = None

    def __post_init__(self) -> None:
        """Check that there is one, above 0."""
        given = {item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) is not None}
        if len(given) != 1:
            raise ValueError(f"length is {given or 'empty'}; give one of max_steps, max_minutes, num_epochs.")
        name, value = given.popitem()
        if not value > 0:
            raise ValueError(f"{name} is {value}; give a number above 0.")


@dataclass(frozen=True)
class TrainingSpec(Recipe):
    """How steps are made; defaults of the optimizer are the paper's (section 4.1).

    Attributes:
        optimizer: `"adamw"`, or `"muon"`: Muon on the matrices and AdamW on the rest, as the demo does.
        learning_rate: At its highest.
        betas, epsilon: Of AdamW.
        schedule: `"cosine"` or `"constant"`, after the warm-up.
        final_share: What the rate falls to along the cosine, of its highest: 1.5e-5 of 3e-4 in the paper.
        accumulation: Batches of a process in a step: `batch_size` is divided by it and by the number of processes.
        ema_decay: Of averaged weights; none are kept without it.
        gradient_checkpointing: Compute activations again instead of keeping them: less memory, more time.
        num_workers: Processes that make rows, beside each that trains.
    """

    weight_decay: float = 0.1
    optimizer: str = "adamw"
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    schedule: str = "cosine"
    final_share: float = 0.05
    accumulation: int = 1
    ema_decay: float | None = None
    gradient_checkpointing: bool = False
    num_workers: int = 0

    def __post_init__(self) -> None:
        """Check what no later step would."""
        super().__post_init__()
        _choose(optimizer=(self.optimizer, OPTIMIZERS), schedule=(self.schedule, SCHEDULES))
        check_duration(learning_rate=self.learning_rate, accumulation=self.accumulation)
        if not 0 <= self.final_share <= 1:
            raise ValueError(f"final_share is {self.final_share}; give a share, 0 to 1.")


@dataclass(frozen=True)
class CheckpointSpec:
    """Checkpoints to go on from.

    Attributes:
        every: Steps between two; None: only where a signal stops the training.
        keep: How many of the last ones stay.
        keep_best: Keep the one with the lowest loss on `validation` too.
    """

    every: int | None = 500
    keep: int = 2
    keep_best: bool = False


@dataclass(frozen=True)
class WatchSpec:
    """What is shown.

    Attributes:
        every: Steps between two logs.
        sample_every: Steps between two sheets of drawings and captions, and two evaluations.
        prompts: What the sheets draw; without any there are none.
        pictures: Files of pictures to caption beside them.
        trackers: `"tensorboard"`, `"trackio"` (to be installed), both or neither.
    """

    every: int = 50
    sample_every: int = 500
    prompts: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        """Check the trackers, and that the pictures are there."""
        if missing := [name for name in self.pictures if not Path(name).is_file()]:
            raise ValueError(f"pictures: {', '.join(missing)} is no file; give files.")
        for tracker in self.trackers:
            _choose(trackers=(tracker, TRACKERS))


@dataclass(frozen=True)
class RunSpec:
    """A whole training.

    Attributes:
        output_dir: Where everything goes.
        model, data, length, training, checkpoints, watch: See there.
        validation: What the losses are evaluated on, if anything.

    Latents are kept in `output_dir/latents` where `cache_dir` of the data is not given.
    """

    output_dir: str
    model: ModelSpec
    data: DataSpec
    length: LengthSpec
    training: TrainingSpec = TrainingSpec()
    checkpoints: CheckpointSpec = CheckpointSpec()
    watch: WatchSpec = WatchSpec()
    validation: DataSpec | None = None

    def __post_init__(self) -> None:
        """Check what concerns two of them."""
        if self.checkpoints.keep_best and self.validation is None:
            raise ValueError("keep_best needs losses to compare; give validation, or leave it out.")
        if self.checkpoints.keep_best and self.checkpoints.every != self.watch.sample_every:
            raise ValueError(
                f"keep_best needs a checkpoint at each evaluation: every is {self.checkpoints.every} and sample_every "
                f"{self.watch.sample_every}; make them equal."
            )
        if self.data.is_stream and self.length.max_steps is None:
            raise ValueError("A stream has no end that is known; give max_steps.")
        if self.model.lora is not None and self.training.ema_decay is not None:
            raise ValueError("ema_decay: adapters are not averaged; leave out one of lora and ema_decay.")


def read_spec(file: str | os.PathLike, changes: Sequence[str] = ()) -> RunSpec:
    """Read a YAML file.

    Args:
        file: The file.
        changes: Entries to set in its place, such as `length.max_steps=100`.

    Raises:
        ValueError: No such file, no YAML, an unknown or missing entry, a value of another type.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path} is no file; give the YAML file of a training.")
    try:
        entries = _load_yaml(path.read_text(encoding="utf-8"))
        parsed = [(name, _load_yaml(value)) for name, _, value in (change.partition("=") for change in changes)]
    except YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds a {type(entries).__name__}; it needs entries such as output_dir and model.")
    for name, value in parsed:
        _set(entries, name, value)
    return parse_spec(entries)


def _load_yaml(text: str) -> Any:
    """Read YAML in which `1e-3` is a number, as in YAML 1.2; for YAML 1.1, which PyYAML knows, it is text."""

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = dict(yaml.SafeLoader.yaml_implicit_resolvers)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))
    return yaml.load(text, Loader)


def _set(entries: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        entries = entries.setdefault(section, {})
        if not isinstance(entries, dict):
            raise ValueError(f"{name}: {section} has no entries below it.")
    entries[last] = value


def parse_spec(entries: Mapping[str, Any]) -> RunSpec:
    """Make a `RunSpec` of the entries of a file.

    Raises:
        ValueError: Naming the entry, by its path.
    """
    from pydantic import TypeAdapter, ValidationError

    _refuse_unknown(RunSpec, entries, "")
    try:
        return TypeAdapter(RunSpec).validate_python(entries)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ValueError("\n".join(lines)) from error


def _refuse_unknown(kind: Any, entries: Any, place: str) -> None:
    """Raise a `ValueError` for entries of `entries` that the dataclass `kind` lacks, at any depth."""
    kinds = [kind, *typing.get_args(kind)]
    if isinstance(entries, list):
        for index, entry in enumerate(entries):
            for inner in kinds[1:2]:
                _refuse_unknown(inner, entry, f"{place}[{index}]")
        return
    dataclass_kind = next((found for found in kinds if is_dataclass(found)), None)
    if dataclass_kind is None or not isinstance(entries, dict):
        return
    types = typing.get_type_hints(dataclass_kind)
    known = {item.name: types[item.name] for item in fields(dataclass_kind)}
    for name, entry in entries.items():
        where = f"{place}.{name}" if place else str(name)
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}."
            raise ValueError(f"{where} is unknown; {hint}")
        _refuse_unknown(known[name], entry, where)


__all__ = [
    "CheckpointSpec",
    "LengthSpec",
    "LoraSpec",
    "ModelSpec",
    "RunSpec",
    "TrainingSpec",
    "WatchSpec",
    "parse_spec",
    "read_spec",
]
