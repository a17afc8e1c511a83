"""`encode_pictures`: pictures -> latents, once, with a cache on disk that knows what it was made with."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.logging import tqdm

from ..data.pictures import CaptionedPicture, DataFault, DataReport
from ..processing import TransfusionProcessor


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedPictures:
    """Pictures that could be encoded, their scaled latents (C, h, w), and the report on those that could not."""

    pictures: list[CaptionedPicture]
    latents: list[Tensor]
    report: DataReport


def encode_pictures(
    pictures: Sequence[CaptionedPicture],
    processor: TransfusionProcessor,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 32,
) -> EncodedPictures:
    """Encode pictures with the processor's VAE, or take the latents from the cache.

    The cache is one safetensors file for the whole list, named by a hash over the VAE's weights and config, the image
    processor's settings and the bytes of every picture: a change of any of them encodes anew. It is written under
    another name and then renamed; a file that cannot be read is ignored and replaced.

    Args:
        pictures: What to encode.
        processor: Owns the VAE (None: pixels are the latents) and the size.
        cache_dir: Folder of the cache; None keeps nothing.
        batch_size: Pictures at once.

    Returns:
        The pictures with latents; those that cannot be decoded are left out, counted in the report and logged.

    Raises:
        ValueError: No picture can be used.
    """
    file = None if cache_dir is None else Path(cache_dir) / f"latents-{cache_key(pictures, processor)}.safetensors"
    found = None if file is None else _read(file)
    if found is None:
        found = _encode(pictures, processor, batch_size)
        if file is not None:
            _write(file, *found)
    latents, faults = found
    root = Path("." if cache_dir is None else cache_dir)
    report = DataReport(root, len(latents), tuple(DataFault(pictures[i].id, why) for i, why in sorted(faults.items())))
    if not latents:
        raise ValueError(f"None of the {len(pictures)} pictures can be encoded.\n{report}")
    if faults:
        logger.warning("%s", report)
    kept = sorted(latents)
    return EncodedPictures([pictures[index] for index in kept], [latents[index] for index in kept], report)


def cache_key(pictures: Sequence[CaptionedPicture], processor: TransfusionProcessor) -> str:
    """A hash over all that the latents depend on."""
    digest = hashlib.sha256(processor.image_processor.to_json_string().encode())
    if processor.vae is not None:
        # Without the private entries, which name the path it was loaded from.
        settings = {name: value for name, value in processor.vae.config.items() if not name.startswith("_")}
        digest.update(json.dumps([type(processor.vae).__name__, settings], sort_keys=True).encode())
        for name, value in sorted(processor.vae.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for picture in pictures:
        source = picture.source if isinstance(picture.source, bytes) else picture.source.read_bytes()
        digest.update(hashlib.sha256(source).digest())
    return digest.hexdigest()[:32]


def _encode(
    pictures: Sequence[CaptionedPicture], processor: TransfusionProcessor, batch_size: int
) -> tuple[dict[int, Tensor], dict[int, str]]:
    """Latents by index, and why there is none by index."""
    latents: dict[int, Tensor] = {}
    faults: dict[int, str] = {}
    progress = tqdm(total=len(pictures), desc="Encoding pictures", unit="picture")
    for indices in _batches(len(pictures), batch_size):
        pixels = {}
        for index in indices:
            try:
                pixels[index] = processor.image_processor(pictures[index].image)["pixel_values"][0]
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                faults[index] = str(error)
        encoded = processor.encode_images(list(pixels.values())) if pixels else []
        latents |= {index: latent.cpu() for index, latent in zip(pixels, encoded, strict=True)}
        progress.update(len(indices))
    progress.close()
    return latents, faults


def _batches(count: int, batch_size: int) -> Iterator[range]:
    for start in range(0, count, batch_size):
        yield range(start, min(start + batch_size, count))


def _write(file: Path, latents: dict[int, Tensor], faults: dict[int, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    tensors = {str(index): latent.contiguous() for index, latent in latents.items()}
    save_file(tensors, part, {"faults": json.dumps(faults)})
    part.replace(file)


def _read(file: Path) -> tuple[dict[int, Tensor], dict[int, str]] | None:
    """What `_write` wrote, or None where there is nothing that can be read."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            faults = json.loads(stored.metadata()["faults"])
            latents = {int(name): stored.get_tensor(name) for name in stored.keys()}
    except SafetensorError as error:
        logger.warning("The latent cache %s cannot be read (%s); the pictures are encoded again.", file, error)
        return None
    return latents, {int(index): reason for index, reason in faults.items()}


__all__ = ["EncodedPictures", "cache_key", "encode_pictures"]
