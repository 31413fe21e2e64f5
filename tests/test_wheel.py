"""The package outside of a clone: wheel and sdist hold all that the verbs need, the two small checkpoints included."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from servers import free_port, running


ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("checkpoints", "hub_cards", "modeling_agevlm", "processing", "src", "training")
FILES = ("LICENSE", "README.md", "pyproject.toml")
START = """
from pathlib import Path
from agevlm.reproduction.matrix import SIZES, Start
from agevlm.reproduction.prepare import prepare_parts, save_start
parts = prepare_parts("tiny", None, Path("quickstart"), None)
save_start(parts, Path("start"), 0, SIZES["tiny"].cross_attention_layers, Start())
"""
pytestmark = pytest.mark.slow


class Installed:
    """The wheel of the sdist of a copy of the repository, unpacked into a folder that nothing else is in."""

    def __init__(self, folder: Path):
        copy, self.home, self.place = folder / "copy", folder / "home", folder / "installed"
        self.home.mkdir()
        for name in FOLDERS:
            skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
        for name in FILES:
            shutil.copy(ROOT / name, copy)
        build = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
        self.run(sys.executable, "-c", build, folder, cwd=copy)
        (sdist,) = folder.glob("*.tar.gz")
        pip = (sys.executable, "-m", "pip")
        self.run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist)
        (wheel,) = folder.glob("*.whl")
        self.run(*pip, "install", "--no-deps", "--no-index", "--target", self.place, wheel)

    @property
    def environment(self) -> dict[str, str]:
        offline = {"HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(self.home / "uploads"), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **offline, "PYTHONPATH": str(self.place)}  # before an editable installation

    def run(self, *words: object, cwd: Path | None = None) -> str:
        result = subprocess.run(
            [str(word) for word in words], cwd=cwd or self.home, env=self.environment, capture_output=True, text=True,
            timeout=280,
        )  # fmt: skip
        assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def python(self, code: str) -> str:
        return self.run(sys.executable, "-P", "-c", code)

    def agevlm(self, *words: object) -> str:
        return self.run(sys.executable, "-P", "-m", "agevlm", *words)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    pytest.importorskip("setuptools", minversion="77", reason="the build backend is not installed")
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_a_wheel_of_the_sdist_holds_the_small_checkpoints(installed):
    there = installed.python("import agevlm; print(agevlm.__file__, agevlm.TINY, agevlm.TINY_PARTS, sep='\\n')")
    module, tiny, parts = map(Path, there.splitlines())
    assert module.parent == installed.place / "agevlm"
    for folder in (tiny, parts):
        original = ROOT / "checkpoints" / folder.name
        files = {path.relative_to(original) for path in original.rglob("*") if path.is_file()}
        assert len(files) > 8 and not folder.is_symlink()
        assert all((folder / file).read_bytes() == (original / file).read_bytes() for file in files)


def test_quickstart_and_evaluation_run_outside_of_a_clone(installed):
    assert "quickstart" in installed.agevlm("--help") and "--seeds" in installed.agevlm("quickstart", "--help")
    installed.python(START)
    assert (installed.home / "start" / "model.safetensors").is_file()
    installed.agevlm("data", "scenes", "--output", "scenes", "--captions", 2, "--instructions", 2, "--test", 2)
    tiny = installed.python("import agevlm; print(agevlm.TINY)").strip()
    installed.agevlm("eval", tiny, "--scenes", "scenes", "--benchmarks", "pope", "--output", "evaluation")
    assert list((installed.home / "evaluation").rglob("metrics.json"))


def test_the_demo_needs_no_model_outside_of_a_clone(installed):
    pytest.importorskip("gradio", reason="the packages of `pip install 'agevlm[demo]'` are missing")
    address = f"http://127.0.0.1:{(port := free_port())}/"
    words = [sys.executable, "-P", "-m", "agevlm", "demo", "--port", str(port)]
    with running(words, address, installed.home / "log.txt", cwd=installed.home, env=installed.environment):
        pass
