import tarfile
from pathlib import Path

import pytest

from transfusion.data import read_image_folder
from transfusion.data.building import build_emoji_set, build_tokenizer
from transfusion.data.emoji_builder import EmojiStyle
from transfusion.data.tokenizer import TOKENIZER_FOLDER


def test_emoji_set_is_built_from_downloaded_packages(packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    for package in [folder for folder in packages.iterdir() if folder != downloads]:
        with tarfile.open(downloads / f"{package.name}.tgz", "w:gz") as archive:
            archive.add(package, "package")
    style = EmojiStyle("tiny", "@set/tiny@1.0.0", "MIT")
    assert build_emoji_set(tmp_path / "out", (style,), 16, downloads) == 7
    assert len(read_image_folder(tmp_path / "out", strict=True)[0]) == 7


def test_missing_packages_stop_the_build(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="npm pack emojibase-data"):
        build_emoji_set(tmp_path / "out", downloads=tmp_path)
    assert not (tmp_path / "out").exists()


def test_shipped_tokenizer_is_what_its_builder_makes(tmp_path: Path) -> None:
    build_tokenizer(tmp_path)
    for file in TOKENIZER_FOLDER.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
