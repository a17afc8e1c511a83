"""What is fastest where: precision, attention, packing and compilation of a training, chosen without asking."""

import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._triton import has_triton

from ..modeling_transfusion import TransfusionForMultimodalGeneration


# Up to so many positions a CPU attends faster by plain matrix products than by the fused kernel.
SHORT_ROW = 128
# From this share of padding on, packing is worth it.
RAGGED = 0.25
# What compiling costs on a CPU, half a minute to two, is won back in trainings of at least so long.
LONG_MINUTES, LONG_STEPS = 10.0, 2000


def bf16_is_faster() -> bool:
    """Whether matrix products of the demo's size are faster in bfloat16 here: some processors only emulate it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(1024, 256).to(dtype), torch.randn(256, 768).to(dtype)
        times = []
        for _ in range(12):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return torch.cuda.is_available() or seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def choose_attention(model: TransfusionForMultimodalGeneration, longest: int, wanted: str | None = None) -> None:
    """Let `model` use what is `wanted`, or what is fastest in training here for rows of up to `longest` positions.

    On CUDA devices that is flex attention, which skips the blocks that the mask hides. On a CPU the fused kernel costs
    half as much again as attention written out where rows have a few dozen positions (docs/experiments.md), and less
    where they are long or packed.
    """
    if wanted is None and torch.cuda.is_available():
        wanted = "flex_attention" if can_compile() else "sdpa"
    elif wanted is None:
        wanted = "eager" if longest <= SHORT_ROW else "sdpa"
    model.set_attn_implementation(wanted)


def sample_lengths(rows: Any, count: int = 256) -> list[int]:
    """Positions of `count` rows, drawn without order: at equal steps a mixture may give one source alone."""
    chosen = random.Random(0).sample(range(len(rows)), min(count, len(rows)))
    return [len(rows[index]["input_ids"]) for index in chosen]


def choose_packing(lengths: Sequence[int], batch_size: int) -> int | None:
    """How long packed rows are to be, or None where padding costs less: rows are short, or of about one length.

    Args:
        lengths: Of the rows, in positions.
        batch_size: Rows of a batch, all of which then lie in one.
    """
    longest, mean = max(lengths), sum(lengths) / len(lengths)
    is_ragged = mean < (1 - RAGGED) * longest
    return batch_size * longest if is_ragged and longest > SHORT_ROW else None


def is_long(max_minutes: float | None, max_steps: int | None) -> bool:
    """Whether a training of one of both lasts long enough for compiling to pay on a CPU."""
    if max_minutes is not None:
        return max_minutes >= LONG_MINUTES
    return max_steps is not None and max_steps >= LONG_STEPS


def can_compile() -> bool:
    """Whether torch can compile here: it needs a C++ compiler, or for a GPU Triton and a C compiler."""
    if torch.cuda.is_available():
        return has_triton() and any(shutil.which(os.environ.get("CC", name)) for name in ("cc", "gcc", "clang"))
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def compile_for_training(
    model: TransfusionForMultimodalGeneration, wanted: bool | None, max_minutes: float | None, max_steps: int | None
) -> None:
    """Compile the layers of `model` if that is `wanted`; if this is left open, where it makes the training shorter.

    Raises:
        ValueError: It is wanted, and there is no compiler.
    """
    if wanted and not can_compile():
        raise ValueError(
            "compile=True, and there is no C++ compiler here, or for a GPU no Triton; install it, or leave this out."
        )
    if wanted is None:
        wanted = can_compile() and (torch.cuda.is_available() or is_long(max_minutes, max_steps))
    if wanted:
        # On a CPU, batches are as long as their longest row: one graph for all lengths, none for the first alone.
        model.compile_layers(dynamic=None if torch.cuda.is_available() else True)


@contextmanager
def not_compiling() -> Iterator[None]:
    """Within this, compiled layers run as written on a CPU: for shapes that come once, a graph would take longer."""
    if torch.cuda.is_available():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


__all__ = [
    "bf16_is_faster",
    "can_compile",
    "choose_attention",
    "choose_packing",
    "compile_for_training",
    "is_long",
    "not_compiling",
    "sample_lengths",
]
