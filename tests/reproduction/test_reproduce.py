"""`agevlm quickstart` and `reproduce`: a matrix of reachable runs, each once; steps; the whole chain in one folder."""

import dataclasses
import json
import os
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file

from agevlm import progress
from agevlm.data.rows import MAX_PHRASES, PHRASE_FEATURES
from agevlm.data.scenes.build import load_rows
from agevlm.modeling_agevlm import AgeVlmConfig
from agevlm.processing import AgeVlmProcessor
from agevlm.reproduction import cli, reproduce
from agevlm.reproduction.matrix import (
    QUICKSTART,
    ROWS,
    SIZES,
    STAGES,
    Start,
    chain,
    choose_rows,
    cross_layers,
    unique,
)
from agevlm.reproduction.prepare import (
    _changed,
    claim_inputs,
    draw_scenes,
    question_sets,
    rows_of,
    save_start,
    state_parts,
    state_questions,
    state_text,
    things_named,
    vocabulary,
)
from agevlm.reproduction.reproduce import Place, Step, execute, train_step
from agevlm.reproduction.scores import TABLE_2, TASKS
from agevlm.training.freezing import part_of
from agevlm.training.lineage import read_lineage


ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "checkpoints" / "tiny-parts"


# -- the matrix -------------------------------------------------------------------------------------------------------


def test_the_matrix_holds_what_the_paper_and_its_reviewers_ask_for():
    assert all(name == row.name for name, row in ROWS.items())
    assert len({row.title for row in ROWS.values()}) == len(ROWS)  # pages and pictures tell rows apart by it
    every = [row for row in ROWS.values() if row.start.twin == "no"]
    assert {row.guided for row in every} >= {(), (3,), (4,), (3, 4)}
    assert {stage for row in every for stage in STAGES if stage not in row.stages} == set(STAGES)
    assert {tuple(row.settings.items()) for row in every} == {
        (), (("guidance_normalization", "max"),), (("mask_fraction", 0.1),), (("mask_fraction", 0.01),),
        (("guidance_loss", "bce"),), (("guidance_loss", "kl"),),
    }  # fmt: skip
    assert {row.start.position for row in every} == {"after_layer", "after_self_attention"}
    assert {row.query for row in every} == {
        "text",
        "things",
        "phrases",
        "phrase-words",
        "phrase-masks",
        "phrase-noise",
    }
    assert {row.start.layers for row in every} == {"default", "first", "last", "every"}
    assert {row.start.twin for row in ROWS.values()} == {"no", "equal", "small"}


@pytest.mark.parametrize("size", list(SIZES))
def test_every_row_is_reachable_from_a_start_at_equal_steps(size):
    counts = set()
    for row in ROWS.values():
        path = chain(row, size, seed=5)
        assert [run.recipe.stage for run in path] == list(row.stages)
        assert path[0].parent is None
        for parent, run in pairwise(path):
            assert run.parent == parent.name
        assert all(run.recipe.training["seed"] == 5 for run in path)
        guided = tuple(run.recipe.stage for run in path if run.recipe.training["guidance_weight"])
        assert guided == row.guided
        counts.add(sum(SIZES[size].steps(run.recipe) for run in path))
    assert len(counts) == 1


def test_a_row_differs_from_agevlm_in_what_it_says_alone():
    def told(name):
        runs = chain(ROWS[name], "tiny", 0)
        return [(dataclasses.replace(run.recipe, variant=""), run.query, run.start) for run in runs]

    ours = told("agevlm")
    changed = {
        "max": {3: {"guidance_normalization": "max"}},
        "guided-4": {3: {"guidance_weight": 0.0}, 4: {"guidance_weight": 1.0}},
        "masks-10": {3: {"mask_fraction": 0.1}},
    }
    for name, changes in changed.items():
        for stage, (recipe, query, start) in enumerate(ours, start=1):
            assert told(name)[stage - 1] == (recipe.override(**changes.get(stage, {})), query, start)
    assert [query for _, query, _ in told("query-things")] == ["text", "text", "things", "text"]
    assert [recipe for recipe, _, _ in told("query-things")] == [recipe for recipe, _, _ in ours]


def test_from_scratch_means_another_language_model_that_trains_throughout(tmp_path):
    """The tower is that of the pretrained parts; the language model has half of the pretrained one's width."""
    for run in chain(ROWS["agevlm"], "clutter", 0):
        assert run.recipe.trains[-1] == "language_model" and "vision_all" not in run.recipe.trains
    models = {}
    for size in ("clutter-able", "clutter"):
        folder = tmp_path / size
        save_start(PARTS, folder, 3, SIZES[size], Start())
        models[size] = load_file(folder / "model.safetensors")
        assert AgeVlmProcessor.from_pretrained(folder).image_processor.grid == (10, 10)
    able, scratch = models.values()
    assert able.keys() == scratch.keys()
    for key in able:
        if part_of(key) == "vision":
            assert able[key].equal(scratch[key])
        elif part_of(key) == "language_model":
            assert scratch[key].shape[-1] * 2 == able[key].shape[-1]


def test_few_questions_are_asked_again_in_as_many_steps():
    for few, endless in zip(chain(ROWS["agevlm"], "clutter-few", 0), chain(ROWS["agevlm"], "clutter", 0), strict=True):
        assert SIZES["clutter-few"].steps(few.recipe) == SIZES["clutter"].steps(endless.recipe)
    assert few.recipe.training["num_train_epochs"] == 16 * endless.recipe.training["num_train_epochs"]


def test_shared_beginnings_are_shared_and_nothing_else():
    paths = {row.name: chain(row, "tiny", 0) for row in ROWS.values()}
    runs = unique(paths.values())
    identity = {}
    for path in paths.values():
        for end in range(1, len(path) + 1):
            # with the variant's name: a finished run refuses to go on under another one
            prefix = tuple((str(run.recipe), run.query, run.start) for run in path[:end])
            identity.setdefault(path[end - 1].name, set()).add(prefix)
    assert all(len(prefixes) == 1 for prefixes in identity.values())
    assert len({next(iter(prefixes)) for prefixes in identity.values()}) == len(runs) == len(identity)
    assert paths["guided-4"][:3] == paths["ca-baseline"][:3]
    names = [run.name for run in runs]
    assert all(run.parent is None or names.index(run.parent) < names.index(run.name) for run in runs)
    assert [run.name for run in chain(ROWS["agevlm"], "tiny", 1)] == [run.name for run in paths["agevlm"]]


@pytest.mark.parametrize("size", list(SIZES))
def test_the_quickstarts_rows_differ_in_guidance_alone(size):
    """Same stages, data, steps, batch and learning rates; only the guidance weight differs, as in Table 1."""
    paths = {row.name: chain(row, size, seed=3) for row in choose_rows(["quickstart"])}
    assert tuple(paths) == QUICKSTART
    weights = {name: [run.recipe.training["guidance_weight"] for run in path] for name, path in paths.items()}
    assert weights == {"ca-baseline": [0, 0, 0, 0], "agevlm": [0, 0, 1, 0], "phrases-lm": [0, 0, 1, 1]}
    same = [[run.recipe.override(guidance_weight=0, variant="") for run in path] for path in paths.values()]
    assert same[0] == same[1] == same[2]
    assert [run.name for run in unique(paths.values())] == [
        "stage1", "stage2", "stage3-unguided", "stage4-ca-baseline", "stage3-guided", "stage4-agevlm",
        "stage3-phrases", "stage4-phrases-lm",
    ]  # fmt: skip


def test_rows_are_chosen_by_name_or_group():
    assert [row.name for row in choose_rows(["max", "guidance"])] == ["guided-4", "max"]
    assert choose_rows(["Normalisation"]) == choose_rows(["normalization"]) == [ROWS["max"]]
    assert choose_rows(None) == list(ROWS.values())
    with pytest.raises(ValueError, match=r"called sum.*agevlm"):
        choose_rows(["sum"])


@pytest.mark.parametrize("default, depth", [((1, 4), 4), ((2, 7, 12, 17), 16)])
def test_cross_blocks_sit_where_a_row_says(default, depth):
    first, last, every = (cross_layers(which, default, depth) for which in ("first", "last", "every"))
    assert cross_layers("default", default, depth) == default
    assert first == (default[0],)
    assert last == (default[-1] - len(default) + 1,)
    assert len(every) == depth
    for layers in (first, last, every):  # the configuration refuses what does not fit
        AgeVlmConfig(text_config={"num_hidden_layers": depth}, cross_attention_layers=list(layers))


def test_the_things_named():
    words = ["apple", "apples", "red", "green", "bird"]
    assert things_named("Is there a red apple in the image?", words) == "red apple"
    assert things_named("A green bird and two apples.", words) == "green bird and two apples"
    assert things_named("What is the word on the sign?", words) == "What is the word on the sign?"
    assert things_named("Is it a redcurrant?", words) == "Is it a redcurrant?"


# -- doing the work ---------------------------------------------------------------------------------------------------


def note(path: Path, name: str, fail: bool = False) -> None:
    if fail:
        raise ValueError("boom")
    with path.open("a") as file:
        file.write(f"{name}\n")


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_failure_takes_along_what_needs_it_and_nothing_else(tmp_path, jobs):
    log = tmp_path / "log"
    steps = [
        Step("a", partial(note, log, "a")),
        Step("b", partial(note, log, "b", fail=True)),
        Step("c", partial(note, log, "c"), ("b",)),
        Step("d", partial(note, log, "d"), ("c",)),
        Step("e", partial(note, log, "e"), ("a",)),
    ]
    told: list[str] = []
    failed = execute(steps, jobs, strict=False, tell=told.append)
    assert log.read_text().split() == ["a", "e"]
    assert sorted(line.split(":")[0] for line in told) == ["a", "b failed", "c left out", "d left out", "e"]
    assert failed == {"b": "ValueError: boom", "c": "needs b", "d": "needs c"}
    with pytest.raises(ValueError, match="boom"):
        execute(steps, jobs, strict=True, tell=lambda text: None)


def test_both_verbs_are_one_reproduction(monkeypatch, tmp_path, capsys):
    """Same function, same arguments, one folder; a call sees one accelerator."""
    seen = []
    monkeypatch.setattr(reproduce, "run_verb", seen.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    cli.quickstart([])
    cli.reproduce(["--only", "quickstart", "--strict", "--quickstart", "runs/quickstart"])
    assert seen[0] == seen[1]
    assert "--quickstart is now --output" in capsys.readouterr().err
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    cli.reproduce([])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for wrong in (["--quickstart", "a", "--output", "b"], ["--jobs", "0"], ["--seeds", "0", "-1"]):
        with pytest.raises(SystemExit):
            cli.reproduce(wrong)


def test_missing_parts_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="agevlm parts tiny --output"):
        save_start(tmp_path, tmp_path / "start", 0, SIZES["tiny"], Start())
    with pytest.raises(ValueError, match="agevlm data cutouts"):
        cli.quickstart(["--size", "small", "--output", str(tmp_path)])


def own_questions(folder: Path, name: str, *rows: dict) -> Path:
    """A file of own questions about one red picture."""
    Image.new("RGB", (64, 48), "red").save(folder / "red.png")
    (folder / name).write_text("\n".join(json.dumps({"image": "red.png", **row}) for row in rows), encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("size", "flag", "content", "message"),
    [
        ("tiny", "--questions", b"", "own.jsonl"),
        ("tiny", "--questions", b'{"image": "gone.png", "question": "Is it?", "answer": "yes"}', "gone.png"),
        ("tiny", "--questions", b"PAR1", "own.jsonl"),
        ("tiny", "--text", "text".encode("utf-16"), "own.jsonl is UTF-16"),
        ("tiny", "--text", b" \n", "holds no text"),
        ("tiny-scratch", "--text", b"A text.", "from scratch .* knows none"),
    ],
)
def test_own_files_that_cannot_be_used_are_refused_before_anything_is_made(tmp_path, size, flag, content, message):
    (tmp_path / "own.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        cli.reproduce(["--size", size, flag, str(tmp_path / "own.jsonl"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_folder_has_one_set_of_inputs(tmp_path):
    """Else rows that different calls trained or asked would be compared."""
    red = {"question": "Is it red?", "answer": "yes"}
    first, second = (
        own_questions(tmp_path, "a.jsonl", red),
        own_questions(tmp_path, "b.jsonl", {**red, "answer": "no"}),
    )
    (tmp_path / "a.txt").write_text("A text."), (tmp_path / "b.txt").write_text("Another.")
    other = {"language_model": "0", "vision_tower": "1"}
    inputs = {
        "questions": (state_questions(first), state_questions(second)),
        "text": (state_text(None), state_text(tmp_path / "a.txt")),
        "parts": (state_parts(PARTS), other),
    }
    assert state_text(tmp_path / "a.txt") != state_text(tmp_path / "b.txt")
    for name, (usual, changed) in inputs.items():
        for _ in range(2):
            claim_inputs(tmp_path / "out", {name: usual})
        with pytest.raises(ValueError, match=f"another reproduction with other {name}"):
            claim_inputs(tmp_path / "out", {name: changed})


def test_size_small_shows_what_is_there_drawn_and_photographed(tmp_path):
    names = [f"thing{chr(97 + number)}" for number in range(12)]
    things = [
        {"name": name, "style": style, "category": f"kind{place % 3}", "file": f"{style}-{name}.png"}
        for place, name in enumerate(names)
        for style in (("drawing", "photo") if place < 8 else ("photo",))
    ]
    for thing in things:
        Image.new("RGBA", (80, 80), "red").save(tmp_path / thing["file"])
    (tmp_path / "cutouts.json").write_text(json.dumps(things), encoding="utf-8")
    size = dataclasses.replace(SIZES["small"], captions=4, instructions=4, questions=4, min_objects=1)
    scenes = draw_scenes(tmp_path / "scenes", size, tmp_path)
    assert json.loads((scenes / "scenes.json").read_text(encoding="utf-8"))["names"] == names[:8]
    found = {name: data for name, _, _, data in question_sets(scenes)}
    assert list(found) == ["evaluation", "language", "name", "style"]
    assert [len(data["pope"]) for name, data in found.items() if name != "language"] == [4, 4, 4]


@pytest.fixture
def minute(monkeypatch):
    """The default size, cut down: two stages' rows and few questions, of two splits."""
    numbers = {"captions": 64, "instructions": 64, "questions": 12, "pairs": 8, "oblong": 3}
    size = dataclasses.replace(SIZES["tiny-scratch"], **numbers, splits=("composition", "name"))
    monkeypatch.setitem(SIZES, "tiny-scratch", size)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))


def report_of(output: Path) -> dict:
    return json.loads((output / "report.json").read_text(encoding="utf-8"))


def weights_of(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.glob("seed-0/stage*/model.safetensors")}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quickstart_goes_on_as_a_reproduction(minute, tmp_path, monkeypatch, capsys):
    """Interrupted, resumed, once more, and another row by the other verb in the same folder; with own questions."""
    asked = {"red": "yes", "blue": "no"}
    rows = [{"question": f"Is it {color}?", "answer": said} for color, said in asked.items()]
    output, questions = tmp_path / "run", own_questions(tmp_path, "own.jsonl", *rows)
    arguments = ["--output", str(output), "--parts", str(PARTS), "--jobs", "1", "--questions", str(questions)]
    cli.reproduce([*arguments, "--only", "quickstart", "--dry-run"])
    said = " ".join(capsys.readouterr().out.split())
    assert "8 stage runs (shared ones once), 0 finished, 8 to do (22 steps), 3 rows to measure" in said
    assert not output.exists()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(reproduce, "measure_step", interrupt)
        patched.setattr(progress, "EVERY", 0.01)
        with progress.lines("quickstart"), pytest.raises(KeyboardInterrupt):
            cli.quickstart(arguments)
    assert "seed-0/stage1: 1 of 2, " in capsys.readouterr().err
    before = weights_of(output)
    assert {path.parent.name for path in before} == {"stage1", "stage2", "stage3-unguided", "stage4-ca-baseline"}
    cli.quickstart(arguments)
    last = capsys.readouterr().out.splitlines()[-1]
    ends = " ".join(str(output / "seed-0" / name) for name in ("stage4-phrases-lm", "stage4-ca-baseline"))
    assert last == f"written to {output / 'report.html'}; next: agevlm demo {ends}"
    weights = weights_of(output)
    assert weights.items() > before.items() and len(weights) == 8
    files = {"config.json", "model.safetensors", "modeling_agevlm.py", "processing_agevlm.py", "README.md"}
    assert files <= {path.name for path in (output / "seed-0" / "stage4-agevlm").iterdir()}
    report = report_of(output)
    assert set(report["numbers"]) == set(QUICKSTART)
    titles = {TASKS[-1].title, "accuracy, unseen names", "false yes, own questions"}
    assert all(titles <= set(numbers) for numbers in report["numbers"].values())
    conversations = load_rows(output / "scenes", "instructions")["messages"]
    turns = sum(message["role"] == "assistant" for messages in conversations for message in messages)
    for name in QUICKSTART:
        points = report["curves"][name]["0"]["points"]
        assert len(points) == 5 and (points[0][0], points[-1][0]) == (0, turns)  # four steps see every row
    assert (output / "curves.png").is_file()
    page, text = ((output / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    for shown in (page, text):
        assert all(ROWS[name].title in shown for name in QUICKSTART)
        assert "not run" in shown and "phrase by phrase" in shown
        assert "similarity of 8 pairs, padding of 3 pictures" in shown
        assert "questions to 75 %" in shown and "What deviates from the paper" in shown
        assert shown.index("Presence on unseen") < shown.index("Learning curves") < shown.index("Where they look")
        assert shown.index("answers and attention") < shown.index("Answers above every constant answer")
    assert page.count("<svg") == 3  # a checkpoint logs loss and guidance of its steps

    cli.reproduce([*arguments, "--only", "query-things"])
    again = report_of(output)
    assert {name: again["numbers"][name] for name in QUICKSTART} == report["numbers"]
    assert weights_of(output).items() > weights.items() and len(weights_of(output)) == 10
    assert set(again["numbers"]) == {*QUICKSTART, "query-things"}
    lineages = [
        read_lineage(output / "seed-0" / chain(ROWS[n], "tiny-scratch", 0)[2].name) for n in ("agevlm", "query-things")
    ]
    assert lineages[0]["data"]["fingerprint"] != lineages[1]["data"]["fingerprint"]  # other words are guided


@pytest.mark.slow
def test_runs_with_the_same_tower_share_its_features(minute, tmp_path):
    """Over seeds; the twin opens its pictures."""
    place = Place(tmp_path / "out", "tiny-scratch", PARTS)
    draw_scenes(place.scenes, SIZES["tiny-scratch"], None)
    sizes = []
    for seed in (0, 1):
        train_step(place, seed, chain(ROWS["agevlm"], "tiny-scratch", seed)[0])
        sizes.append([(path.name, path.stat().st_size) for path in sorted(place.features.rglob("*.bin"))])
    assert sizes[0] == sizes[1] and len(sizes[0]) == 2
    train_step(place, 0, chain(ROWS["twin"], "tiny-scratch", 0)[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_twin_end_to_end(minute, tmp_path):
    output = tmp_path / "out"
    arguments = ["--output", str(output), "--parts", str(PARTS), "--only", "twin", "--strict", "--jobs", "1"]
    cli.reproduce(arguments)
    titles = set(report_of(output)["numbers"]["twin"])
    assert titles >= {answer.title for answer in TABLE_2}
    assert not any("attention" in title for title in titles)
    assert not list(output.glob("seed-0/stage*/training_args.bin"))
    weights = weights_of(output)
    assert len(weights) == 4
    for folder in output.glob("seed-0/stage*"):
        assert json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["truncation"] is None
    cli.reproduce(arguments)
    assert weights_of(output) == weights


def test_guided_words_are_narrowed_for_the_rows_that_vary_them_alone(tmp_path):
    size = dataclasses.replace(SIZES["tiny"], captions=12, instructions=6, questions=6)
    draw_scenes(tmp_path, size, None)
    words = vocabulary(tmp_path)

    def ground(name):
        return rows_of(tmp_path, chain(ROWS[name], "tiny", 0)[2])  # of stage 3

    plain, narrow = ground("agevlm"), ground("query-things")
    assert narrow.features == plain.features
    assert narrow["messages"] == plain["messages"]
    shorter = 0
    for before, after in zip(plain["guidance"], narrow["guidance"], strict=True):
        assert (before is None) == (after is None)
        if before is not None:
            assert {**after, "query": ""} == {**before, "query": ""}  # same picture of the mask, same message
            assert after["query"] == things_named(before["query"], words)
            shorter += len(after["query"]) < len(before["query"])
    assert shorter > 6
    few = ground("masks-10")["guidance"]
    assert sum(entry is not None for entry in few) < sum(entry is not None for entry in plain["guidance"])


def test_phrases_differ_from_those_of_the_folder_in_what_the_row_says_alone(tmp_path):
    size = dataclasses.replace(SIZES["tiny"], captions=24, instructions=6, questions=6)
    draw_scenes(tmp_path, size, None)

    def ground(name):
        guided = rows_of(tmp_path, chain(ROWS[name], "tiny", 0)[2])["guidance"]  # of stage 3
        return [entry if isinstance(entry, list) else [entry] for entry in guided]

    def words(entry):
        return entry["query"], entry["message_index"], entry["occurrence"]

    whole, plain = ground("agevlm"), ground("phrases")
    entries = [(text, entry) for (text,), row in zip(whole, plain, strict=True) for entry in row]
    assert len(entries) > 30
    for name in ("phrase-words", "phrase-masks", "phrases-lm-noise"):
        changed = [entry for row in ground(name) for entry in row]
        same_masks = [new["mask"] == old["mask"] for new, (_, old) in zip(changed, entries, strict=True)]
        if name == "phrase-masks":
            assert all(same_masks)
            assert [words(new) for new in changed] == [(t["query"], t["message_index"], None) for t, _ in entries]
            continue
        assert [words(new) for new in changed] == [words(old) for _, old in entries]
        if name == "phrase-words":
            assert all(new["mask"] == text["mask"] for new, (text, _) in zip(changed, entries, strict=True))
        else:
            assert [number for number, same in enumerate(same_masks) if not same] == list(range(0, len(entries), 5))


@pytest.mark.parametrize("phrases", [1, 2, 5, MAX_PHRASES])
def test_noise_comes_from_another_picture(tmp_path, phrases):
    """However many phrases each has."""
    entries = [
        {"id": str(number // phrases), "query": "q", "message_index": 1, "source": "s", "score": 1.0, "occurrence": 0,
         "mask": {"bytes": f"{number // phrases}".encode(), "path": None}}
        for number in range(20 * phrases)
    ]  # fmt: skip
    (tmp_path / "phrases").mkdir()
    Dataset.from_list(entries, features=PHRASE_FEATURES).to_parquet(tmp_path / "phrases" / "captions.parquet")
    table = _changed(tmp_path, "captions", "phrase-noise").with_format("arrow")[:].to_pylist()
    other = [number for number, entry in enumerate(table) if entry["mask"]["bytes"].decode() != entry["id"]]
    assert other == list(range(0, len(entries), 5))
