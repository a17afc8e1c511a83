"""Tiny npm packages."""

import json
from pathlib import Path
from typing import Any

import pytest

from transfusion.data.packages import EMOJIBASE, package_folder


LEFT_HALF = {"body": '<path fill="#ff0000" d="M0 0h8v16H0z"/>'}
EMPTY = {"body": ""}

LABELS = [
    {"label": "red heart", "hexcode": "2764", "group": 0, "tags": ["love", "red"]},
    {"label": "hand pointing left", "hexcode": "1F448", "group": 1, "tags": []},
    {"label": "hand pointing right", "hexcode": "1F449", "group": 1, "tags": []},
    {"label": "flag: Niue", "hexcode": "1F1F3-1F1FA", "group": 9, "tags": ["NU"]},
    {"label": "bear", "hexcode": "1F43B", "group": 3},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
]
GROUPS = {0: "smileys & emotion", 1: "people & body", 3: "animals & nature", 9: "flags"}


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Unpacked npm packages: the emoji standard's labels, and the set "@set/tiny@1.0.0" of nine icons."""
    icons = {
        "heart": LEFT_HALF,
        "hand-pointing-left": LEFT_HALF,
        "hand-pointing-left-dark": EMPTY,
        "flag-for-flag-niue": EMPTY,
        "bear-face": LEFT_HALF,
        "axe": LEFT_HALF,
        "axe2": {"body": "", "hidden": True},
        "police-car-light": EMPTY,
    }
    aliases: dict[str, dict[str, Any]] = {
        "hand-pointing-right": {"parent": "hand-pointing-left", "hFlip": True},
        "hand-pointing-right-dark": {"parent": "hand-pointing-left-dark", "hFlip": True},
        "bear": {"parent": "bear-face"},
    }
    files: dict[str, dict[str, Any]] = {
        package_folder(EMOJIBASE) + "/en": {
            "data": LABELS,
            "messages": {"groups": [{"order": order, "message": name} for order, name in GROUPS.items()]},
        },
        "set-tiny-1.0.0": {
            "icons": {"icons": icons, "aliases": aliases, "width": 16, "height": 16},
            "metadata": {"categories": {"Travel": ["police-car-light"]}},
            "chars": {"2764-fe0f": "heart"},
        },
    }
    for folder, contents in files.items():
        (tmp_path / folder).mkdir(parents=True)
        for name, content in contents.items():
            (tmp_path / folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path
