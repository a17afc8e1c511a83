"""Fixtures: a folder of captioned pictures."""

import json
from pathlib import Path

import pytest

from tests.tiny_processor import picture


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Six pictures of noise, 20 x 20 pixels, and their metadata.jsonl."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number in range(6):
        picture(number, 20, 20).save(folder / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"noise {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder
