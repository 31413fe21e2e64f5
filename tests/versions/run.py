"""Compares the shipped checkpoint under several versions of transformers with the installed one.

    python tests/versions/run.py                          # the tested versions
    python tests/versions/run.py 5.10.4 newest            # these
    python tests/versions/run.py --table docs/versions.md

Each version gets a virtual environment that holds nothing but this transformers and what it needs otherwise than the
environment that runs this file; all else is found there. The environments are kept in `.versions`, or in the folder
that the environment variable AGEVLM_VERSIONS_CACHE names. A version that is too old for the checkpoint must be refused
in one sentence; any other must pass every probe of `probe.py` and return what the installed version returns. The exit
code is 1 where one does not.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from importlib.metadata import version as installed_version
from pathlib import Path

import torch
from packaging.version import InvalidVersion, Version
from safetensors.torch import load_file


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHECKPOINT = ROOT / "checkpoints" / "agevlm-tiny"
PICTURE = ROOT / "docs" / "images" / "example.png"
CACHE = Path(os.environ.get("AGEVLM_VERSIONS_CACHE", ROOT / ".versions")).resolve()

# The oldest version that the checkpoint's code accepts, read where it says so.
MINIMUM = re.search(r'^MINIMUM = "(.+)"$', (CHECKPOINT / "compatibility_agevlm.py").read_text(), re.MULTILINE)[1]
TOO_OLD = ("4.57.6", "5.0.0", "5.3.0")
TESTED = ("oldest", "5.15.1", "5.20.2", "5.23.0", "5.24.0", "newest")
TOLERANCE = 1e-5
AT_ONCE = 2

PAGE = """\
# Versions of transformers

`tests/versions/probe.py` loads the shipped checkpoint with torch, transformers and Pillow, without this repository,
and uses it in {probes} ways: processor and Auto classes, saving, forward passes and guidance, generation with several
kinds of cache, backward passes. A version passes if every probe gives the tokens and masks of {reference}, the
installed version, and its numbers within {tolerance}. Versions before {minimum} must refuse the checkpoint and name
the version needed.

Measured on {date} at commit {commit} on a CPU, with Python {python} and torch {torch}:

{table}
To measure again:

```bash
make test-versions                                      # VERSIONS="5.12.0 newest" takes others
python tests/versions/run.py --table docs/versions.md   # writes this page
```
"""


class IndexUnreachable(RuntimeError):
    """pip finds no version of transformers at all."""


@dataclass
class Row:
    """What one version has shown.

    Attributes:
        probes: number of probes; 0 where the version must refuse the checkpoint.
        difference: largest absolute difference to the reference, over all floating-point tensors.
        failures: probe (or step) -> what is wrong; empty where all is well.
    """

    version: str
    packages: dict[str, str] = field(default_factory=dict)
    probes: int = 0
    difference: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)


def pip(python: Path | str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs this environment's pip for another interpreter."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "--no-input", "--retries", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@cache
def released() -> tuple[Version, ...]:
    """The versions of transformers on the package index, oldest first, without pre-releases.

    Raises:
        IndexUnreachable: there is none.
    """
    listed = pip(sys.executable, "index", "versions", "transformers")
    found = re.search(r"^Available versions: (.+)$", listed.stdout, re.MULTILINE)
    if found is None:
        raise IndexUnreachable(f"The package index lists no transformers ({_last_line(listed.stderr)}).")
    return tuple(sorted(Version(name) for name in found[1].split(", ")))


def resolve(name: str) -> str:
    """A version, or the one that `oldest` (supported) or `newest` names."""
    if name == "newest":
        return str(released()[-1])
    if name == "oldest":
        return str(min(version for version in released() if version >= Version(MINIMUM)))
    return str(Version(name))


def overlay(version: str) -> Path:
    """The Python of an environment with this transformers, made where it is missing.

    Its site-packages name this environment's in a `.pth` file: Python then looks there too, but does not run the
    `.pth` files of that folder, one of which would make `agevlm` importable.

    Raises:
        RuntimeError: pip cannot install the version. The message holds pip's.
    """
    folder = CACHE / f"{sys.implementation.cache_tag}-{version}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            built = Path(temporary) / "environment"
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", built], check=True)
            _install(built, version)
            built.rename(folder)
    return _install(folder, version)  # pip does nothing unless this environment has changed since


def _install(folder: Path, version: str) -> Path:
    python = folder / "bin" / "python"
    base = sysconfig.get_path("purelib")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "base.pth").write_text(f"{base}\n", encoding="utf-8")
    done = pip(python, "install", "-q", "--no-compile", "--no-warn-conflicts", f"transformers=={version}")
    if done.returncode:
        raise RuntimeError(f"pip cannot install transformers {version}: {_last_line(done.stderr)}")
    return python


def _isolated(python: Path, home: Path, script: str, *arguments: Path | str) -> subprocess.CompletedProcess:
    """A fresh process without network, without caches and without this repository on its path."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home / "hub"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [python, "-I", HERE / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment, timeout=600)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def _probe(version: str, home: Path, checkpoint: Path) -> tuple[Row, dict[str, torch.Tensor]]:
    """Runs the probes under one version. Tracebacks go to `.versions/VERSION.log`."""
    done = _isolated(overlay(version), home, "probe.py", checkpoint, PICTURE, home / "output")
    (CACHE / f"{version}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        return Row(version, failures={"process": _last_line(done.stderr)}), {}
    report = json.loads((home / "output.json").read_text(encoding="utf-8"))
    failures = {name: outcome["error"] for name, outcome in report["probes"].items() if not outcome["passed"]}
    if report["versions"]["transformers"] != version:
        failures["process"] = f"ran under transformers {report['versions']['transformers']}"
    row = Row(version, report["versions"], len(report["probes"]), failures=failures)
    return row, load_file(home / "output.safetensors")


def _refuse(version: str, home: Path, checkpoint: Path) -> Row:
    """Checks that model and processor each say in one sentence which transformers they need."""
    row = Row(version)
    expected = f"AGE-VLM needs transformers >= {MINIMUM} (this is {version}): pip install -U transformers"
    for part in ("model", "processor"):
        done = _isolated(overlay(version), home, "refusal.py", checkpoint, part)
        said = done.stdout.strip() if done.returncode == 0 else _last_line(done.stderr)
        if said != expected:
            row.failures[part] = said
    return row


def _layout(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def compare(row: Row, tensors: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    """Adds to `row` what differs from the reference: integers and booleans must be equal, numbers within 1e-5."""
    for name in sorted(tensors.keys() | reference.keys()):
        probe, _, key = name.partition("/")
        if probe in row.failures:
            continue
        if name not in tensors or name not in reference:
            without = "the reference" if name in tensors else "this version"
            row.failures[probe] = f"{without} returns no `{key}`"
            continue
        actual, expected = tensors[name], reference[name]
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            row.failures[probe] = f"`{key}` is {_layout(actual)}, not {_layout(expected)}"
        elif not expected.is_floating_point():
            if not torch.equal(actual, expected):
                row.failures[probe] = f"`{key}` differs from the reference: {actual.flatten()[:12].tolist()}"
        elif expected.numel():
            difference = (actual - expected).abs().max().item()
            row.difference = max(row.difference, difference)
            if not difference <= TOLERANCE:
                row.failures[probe] = f"`{key}` differs from the reference by {difference:.2g}"


def check(versions: list[str]) -> list[Row]:
    """One row for each version and one for the installed one, oldest first. Two run at a time."""
    reference = installed_version("transformers")
    names = list(dict.fromkeys([reference, *versions]))
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(AT_ONCE) as pool:
        checkpoint = Path(shutil.copytree(CHECKPOINT, Path(temporary) / "checkpoint"))

        def run(version: str) -> tuple[Row, dict[str, torch.Tensor]]:
            home = Path(temporary) / version
            home.mkdir()
            try:
                if Version(version) < Version(MINIMUM):
                    return _refuse(version, home, checkpoint), {}
                return _probe(version, home, checkpoint)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                return Row(version, failures={"process": str(error)}), {}

        results = list(pool.map(run, names))
    expected = results[0][1]
    for row, tensors in results:
        if row.probes:
            compare(row, tensors, expected)
    return sorted((row for row, _ in results), key=lambda row: Version(row.version))


def table(rows: list[Row]) -> str:
    """Markdown, one line for each version; the failures follow as a list."""
    lines = [
        "| transformers | huggingface_hub | tokenizers | probes passed | largest difference | result |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.version, *(row.packages.get(name, "") for name in ("huggingface_hub", "tokenizers"))]
        if row.probes:
            passed = row.probes - len(row.failures.keys() - {"process"})
            cells += [f"{passed} of {row.probes}", f"{row.difference:.1g}", "passes"]
        else:
            cells += ["", "", "refused, as it must be"]
        if row.failures:
            cells[-1] = f"**fails**: {', '.join(row.failures)}"
        lines.append(f"| {' | '.join(cells)} |")
    failures = [f"- {row.version}, {name}: {_one_line(text)}" for row in rows for name, text in row.failures.items()]
    return "\n".join([*lines, *([""] if failures else []), *failures]) + "\n"


def _one_line(text: str) -> str:
    text = " ".join(text.replace(str(ROOT), ".").split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


def page(rows: list[Row]) -> str:
    """docs/versions.md."""
    describe = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return PAGE.format(
        probes=max(row.probes for row in rows),
        reference=installed_version("transformers"),
        tolerance=f"{TOLERANCE:.0e}",
        minimum=MINIMUM,
        date=date.today(),
        commit=commit,
        python=sys.version.split()[0],
        torch=installed_version("torch"),
        table=table(rows),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", help="versions of transformers, `oldest` (supported) or `newest`")
    parser.add_argument("--table", type=Path, help="file to write the table to, as a page of docs/")
    arguments = parser.parse_args()
    try:
        versions = [resolve(name) for name in arguments.versions or (*TOO_OLD, *TESTED)]
    except (InvalidVersion, IndexUnreachable) as error:
        parser.error(f"{error} Give versions of transformers, `oldest` or `newest`.")
    rows = check(versions)
    print(table(rows))
    if arguments.table:
        partial = arguments.table.with_name(f".{arguments.table.name}.partial")
        partial.write_text(page(rows), encoding="utf-8")
        partial.rename(arguments.table)
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
