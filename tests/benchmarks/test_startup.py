from pathlib import Path

import pytest

from transfusion.benchmarks import startup
from transfusion.benchmarks.workloads import SIZES


def test_imports_take_turns_and_an_empty_interpreter_is_taken_off() -> None:
    calls: list[str] = []

    def run(code: str) -> float:
        calls.append(code)
        return {"pass": 1.0, "import a": 3.0, "import b": 6.0}[code]

    found = startup.time_imports(2, {"ours": "import a", "peer": "import b"}, run)
    assert found["ours"].values == [2.0, 2.0] and found["peer"].values == [5.0, 5.0]
    timed = [code for code in calls[2:] if code != "pass"]
    assert calls[:2] == ["import a", "import b"] and timed == ["import a", "import b", "import b", "import a"]


def test_one_import_is_the_one_to_compare_with() -> None:
    assert [name for name in startup.IMPORTS if name.startswith("plain")] == [
        "plain, what the model needs of transformers"
    ]


def test_a_fresh_process_runs() -> None:
    assert 0 < startup.run_fresh("pass") < 30
    with pytest.raises(startup.subprocess.CalledProcessError):
        startup.run_fresh("import no_such_module")


def test_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    (name, load), *others = startup.loaders(SIZES["tiny"], tmp_path, with_peer=False).items()
    assert name == "ours, from_pretrained" and not others
    assert load().config.hidden_size == 16
