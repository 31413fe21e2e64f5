"""Every code block of the README and of CONTRIBUTING is executed."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from pages import broken_links

from agevlm.cli import dispatch


ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name: str, language: str) -> list[str]:
    return [code for tag, code in BLOCK.findall((ROOT / name).read_text(encoding="utf-8")) if tag == language]


def commands(name: str) -> list[str]:
    """The shell commands of a file, comments and line continuations taken out."""
    text = "\n".join(blocks(name, "bash")).replace("\\\n", " ")
    return [line for line in (re.sub(r"\s+#.*$", "", line).strip() for line in text.splitlines()) if line]


def run(command: str) -> None:
    """A verb in this process, which has imported what it needs. `make` targets are only resolved: they train for
    minutes."""
    words = shlex.split(command)
    if words[0] == "agevlm":
        dispatch(words[1:])
        return
    assert words[0] == "make"
    words.insert(1, "-n")
    result = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def test_only_known_languages():
    for name in ("README.md", "CONTRIBUTING.md"):
        languages = {tag for tag, _ in BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))}
        assert languages <= {"python", "bash"}, f"{name}: a block that no test executes"


@pytest.mark.timeout(900)
def test_every_block_runs(tmp_path, monkeypatch, capsys):
    """In the order of the README, Python blocks after those of the shell: these make the scenes that they read. One
    test, as workers of pytest would run several apart."""
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoints", "docs", "Makefile", "pyproject.toml", "constraints.txt"):  # what a clone has
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("README.md", "CONTRIBUTING.md"):
        for command in commands(name):
            run(command)
    for code in blocks("README.md", "python"):
        capsys.readouterr()
        exec(compile(code, "README.md", "exec"), {})
        expected = re.findall(r"print\(.*\)  # (.+)$", code, flags=re.MULTILINE)
        assert expected, "a block of the README prints something and says what"
        assert capsys.readouterr().out.splitlines()[-len(expected) :] == expected


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not broken_links(page)


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# Eq. 3, the loss\n", encoding="utf-8")
    page = tmp_path / "page.md"
    good = "[a](other.md#eq-3-the-loss) [b](#here) ![c](other.md) [d](https://example.com/none)"
    page.write_text(f"# Here\n{good} [e](gone.md) [f](other.md#gone) [g](#gone)", encoding="utf-8")
    assert broken_links(page) == ["gone.md", "other.md#gone", "#gone"]
