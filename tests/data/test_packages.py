import io
import tarfile
from pathlib import Path

import pytest

from transfusion.data.packages import package_folder, unpacked


def write_tarball(folder: Path, package: str, name: str) -> None:
    with tarfile.open(folder / f"{package_folder(package)}.tgz", "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = 2
        archive.addfile(member, io.BytesIO(b"hi"))


def test_folder_names_are_npms() -> None:
    assert package_folder("@iconify-json/noto@1.2.9") == "iconify-json-noto-1.2.9"
    assert package_folder("emojibase-data@17.0.0") == "emojibase-data-17.0.0"


def test_downloaded_packages_are_unpacked_and_removed_again(tmp_path: Path) -> None:
    write_tarball(tmp_path, "@set/icons@1.0.0", "package/icons.json")
    with unpacked(["@set/icons@1.0.0"], tmp_path) as folder:
        assert (folder / "set-icons-1.0.0" / "icons.json").read_text() == "hi"
    assert not folder.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["set-icons-1.0.0.tgz"]


def test_missing_package_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set-icons-1\.0\.0\.tgz.*npm pack @set/icons@1\.0\.0"):
        with unpacked(["@set/icons@1.0.0"], tmp_path):
            pass


def test_tarball_cannot_write_outside(tmp_path: Path) -> None:
    write_tarball(tmp_path, "evil@1.0.0", "../../evil.txt")
    with pytest.raises(tarfile.FilterError):
        with unpacked(["evil@1.0.0"], tmp_path):
            pass


def test_npm_that_cannot_be_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="npm pack x@1"):
        with unpacked(["x@1"]):
            pass
