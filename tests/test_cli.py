"""The command line: frozen verbs and flags, old spellings, errors in one line."""

import argparse
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import agevlm
from agevlm import cli
from agevlm.arguments import VerbParser
from agevlm.reproduction import reproduce
from agevlm.reproduction.prepare import prepare_parts
from agevlm.serving.demo import app
from agevlm.store import locked
from agevlm.training import flags as training_flags


# Commit 01c7f2d: number of positional arguments, flags. Whatever could be said there can be said here.
# fmt: off
BEFORE = {
    "quickstart": (0, "cutouts output parts seeds size"),
    "reproduce": (0, "cutouts dry-run jobs only output parts quickstart seeds size strict"),
    "init": (1, "cross-attention-layers dry-run dtype image-size language-model parts seed vision-tower"),
    "parts": (2, "conversations cutouts scenes seed"),  # python -m agevlm.training.parts
    "data scenes": (1, "backgrounds captions colours cutouts instructions max-objects names num-proc seed size test "
                       "turns word-rate"),
    "data cutouts": (1, "downloads"),
    "data photographs": (0, "cutouts downloads foreground output scenes seed"),
    "data cambrian": (2, "images limit rows-per-shard strict workers"),
    "data import": (1, "images masks output part strict"),
    "data check": (1, "against checkpoint images limit max-length out strict workers"),
    "train": (0, "variant size data init_from revision mask_fraction vision freeze_self_attention dry_run resume "
                 "model_name_or_path model_revision dtype attn_implementation use_peft lora_r lora_alpha lora_dropout "
                 "lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora "
                 "load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage "
                 "guidance_weight guidance_normalisation projector_learning_rate cross_attention_learning_rate "
                 "vision_learning_rate language_model_learning_rate spread_guided_rows loss_spike probe_steps strict "
                 "peak_tflops output_dir"),
    "eval": (1, "adapter batch-size benchmarks data four-bit judge limit masks max-new-tokens output protocol "
                "revision scenes split strict trust-remote-code"),
    "results": (1, "output"),  # python -m agevlm.evaluation.leaderboard
    "analyze attention": (3, "layer mask max-new-tokens output trust-remote-code"),
    "analyze similarity": (2, "batch-size limit output seeds strict text trust-remote-code"),
    "analyze padding": (2, "limit output strict text trust-remote-code"),
    "analyze architecture": (1, "output"),
    "ground": (2, "attempt backend batch-size grounder grounder-revision keep masks max-area max-new-tokens min-area "
                  "min-cells min-score num-workers processor query seed segmenter segmenter-revision split strict"),
    "ground view": (1, "count dataset output processor split"),
    "ground quality": (1, "against output processor"),
    "ground export": (2, ""),
    "ground import": (2, ""),
    "convert": (3, "read-bin revision vision-from-checkpoint vision-tower"),
    "push": (2, "branch public"),
    "card": (1, "attention dataset evaluation"),
    "export": (2, "format images int8"),
    "serve": (1, "device dtype host port"),
    "demo": (2, "host max-new-tokens port share trust-remote-code"),
    "env": (0, ""),
}
# fmt: on
# What the helps show instead. `output` stands for what was the last positional argument.
RENAMED = {
    "reproduce": {"quickstart": "output"},
    "data scenes": {"num-proc": "workers", "colours": "colors"},
    "data check": {"checkpoint": "model", "out": "output"},
    "ground": {"num-workers": "workers", "processor": "model"},
    "ground view": {"processor": "model"},
    "ground quality": {"processor": "model"},
}
NEW_OUTPUT = (
    "init", "parts", "data scenes", "data cutouts", "data cambrian", "ground", "ground export", "ground import",
    "convert", "export",
)  # fmt: skip
ADDED = {
    "quickstart": {"jobs", "questions", "text"}, "reproduce": {"questions", "text"},
    "init": {"cross-attention-position"}, "eval": {"images", "language", "rows"}, "ground": {"by-phrase"},
    "analyze attention": {"phrases"}, "serve": {"open-addresses"},
    "ground import": {"rows", "query", "by-phrase"}, "data scenes": {"min-objects", "presence-first", "splits"},
    "push": {"hub-model-id", "hub_model_id"},
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line in this process: its status, and what it printed on both streams."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["agevlm", *words])
        status = 0
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def parser_of(monkeypatch):
    """The parser that prints a verb's help."""

    class Shown(Exception):
        pass

    def show(self, *_):
        raise Shown(self)

    def parser_of(verb: str, flag: str = "--help") -> argparse.ArgumentParser:
        monkeypatch.setattr(argparse.ArgumentParser, "print_help", show)
        with pytest.raises(Shown) as shown:
            cli.dispatch([*verb.split(), flag])
        return shown.value.args[0]

    return parser_of


def test_verbs_are_frozen():
    """A new verb is a decision: change the list above together with README and CONTRIBUTING."""
    assert set(cli.VERBS) == set(BEFORE)


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_flags_are_frozen(verb, parser_of):
    parser, (count, flags) = parser_of(verb), BEFORE[verb]
    assert isinstance(parser, VerbParser)
    spellings = {name for name in parser._option_string_actions if name.startswith("--")} - {"--help"}
    if verb == "train":  # 600 flags are the libraries', which are imported to name them
        every = set(parser_of(verb, "--help-all")._option_string_actions)
        before = {f"--{training_flags.RENAMED.get(flag, flag)}" for flag in flags.split()}
        assert before | spellings <= every | {"--config"}  # which TRL reads itself
        assert 35 <= len(spellings) <= 48
        return
    renamed = RENAMED.get(verb, {})
    now = {renamed.get(flag, flag) for flag in flags.split()} | ADDED.get(verb, set())
    now |= {"output"} if verb in NEW_OUTPUT else set()
    assert spellings == {f"--{flag}" for flag in now}
    assert parser.renamed == {f"--{old}": f"--{new}" for old, new in renamed.items()}
    assert parser.output_was_positional == (verb in NEW_OUTPUT)
    positional = [action for action in parser._actions if not action.option_strings]
    assert len(positional) + parser.output_was_positional == count


def test_every_entry_point_is_a_verb():
    """`python -m` is for the command itself, for `accelerate launch`, and for old spellings that say so."""
    package = Path(cli.__file__).parent
    found = set()
    for place, _, names in os.walk(package, followlinks=True):
        for path in (Path(place) / name for name in names if name.endswith(".py")):
            text = path.read_text(encoding="utf-8")
            if text.rpartition("\n\n")[2].startswith('if __name__ == "__main__"') and "note_old" not in text:
                found.add(str(path.relative_to(package)))
    assert found == {"__main__.py", "training/train.py"}


def test_old_spellings_work_with_a_note(capsys):
    parser = VerbParser("test", "A test.")
    parser.add_argument("source")
    parser.add_output("folder")
    parser.add_argument("--workers", type=int)
    parser.rename("--num-proc", "--workers")
    wanted = parser.parse_args(["a", "--output", "b", "--workers", "2"])
    assert capsys.readouterr().err == "" and wanted.output == Path("b")
    for old in (["a", "b", "--num-proc", "2"], ["a", "--num-proc=2", "b"]):
        assert parser.parse_args(old) == wanted
        said = capsys.readouterr().err
        assert "--num-proc is now --workers" in said and "`--output b`" in said
    for wrong in (["a"], ["a", "b", "c"], ["a", "b", "--nothing"], ["a", "--output", "b", "c"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


def test_the_overview_lists_every_verb(run):
    status, said, _ = run("--help")
    assert status == 0
    assert all(f"\n  {verb} " in said for verb in cli.VERBS)
    assert "agevlm ground view" in run("ground", "view", "--help")[1]
    assert "\n  data scenes " in run("data", "--help")[1]


@pytest.mark.parametrize("start", [[sys.executable, "-m", "agevlm"], [str(Path(sys.executable).parent / "agevlm")]])
def test_a_wrong_verb_gets_a_proposal(start):
    """In a process of its own, by both names of the command."""
    result = subprocess.run([*start, "analyze", "atention"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "'analyze attention'" in result.stderr and "Traceback" not in result.stderr


def test_a_users_mistake_is_one_line(run):
    status, _, said = run("data", "scenes", "--output", "/nonexistent-parent/file.txt/out", "--names", "aple")
    assert status == 2 and said.startswith("agevlm: ") and said.count("\n") == 1
    assert "aple" in said and "apple" in said


def test_a_file_in_the_way_is_one_line(run, tmp_path):
    rows, file = tmp_path / "rows.json", tmp_path / "file"
    rows.write_text(
        '[{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi"}]}]'
    )
    file.write_text("")
    status, _, said = run("data", "cambrian", str(rows), "--output", str(file / "out"), "--workers", "1")
    assert status == 2 and said.startswith("agevlm: ") and said.count("\n") == 1
    assert str(file) in said and "choose another path" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied; change the permissions"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "x: No space left on device; free some space"),
        (FileNotFoundError("there is no a.json"), "there is no a.json"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused; check the connection"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "a file cannot be written: No space left"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
            "a file cannot be wri",
        ),
        (ConnectionError("the Hub did not answer"), "the Hub did not answer; check the connection"),
    ],
)
def test_system_errors_are_one_line(error, said, run, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "dispatch", fail)
    status, _, text = run()
    assert status == 2 and text.startswith(f"agevlm: {said}") and text.count("\n") == 1


@pytest.mark.parametrize("verb", ["demo", "quickstart", "reproduce"])
def test_what_comes_with_the_package_is_found_from_any_folder(verb, monkeypatch, tmp_path):
    """Offline and outside of a clone; `test_wheel.py` installs the package and does the work."""
    found = []

    def parts(options: argparse.Namespace) -> None:
        found.append(prepare_parts(options.size, options.parts, options.output, options.cutouts))

    monkeypatch.setattr(app, "run_verb", lambda options: found.append(options.model))
    monkeypatch.setattr(reproduce, "run_verb", parts)
    monkeypatch.chdir(tmp_path)
    cli.dispatch([verb])
    (folder,) = map(Path, found)
    assert folder.is_relative_to(Path(agevlm.__file__).parent) and list(folder.rglob("*.safetensors"))
    assert not list(tmp_path.iterdir())


def test_env_names_what_a_bug_report_needs(run):
    status, said, _ = run("env")
    assert status == 0 and all(package in said for package in ("agevlm", "torch", "transformers", "trl"))


WRITERS = {
    "train": "train stage1_align --data D --init_from M --output_dir {}",
    "attention": "analyze attention M I Q --output {}",
    "similarity": "analyze similarity M D --output {}",
    "padding": "analyze padding M D --output {}",
}


@pytest.mark.parametrize("command", WRITERS.values(), ids=WRITERS)
def test_two_commands_do_not_write_one_folder(command, tmp_path):
    words = command.format(tmp_path / "out").split()
    with locked(tmp_path / "out"), pytest.raises(ValueError, match=r"another run is writing to .*out; wait for it"):
        cli.dispatch(words)
