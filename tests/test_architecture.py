"""The house rules that imports and packaging must keep (docs/design.md, section 1)."""

import ast
import os
import re
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "agevlm"
# A floor may import from the floors above it in this list, and a room from itself.
FLOORS = (
    {"arguments", "store"},
    {"images", "drawing", "stats"},
    {"modeling_agevlm", "processing"},
    {"models"},
    {"data"},
    {"hub_cards", "conversion"},
    {"training", "evaluation", "analysis", "grounding"},
    {"reproduction", "serving"},
    {"cli", "env", "__init__"},
    {"__main__"},
)
# `processing` registers its classes, and the Auto classes are keyed by the configuration.
EXCEPTIONS = {("processing", "modeling_agevlm")}
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
SHIPPED_BASELINES = ("src/agevlm/conversion/modeling_mobilevlm.py",)  # into converted ones


def python_files(*folders: str) -> list[Path]:
    """Python files below folders of the repository, links followed; by default those of the package."""
    starts = [ROOT / folder for folder in folders] or [PACKAGE]
    found = set()
    for start in starts:
        for place, _, names in os.walk(start, followlinks=True):
            found |= {Path(place) / name for name in names if name.endswith(".py")}
    return sorted(found)


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


def floor_of(room: str) -> int:
    return next(index for index, rooms in enumerate(FLOORS) if room in rooms)


def test_every_room_has_a_floor():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms <= set().union(*FLOORS)


def test_import_direction():
    for path in python_files():
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported_modules(path):
            target = [*name.split("."), ""][1]
            if not name.startswith("agevlm.") or target == room or (room, target) in EXCEPTIONS:
                continue
            if any(target in rooms for rooms in FLOORS):
                assert floor_of(target) < floor_of(room), f"{path.relative_to(PACKAGE)} imports {name}"


def test_one_place_loads_vision_language_models():
    """`from_pretrained` of a model passes over missing weights; `agevlm.models` does not."""
    loaders = re.compile(r"\b(AutoModel\w*|\w+For\w+|LlamaModel|ConvNextModel|model_class)\.from_pretrained\(")
    others = {"models.py", "training/parts.py"}  # the second reads GGUF
    for path in python_files():
        if str(path.relative_to(PACKAGE)) not in others:
            found = loaders.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path.relative_to(PACKAGE)}: {found and found[0]}...): use agevlm.models"


def test_one_place_opens_pictures():
    """Formats, limits, rotation, transparency, depth and masks are decided once."""
    openers = {"images.py", "processing/image_processing_agevlm.py"}  # the second travels with checkpoints
    for path in python_files("src/agevlm", "bench", "examples"):
        if not path.is_relative_to(PACKAGE) or str(path.relative_to(PACKAGE)) not in openers:
            assert "Image.open(" not in path.read_text(encoding="utf-8"), f"{path}: use agevlm.images.open_image"


def is_store_work(call: ast.Call) -> bool:
    """Whether a call renames files, makes a temporary folder beside a result, syncs or hashes."""
    name, arguments = ast.unparse(call.func), len(call.args) + len(call.keywords)
    renames = isinstance(call.func, ast.Attribute) and call.func.attr in ("rename", "replace") and arguments == 1
    banned = ("os.replace", "os.rename", "os.fsync", "shutil.move", "tempfile.mkdtemp")
    return renames or name in banned or name.startswith("hashlib.")


@pytest.mark.parametrize(
    "code, expected",
    [
        ("os.replace(a, b)", True), ("path.rename(b)", True), ("path.replace(b)", True), ("hashlib.md5()", True),
        ("text.replace('a', 'b')", False), ("dataclasses.replace(row, a=1)", False),
        ("rows.rename_column(a, b)", False),
    ],
)  # fmt: skip
def test_what_only_the_store_does(code, expected):
    assert is_store_work(ast.parse(code, mode="eval").body) is expected


def test_no_second_atomic_write():
    """`agevlm.store` alone renames files and folders into place, syncs and hashes."""
    others = {
        "src/agevlm/store.py",
        "src/agevlm/modeling_agevlm/guidance_agevlm.py",  # travels with checkpoints and imports nothing of ours
    }
    for path in python_files("src/agevlm", "bench", "examples"):
        if str(path.relative_to(ROOT)) in others:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert not is_store_work(node), f"{place} calls {ast.unparse(node.func)}: use agevlm.store"


def test_nothing_imports_tests():
    helpers = {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")}
    for path in python_files("src/agevlm", "bench", "examples"):
        roots = {name.split(".")[0] for name in imported_modules(path) if not name.startswith(".")}
        assert not roots & {"tests", *helpers}, path


def test_everything_is_packaged():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = config["package-data"]["*"]
    for place, _, names in os.walk(PACKAGE, followlinks=True):
        if Path(place).name == "__pycache__":
            continue
        data = [name for name in names if not name.endswith((".py", ".pyc"))]
        assert all(any(Path(name).match(pattern) for pattern in patterns) for name in data), (place, data)
        home = Path(place) if any(name.endswith(".py") for name in names) else Path(place).parent
        assert not names or (home / "__init__.py").is_file(), f"{place} is in no package"


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
    for path in python_files("src/agevlm", "bench", "examples", "tests"):
        text = path.read_text(encoding="utf-8")
        if text.strip():
            assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} has no module docstring"


def test_no_pickle_eval_or_shell():
    banned = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads"}
    for path in python_files("src/agevlm", "bench", "examples"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in banned, f"{path.relative_to(ROOT)}:{node.lineno} calls {name}"
                shell = [k for k in node.keywords if k.arg == "shell" and ast.unparse(k.value) == "True"]
                assert not shell, f"{path.relative_to(ROOT)}:{node.lineno} runs a shell string"
                # The one reader of pickles: published baselines, where the user asks for it
                if name == "torch.load" and path == PACKAGE / "conversion" / "weights.py":
                    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert options["weights_only"] == "True", f"{path.relative_to(ROOT)}:{node.lineno}"
                elif name == "torch.load":
                    pytest.fail(f"{path.relative_to(ROOT)}:{node.lineno}: safetensors only")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_tiny_checkpoint_ships_the_code_of_this_repository(name):
    shipped = ROOT / "checkpoints" / "agevlm-tiny" / Path(name).name
    assert shipped.read_bytes() == (ROOT / name).read_bytes(), "save checkpoints/agevlm-tiny again"
