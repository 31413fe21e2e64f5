"""The house rules that imports and packaging must keep (docs/design.md, section 1)."""

import ast
import re
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "analysis",
    "baselines",
    "data",
    "demo",
    "evaluation",
    "grounding",
    "hub_cards",
    "modeling_agevlm",
    "processing",
    "training",
)
ALLOWED = {
    "modeling_agevlm": set(),
    "processing": set(),
    "hub_cards": set(),
    "data": set(),
    "grounding": {"data"},
    "training": {"modeling_agevlm", "processing", "data", "hub_cards"},
    "evaluation": {"modeling_agevlm", "processing", "data", "hub_cards"},
    "analysis": {"modeling_agevlm", "processing", "data"},
    "baselines": {"modeling_agevlm", "processing", "data"},
    "demo": {"analysis", "data"},
}
# One place for each idea that every folder needs. These modules import nothing of ours but what is named here.
GROUND_FLOOR = {"models": {"modeling_agevlm", "processing"}}
CONFIGURATION = "agevlm.modeling_agevlm.configuration_agevlm"
# What is copied, flat, into every checkpoint of ours.
SHIPPED = (
    "modeling_agevlm/compatibility_agevlm.py",
    "modeling_agevlm/configuration_agevlm.py",
    "modeling_agevlm/modeling_agevlm.py",
    "modeling_agevlm/cross_attention_agevlm.py",
    "modeling_agevlm/guidance_agevlm.py",
    "processing/compatibility_agevlm.py",  # a link to the model's
    "processing/image_processing_agevlm.py",
    "processing/processing_agevlm.py",
)
SHIPPED_BASELINES = ("baselines/modeling_mobilevlm.py",)  # into converted ones


def python_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything `path` imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_import_direction(folder):
    for path in python_files(folder):
        for name in imported_modules(path):
            if path == ROOT / "processing" / "__init__.py" and name.startswith(CONFIGURATION):
                continue  # it registers the processor, and the Auto classes are keyed by the configuration
            if name.startswith("agevlm."):
                target = name.split(".")[1]
                if target in GROUND_FLOOR:
                    assert folder not in GROUND_FLOOR[target], f"{path.relative_to(ROOT)} imports {name}"
                elif target in FOLDERS:
                    assert target == folder or target in ALLOWED[folder], f"{path.relative_to(ROOT)} imports {name}"
                else:
                    pytest.fail(f"{path.relative_to(ROOT)} imports {name}: folders know nothing of the command line")


@pytest.mark.parametrize("module", GROUND_FLOOR)
def test_the_ground_floor_imports_little(module):
    names = imported_modules(ROOT / "src" / "agevlm" / f"{module}.py")
    used = {name.split(".")[1] for name in names if name.startswith("agevlm.")}
    assert used <= GROUND_FLOOR[module] and "agevlm" not in names


def test_one_place_loads_vision_language_models():
    """`from_pretrained` of a model passes over missing weights; `agevlm.models` does not."""
    loaders = re.compile(r"\b(AutoModel\w*|\w+For\w+|LlamaModel|ConvNextModel|model_class)\.from_pretrained\(")
    others = {"src/agevlm/models.py", "training/parts.py"}  # the second reads GGUF
    for folder in (*FOLDERS, "src/agevlm"):
        for path in python_files(folder):
            if str(path.relative_to(ROOT)) not in others:
                found = loaders.search(path.read_text(encoding="utf-8"))
                assert found is None, f"{path.relative_to(ROOT)}: {found and found[0]}...): use agevlm.models"


def test_nothing_imports_tests_or_bare_folders():
    for folder in (*FOLDERS, "src/agevlm", "bench", "examples"):
        for path in python_files(folder):
            roots = {name.split(".")[0] for name in imported_modules(path) if not name.startswith(".")}
            assert "tests" not in roots and "builders" not in roots, path
            assert not roots & set(FOLDERS), f"{path.relative_to(ROOT)}: import agevlm.<folder>, not the bare folder"


def test_package_list_matches_the_folders():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    listed = set(config["packages"]) - {"agevlm"}
    present = {
        "agevlm." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == present
    assert {name.removeprefix("agevlm.") for name in config["package-dir"] if name != "agevlm"} == set(FOLDERS)
    for folder in FOLDERS:
        inner = {path.parent for path in python_files(folder)}
        assert all((path / "__init__.py").exists() for path in inner), f"{folder}: a folder without __init__.py"


def test_every_data_file_is_packaged():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_dir() or path.suffix in {".py", ".pyc"}:
                continue
            home = next(parent for parent in path.parents if (parent / "__init__.py").exists())
            package = "agevlm." + ".".join(home.relative_to(ROOT).parts)
            patterns = config["package-data"].get(package, [])
            assert any(path.match(pattern) for pattern in patterns), f"{path.relative_to(ROOT)} is in no package data"


@pytest.mark.parametrize("name", (*SHIPPED, *SHIPPED_BASELINES))
def test_shipped_files_import_only_siblings(name):
    """transformers finds a checkpoint's files by a regex over the text, docstrings included."""
    text = (ROOT / name).read_text(encoding="utf-8")
    siblings = {Path(shipped).stem for shipped in SHIPPED if Path(shipped).parent == Path(name).parent}
    for module in re.findall(r"^\s*from\s+(\.\S*)\s+import", text, flags=re.MULTILINE):
        assert module.removeprefix(".") in siblings, f"{name}: from {module} import ... would not travel"
    assert not re.findall(r"^\s*import\s+\.", text, flags=re.MULTILINE)
    assert not any(module.startswith("agevlm") for module in imported_modules(ROOT / name)), name


def test_shipped_file_names_are_unique():
    files = {(ROOT / name).resolve() for name in (*SHIPPED, *SHIPPED_BASELINES)}
    assert len({path.name for path in files}) == len(files)


def test_every_file_says_what_it_implements():
    for folder in (*FOLDERS, "src/agevlm", "bench", "examples", "tests"):
        for path in python_files(folder):
            text = path.read_text(encoding="utf-8")
            if text.strip():
                assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} has no module docstring"


def test_no_pickle_eval_or_shell():
    banned = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads"}
    for folder in (*FOLDERS, "src/agevlm", "bench", "examples"):
        for path in python_files(folder):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    name = ast.unparse(node.func)
                    assert name not in banned, f"{path.relative_to(ROOT)}:{node.lineno} calls {name}"
                    shell = [k for k in node.keywords if k.arg == "shell" and ast.unparse(k.value) == "True"]
                    assert not shell, f"{path.relative_to(ROOT)}:{node.lineno} runs a shell string"
                    # The one reader of pickles: published baselines, where the user asks for it
                    if name == "torch.load" and path == ROOT / "baselines" / "weights.py":
                        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                        assert options["weights_only"] == "True", f"{path.relative_to(ROOT)}:{node.lineno}"
                    elif name == "torch.load":
                        pytest.fail(f"{path.relative_to(ROOT)}:{node.lineno}: safetensors only")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_tiny_checkpoint_ships_the_code_of_this_repository(name):
    shipped = ROOT / "checkpoints" / "agevlm-tiny" / Path(name).name
    assert shipped.read_bytes() == (ROOT / name).read_bytes(), "save checkpoints/agevlm-tiny again"
