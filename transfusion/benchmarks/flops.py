"""How much work there is at least, by formula, and how fast the machine does it at best.

The work of a training step is 6 * N * T + 12 * layers * heads * head_dim * P: N parameters in matrix products, each at
the T rows it really runs on, and P the pairs of query and key that the mask allows, counted exactly. A third of it is
the forward pass. What checkpointing computes again does not count.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .workloads import PATCH_DIM, VOCABULARY, Document, Size, num_patches, num_tokens


FREQUENCIES = 256  # of the timestep embedding


def visible_pairs(document: Document) -> int:
    """Pairs (query, key) that the mask of one document allows: causal, and all within each image."""
    length = num_tokens(document)
    images = [part[0] * part[1] for part in document if isinstance(part, tuple)]
    return length * (length + 1) // 2 + sum(n * (n - 1) // 2 for n in images)


def layer_parameters(size: Size, inner: int | None = None) -> int:
    """Parameters of one layer that stand in matrix products."""
    return 4 * size.width * size.heads * size.head_dim + 3 * size.width * (inner or size.inner)


def num_text_targets(document: Document) -> int:
    """Positions where the language head has to run: text and end-of-image, whose next token is learned."""
    return sum(part if isinstance(part, int) else 1 for part in document)


def training_flops(size: Size, documents: Iterable[Document], inner: int | None = None) -> int:
    """Of forward and backward, without the optimizer."""
    products = pairs = 0
    for document in documents:
        num_images = sum(isinstance(part, tuple) for part in document)
        products += size.layers * layer_parameters(size, inner) * num_tokens(document)
        products += size.width * VOCABULARY * num_text_targets(document)
        products += 2 * size.width * PATCH_DIM * num_patches(document)
        products += (FREQUENCIES + size.width) * size.width * num_images
        pairs += visible_pairs(document)
    return 6 * products + 12 * size.layers * size.heads * size.head_dim * pairs


def denoising_flops(size: Size, prefixes: Sequence[int], patches: int, inner: int | None = None) -> int:
    """Of one evaluation: an image of `patches` (in a branch of guidance) after each of the cached `prefixes`."""
    products = size.layers * layer_parameters(size, inner) * patches + 2 * size.width * PATCH_DIM * patches
    pairs = sum(patches * (prefix + patches) for prefix in prefixes)
    return len(prefixes) * 2 * products + 4 * size.layers * size.heads * size.head_dim * pairs


def decoding_flops(size: Size, length: int, batch: int, inner: int | None = None) -> int:
    """Of one token for each of `batch` rows after `length` cached positions."""
    products = size.layers * layer_parameters(size, inner) + size.width * VOCABULARY
    return batch * (2 * products + 4 * size.layers * size.heads * size.head_dim * length)


def decoding_bytes(size: Size, length: int, batch: int, itemsize: int, inner: int | None = None) -> int:
    """Read for one token for each of `batch` rows: all weights once, and the keys and values of `length` positions."""
    weights = size.layers * layer_parameters(size, inner) + size.width * VOCABULARY
    cached = 2 * size.layers * size.heads * size.head_dim * length * batch
    return itemsize * (weights + cached)


def best_seconds(call: Callable[[], Any], device: str, seconds: float = 1.0) -> float:
    """The median of the faster half of the calls that fit into `seconds`."""
    times: list[float] = []
    call()
    while sum(times) < seconds or len(times) < 4:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter() if device == "cuda" else time.process_time()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() if device == "cuda" else time.process_time()) - start)
    times.sort()
    return max(statistics.median(times[: len(times) // 2]), 1e-9)


def matmul_rate(dtype: torch.dtype, device: str, side: int = 1024) -> float:
    """FLOP/s of a square matrix product, per CPU second or on the device."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / best_seconds(lambda: torch.mm(left, right, out=out), device)


def read_rate(device: str, megabytes: int = 256) -> float:
    """Bytes/s that can be read: the best of a sum, a matrix-vector product, and on a GPU the two ways of a copy."""
    data = torch.randn(megabytes * 2**18 // 4096, 4096, device=device)
    vector = torch.randn(4096, device=device)
    moved = data.numel() * data.element_size()
    rates = [moved / best_seconds(data.sum, device), moved / best_seconds(lambda: torch.mv(data, vector), device)]
    if device == "cuda":
        target = torch.empty_like(data)
        rates.append(2 * moved / best_seconds(lambda: target.copy_(data), device))
    return max(rates)


@dataclass(frozen=True)
class Peak:
    """What the machine does at best, with the threads it has been given.

    Attributes:
        matmul: FLOP/s by the name of a dtype.
        read: Bytes/s.
    """

    matmul: dict[str, float]
    read: float

    @classmethod
    def measure(cls, device: str) -> "Peak":
        """Takes a few seconds."""
        sides = (4096, 8192) if device == "cuda" else (1024, 2048)
        rates = {name: max(matmul_rate(dtype, device, side) for side in sides) for name, dtype in DTYPES.items()}
        return cls(rates, read_rate(device, 2048 if device == "cuda" else 256))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


__all__ = [
    "DTYPES",
    "Peak",
    "best_seconds",
    "decoding_bytes",
    "decoding_flops",
    "denoising_flops",
    "layer_parameters",
    "matmul_rate",
    "num_text_targets",
    "read_rate",
    "training_flops",
    "visible_pairs",
]
