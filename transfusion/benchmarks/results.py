"""What a measurement leaves: one record for each system and workload, kept as JSON, and the ratios between them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .timing import Samples, paired_ratio


OURS, PEER, PLAIN, FLOOR = "ours", "peer", "plain", "floor"


@dataclass(frozen=True)
class Place:
    """What was measured: results of one place compare.

    Attributes:
        suite, workload, size, dtype: By name; empty where it does not matter.
        unit: What a value is the cost of: `step`, `token`, `evaluation`, `call`; or `MB`, which is a value by itself.
    """

    suite: str
    workload: str
    size: str
    dtype: str
    unit: str


@dataclass(frozen=True)
class Result:
    """One system at one workload.

    Attributes:
        place: What was measured.
        system: Which one, beginning with `ours`, `peer`, `plain` or `floor`.
        samples: None where it failed.
        parameters: Of the model.
        tokens: Real ones (no padding) of a unit.
        flops: Of a unit, by the formula of `flops.py`.
        bytes: Read by a unit at least.
        note: What else is to be said, as why it failed.
    """

    place: Place
    system: str
    samples: Samples | None
    parameters: int | None = None
    tokens: int | None = None
    flops: int | None = None
    bytes: int | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"samples": self.samples.to_dict() if self.samples else None}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Result":
        """The inverse of `to_dict`."""
        samples = record["samples"]
        read = {"place": Place(**record["place"]), "samples": Samples.from_dict(samples) if samples else None}
        return cls(**{**record, **read})


def grouped(results: Iterable[Result]) -> dict[Place, list[Result]]:
    """Results that compare, in the order of the first of each group."""
    groups: dict[Place, list[Result]] = {}
    for result in results:
        groups.setdefault(result.place, []).append(result)
    return groups


def fastest(results: Sequence[Result], system: str) -> Result | None:
    """The one of `system` (its name's beginning) that costs least: a peer is met where it is best."""
    measured = [result for result in results if result.system.startswith(system) and result.samples]
    return min(measured, key=lambda result: result.samples.median if result.samples else 0.0, default=None)


def ratio(above: Result | None, below: Result | None) -> float | None:
    """How much more `above` costs, as the median over rounds that both were timed in."""
    if above is None or below is None or above is below or not above.samples or not below.samples:
        return None
    pair = (above.samples.values, below.samples.values)
    if len(pair[0]) != len(pair[1]):
        return above.samples.median / below.samples.median
    return paired_ratio(*pair)


def ratios(results: Iterable[Result]) -> dict[str, float]:
    """By name, how much more the fastest peer and the plain model cost than each system of ours."""
    found = {}
    for place, members in grouped(results).items():
        name = " | ".join(asdict(place).values())
        for result in members:
            for other in (PEER, PLAIN):
                value = ratio(fastest(members, other), result) if result.system.startswith(OURS) else None
                if value is not None:
                    found[f"{name}: {other} / {result.system}"] = value
    return found


def regressions(old: Iterable[Result], new: Iterable[Result], tolerance: float = 0.1) -> list[str]:
    """Ratios of `new` that are lower than those of `old` by more than `tolerance`; they move less than times do."""
    before = ratios(old)
    return [
        f"{name}: {before[name]:.2f} before, {value:.2f} now"
        for name, value in ratios(new).items()
        if name in before and value < before[name] * (1 - tolerance)
    ]


def write_record(file: Path, record: dict[str, Any], results: Sequence[Result]) -> None:
    """Write what there is, as a whole or not at all."""
    part = file.with_suffix(".part")
    content = {**record, "ratios": ratios(results), "results": [result.to_dict() for result in results]}
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(file)


def read_record(file: Path) -> tuple[dict[str, Any], list[Result]]:
    """What `write_record` wrote."""
    content = json.loads(file.read_text())
    results = [Result.from_dict(record) for record in content.pop("results")]
    return content, results


__all__ = ["Place", "Result", "fastest", "grouped", "ratio", "ratios", "read_record", "regressions", "write_record"]
