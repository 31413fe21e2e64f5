"""docs/paper.md is the rendering of docs/paper.yaml, and everything that it refers to is there."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from pages import anchors


ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("paper", ROOT / "docs" / "paper.py")
paper = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(paper)
ITEMS = [(title, item) for title, items in paper.read_sections().items() for item in items]


def defined(file: Path) -> set[str]:
    """Functions, classes, their members and variables of a module: `name` and `Class.name`."""

    def names(body: list[ast.stmt]) -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
                if isinstance(node, ast.ClassDef):
                    found |= {f"{node.name}.{name}" for name in names(node.body)}
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        return found

    return names(ast.parse(file.read_text(encoding="utf-8")).body)


def test_the_page_is_the_rendering_of_the_data():
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    assert page == paper.render(paper.read_sections()), "run `make paper`"


@pytest.mark.parametrize("title", dict(ITEMS))
def test_every_reference_leads_somewhere(title):
    texts = [text for section, item in ITEMS if section == title for text in item.values()]
    found = [match.groups() for text in texts for match in paper.REFERENCE.finditer(text)]
    assert found
    for name, symbol, anchor in found:
        file = ROOT / name
        assert file.is_file(), name
        assert symbol is None or symbol in defined(file), f"{name} defines no {symbol}"
        assert anchor is None or anchor in anchors(file), f"{name} has no heading #{anchor}"


def test_every_figure_stands_on_the_page_it_is_taken_from():
    """Measured figures are copied by hand: where a page is measured again, this names those to copy anew."""
    checked = 0
    for title, item in ITEMS:
        pages = [name for name, _, _ in paper.REFERENCE.findall(item["run"]) if name.endswith(".md")]
        if item["run"].startswith("tiny"):
            pages.append("docs/reproduction.md")
        text = " ".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
        for figure in re.findall(r"\d+\.\d+", item["run"]) if pages else ():
            assert re.search(rf"(?<![\d.]){re.escape(figure)}", text), f"{title}: {item['claim']!r} has {figure}"
            checked += 1
    assert checked > 20


def test_every_place_is_a_reference():
    for title, item in ITEMS:
        rest = paper.REFERENCE.sub("", item.get("here", "")).strip()
        assert not rest, f"{title}: {item['claim']!r} has {rest!r} in `here`"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "mostly"}, "has the verdict 'mostly'"),
        ({"here": ""}, "neither a place"),
        ({"run": None}, "lacks run"),
        ({"note": "x"}, "unknown fields note"),
        ({"verdict": "open"}, "is open without a reason"),
        ({"verdict": "deviates", "why": "it is better"}, r"must name the section of docs/design\.md"),
    ],
)
def test_items_that_say_too_little_are_refused(changes, message, tmp_path):
    item = {"claim": "a", "here": "docs/paper.py", "run": "not run", "verdict": "as in the paper", **changes}
    lines = [f"{name}: {value}" for name, value in item.items() if value is not None]
    (tmp_path / "paper.yaml").write_text("part:\n  - " + "\n    ".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        paper.read_sections(tmp_path / "paper.yaml")
