import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from transfusion.registration import after_import


@pytest.fixture
def module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that can be imported, and holds `value = 1`."""
    (tmp_path / "late_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "late_module"
    sys.modules.pop("late_module", None)


def test_the_action_follows_each_import(module_name: str) -> None:
    """Whoever only looked for the module before, and when it is loaded again."""
    seen: list[int] = []
    after_import(module_name, lambda: seen.append(sys.modules[module_name].value))
    assert seen == [] and module_name not in sys.modules
    assert importlib.util.find_spec(module_name) is not None
    module = __import__(module_name)
    assert seen == [1]
    assert type(module.__loader__).__name__ == "SourceFileLoader"  # debuggers and inspect know it
    importlib.reload(module)
    assert seen == [1, 1]
    __import__(module_name)
    assert seen == [1, 1]


def test_two_may_wait_for_one_module(module_name: str) -> None:
    seen: list[str] = []
    after_import(module_name, lambda: seen.append("first"))
    after_import(module_name, lambda: seen.append("second"))
    __import__(module_name)
    assert sorted(seen) == ["first", "second"]


def test_the_action_is_at_once_where_the_module_is_there(module_name: str) -> None:
    seen: list[int] = []
    module = __import__(module_name)
    after_import(module_name, lambda: seen.append(module.value))
    assert seen == [1]


def test_a_module_that_is_missing_stays_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    after_import("no_such_module", lambda: pytest.fail("there is nothing to follow"))
    __import__("json")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        __import__("no_such_module")
