from typing import Any

import pytest

from transfusion.experiments.tables import COLUMNS, comparison_table, spread
from transfusion.experiments.trials import Question


@pytest.mark.parametrize(
    ("values", "form", "written"),
    [
        ([0.4, 0.5], "percent", "45 ± 5 %"),
        ([0.4], "percent", "40 %"),
        ([0.25, 0.27, 0.32], "number", "0.280 ± 0.035"),
        ([99.0, 104.0], "number", "101.5 ± 2.5"),
    ],
)
def test_mean_and_half_the_range(values: list[float], form: str, written: str) -> None:
    assert spread(values, form) == written


def test_a_table_has_a_row_for_each_trial_that_ran() -> None:
    def result(trial: str, seed: int, value: float) -> dict[str, Any]:
        scores = {key: value for _, key, _ in COLUMNS}
        config = {"objective": "ddpm"} if trial == "b" else {}
        run = {"parameters": 2_000_000, "cpu_seconds": 3.0, "settings": {"steps": 10}, "config": config}
        return {"trial": trial, "seed": seed, **run, **scores}

    question = Question("Which", "The paper says a.", ("a", "b", "never run"))
    table = comparison_table(question, [result("a", 0, 0.5), result("b", 0, 0.1), result("a", 1, 0.7)])
    lines = table.splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| a | 2.00 M | 2 | 60 ± 10 % |") and lines[2].endswith("| 300 |")
    assert lines[3].startswith("| b | 2.00 M | 1 | 10 % |")
    assert "0.600 ± 0.100" in lines[2] and "| - | 0.100 |" in lines[3]  # another process, another loss
