from pathlib import Path

import pytest

from transfusion.benchmarks.results import (
    Place,
    Result,
    fastest,
    grouped,
    ratio,
    ratios,
    read_record,
    regressions,
    write_record,
)
from transfusion.benchmarks.timing import Samples


PLACE = Place("train", "row", "S", "fp32", "step")


def result(system: str, *values: float, place: Place = PLACE) -> Result:
    return Result(place, system, Samples(list(values)) if values else None, parameters=1)


def test_results_of_one_place_compare() -> None:
    other = Place("train", "row", "S", "bf16", "step")
    groups = grouped([result("ours", 1.0), result("ours", 2.0, place=other), result("peer", 3.0)])
    assert {place: [member.system for member in members] for place, members in groups.items()} == {
        PLACE: ["ours", "peer"],
        other: ["ours"],
    }


def test_the_fastest_peer_is_the_one_to_meet() -> None:
    members = [result("peer, its defaults", 4.0), result("peer", 2.0), result("peer, failed"), result("ours", 1.0)]
    best = fastest(members, "peer")
    assert best is not None and best.system == "peer"
    assert fastest(members, "plain") is None
    assert ratio(best, members[3]) == 2.0
    assert ratio(best, best) is None and ratio(best, result("ours")) is None
    assert ratio(result("peer", 4.0, 8.0), result("ours", 1.0)) == 6.0  # unequal rounds: of medians


def test_ratios_are_stored_and_regressions_found(tmp_path: Path) -> None:
    before = [result("ours", 1.0, 1.0), result("peer", 4.0, 4.0), result("plain", 1.0, 1.0), result("floor")]
    file = tmp_path / "benchmark.json"
    write_record(file, {"environment": {"torch": "2"}}, before)
    record, stored = read_record(file)
    assert stored == before and record["environment"] == {"torch": "2"}
    name = "train | row | S | fp32 | step: peer / ours"
    assert record["ratios"] == {name: 4.0, name.replace("peer", "plain"): 1.0}
    slower = [result("ours", 1.2, 1.2), *before[1:]]
    found = regressions(stored, slower)
    assert len(found) == 2 and found[0] == f"{name}: 4.00 before, 3.33 now"
    assert not regressions(stored, [result("ours", 1.05, 1.05), *before[1:]])
    assert ratios(slower)[name] == pytest.approx(4 / 1.2)
