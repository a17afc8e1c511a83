import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transfusion.benchmarks import timing
from transfusion.benchmarks.timing import (
    CpuClock,
    OthersWatch,
    Samples,
    WallClock,
    interleave,
    make_clock,
    marginal,
    paired_ratio,
    per_unit,
    turns,
)


class FakeClock:
    """Says what each call of a name costs, in the order of the calls."""

    name = "fake"

    def __init__(self, costs: dict[str, list[float]]) -> None:
        self.costs, self.calls = costs, list[str]()

    def __call__(self, call: Callable[[], Any]) -> float:
        name = call()
        self.calls.append(name)
        return self.costs[name].pop(0)


def test_candidates_take_turns_forwards_and_backwards() -> None:
    order = "".join(name for _, name in turns("ABC", 3))
    assert order == "ABCCBAABC"
    clock = FakeClock({"A": [1, 2], "B": [3, 5]})
    found = interleave({"A": lambda: "A", "B": lambda: "B"}, clock, rounds=2)
    assert clock.calls == ["A", "B", "B", "A"]
    assert found["A"].values == [1, 2] and found["B"].values == [3, 5]


def test_warm_up_is_not_timed() -> None:
    calls: list[str] = []

    def call() -> str:
        calls.append("A")
        return "A"

    interleave({"A": call}, FakeClock({"A": [1.0] * 3}), rounds=3, warmup=2)
    assert len(calls) == 5


def test_what_fails_is_left_out_and_named() -> None:
    def fails() -> None:
        raise MemoryError("no room\nand more")

    failures: dict[str, str] = {}
    clock = FakeClock({"A": [1.0]})
    found = interleave({"A": lambda: "A", "B": fails}, clock, rounds=1, failures=failures)
    assert list(found) == ["A"] and failures == {"B": "MemoryError: no room"}
    with pytest.raises(MemoryError):
        interleave({"B": fails}, clock, rounds=1)


def test_ratio_is_the_median_of_rounds_and_not_the_ratio_of_medians() -> None:
    assert paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0


def test_summary_of_samples() -> None:
    samples = Samples([1.0, 2.0, 3.0, 2.0], others=[0.0, 0.5, 0.01, 0.2])
    assert samples.median == 2.0 and samples.uncontended == 2
    assert samples.noise == 0.0  # 1 and 3 in even rounds, 2 and 2 in odd ones
    assert Samples([1.0, 2.0]).noise == pytest.approx(1 / 1.5)
    assert Samples([1.0]).noise is None
    assert Samples.from_dict(samples.to_dict()) == samples


def test_cost_of_one_more_unit_and_of_each() -> None:
    fewer, more = Samples([1.0, 2.0], [0.0, 0.3]), Samples([5.0, 10.0], [0.1, 0.0], first=9.0)
    each = marginal(more, fewer, units=4)
    assert each.values == [1.0, 2.0] and each.others == [0.1, 0.3] and each.first == 9.0
    assert per_unit(more, 5).values == [1.0, 2.0]


def test_cpu_time_does_not_pass_while_waiting() -> None:
    assert CpuClock()(lambda: time.sleep(0.05)) < 0.04 < WallClock()(lambda: time.sleep(0.05))


@pytest.mark.parametrize(("threads", "name"), [(1, "CPU seconds"), (2, "wall seconds")])
def test_one_thread_is_timed_by_the_processor(threads: int, name: str) -> None:
    assert make_clock("cpu", threads).name == name
    assert make_clock("cuda", threads).name == "device seconds"


def test_work_of_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1 2 3\n")
    ticks = timing.os.sysconf("SC_CLK_TCK")
    assert timing.busy_seconds(stat) == 200 / ticks
    assert timing.busy_seconds(tmp_path / "absent") is None
    monkeypatch.setattr(timing, "busy_seconds", lambda: 0.0)
    watch = OthersWatch()
    monkeypatch.setattr(timing, "busy_seconds", lambda: 1000.0)
    share = watch.share()
    assert share is not None and share > 10
    monkeypatch.setattr(timing, "busy_seconds", lambda: None)
    assert watch.share() is None
