"""`build_rows`: what a `DataSpec` states -> rows for the collator."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from ..data.documents import Document
from ..data.pictures import DataFault
from ..data.sources import Documents, open_source
from ..data.specs import DataSpec, SourceSpec
from ..data.streams import open_stream
from ..data.survey import Survey, cached_lengths, cached_survey, require_usable
from ..processing import TransfusionProcessor
from .document_rows import DocumentRows, RowMaker, StreamRows
from .latent_cache import LatentStore, encode_missing, open_latents, settings_key


def build_rows(
    spec: DataSpec,
    processor: TransfusionProcessor,
    seed: int = 0,
    num_passes: int | None = None,
    device: torch.device | str | None = None,
) -> DocumentRows | StreamRows:
    """Open the sources of a specification, look at every document once, encode the pictures, and mix.

    Pictures that are not in a cache are encoded where they are read: leave the VAE on the CPU if workers do that.
    With several processes and a `cache_dir`, let the first of them do it before the others, which then find what it
    made: `with training_arguments.main_process_first(): build_rows(...)`.

    Args:
        spec: What to train on.
        processor: Makes token ids, labels and latents.
        seed: Of all orders and choices.
        num_passes: Over a stream; None: without end.
        device: Where the VAE encodes what is cached; it goes back to the CPU. None: where it is.

    Returns:
        A dataset of which `reports` says what was found; of a stream, one to iterate over.

    Raises:
        ValueError: Sources that cannot be read, columns that are not there, too many faults.
    """
    maker = RowMaker(processor, spec.caption_first, spec.buckets, spec.flip, spec.crop)
    if spec.is_stream:
        stream = open_stream(spec.sources[0], spec.shuffle_block, seed)
        return StreamRows(stream, maker, num_passes, spec.max_faulty, spec.strict, spec.max_length, seed)
    store = None if spec.cache_dir is None or spec.augments else open_latents(spec.cache_dir, processor, spec.buckets)
    sources, surveys = [], []
    for source in spec.sources:
        documents = open_source(source, spec.cache_dir)
        found = _survey(documents, source, spec, maker, decode=store is None)
        if store is not None:
            found = _encode(documents, found, store, maker, device)
        if spec.max_length is not None:
            found = found.without_long(_too_long(documents, found, maker, spec.max_length, spec.cache_dir))
        sources.append(documents)
        surveys.append(found)
    reports = [found.report(documents.records.path) for documents, found in zip(sources, surveys, strict=True)]
    require_usable(reports, spec.max_faulty, spec.strict)
    weights = [source.weight for source in spec.sources if source.weight is not None] or None
    maker = RowMaker(processor, spec.caption_first, spec.buckets, spec.flip, spec.crop, store)
    return DocumentRows(sources, surveys, maker, weights, spec.epoch_rows, reports, seed)


def _survey(documents: Documents, source: SourceSpec, spec: DataSpec, maker: RowMaker, decode: bool) -> Survey:
    """Look at every document; with `decode` at every pixel too, as nothing else will before training."""

    def check(document: Document) -> None:
        for picture in document.pictures:
            maker.pixels(picture)

    limit = maker.processor.image_processor.max_image_pixels
    checked = settings_key(maker.processor, spec.buckets) if decode else ""
    return cached_survey(documents, source, spec.cache_dir, limit, check if decode else None, checked)


def _encode(
    documents: Documents, found: Survey, store: LatentStore, maker: RowMaker, device: torch.device | str | None
) -> Survey:
    """Encode what the store lacks; the survey without the rows of pictures that cannot be."""

    def pixels(row: int, number: int) -> np.ndarray:
        return maker.pixels(documents[row].pictures[number])

    def jobs() -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
        for row, keys in zip(found.rows, found.pictures, strict=True):
            for number, key in enumerate(keys):
                yield key.digest, partial(pixels, row, number)

    with _vae_on(device, maker.processor):
        encode_missing(store, jobs(), maker.processor)
    faults = {}
    for row, keys in zip(found.rows, found.pictures, strict=True):
        if reasons := [store.faults[key.digest] for key in keys if key.digest in store.faults]:
            faults[row] = DataFault(documents.records.where(row), reasons[0])
    return found.without(faults)


@contextmanager
def _vae_on(device: torch.device | str | None, processor: TransfusionProcessor) -> Iterator[None]:
    """The processor's VAE on a device, and on the CPU afterwards; None leaves it where it is."""
    if device is None or processor.vae is None:
        yield
        return
    processor.vae.to(device)
    try:
        yield
    finally:
        processor.vae.to("cpu")


def _too_long(
    documents: Documents, found: Survey, maker: RowMaker, max_length: int, cache_dir: str | None
) -> dict[int, DataFault]:
    """Why rows are left out that would be longer than `max_length`, by row."""

    def measure(place: int) -> int:
        return maker.longest(documents[found.rows[place]], found.pictures[place])

    lengths = cached_lengths(found, cache_dir, maker.length_key, measure)
    return {
        row: DataFault(documents.records.where(row), f"{length} tokens, and max_length is {max_length}")
        for row, length in zip(found.rows, lengths, strict=True)
        if length > max_length
    }


__all__ = ["build_rows"]
