"""Timing: candidates in turn, forwards and backwards (A B C, C B A), medians, spread, and ratios of paired rounds."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch


QUIET = 0.05  # of a core: with more of it taken by other processes, a sample counts as contended


class Clock(Protocol):
    """Times one call."""

    name: str

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds that `call` takes."""


class CpuClock:
    """CPU time of this process, all its threads: with one thread it hardly depends on what else runs."""

    name = "CPU seconds"

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds that `call` takes."""
        start = time.process_time()
        call()
        return time.process_time() - start


class WallClock:
    """Time on the wall, for several threads on a quiet machine."""

    name = "wall seconds"

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds that `call` takes."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class CudaClock:
    """Device time between two events."""

    name = "device seconds"

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds that `call` takes, until the device has finished."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000


def make_clock(device: str, threads: int) -> Clock:
    """Events on a GPU, CPU time for one thread, the wall for several."""
    if device == "cuda":
        return CudaClock()
    return CpuClock() if threads == 1 else WallClock()


@dataclass
class Samples:
    """What was measured of one candidate, a value for each round: seconds, or bytes.

    Attributes:
        values: In the order of the rounds, warm-up left out.
        others: Cores that other processes used meanwhile; empty where the system does not say.
        first: Wall seconds of the first call, which compiles if anything does.
    """

    values: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    first: float = 0.0

    @property
    def median(self) -> float:
        """Of all rounds."""
        return statistics.median(self.values)

    @property
    def noise(self) -> float | None:
        """How far the medians of the even and of the odd rounds lie apart, as a share: the run timed twice."""
        if len(self.values) < 2:
            return None
        halves = [statistics.median(self.values[start::2]) for start in (0, 1)]
        return abs(halves[0] - halves[1]) / self.median if self.median else None

    @property
    def uncontended(self) -> int:
        """How many samples other processes left alone."""
        return sum(share < QUIET for share in self.others)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        summary = {"median": self.median, "min": min(self.values), "max": max(self.values), "noise": self.noise}
        quiet = self.uncontended if self.others else None
        return {"values": self.values, "others": self.others, "first": self.first, **summary, "uncontended": quiet}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Samples":
        """The inverse of `to_dict`."""
        return cls(record["values"], record["others"], record["first"])


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def marginal(more: Samples, fewer: Samples, units: int) -> Samples:
    """The cost of one of the `units` by which the calls of `more` are longer than those of `fewer`, round by round."""
    seconds = [(a - b) / units for a, b in zip(more.values, fewer.values, strict=True)]
    return Samples(seconds, [max(pair) for pair in zip(more.others, fewer.others, strict=True)], more.first)


def per_unit(samples: Samples, units: float) -> Samples:
    """The cost of one of the `units` of each call."""
    return Samples([seconds / units for seconds in samples.values], samples.others, samples.first)


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name): forwards in even rounds and backwards in odd ones."""
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            yield index, name


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    clock: Clock,
    rounds: int,
    warmup: int = 2,
    say: Callable[[str], None] = lambda line: None,
    failures: dict[str, str] | None = None,
) -> dict[str, Samples]:
    """Time all `candidates` in turn, after `warmup` calls of each.

    What fails while it warms up, as by lack of memory, is left out and put into `failures`; without those it raises.
    """
    found: dict[str, Samples] = {}
    for name, call in candidates.items():
        try:
            found[name] = Samples(first=warm_up(call, warmup))
            say(f"  {name}: first call {found[name].first:.2f} s")
        except (AssertionError, MemoryError, NotImplementedError, RuntimeError) as error:
            if failures is None:
                raise
            failures[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[
                :160
            ]
            say(f"  {name}: {failures[name]}")
    for _, name in turns(list(found), rounds):
        watch = OthersWatch()
        found[name].values.append(clock(candidates[name]))
        if (share := watch.share()) is not None:
            found[name].others.append(share)
    for name, samples in found.items():
        say(f"  {name}: {1000 * samples.median:.2f} ms")
    return found


def warm_up(call: Callable[[], Any], times: int) -> float:
    """Wall seconds of the first of several calls."""
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    for _ in range(times - 1):
        call()
    return first


def busy_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    """CPU seconds that all processes of the machine have used, where the system says."""
    try:
        fields = [int(value) for value in stat.read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    idle = sum(fields[3:5])  # and waiting for disks
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")


class OthersWatch:
    """Counts the cores that other processes use from now on."""

    def __init__(self) -> None:
        self.start = (busy_seconds(), time.process_time(), time.perf_counter())

    def share(self) -> float | None:
        """Cores used by others since the start; None where the system does not say."""
        before, now = self.start[0], busy_seconds()
        if before is None or now is None:
            return None
        own, wall = time.process_time() - self.start[1], time.perf_counter() - self.start[2]
        tick = 1 / os.sysconf("SC_CLK_TCK")  # the counters' unit: short calls see nothing of others
        return max(0.0, now - before - own - tick) / max(wall, tick)


__all__ = [
    "Clock",
    "CpuClock",
    "CudaClock",
    "OthersWatch",
    "Samples",
    "WallClock",
    "interleave",
    "make_clock",
    "marginal",
    "paired_ratio",
    "per_unit",
    "turns",
]
