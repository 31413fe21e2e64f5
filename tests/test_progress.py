"""Progress in a log file: a line now and then, and the last line of a verb."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from agevlm import TINY, TINY_PARTS, cli, progress
from agevlm.progress import Bar, lines, written


ROOT = Path(__file__).resolve().parent.parent
# A verb of this package, with lines as often as given
VERB = "import sys; from agevlm import cli, progress; progress.EVERY = float(sys.argv.pop(1)); cli.main()"


def wait_for(capsys, text: str) -> str:
    """What was printed on stderr up to `text`."""
    seen, end = "", time.monotonic() + 60
    while text not in seen:
        assert time.monotonic() < end, seen
        time.sleep(0.01)
        seen += capsys.readouterr().err
    return seen


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.01)


def test_lines_tell_of_the_innermost_bar_and_else_of_the_verb(often, capsys):
    with lines("work"):
        wait_for(capsys, "work: 0.0 minutes so far\n")
        with Bar(total=3, desc="outer", unit="step") as outer:
            outer.update()
            wait_for(capsys, "outer: 1 of 3, ")
            with Bar(total=4000, desc="inner", unit="row") as inner:
                inner.update(1000)
                inner.set_postfix(loss=0.5, refresh=False)
                said = wait_for(capsys, "loss=0.5\n")
                line = [line for line in said.splitlines() if "loss" in line][-1]
                assert line.startswith("inner: 1000 of 4000, ") and "row/s" in line and " left, " in line
            wait_for(capsys, "outer: 1 of 3, ")
        wait_for(capsys, "work: ")
        with pytest.raises(RuntimeError), Bar(total=1, desc="fails"):
            raise RuntimeError
        wait_for(capsys, "work: ")
    time.sleep(0.1)
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_line_comes_while_nothing_is_done(often, capsys):
    """A row may take longer than the time between two lines."""
    with lines("work"), Bar(total=2, desc="slow"):
        said = wait_for(capsys, "slow: 0 of 2") + wait_for(capsys, "slow: 0 of 2")
    assert "\r" not in said


def test_a_bar_that_closes_says_what_it_came_to(capsys):
    """However short it was; one that has done nothing says nothing."""
    with lines("work"):
        with Bar(total=2, desc="short", unit="step") as bar:
            bar.set_postfix(loss=0.25, refresh=False)
            bar.update(2)
        with pytest.raises(RuntimeError), Bar(total=1, desc="fails"):
            raise RuntimeError
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("short: 2 of 2, ") and line.endswith("loss=0.25")


def test_other_processes_are_silent(often, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with lines("work"), Bar(total=2) as bar:
        bar.update(2)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_without_lines_a_bar_is_tqdms(capsys):
    for _ in Bar(range(2), desc="rows"):
        pass
    assert "100%" in capsys.readouterr().err
    for _ in Bar(range(2), desc="rows", disable=True):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_that_ends_has_lines(verb, monkeypatch, often, capsys):
    """Where there is no terminal; on one, and from a server, there are none."""
    seen = []
    monkeypatch.setattr(cli, "function_of", lambda _: lambda words: seen.append((words, progress._by_line)))
    cli.dispatch([*verb.split(), "--flag"])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.dispatch([*verb.split(), "--flag"])
    assert seen == [(["--flag"], verb not in ("serve", "demo")), (["--flag"], False)]


def test_no_module_has_a_bar_of_its_own():
    """Another would say nothing in a log file. lmms-eval runs its plugin, which is no verb of ours."""
    found = {
        str(path.relative_to(ROOT))
        for folder in ("src/agevlm", "training", "hub_cards", "processing", "modeling_agevlm")
        for path in (ROOT / folder).rglob("*.py")
        if any(name in path.read_text(encoding="utf-8") for name in ("tqdm(", "rich.progress"))
    }
    assert found == {"src/agevlm/evaluation/lmms/model.py"}


def test_the_last_line_quotes_and_names_the_next_command(capsys):
    written("a b/{c}", "agevlm ground view {} --output d")
    written("e")
    assert capsys.readouterr().out == (
        "written to a b/{c}; next: agevlm ground view 'a b/{c}' --output d\nwritten to e\n"
    )


def commands(root: Path) -> list[tuple[str, list[object]]]:
    """Every long verb that needs no network on tiny inputs, as its words, and what it writes."""
    scenes, masks, rows = root / "scenes", root / "masks", root / "rows.json"
    rows.write_text(
        json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi"}]}])
    )
    for name in "ab":
        Image.new("RGB", (96, 40), "red").save(root / f"{name}.png")
    pairs = root / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"image": f"{name}.png", "caption": f"red {name}"}) + "\n" for name in "ab"))
    numbers = ["--captions", 12, "--instructions", 4, "--test", 4, "--size", 96, "--workers", 1]
    exact = ["--backend", "exact", "--masks", scenes / "masks" / "captions.parquet", "--workers", 0]
    steps = ["--max-steps", 3, "--logging-steps", 1, "--per-device-train-batch-size", 4]
    return [
        ("data scenes", ["--output", scenes, *numbers]),
        ("data cambrian", [rows, "--output", root / "cambrian", "--workers", 1]),
        ("data import", [pairs, "--output", root / "imported"]),
        ("init", ["--parts", TINY_PARTS, "--output", root / "start"]),
        ("ground", [scenes / "captions", "--output", masks, *exact]),
        ("ground view", [masks, "--output", root / "view.html"]),
        ("train", ["stage3_ground", "--size", "tiny", "--data", scenes, "--init-from", TINY, *steps,
                   "--output-dir", root / "stage"]),
        ("eval", [TINY, "--scenes", scenes, "--benchmarks", "pope", "--output", root / "evaluation"]),
        ("analyze similarity", [TINY, scenes, "--limit", 4, "--output", root / "similarity"]),
        ("analyze padding", [TINY, pairs, "--output", root / "padding"]),
    ]  # fmt: skip


def check_last_line(verb: str, words: list[object], output: str) -> None:
    """The result is where it says, and the next command is a verb with flags that it has."""
    written_to, _, then = output.rstrip().splitlines()[-1].partition("; next: agevlm ")
    place = written_to.removeprefix("written to ")
    assert Path(place) in words or Path(place).parent in words, output
    assert Path(place).exists() and "{'" not in output
    following = shlex.split(then)
    found = cli.find(following)
    assert found is not None, then
    help_of = io.StringIO()
    with contextlib.redirect_stdout(help_of), pytest.raises(SystemExit):
        cli.dispatch([*found.split(), "--help"])
    assert all(word in help_of.getvalue() for word in following if word.startswith("--"))


def test_long_verbs_tell_how_far_they_are_and_end_with_what_to_do_next(tmp_path, often, capsys):
    for verb, words in commands(tmp_path):
        cli.dispatch([*verb.split(), *map(str, words)])
        said = capsys.readouterr()
        # A verb of milliseconds may end before its first line; its bars close with one
        assert re.search(r"^.+: (\d+ of \d+, .* left|\d+\.\d minutes so far)", said.err, re.MULTILINE), said.err
        assert "{'" not in said.err
        check_last_line(verb, words, said.out)
        if verb == "train":
            assert re.search(r"^stage3_ground: 3 of 3, .* left, .*loss=", said.err, re.MULTILINE), said.err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_long_verbs_do_so_in_processes_of_their_own(tmp_path):
    parts = ("parts", ["tiny", "--output", tmp_path / "parts", "--conversations", 64, "--scenes", 64])
    numbers = "captions=64, instructions=64, questions=12, pairs=8, oblong=3"
    small = (
        "import dataclasses; from agevlm.reproduction.matrix import SIZES; "
        f"SIZES['tiny-scratch'] = dataclasses.replace(SIZES['tiny-scratch'], {numbers}); "
    )
    quickstart = ("quickstart", ["--output", tmp_path / "quickstart", "--jobs", 1])
    for verb, words in [*commands(tmp_path), parts, quickstart]:
        code = (small if verb == "quickstart" else "") + VERB
        command = [sys.executable, "-c", code, 0.5, *verb.split(), *words]
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stderr
        assert re.search(r" so far\n| left", result.stderr), (verb, result.stderr)
        check_last_line(verb, words, result.stdout)


def test_a_log_file_has_lines(tmp_path):
    """In a process of its own, both streams in one file, as `nohup` has it."""
    words = ["data", "scenes", "--output", tmp_path / "scenes", "--captions", 40, "--instructions", 0, "--test", 0]
    command = [sys.executable, "-c", VERB, 0.05, *words, "--size", 96, "--workers", 1]
    with (tmp_path / "log.txt").open("w") as log:
        subprocess.run([str(word) for word in command], stdout=log, stderr=log, check=True, timeout=280)
    said = (tmp_path / "log.txt").read_text()
    assert "data scenes: 0.0 minutes so far\n" in said and "\r" not in said
    assert said.splitlines()[-1].startswith(f"written to {tmp_path / 'scenes'}; next: agevlm train ")
