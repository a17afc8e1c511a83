"""The model card: the README.md that a repository on the Hub shows, written from what you say about the model."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image, ImageOps


CARD_FILE = "README.md"
SAMPLES_FOLDER = "assets"
# A card with this line is ours to write again; people delete it when they write their own.
CARD_MARK = "<!-- Written by push_to_hub of transfusion. Delete this line to keep what you change below. -->"
TAGS = ("transfusion", "text-to-image", "image-to-text", "diffusers")

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LOCAL_PATH = re.compile(r"/|~|\.\.?([/\\]|$)|\\|[A-Za-z]:[/\\]|file:", re.IGNORECASE)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#!|])")
_WITH_CODE = "The repository has its own code. Read it, and allow it with `trust_remote_code=True`."
_NO_BASE = "These are adapters. They go on top of the model they were trained with, which this card does not name."
_WITHOUT_CODE = "Install the package `transfusion-transformers`; importing it registers the classes."


@dataclass(frozen=True)
class CardContents:
    """What a card says and only you know. What is absent is called not stated, never guessed.

    Attributes:
        license: As the Hub names it, such as `"apache-2.0"`.
        datasets: What it was trained on: names on the Hub, or a few words.
        metrics: Scores by name, as `evaluation.json` holds them; what is nested, such as the settings, stands below.
        evaluated_on: The data of `metrics`, in a few words.
        samples: Pictures that the model drew, PIL images or files, or pairs (prompt, picture).
        base_model: The name on the Hub of what it was fine-tuned from; the card of adapters shows how both are loaded.

    Raises:
        ValueError: A path of this machine among the names, or a value of another type.
    """

    license: str | None = None
    datasets: Sequence[str] = ()
    metrics: Mapping[str, Any] | None = None
    evaluated_on: str | None = None
    samples: Sequence[Any] = ()
    base_model: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.datasets, str):
            object.__setattr__(self, "datasets", [self.datasets])
        for field in ("datasets", "samples"):
            if not isinstance(value := getattr(self, field), list | tuple):
                raise ValueError(f"{field}={value!r}; give a list.")
        if self.metrics is not None and not isinstance(self.metrics, Mapping):
            raise ValueError(f"metrics={self.metrics!r}; give a dictionary of scores by name.")
        for name in (self.license, self.evaluated_on, self.base_model, *self.datasets):
            if name is not None and not isinstance(name, str):
                raise ValueError(f"A card cannot name {name!r}; give a string.")
            if name is not None and is_local_path(name):
                raise ValueError(f"A card cannot name {name!r}, a path of this machine; give a name that others know.")
        if self.base_model is not None and not _HUB_NAME.fullmatch(self.base_model):
            raise ValueError(f"base_model={self.base_model!r}; give its name on the Hub, such as 'user/name'.")

    @property
    def scores(self) -> dict[str, float]:
        """The numbers of `metrics`, apart from nested ones."""
        return dict(_numbers(self.metrics or {}))

    @property
    def settings(self) -> dict[str, Any]:
        """The nested entries of `metrics`, in one level."""
        nested = (entry for entry in (self.metrics or {}).values() if isinstance(entry, Mapping))
        return {name: value for entry in nested for name, value in entry.items() if isinstance(value, Real)}


def is_local_path(name: str) -> bool:
    """Whether `name` looks like a path of some machine, of whatever system."""
    return _LOCAL_PATH.match(name) is not None


def _numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Real) and not isinstance(value, bool):
            number = float(value)
            yield name, int(number) if number.is_integer() else number


def as_contents(card: Any) -> CardContents:
    """What was given as `card`: None, a dictionary of the fields of `CardContents`, or one of those.

    Raises:
        ValueError: Anything else, or a dictionary with another field.
    """
    if card is None:
        return CardContents()
    if type(card).__name__ == "CardContents":
        return card
    if not isinstance(card, Mapping):
        raise ValueError(f"card={card!r}; give a dictionary of the fields of CardContents, or one of those.")
    allowed = [field.name for field in fields(CardContents)]
    if unknown := sorted(set(card) - set(allowed)):
        raise ValueError(f"card has {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)}.")
    return CardContents(**card)


def write_card(
    folder: str | os.PathLike,
    repo_id: str,
    kind: str = "model",
    card: Any = None,
    tags: Sequence[str] = (),
    with_code: bool = False,
) -> None:
    """Write `<folder>/README.md`, and the samples to `<folder>/assets/`.

    Args:
        folder: Where the repository's files are.
        repo_id: Its name on the Hub, which the usage example loads.
        kind: What the example uses: `"model"`, `"adapter"`, `"pipeline"` or `"image_processor"`.
        card: A `CardContents`, or a dictionary of its fields.
        tags: More of them.
        with_code: The repository brings its own code.
    """
    contents = as_contents(card)
    prompts = save_samples(contents.samples, Path(folder))
    code_tags = ["custom_code"] if with_code else []
    scores = eval_results(contents)
    data = ModelCardData(
        base_model=contents.base_model,
        datasets=[name for name in contents.datasets if _HUB_NAME.fullmatch(name)] or None,
        eval_results=scores or None,
        library_name="peft" if kind == "adapter" else "transformers",
        license=contents.license,
        model_name=repo_id.split("/")[-1] if scores else None,  # it belongs to them
        pipeline_tag="any-to-any",
        tags=[*TAGS, *code_tags, *tags],
        widget=[{"text": prompt, "output": {"url": file}} for file, prompt in prompts.items()] or None,
    )
    body = card_body(contents, repo_id, kind, with_code, prompts)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(Path(folder, CARD_FILE))


def add_tags(text: str, tags: Sequence[str]) -> str:
    """The card `text`, whoever wrote it, with `tags` among its tags and nothing else changed."""
    card = ModelCard(text)
    present = card.data.get("tags") or []
    card.data["tags"] = [*present, *(tag for tag in tags if tag not in present)]
    return str(card)


def save_samples(samples: Sequence[Any], folder: Path) -> dict[str, str]:
    """Save pictures as `assets/sample_0.png`, ..., without what their files said beside; file -> prompt."""
    prompts = {}
    for index, sample in enumerate(samples):
        prompt, picture = sample if isinstance(sample, tuple | list) and len(sample) == 2 else ("", sample)
        if not isinstance(prompt, str) or not isinstance(picture, Image.Image | str | os.PathLike):
            raise ValueError(f"Sample {index} is {sample!r}; give a picture, a file, or a pair (prompt, picture).")
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        image = ImageOps.exif_transpose(image).convert("RGB")
        image.info.clear()
        name = f"{SAMPLES_FOLDER}/sample_{index}.png"
        Path(folder, SAMPLES_FOLDER).mkdir(parents=True, exist_ok=True)
        image.save(Path(folder, name))
        prompts[name] = prompt
    return prompts


def eval_results(contents: CardContents) -> list[EvalResult]:
    """The scores as the Hub's `model-index` holds them."""
    dataset = contents.evaluated_on or "not stated"
    return [
        EvalResult(
            task_type="any-to-any",
            dataset_type=dataset if _HUB_NAME.fullmatch(dataset) else "custom",
            dataset_name=dataset,
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in contents.scores.items()
    ]


def card_body(contents: CardContents, repo_id: str, kind: str, with_code: bool, prompts: Mapping[str, str]) -> str:
    """What stands below the front matter."""
    shown = {file: as_plain_text(prompt) for file, prompt in prompts.items()}
    sections = {
        "": "A [Transfusion](https://arxiv.org/abs/2408.11039) model: one transformer that writes text by predicting "
        "the next token and draws pictures by diffusing their patches.",
        "Use": usage_text(contents, repo_id, kind, with_code),
        "Samples": "\n\n".join(f"![{text}]({file})\n{text}".strip() for file, text in shown.items()),
        "Training data": "\n".join(f"- {_linked(name)}" for name in contents.datasets) or "Not stated.",
        "Results": results(contents),
        "Licence": contents.license or "Not stated. Ask the authors before you use the model.",
    }
    parts = [f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text]
    return "\n\n".join([CARD_MARK, f"# {repo_id.split('/')[-1]}", *parts]) + "\n"


def _linked(dataset: str) -> str:
    is_name = "/" in dataset and _HUB_NAME.fullmatch(dataset)
    return f"[{dataset}](https://huggingface.co/datasets/{dataset})" if is_name else dataset


def results(contents: CardContents) -> str:
    """The scores as a table, on what and how they were measured below it."""
    if not contents.scores:
        return "Not stated."
    rows = [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in contents.scores.items()]
    lines = ["| score | value |", "| --- | --- |", *rows, "", f"Measured on: {contents.evaluated_on or 'not stated'}."]
    if settings := contents.settings:
        lines += ["", "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + "."]
    return "\n".join(lines)


def as_plain_text(text: str) -> str:
    """`text` in one line, such that Markdown shows it as it is."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def usage_text(contents: CardContents, repo_id: str, kind: str, with_code: bool) -> str:
    """What is needed to use `repo_id`, with an example where one can be given."""
    if kind == "adapter" and contents.base_model is None:
        return f"{_WITHOUT_CODE}\n\n{_NO_BASE} Load that, and then `model.load_adapter({repo_id!r})`."
    code = usage(repo_id, kind, with_code, contents.base_model)
    return f"{_WITH_CODE if with_code else _WITHOUT_CODE}\n\n```python\n{code}\n```"


def usage(repo_id: str, kind: str, with_code: bool = False, base_model: str | None = None) -> str:
    """Code that loads `repo_id`, for adapters on top of `base_model`, and uses it; it runs as it stands."""
    trust = ", trust_remote_code=True" if with_code else ""
    if kind == "pipeline" and not with_code:
        loading = [
            "from transfusion import TransfusionPipeline",
            "",
            f'pipe = TransfusionPipeline.from_pretrained("{repo_id}")',
        ]
    elif kind == "pipeline":
        loading = [
            "from diffusers import DiffusionPipeline",
            *_load_model(repo_id, trust),
            f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", model=model, processor=processor{trust})',
        ]
    elif kind == "adapter":
        loading = ["import transfusion", *_load_model(str(base_model), ""), f'model.load_adapter("{repo_id}")']
    elif kind == "image_processor":
        lines = ["from transformers import AutoImageProcessor", "from PIL import Image", ""]
        lines += [f'image_processor = AutoImageProcessor.from_pretrained("{repo_id}"{trust})']
        lines += ['print(image_processor(Image.new("RGB", (256, 256), "red"))["pixel_values"][0].shape)']
        return "\n".join([*([] if with_code else ["import transfusion"]), *lines])
    else:
        loading = [*([] if with_code else ["import transfusion"]), *_load_model(repo_id, trust)]
    use = _USE_PIPELINE if kind == "pipeline" else _USE_MODEL
    return "\n".join([*loading, "", *use])


def _load_model(repo_id: str, trust: str) -> list[str]:
    return [
        "from transformers import AutoModel, AutoProcessor",
        "",
        f'model = AutoModel.from_pretrained("{repo_id}"{trust})',
        f'processor = AutoProcessor.from_pretrained("{repo_id}"{trust})',
    ]


# Lists, since transformers takes a line of a text that begins like an import for one.
_USE_PIPELINE = [
    'picture = pipe("a red heart").images[0]',
    'picture.save("a_red_heart.png")',
    "print(pipe.caption(picture).text)",
]
_USE_MODEL = [
    'inputs = processor(text="a red heart", return_tensors="pt")',
    "drawn = model.generate_images(**inputs)",
    "picture = processor.decode_images(drawn.latent_patches, drawn.image_grids)[0]",
    'picture.save("a_red_heart.png")',
    "",
    'inputs = processor(text="<image>", images=[picture], return_tensors="pt")',
    "written = model.generate(**inputs, max_new_tokens=32)",
    'new_ids = written[:, inputs["input_ids"].shape[1] :]',
    "print(processor.batch_decode(new_ids, skip_special_tokens=True)[0])",
]


__all__ = ["CardContents", "write_card"]
