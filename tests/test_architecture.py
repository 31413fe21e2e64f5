"""The house rules that imports and packaging must keep (docs/design.md, package layout)."""

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from agevlm import cli


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "agevlm"
# A floor may import from the floors above it in this list, and a room from itself.
FLOORS = (
    {"arguments", "progress", "store"},
    {"images", "drawing", "stats"},
    {"modeling_agevlm", "processing"},
    {"models"},
    {"data"},
    {"hub_cards", "conversion", "language", "analysis"},
    {"training", "evaluation", "grounding"},
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


EVERYWHERE = ("src/agevlm", "bench", "examples")


@functools.cache
def python_files(*folders: str) -> dict[Path, ast.Module]:
    """Python files below folders of the repository, links followed, and what they say; by default the package's.
    The code inside the small checkpoints is a copy."""
    starts = [ROOT / folder for folder in folders] or [PACKAGE]
    found = set()
    for start in starts:
        for place, folders, names in os.walk(start, followlinks=True):
            folders[:] = set(folders) - {"checkpoints"}
            found |= {Path(place) / name for name in names if name.endswith(".py")}
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(found)}


def calls() -> Iterator[tuple[Path, str, ast.Call]]:
    """All calls, as file, `file:line` and node."""
    for path, tree in python_files(*EVERYWHERE).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield path, f"{path.relative_to(ROOT)}:{node.lineno}", node


def imported_modules(tree: ast.Module) -> set[str]:
    """Absolute names of everything that is imported, also inside functions."""
    names = set()
    for node in ast.walk(tree):
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
    for path, tree in python_files().items():
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported_modules(tree):
            target = [*name.split("."), ""][1]
            if not name.startswith("agevlm.") or target == room or (room, target) in EXCEPTIONS:
                continue
            if any(target in rooms for rooms in FLOORS):
                assert floor_of(target) < floor_of(room), f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize(
    ("pattern", "places", "instead"),
    [
        # `from_pretrained` of a model passes over missing weights; the parts' other source is GGUF
        (
            r"\b(AutoModel\w*|\w+For\w+|LlamaModel|ConvNextModel|model_class)\.from_pretrained\(",
            ("src/agevlm/models.py", "src/agevlm/training/parts.py", "bench", "examples"),
            "agevlm.models",
        ),
        # Formats, limits, rotation, transparency, depth and masks; the second file travels with checkpoints
        (
            r"Image\.open\(",
            ("src/agevlm/images.py", "src/agevlm/processing/image_processing_agevlm.py"),
            "agevlm.images.open_image",
        ),
        # Old spellings and errors
        (
            r"(?<!Hf)\bArgumentParser\(",
            ("src/agevlm/arguments.py", "bench", "examples"),
            "agevlm.arguments.VerbParser",
        ),
    ],
    ids=["loads models", "opens pictures", "reads flags"],
)
def test_one_place_only(pattern, places, instead):
    for path in python_files(*EVERYWHERE):
        if not any(path.is_relative_to(ROOT / place) for place in places):
            found = re.search(pattern, path.read_text(encoding="utf-8"))
            assert found is None, f"{path.relative_to(ROOT)}: {found and found[0]}...): use {instead}"


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
    for path, place, call in calls():
        if str(path.relative_to(ROOT)) not in others:
            assert not is_store_work(call), f"{place} calls {ast.unparse(call.func)}: use agevlm.store"


def test_no_second_opener_of_tables():
    """`agevlm.data.tables` alone lets `datasets` open files, whose names it reads as patterns."""
    readers = {"load_dataset", "load_from_disk", "from_parquet", "from_json"}
    others = ("src/agevlm/data/tables.py", "bench", "examples")
    for path, place, call in calls():
        if not any(path.is_relative_to(ROOT / other) for other in others):
            name = ast.unparse(call.func).rpartition(".")[2]
            assert name not in readers, f"{place} calls {name}: use agevlm.data.tables"


def test_no_console_reads_names_as_markup():
    for _, place, call in calls():
        if ast.unparse(call.func) == "Console":
            options = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert options.get("markup") == "False", f"{place}: a path may hold [brackets]; say markup=False"


HELPS = """
import contextlib, io, sys
from agevlm import cli

for words in [[], *(verb.split() for verb in sys.argv[1:])]:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        cli.dispatch([*words, "--help"])
    assert " ".join(["agevlm", *words]) in printed.getvalue(), words
    heavy = [name for name in ("torch", "transformers", "datasets", "matplotlib") if name in sys.modules]
    assert not heavy, f"agevlm {' '.join(words)} --help imports {heavy}"
"""


def test_no_help_imports_what_it_does_not_need():
    verbs = {*cli.VERBS} | {verb.split()[0] for verb in cli.VERBS if " " in verb}
    done = subprocess.run([sys.executable, "-c", HELPS, *sorted(verbs)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_nothing_imports_tests():
    helpers = {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")}
    for path, tree in python_files(*EVERYWHERE).items():
        roots = {name.split(".")[0] for name in imported_modules(tree) if not name.startswith(".")}
        assert not roots & {"tests", *helpers}, path


def test_everything_is_packaged():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = config["package-data"]["*"]
    assert config["package-data"]["agevlm"] == ["checkpoints/**"]
    for place, folders, names in os.walk(PACKAGE, followlinks=True):
        folders[:] = set(folders) - {"__pycache__", "checkpoints"}
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
    assert not any(module.startswith("agevlm") for module in imported_modules(ast.parse(text))), name


def test_shipped_file_names_are_unique():
    files = {(ROOT / name).resolve() for name in (*SHIPPED, *SHIPPED_BASELINES)}
    assert len({path.name for path in files}) == len(files)


def test_every_file_says_what_it_implements():
    for path, tree in python_files(*EVERYWHERE, "tests").items():
        assert not tree.body or ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no module docstring"


def test_no_pickle_eval_or_shell():
    banned = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads"}
    for path, place, call in calls():
        name, options = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert name not in banned, f"{place} calls {name}"
        assert options.get("shell") != "True", f"{place} runs a shell string"
        if name == "torch.load":
            # The one reader of pickles: published baselines, where the user asks for it
            assert path == PACKAGE / "conversion" / "sources.py", f"{place}: safetensors only"
            assert options["weights_only"] == "True", place


@pytest.mark.parametrize("name", SHIPPED)
def test_the_tiny_checkpoint_ships_the_code_of_this_repository(name):
    shipped = ROOT / "checkpoints" / "agevlm-tiny" / Path(name).name
    assert shipped.read_bytes() == (ROOT / name).read_bytes(), "save checkpoints/agevlm-tiny again"
