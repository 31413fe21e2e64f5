"""The command line: a frozen list of verbs, each with a help of its own, imported lazily."""

import subprocess
import sys

import pytest

from agevlm import cli


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "agevlm", *args], capture_output=True, text=True, timeout=120)


def test_verbs_are_frozen():
    """A new verb is a decision: change this list together with README and CONTRIBUTING."""
    expected = {
        "quickstart", "reproduce", "init", "data scenes", "data cambrian", "data check", "data cutouts", "train",
        "eval", "analyze attention", "analyze similarity", "analyze padding",
        "ground", "convert", "export", "serve", "demo", "push", "card", "env",
    }  # fmt: skip
    assert set(cli.VERBS) == expected


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_has_its_own_help(verb):
    result = run(*verb.split(), "--help")
    assert result.returncode == 0, result.stderr
    assert f"agevlm {verb}" in result.stdout


def test_help_imports_nothing_heavy():
    code = "import sys, agevlm.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_users_mistake_is_one_line():
    result = run("data", "scenes", "/nonexistent-parent/file.txt/out", "--names", "aple")
    assert result.returncode == 2
    assert "aple" in result.stderr and "apple" in result.stderr
    assert "Traceback" not in result.stderr


def test_env_names_what_a_bug_report_needs():
    result = run("env")
    assert result.returncode == 0
    for package in ("agevlm", "torch", "transformers", "trl"):
        assert package in result.stdout
