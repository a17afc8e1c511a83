"""Latents of pictures, encoded once and kept in shards on disk.

A shard is a safetensors file with the latents of some hundred pictures, each under a hash of the picture's bytes, and
in its metadata a checksum of each and the reasons why others have none. All shards of one folder were made with the
same VAE, transform, sizes and dtype, of which the folder's name is a hash.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar
from uuid import uuid4

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.logging import tqdm

from ..data.pictures import DataFault, DataReport
from ..data.survey import PICTURE_ERRORS
from ..processing import TransfusionProcessor


logger = logging.getLogger(__name__)

SHARD_SIZE = 512


class Encodable(Protocol):
    """A picture: its file or bytes, and decoded."""

    @property
    def id(self) -> str:
        """Its name, for reports."""
        ...

    @property
    def source(self) -> Path | bytes:
        """Where its bytes are, or they themselves."""
        ...

    @property
    def image(self) -> Image.Image:
        """The picture in RGB."""
        ...


P = TypeVar("P", bound=Encodable)


@dataclass(frozen=True)
class EncodedPictures(Generic[P]):
    """Pictures that could be encoded, their scaled latents (C, h, w), and the report on those that could not."""

    pictures: list[P]
    latents: Sequence[Tensor]
    report: DataReport


class LatentStore:
    """Latents (C, h, w) by key, in shards which are memory-mapped when one of theirs is read.

    Args:
        folder: Of the shards, each of which is checked when one of its keys is first asked for. One that cannot be
            read, or has another checksum, is named in a warning, taken for not there, and deleted with the next shard
            that is written, unless it is whole by then. None: latents are kept in memory.
    """

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.faults: dict[str, str] = {}
        self._memory: dict[str, Tensor] = {}
        self._shard_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._checked: set[Path] = set()
        self._broken: list[Path] = []
        self._open: dict[Path, Any] = {}
        for file in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            self._add(file)

    def __contains__(self, key: str) -> bool:
        if key in self._shard_of and not self._is_whole(self._shard_of[key]):
            return False
        return key in self._shapes or key in self.faults

    def __getitem__(self, key: str) -> Tensor:
        if key in self._memory:
            return self._memory[key]
        file = self._shard_of[key]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt").__enter__()
        return self._open[file].get_tensor(key)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a latent, without reading it."""
        return self._shapes[key]

    def write(self, latents: dict[str, Tensor], faults: dict[str, str]) -> None:
        """Add a shard, named by its pictures: written under another name, then renamed."""
        if self.folder is None:
            self._memory |= latents
            self._shapes |= {key: tuple(latent.shape) for key, latent in latents.items()}
            self.faults |= faults
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        names = ",".join(sorted([*latents, *faults]))
        file = self.folder / f"{hashlib.sha256(names.encode()).hexdigest()[:32]}.safetensors"
        part = file.with_suffix(f".{uuid4().hex}.part")
        tensors = {key: latent.contiguous() for key, latent in latents.items()}
        sums = {key: _checksum(latent) for key, latent in tensors.items()}
        save_file(tensors, part, {"faults": json.dumps(faults), "checksums": json.dumps(sums)})
        part.replace(file)
        self._add(file)
        self._is_whole(file)
        self._delete_broken(file)

    def _add(self, file: Path) -> None:
        try:
            shapes, faults = _read_shard(file)
        except _UNREADABLE as error:
            self._set_aside(file, error)
            return
        self._shapes |= shapes
        self._shard_of |= dict.fromkeys(shapes, file)
        self.faults |= faults

    def _is_whole(self, file: Path) -> bool:
        """Whether all latents of a shard are what was written; those of one that is not are not there any more."""
        if file in self._checked:
            return True
        try:
            _read_shard(file, check=True)
        except _UNREADABLE as error:
            self._set_aside(file, error)
            for key in [key for key, shard in self._shard_of.items() if shard == file]:
                del self._shapes[key], self._shard_of[key]
            return False
        self._checked.add(file)
        return True

    def _set_aside(self, file: Path, error: Exception) -> None:
        logger.warning("The latents in %s cannot be read (%s); the pictures are encoded again.", file, error)
        self._broken.append(file)

    def _delete_broken(self, written: Path) -> None:
        """Delete the broken shards but `written`; another process may have written them anew meanwhile."""
        broken = [file for file in self._broken if file != written]
        self._broken.clear()
        for file in broken:
            try:
                _read_shard(file, check=True)
            except OSError:  # gone, or not to be read for now
                continue
            except _UNREADABLE:
                file.unlink(missing_ok=True)
            else:
                self._add(file)


_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError)


def _read_shard(file: Path, check: bool = False) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and faults of a shard, from its header alone unless `check` compares all checksums."""
    with safe_open(file, framework="pt") as shard:
        sums, faults = (json.loads(shard.metadata()[name]) for name in ("checksums", "faults"))
        shapes = {key: tuple(shard.get_slice(key).get_shape()) for key in shard.keys()}
        for key in shapes if check else ():
            if _checksum(shard.get_tensor(key)) != sums[key]:
                raise ValueError(f"{key} has another checksum")
    return shapes, faults


class StoredLatents(Sequence[Tensor]):
    """Latents of a store in a given order, read when they are asked for."""

    def __init__(self, store: LatentStore, keys: list[str]) -> None:
        self.store, self.keys = store, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return StoredLatents(self.store, self.keys[index])
        return self.store[self.keys[index]]


def encode_pictures(
    pictures: Sequence[P],
    processor: TransfusionProcessor,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 32,
) -> EncodedPictures[P]:
    """Encode pictures with the processor's VAE, or take the latents from the cache.

    The cache holds shards of pictures in a folder named by a hash over the VAE's weights, config and dtype and the
    image processor's settings; a picture is found by its bytes, so only new ones are encoded. Shards are written under
    another name and then renamed; one that cannot be read is ignored and replaced.

    Args:
        pictures: What to encode.
        processor: Owns the VAE (None: pixels are the latents) and the size.
        cache_dir: Folder of the cache; None keeps nothing on disk, and all latents in memory.
        batch_size: Pictures at once; fewer where memory does not suffice.

    Returns:
        The pictures with latents, which are read from the cache when they are asked for; those that cannot be decoded
        are left out, counted in the report and logged.

    Raises:
        ValueError: No picture can be used.
    """

    store = open_latents(cache_dir, processor)
    keys: dict[int, str] = {}
    faults: dict[int, str] = {}
    for index, picture in enumerate(pictures):
        try:
            keys[index] = _digest(picture)
        except OSError as error:
            faults[index] = str(error)

    def pixels(picture: P) -> np.ndarray:
        return processor.image_processor(picture.image)["pixel_values"][0]

    encode_missing(store, ((key, partial(pixels, pictures[i])) for i, key in keys.items()), processor, batch_size)
    faults |= {index: store.faults[key] for index, key in keys.items() if key in store.faults}
    kept = [index for index in range(len(pictures)) if index not in faults]
    root = Path("." if cache_dir is None else cache_dir)
    report = DataReport(root, len(kept), tuple(DataFault(pictures[i].id, faults[i]) for i in sorted(faults)))
    if not kept:
        raise ValueError(f"None of the {len(pictures)} pictures can be encoded.\n{report}")
    if faults:
        logger.warning("%s", report)
    return EncodedPictures(
        [pictures[index] for index in kept], StoredLatents(store, [keys[index] for index in kept]), report
    )


def open_latents(
    cache_dir: str | os.PathLike | None, processor: TransfusionProcessor, sizes: Sequence[tuple[int, int]] = ()
) -> LatentStore:
    """The latents that a processor makes, of a cache folder, or of none: then they are kept in memory.

    Args:
        cache_dir: Folder of the cache.
        processor: Owns the VAE.
        sizes: Sizes that pictures are brought to, in place of the image processor's.
    """
    return LatentStore(None if cache_dir is None else Path(cache_dir) / f"latents-{settings_key(processor, sizes)}")


def settings_key(processor: TransfusionProcessor, sizes: Sequence[tuple[int, int]] = ()) -> str:
    """A hash over all that latents depend on beside their pictures."""
    digest = hashlib.sha256(processor.image_processor.to_json_string().encode())
    digest.update(json.dumps(list(sizes)).encode())
    if processor.vae is not None:
        # Without the private entries, which name the path it was loaded from.
        settings = {name: value for name, value in processor.vae.config.items() if not name.startswith("_")}
        digest.update(json.dumps([type(processor.vae).__name__, settings], sort_keys=True).encode())
        for name, value in sorted(processor.vae.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def encode_missing(
    store: LatentStore,
    pictures: Iterable[tuple[str, Callable[[], np.ndarray]]],
    processor: TransfusionProcessor,
    batch_size: int = 32,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Encode the pictures that the store lacks, shard by shard.

    Args:
        store: Where latents go, and why there is none of a picture.
        pictures: Key of each, and what makes its pixels (3, H, W).
        processor: Encodes them.
        batch_size: Pictures at once; fewer where memory does not suffice.
        shard_size: Pictures of a shard.
    """
    missing = _missing(store, pictures)
    progress = None
    while chunk := list(islice(missing, shard_size)):
        if progress is None:  # no bar where nothing is missing
            progress = tqdm(desc="Encoding pictures", unit="picture")
        latents: dict[str, Tensor] = {}
        faults: dict[str, str] = {}
        for start in range(0, len(chunk), batch_size):
            pixels = {}
            for key, make in chunk[start : start + batch_size]:
                try:
                    pixels[key] = make()
                except OSError as error:  # may be read another time, so it is not written down
                    store.faults[key] = str(error)
                except PICTURE_ERRORS as error:
                    faults[key] = str(error)
            _encode(pixels, processor, latents, faults)
            progress.update(len(chunk[start : start + batch_size]))
        store.write(latents, faults)
    if progress is not None:
        progress.close()


def _missing(
    store: LatentStore, pictures: Iterable[tuple[str, Callable[[], np.ndarray]]]
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """The pictures that are not in the store, each once."""
    seen: set[str] = set()
    for key, make in pictures:
        if key not in store and key not in seen:
            seen.add(key)
            yield key, make


def _encode(
    pixels: dict[str, np.ndarray], processor: TransfusionProcessor, latents: dict[str, Tensor], faults: dict[str, str]
) -> None:
    """Encode a batch into `latents`, in halves where memory does not suffice or a picture has a fault."""
    if not pixels:
        return
    try:
        encoded = processor.encode_images(list(pixels.values()))
    except (ValueError, RuntimeError) as error:
        lacks_memory = should_reduce_batch_size(error)
        if not lacks_memory and not isinstance(error, ValueError) or lacks_memory and len(pixels) == 1:
            raise
        if len(pixels) == 1:
            faults |= dict.fromkeys(pixels, str(error))
            return
        clear_device_cache(garbage_collection=True)
        halves = list(pixels)[: len(pixels) // 2], list(pixels)[len(pixels) // 2 :]
    else:
        latents |= {key: latent.cpu() for key, latent in zip(pixels, encoded, strict=True)}
        return
    for half in halves:
        _encode({key: pixels[key] for key in half}, processor, latents, faults)


def _digest(picture: Encodable) -> str:
    source = picture.source if isinstance(picture.source, bytes) else picture.source.read_bytes()
    return hashlib.sha256(source).hexdigest()[:32]


def _checksum(latent: Tensor) -> int:
    return zlib.crc32(latent.view(-1).view(torch.uint8).numpy())


__all__ = [
    "EncodedPictures",
    "LatentStore",
    "StoredLatents",
    "encode_missing",
    "encode_pictures",
    "open_latents",
    "settings_key",
]
