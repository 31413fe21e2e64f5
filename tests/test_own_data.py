"""docs/own_data.md is executed, as the notebook that it is rendered as; the Space serves the demo."""

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import builders_grounding as tiny
import pytest
import yaml
from hub_server import HubServer, connect
from servers import free_port
from transformers.utils.import_utils import is_serve_available

from agevlm.cli import dispatch
from agevlm.serving.demo import app


ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "examples" / "space"
COMMANDS = ["own_files", "import", "ground", "train", "train", "train", "eval", "attention", "serve", "push"]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = load(ROOT / "docs" / "own_data.py")
CELLS = ["".join(cell["source"]) for cell in json.loads(PAGE.NOTEBOOK.read_text())["cells"] if "outputs" in cell]


def test_the_notebook_is_the_page():
    rendered = PAGE.render(PAGE.PAGE.read_text(encoding="utf-8"))
    assert json.loads(PAGE.NOTEBOOK.read_text(encoding="utf-8")) == rendered, "run `python docs/own_data.py`"
    page = PAGE.PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert {language for language, _ in blocks} == {"bash"}
    assert [f"%%bash\n{code}".strip() for _, code in blocks] == [cell for cell in CELLS[1:] if cell[0] == "%"]
    assert len(re.findall(r"\w+", re.sub(r"```.*?```", "", page, flags=re.DOTALL))) < 800


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def run(cell: str, folder: Path, names: dict, **more: str) -> str:
    """Executes a cell as Jupyter does; what a cell of shell commands printed."""
    if not cell.startswith("%%bash\n"):
        exec(compile(cell, "cell", "exec"), names)
        return ""
    code = cell.removeprefix("%%bash\n")
    result = subprocess.run(
        ["bash", "-c", code], cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, f"{code}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def verb(line: str) -> str:
    words = shlex.split(line)
    if words[0] != "agevlm":
        return Path(words[1]).stem
    return words[2] if words[1] in ("data", "analyze") else words[1]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """The current folder, with what the page needs of a clone."""
    for name in ("checkpoints", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(code: str) -> str:
    """A cell with the tests' sizes: fewer steps, and a port that is free."""
    code = re.sub(r"--num-train-epochs \d+", "--max-steps 2 --logging-steps 1 --disable-tqdm True", code)
    return code.replace("8000", str(free_port()))


def ground_locally(line: str, folder: Path) -> str:
    """`agevlm ground` with tiny models of the real classes, whose random weights score around 0."""
    parts = f"--grounder {tiny.florence2(folder / 'florence2')} --segmenter {tiny.sam(folder / 'sam')}"
    return f"{line} {parts} --min-area 0 --max-area 1 --min-score -1 --workers 0 --max-new-tokens 24"


@pytest.mark.timeout(900)
@pytest.mark.skipif(not is_serve_available(), reason="the packages of `pip install 'agevlm[serve]'` are missing")
def test_the_page_is_executed(clone, tmp_path_factory, monkeypatch, capsys):
    """With few pictures and steps, and all but the server in this process, which has imported what they need."""
    named, shown, served, names = [], [], "", {}
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        connect(hub, monkeypatch)
        for cell in map(shortened, CELLS):
            lines = cell.removeprefix("%%bash\n").splitlines()
            if "own_files.py" in cell:
                load(ROOT / "examples" / "own_files.py").write_files(Path("mine"), train=8, test=4)
                (clone / "mine" / "photos" / "0200.jpg").write_bytes((clone / "mine/photos/0008.jpg").read_bytes())
                named.append("own_files")
            elif "agevlm serve" in cell:
                served = run(cell, clone, names)
                named.append("serve")
            elif all(line.startswith("agevlm ") for line in lines):
                for line in lines:
                    named.append(verb(line))
                    line = ground_locally(line, clone) if named[-1] == "ground" else line
                    dispatch(shlex.split(line)[1:])
            else:
                shown.append(cell)
                run(cell, clone, names)
        public = hub.repos["model", "ORG/NAME"].private, set(hub.files("ORG/NAME"))
    assert named == COMMANDS
    assert len(shown) == 3  # the installation, and two pictures
    assert public[0] and {"config.json", "model.safetensors", "modeling_agevlm.py", "README.md"} <= public[1]
    models, answer = map(json.loads, served.splitlines())
    assert "mine" in [model["id"] for model in models["data"]]
    assert answer["choices"][0]["message"]["role"] == "assistant"
    said = capsys.readouterr().out
    for place in ("data/contact_sheet.png", "runs/ground", "runs/mine", "runs/lora", "runs/evaluation"):
        assert Path(place).exists() and place in said, place
    for stage in ("ground", "mine", "lora"):
        metrics = json.loads(Path("runs", stage, "agevlm_stage.json").read_text())["metrics"]
        assert metrics["guided_share"] == 1 and metrics["guidance_loss"] > 0
    for model in ("agevlm-tiny", "mine", "lora"):
        metrics = json.loads(Path("runs/evaluation", model, "metrics.json").read_text())
        assert metrics["benchmarks"]["own"]["n"] == 8 and metrics["grounding"]["n"] == 4
    assert "mine" in Path("runs/evaluation/results.html").read_text(encoding="utf-8")


def test_what_an_import_says_is_next_is_accepted(clone, capsys):
    load(ROOT / "examples" / "own_files.py").write_files(Path("mine"), train=8, test=1)
    command = "data import mine/llava.json --images mine/photos --masks mine/coco.json --output data"
    dispatch(shlex.split(command))
    then = capsys.readouterr().out.rstrip().rpartition("; next: agevlm ")[2]
    dispatch([*shlex.split(then.replace("CHECKPOINT", "checkpoints/agevlm-tiny")), "--dry-run"])


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2), (["."], 2)])
def test_files_of_your_own_go_into_a_new_folder_alone(words, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["own_files.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / "own_files.py"), run_name="__main__")
    assert ended.value.code == code
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_moves_the_attention(clone, tmp_path_factory):
    """As it stands, each cell in a shell of its own; only the weights of Florence-2 and SAM are tiny ones."""
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        names: dict = {}
        for cell in CELLS:
            cell = ground_locally(cell.strip(), clone) if "agevlm ground" in cell else cell
            cell = cell.replace("8000", str(free_port()))
            run(cell, clone, names, **(hub.environment | {"HF_TOKEN": "hf_write_token_of_the_tests"}))
    found = [json.loads(Path("runs/evaluation", name, "metrics.json").read_text()) for name in ("agevlm-tiny", "mine")]
    before, after = (metrics["grounding"]["in_mask_mass"]["mean"] for metrics in found)
    assert after > before > 0.5


def test_the_space_serves_the_demo(tmp_path, monkeypatch):
    """Its header is one that the Hub takes; its program builds the page with the checkpoint that a variable names."""
    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert header["sdk"] == "gradio" and f"gradio=={header['sdk_version']}" in pinned
    assert (SPACE / header["app_file"]).is_file() and len(header["short_description"]) <= 60
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {header["colorFrom"], header["colorTo"]} <= colors
    assert (SPACE / "requirements.txt").read_text(encoding="utf-8").startswith("agevlm[demo] @ ")

    shown = []
    build = app.build_page
    monkeypatch.setattr(
        app, "build_page", lambda answerers, *rest: build(shown.append([*answerers]) or answerers, *rest)
    )
    monkeypatch.setattr(app, "launch", lambda page, **options: shown.append((page, options)))
    shutil.copytree(ROOT / "checkpoints" / "agevlm-tiny", tmp_path / "mine")
    for variable, name in ({"AGEVLM_MODEL": str(tmp_path / "mine")}, "mine"), ({}, "agevlm-tiny"):
        monkeypatch.delenv("AGEVLM_MODEL", raising=False)
        for key, value in variable.items():
            monkeypatch.setenv(key, value)
        runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
        (models, (page, options)), shown[:] = shown, []
        assert models == [name] and page.blocks
        assert options["server_name"] == "0.0.0.0" and not options["share"]
