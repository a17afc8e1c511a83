"""Saving with code and sharing on the Hub, for the model, the processors and the pipeline.

`with_code=True` copies the file that defines a class, and those that it imports beside it, into the saved folder and
names the class in `auto_map`. transformers' Auto classes then load it with `trust_remote_code=True` where this package
is not installed. What was loaded in that way is always saved with its code.

`push_to_hub` writes a card where the repository has none (see `model_card.py`). One that is there stays, whoever wrote
it; it is written again only if it is ours still and `card` is given.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

from .model_card import CARD_FILE, CARD_MARK, add_tags, is_local_path, write_card


MODEL_AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
ADAPTER_FILE = "adapter_config.json"
_IMPORT_OF_PACKAGE = re.compile(r"^[ \t]*(?:from|import)[ \t]+transfusion\b", re.MULTILINE)
# Options of an upload, apart from those of the commit.
HUB_OPTIONS = ("repo_id", "private", "token", "tags", "commit_message", "commit_description", "revision", "create_pr")

# A JSON file, the keys to the place of its `auto_map`, and the class for each auto class.
AutoMap = tuple[str, Sequence[str], Mapping[str, type]]


def own_class(value: Any) -> type:
    """The class that a file defines; FSDP puts one of its own before it."""
    return next(cls for cls in type(value).__mro__ if not cls.__module__.startswith("torch."))


def reference_to(cls: type) -> str:
    """`<file>.<class>`, as `auto_map` names a class."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def copy_code(cls: type, folder: Path) -> None:
    """Copy the file of `cls`, and those that it imports beside it, into `folder`.

    Raises:
        ValueError: No file defines `cls`, or one of them imports this package, which is to be done without.
    """
    source = getattr(sys.modules[cls.__module__], "__file__", None)
    if cls.__module__ == "__main__" or not source:
        raise ValueError(f"with_code=True, but no file defines {cls.__name__}; put it into a module and import that.")
    for file in [source, *get_relative_import_files(source)]:
        if found := _IMPORT_OF_PACKAGE.search(Path(file).read_text(encoding="utf-8")):
            raise ValueError(
                f"with_code=True, but {Path(file).name} has `{found[0].strip()}`, and the code is to run without this "
                "package. Save without with_code, or put copies of the package's files beside yours and import from "
                "them: `from .modeling_transfusion import ...`."
            )
    custom_object_save(cls, folder)


def edit_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as transformers writes its JSON files."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_code(folder: Path, auto_map: AutoMap, with_code: bool) -> None:
    """Copy the code of the classes of `auto_map` into `folder`, and write them into the file of that.

    Without `with_code` any `auto_map` is taken away: it is left from the repository that the object was loaded from.
    """
    name, keys, classes = auto_map
    if not (file := folder / name).exists():  # beside an adapter
        return
    content = place = json.loads(file.read_text(encoding="utf-8"))
    for key in keys:
        place = place[key]
    old = place.pop("auto_map", None)
    if with_code and classes:
        for cls in dict.fromkeys(classes.values()):
            copy_code(cls, folder)
        place["auto_map"] = {auto_class: reference_to(cls) for auto_class, cls in classes.items()}
    if old or "auto_map" in place:
        edit_json(file, content)


def save_pipeline_code(pipeline: Any, folder: Path) -> None:
    """Copy the code of `pipeline`, and name it in `model_index.json` as diffusers finds it.

    diffusers copies only the files that the pipeline's file imports itself, not what those import. So it cannot load
    model and processor, and takes them as they are given to `from_pretrained`.
    """
    copy_code(type(pipeline), folder)
    file = folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    index["_class_name"] = reference_to(type(pipeline)).split(".")
    index |= {"model": ["transformers", "PreTrainedModel"], "processor": ["transformers", "ProcessorMixin"]}
    edit_json(file, index)


def forget_base_path(folder: Path) -> None:
    """Take the path of the base model, which means nothing elsewhere, out of an adapter; a name on the Hub stays."""
    file = folder / ADAPTER_FILE
    if not file.exists():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path") or ""
    if is_local_path(base) or os.path.exists(base):
        edit_json(file, {**config, "base_model_name_or_path": None})


def take_hub_options(kwargs: dict[str, Any], folder: str | os.PathLike) -> dict[str, Any]:
    """Take the options of an upload out of `kwargs`; the repository's name is by default that of the folder."""
    options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    return {"repo_id": os.path.basename(os.path.abspath(folder)), **options}


def refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for what `take_hub_options` left; what is None asks for nothing."""
    if unknown := [name for name, value in kwargs.items() if value is not None]:
        raise ValueError(f"{', '.join(unknown)}: no option of save_pretrained or push_to_hub; leave it out.")


def file_times(folder: str | os.PathLike) -> dict[Path, int]:
    """When each file of `folder` and of what is in it was last written, by which an upload knows what is new."""
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    known: Mapping[Path, int],
    commit_message: str | None = None,
    **commit: Any,
) -> Any:
    """Upload the files of `folder` that are not `known`, or were written since."""
    new = sorted(path for path, time in file_times(folder).items() if known.get(path) != time)
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in new]
    message = commit_message or "Upload with transfusion"
    return HfApi().create_commit(repo_id, operations, commit_message=message, **commit)


def find_card(repo_id: str, token: Any = None, revision: str | None = None) -> str | None:
    """The card of a repository; None where it has none. Whatever else keeps us from reading it raises."""
    try:
        file = HfApi().hf_hub_download(repo_id, CARD_FILE, token=token, revision=revision)
    except (RemoteEntryNotFoundError, RepositoryNotFoundError):
        return None
    return Path(file).read_bytes().decode("utf-8")


def prepare_card(
    folder: Path,
    repo_id: str,
    kind: str,
    card: Any = None,
    tags: Sequence[str] = (),
    published: str | None = None,
    with_code: bool = False,
) -> bool:
    """Write a card into `folder` where one is needed, as the top of this file says.

    Args:
        folder: What is saved.
        repo_id: The repository's name on the Hub.
        kind: As for `write_card`, for what is no adapter.
        card: As for `write_card`.
        tags: To be added; to a card that stays, too.
        published: The card that the repository has.
        with_code: Code lies beside what is saved. Code that the repository has already is kept on the card.

    Returns:
        Whether the folder now has a card that the repository has not.
    """
    file = folder / CARD_FILE
    text = published or (file.read_text(encoding="utf-8") if file.exists() else None)
    if text is None or (card is not None and CARD_MARK in text):
        has_code = with_code or "custom_code" in (ModelCard(text or "").data.get("tags") or [])
        is_adapter = (folder / ADAPTER_FILE).exists() and not (folder / "config.json").exists()
        write_card(folder, repo_id, "adapter" if is_adapter else kind, card, tags, has_code and not is_adapter)
        return True
    if tags:
        file.write_text(add_tags(text, tags), encoding="utf-8")
    return bool(tags) or published is None


def share(
    folder: str | os.PathLike,
    repo_id: str,
    kind: str,
    card: Any = None,
    known: Mapping[Path, int] | None = None,
    with_code: bool = False,
    private: bool | None = None,
    token: Any = None,
    revision: str | None = None,
    tags: str | Sequence[str] | None = None,
    **commit: Any,
) -> Any:
    """Upload what `folder` holds beyond the files `known` there before, with a card (see `prepare_card`)."""
    api, fresh = HfApi(), dict(known or {})
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    forget_base_path(Path(folder))
    all_tags = [tags] if isinstance(tags, str) else list(tags or [])
    published = find_card(repo_id, token, revision)
    if prepare_card(Path(folder), repo_id, kind, card, all_tags, published, with_code):
        fresh.pop(Path(folder, CARD_FILE), None)
    return upload(folder, repo_id, fresh, token=token, revision=revision, **commit)


class SharedMixin:
    """`push_to_hub` with code and card; classes for model, processors and pipeline say how they are saved."""

    card_kind = "model"

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        *,
        with_code: bool = False,
        card: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Upload to the Hub, with a model card.

        Args:
            repo_id: The repository's name there; it is created where it is missing.
            commit_message: What the Hub shows beside the files.
            with_code: Upload the code too, for `trust_remote_code=True` where this package is not installed.
            card: What the card says, a `CardContents` or a dictionary of its fields. A card that is there stays,
                unless it is one of ours that nobody made their own.
            kwargs: `commit_description`, `private`, `token`, `revision`, `create_pr`, `tags`; others, such as
                `max_shard_size`, go to `save_pretrained`.
        """
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, with_code=with_code, **kwargs)  # type: ignore[attr-defined]
            hub |= {"repo_id": repo_id, "commit_message": commit_message}
            return self._share(folder, {}, with_code, card, hub)

    def _share(
        self,
        folder: str | os.PathLike,
        known: Mapping[Path, int],
        with_code: bool,
        card: Any,
        hub: dict[str, Any],
    ) -> Any:
        tags = hub.get("tags") or []
        options = {**hub, "tags": [*([tags] if isinstance(tags, str) else tags), *self._own_tags()]}
        has_code = self._has_code(with_code)
        return share(folder, kind=self.card_kind, card=card, known=known, with_code=has_code, **options)

    def _finish_saving(
        self,
        folder: str | os.PathLike,
        known: dict[Path, int],
        with_code: bool,
        push_to_hub: bool,
        card: Any,
        hub: dict[str, Any],
    ) -> None:
        """What `save_pretrained` does when all files are there: code, card, upload."""
        self._save_code(Path(folder), with_code)
        if push_to_hub:
            self._share(folder, known, with_code, card, hub)
        elif card is not None:
            has_code = self._has_code(with_code)
            prepare_card(Path(folder), hub["repo_id"], self.card_kind, card, with_code=has_code)

    def _has_code(self, with_code: bool) -> bool:
        """Whether code is saved: if asked to, or if it came from the Hub: then transformers has set `_auto_class`."""
        return with_code or self._auto_class is not None  # type: ignore[attr-defined]

    def _save_code(self, folder: Path, with_code: bool) -> None:
        for auto_map in self._auto_maps():
            save_code(folder, auto_map, self._has_code(with_code))

    def _auto_maps(self) -> list[AutoMap]:
        """The classes of what is saved."""
        raise NotImplementedError

    def _own_tags(self) -> Sequence[str]:
        """Tags for the card that were set before."""
        return ()


class SharedModel(SharedMixin):
    """A model; stands before `PreTrainedModel`."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        *,
        with_code: bool = False,
        card: Any = None,
        **kwargs: Any,
    ) -> None:
        """Save config, generation config and weights.

        Args:
            save_directory: A folder.
            is_main_process: False where another process saves too.
            state_dict: In place of the model's own.
            push_to_hub: Then upload it, with a model card.
            with_code: Save the code too, for `trust_remote_code=True` where this package is not installed.
            card: Write a model card, with this in it, as for `push_to_hub`.
            kwargs: `max_shard_size`, `variant` and whatever else transformers' `save_pretrained` takes; and options of
                `push_to_hub`, of which `repo_id` defaults to the folder's name.

        Raises:
            ValueError: A distributed checkpoint that is to be uploaded.
        """
        if push_to_hub and kwargs.get("distributed_checkpoint"):
            raise ValueError("distributed_checkpoint=True is for going on with a training; upload without it.")
        hub, known = take_hub_options(kwargs, save_directory), file_times(save_directory)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)  # type: ignore[misc]
        if self.should_save_on_this_rank(is_main_process):  # type: ignore[attr-defined]
            self._finish_saving(save_directory, known, with_code, push_to_hub, card, hub)

    def _own_tags(self) -> Sequence[str]:
        return self.model_tags or ()  # type: ignore[attr-defined]

    def _auto_maps(self) -> list[AutoMap]:
        names = MODEL_AUTO_CLASSES if self.can_generate() else MODEL_AUTO_CLASSES[:1]  # type: ignore[attr-defined]
        classes = {"AutoConfig": type(self.config), **dict.fromkeys(names, own_class(self))}  # type: ignore[attr-defined]
        return [("config.json", (), classes)]


class SharedProcessor(SharedMixin):
    """A processor; stands before `ProcessorMixin`."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        *,
        with_code: bool = False,
        card: Any = None,
        **kwargs: Any,
    ) -> list[str]:
        """Save the settings and all that belongs to them: tokenizer, chat template, VAE.

        Args:
            save_directory: A folder.
            push_to_hub: Then upload it, with a model card.
            with_code: Save the code too, for `trust_remote_code=True` where this package is not installed.
            card: Write a model card, with this in it, as for `push_to_hub`.
            kwargs: Options of `push_to_hub`; `repo_id` defaults to the folder's name.

        Returns:
            The file of the settings.

        Raises:
            ValueError: An unknown option.
        """
        hub, known = take_hub_options(kwargs, save_directory), file_times(save_directory)
        refuse_unknown(kwargs)
        files = super().save_pretrained(save_directory)  # type: ignore[misc]
        self.save_parts(save_directory)
        self._finish_saving(save_directory, known, with_code, push_to_hub, card, hub)
        return files

    def save_parts(self, folder: str | os.PathLike) -> None:
        """Save what transformers does not know of."""

    def _auto_maps(self) -> list[AutoMap]:
        file = "processor_config.json"
        image_processor = type(self.image_processor)  # type: ignore[attr-defined]
        auto_maps: list[AutoMap] = [
            (file, (), {"AutoProcessor": own_class(self)}),
            (file, ("image_processor",), {"AutoImageProcessor": image_processor}),
        ]
        # transformers names the processor here too, once it came from the Hub; a tokenizer with code keeps its own.
        if self.tokenizer._auto_class is None:  # type: ignore[attr-defined]
            auto_maps.append(("tokenizer_config.json", (), {}))
        return auto_maps


class SharedImageProcessor(SharedProcessor):
    """An image processor by itself; stands before `BaseImageProcessor`."""

    card_kind = "image_processor"

    def _auto_maps(self) -> list[AutoMap]:
        return [("preprocessor_config.json", (), {"AutoImageProcessor": own_class(self)})]


class SharedPipeline(SharedMixin):
    """A diffusers pipeline; stands before `DiffusionPipeline`.

    Its `save_pretrained` passes `with_code` on to model and processor, and ends in `_finish_saving`.
    """

    card_kind = "pipeline"

    def _has_code(self, with_code: bool) -> bool:
        return with_code or type(self).__module__.startswith("diffusers_modules.")

    def _save_code(self, folder: Path, with_code: bool) -> None:
        if self._has_code(with_code):
            save_pipeline_code(self, folder)


__all__ = [
    "SharedImageProcessor",
    "SharedModel",
    "SharedPipeline",
    "SharedProcessor",
    "file_times",
    "prepare_card",
    "refuse_unknown",
    "share",
    "take_hub_options",
]
