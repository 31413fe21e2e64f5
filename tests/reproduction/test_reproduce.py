"""`agevlm reproduce`: a complete matrix of reachable runs, each once; resuming; claims that follow from numbers."""

import dataclasses
import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agevlm.modeling_agevlm import AgeVlmConfig
from agevlm.reproduction import claims, cli, findings, quickstart, reproduce
from agevlm.reproduction.claims import compared, decide
from agevlm.reproduction.matrix import PAPER_ROWS, STAGES, chain, choose_rows, cross_layers, matrix, unique
from agevlm.reproduction.queries import things_named, vocabulary
from agevlm.reproduction.reproduce import Step, execute
from agevlm.reproduction.scores import MASS, TABLE_2, Number, Scores
from agevlm.stats import share
from agevlm.training.lineage import LINEAGE_FILE, read_lineage, write_lineage


ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "checkpoints" / "tiny-parts"
ROWS = {row.name: row for row in matrix()}


# -- the matrix -------------------------------------------------------------------------------------------------------


def test_the_matrix_holds_what_the_paper_and_its_reviewers_ask_for():
    assert len(ROWS) == len(matrix())
    every = [row for row in matrix() if row.start.twin == "no"]
    assert {row.guided for row in every} >= {(), (3,), (4,), (3, 4)}
    assert {stage for row in every for stage in STAGES if stage not in row.stages} == set(STAGES)
    assert {row.normalisation for row in every} == {"sum", "max"}
    assert {row.query for row in every} == {"text", "things"}
    assert {row.start.layers for row in every} == {"default", "first", "last", "every"}
    assert len({row.mask_fraction for row in every}) >= 3
    assert {row.start.twin for row in matrix()} == {"no", "equal", "small"}


@pytest.mark.parametrize("size", list(quickstart.SIZES))
def test_every_row_is_reachable_from_a_start_at_equal_steps(size):
    counts = set()
    for row in matrix():
        path = chain(row, size, seed=5)
        assert [run.recipe.stage for run in path] == list(row.stages)
        assert path[0].parent is None
        assert path[0].origin == row.start.name
        for parent, run in pairwise(path):
            assert run.parent == run.origin == parent.name
        assert all(run.recipe.training["seed"] == 5 for run in path)
        guided = tuple(run.recipe.stage for run in path if run.recipe.training["guidance_weight"])
        assert guided == row.guided
        counts.add(sum(quickstart.steps_of(run.recipe, quickstart.SIZES[size]) for run in path))
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


def test_shared_beginnings_are_shared_and_nothing_else():
    paths = {row.name: chain(row, "tiny", 0) for row in matrix()}
    runs = unique(paths.values())
    identity = {}
    for path in paths.values():
        for end in range(1, len(path) + 1):
            prefix = tuple(
                (str(dataclasses.replace(run.recipe, variant="")), run.query, run.start) for run in path[:end]
            )
            identity.setdefault(path[end - 1].name, set()).add(prefix)
    assert all(len(prefixes) == 1 for prefixes in identity.values())
    assert len({next(iter(prefixes)) for prefixes in identity.values()}) == len(runs) == len(identity)
    assert paths["guided-4"][:3] == paths["ca-baseline"][:3]
    names = [run.name for run in runs]
    assert all(run.parent is None or names.index(run.parent) < names.index(run.name) for run in runs)
    assert [run.name for run in chain(ROWS["agevlm"], "tiny", 1)] == [run.name for run in paths["agevlm"]]


def test_the_quickstarts_runs_are_those_of_the_matrix():
    known = {run.address for run in quickstart.plan("tiny", 0)}
    assert known == {run.address for row in PAPER_ROWS for run in chain(row, "tiny", 0)}


def test_rows_are_chosen_by_name_or_group():
    assert [row.name for row in choose_rows(["max", "guidance"])] == ["guided-4", "max"]
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


def test_jobs_share_the_devices_that_may_be_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [reproduce._device(job) for job in range(3)] == ["4", "6", "4"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(reproduce.torch.cuda, "device_count", lambda: 0)
    assert reproduce._device(0) is None


@pytest.fixture
def minute(monkeypatch):
    """The tiny size, cut down: two stages' rows and few questions."""
    size = dataclasses.replace(quickstart.SIZES["tiny"], captions=32, instructions=32, questions=12)
    monkeypatch.setitem(quickstart.SIZES, "tiny", size)
    monkeypatch.setattr(reproduce, "PAIRS", 8)
    monkeypatch.setattr(reproduce, "OBLONG", 3)
    return size


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_rows_end_to_end_and_once_more(minute, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--output", str(output), "--parts", str(PARTS), "--only", "ca-baseline", "query-things"]
    cli.reproduce([*arguments, "--dry-run"])
    assert not output.exists()
    assert "6 stage runs (shared ones once), 0 finished, 6 to do (12 steps)" in " ".join(
        capsys.readouterr().out.split()
    )
    cli.reproduce(arguments)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    page, text = ((output / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    for shown in (page, text):
        assert "CA-baseline" in shown
        assert "guided words: the things named" in shown
        assert "not run" in shown
    assert set(report["numbers"]) == {"ca-baseline", "query-things"}
    weights = {path: path.stat().st_mtime_ns for path in output.glob("seed-0/**/*.safetensors")}
    assert len([path for path in weights if path.parent.name.startswith("stage")]) >= 6
    guided = read_lineage(output / "seed-0" / chain(ROWS["query-things"], "tiny", 0)[2].name)
    plain = read_lineage(output / "seed-0" / chain(ROWS["ca-baseline"], "tiny", 0)[2].name)
    assert guided["data"]["fingerprint"] != plain["data"]["fingerprint"]  # other words are guided
    cli.reproduce([*arguments[:4], "--only", "ca-baseline"])  # finds everything done, and reports both
    again = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert again["numbers"] == report["numbers"]
    assert {path: path.stat().st_mtime_ns for path in output.glob("seed-0/**/*.safetensors")} == weights


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_twin_end_to_end(minute, tmp_path):
    output = tmp_path / "out"
    arguments = ["--output", str(output), "--parts", str(PARTS), "--only", "twin", "--strict"]
    cli.reproduce(arguments)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert set(report["numbers"]["twin"]) == {title for _, _, title in TABLE_2}
    assert not list(output.glob("seed-0/stage*/training_args.bin"))
    weights = {path: path.stat().st_mtime_ns for path in output.glob("seed-0/stage*/model.safetensors")}
    assert len(weights) == 4
    for folder in output.glob("seed-0/stage*"):
        assert json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["truncation"] is None
    cli.reproduce(arguments)
    assert {path: path.stat().st_mtime_ns for path in output.glob("seed-0/stage*/model.safetensors")} == weights


def test_guided_words_are_narrowed_for_the_rows_that_vary_them_alone(tmp_path):
    size = dataclasses.replace(quickstart.SIZES["tiny"], captions=12, instructions=6, questions=6)
    quickstart.draw_scenes(tmp_path, size, None)
    words = vocabulary(tmp_path)

    def rows_of(name):
        return reproduce.rows_of(tmp_path, chain(ROWS[name], "tiny", 0)[2])  # of stage 3

    plain, narrow = rows_of("agevlm"), rows_of("query-things")
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
    few = rows_of("masks-10")["guidance"]
    assert sum(entry is not None for entry in few) < sum(entry is not None for entry in plain["guidance"])


def test_runs_of_a_quickstart_are_taken_if_they_are_the_same(tmp_path):
    run = chain(ROWS["agevlm"], "tiny", 0)[2]
    folder = tmp_path / "seed-0" / "stage3-guided"
    folder.mkdir(parents=True)
    arguments = reproduce.AgeVlmSFTConfig(**run.recipe.training_arguments(output_dir=str(folder)))
    lineage = {
        "status": "finished",
        "recipe": {
            "stage": 3,
            "trains": list(run.recipe.trains),
            "frozen": [],
            "training": reproduce.as_json(reproduce.training_identity(arguments)),
        },
        "data": {"rows": quickstart.SIZES["tiny"].captions, "mask_fraction": 1.0},
    }
    place = reproduce.Place(tmp_path / "out", "tiny", PARTS, tmp_path / "scenes", tmp_path)
    write_lineage(folder, {**lineage, "status": "unfinished"})
    assert place.taken(0, run) is None
    write_lineage(folder, lineage)
    assert place.folder(0, run) == folder
    assert place.taken(1, run) is None
    assert place.taken(0, chain(ROWS["max"], "tiny", 0)[2]) is None
    del lineage["recipe"]["training"]["spread_guided_rows"]  # unknown to an older version
    write_lineage(folder, lineage)
    assert place.folder(0, run) == folder
    lineage["recipe"]["training"]["learning_rate"] = 1.0
    write_lineage(folder, lineage)
    with pytest.raises(ValueError, match=r"learning_rate: 1.0"):
        place.folder(0, run)
    assert (folder / LINEAGE_FILE).exists()


# -- what the numbers say ---------------------------------------------------------------------------------------------


def scores_of(first: list[np.ndarray], second: list[np.ndarray]) -> Scores:
    """Two rows with the given right answers per seed."""
    made = object.__new__(Scores)
    units = np.arange(len(first[0]))
    made.numbers = {
        name: {"accuracy": Number({seed: share(right) for seed, right in enumerate(answers)}, units)}
        for name, answers in (("ca-baseline", first), ("agevlm", second))
    }
    return made


def answers(share_right: float, seed: int, n: int = 400) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < share_right).astype(float)


@pytest.mark.parametrize(
    "low, high, verdict",
    [((0.5, 0.5), (0.8, 0.8), True), ((0.5, 0.5), (0.5, 0.5), False), ((0.8, 0.8), (0.5, 0.5), False),
     ((0.5, 0.9), (0.95, 0.7), False), ((0.5,), (0.8,), None)],
    ids=["better", "equal", "worse", "seeds disagree", "one seed"],
)  # fmt: skip
def test_claims_follow_from_the_numbers(low, high, verdict):
    scores = scores_of(
        [answers(share_right, seed) for seed, share_right in enumerate(low)],
        [answers(share_right, 10 + seed) for seed, share_right in enumerate(high)],
    )
    difference = scores.difference("ca-baseline", "agevlm", "accuracy")
    assert decide(difference) is verdict
    claim = compared("A claim", "accuracy", difference)
    assert claim.holds is verdict
    assert f"{difference['difference']:+.1f} points" in claim.sentence
    expected = np.mean([s.value() for s in scores.numbers["agevlm"]["accuracy"].seeds.values()]) - np.mean(
        [s.value() for s in scores.numbers["ca-baseline"]["accuracy"].seeds.values()]
    )
    assert difference["difference"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "spans, verdict, below",
    [(((0.4, 0.6), (0.45, 0.55)), True, False), (((0.4, 0.6),), None, False),
     (((0.4, 0.6), (0.6, 0.7)), False, False), (((0.4, 0.6), (0.3, 0.49)), False, True)],
)  # fmt: skip
def test_similarity_is_decided_by_every_seed(spans, verdict, below):
    def entries(intervals):
        return [{"headline": {"auroc": sum(span) / 2, "auroc_interval": span}} for span in intervals]

    claim = claims._apart({"twin": entries(spans), "agevlm": entries([(0.5, 0.9)])})
    assert claim.holds is verdict
    assert ("mismatched pairs are the closer" in claim.sentence) is below
    assert "AGE-VLM's last cross block: 0.700 [0.500, 0.900]" in claim.sentence


def test_rows_that_answer_blindly_decide_nothing():
    scores = scores_of([answers(0.5, 0)] * 2, [answers(0.8, 1)] * 2)
    scores.constants = {"accuracy": 50.0}
    assert [scores.is_above_blind(name, "accuracy") for name in ("ca-baseline", "agevlm")] == [False, True]
    better = claims._above(scores, "ca-baseline", "agevlm", "accuracy", "A claim")
    assert better.holds is True
    scores.constants = {"accuracy": 90.0}
    blind = claims._above(scores, "ca-baseline", "agevlm", "accuracy", "A claim")
    assert blind.holds is None
    assert "decides nothing" in blind.sentence


def test_a_claim_that_fails_says_how():
    equal = scores_of([answers(0.5, 0)] * 2, [answers(0.5, 0)] * 2).difference("ca-baseline", "agevlm", "accuracy")
    worse = scores_of([answers(0.8, 0)] * 2, [answers(0.5, 1)] * 2).difference("ca-baseline", "agevlm", "accuracy")
    assert compared("A claim", "accuracy", equal).sentence.endswith("No difference can be told.")
    assert compared("A claim", "accuracy", worse).sentence.endswith("The difference is reversed.")
    assert [findings._reading(found) for found in (equal, worse)] == ["no difference told", "worse"]
    one_seed = {**worse, "seeds": {"0": -30.0}}
    assert findings._reading(one_seed) == "one seed"
    assert findings._reading({**worse, "seeds": {"0": -30.0, "1": 1.0}}) == "no difference told"


def test_table_2_is_claimed_where_the_paper_has_it():
    scores = scores_of([answers(0.5, 0)], [answers(0.5, 1)])
    titles = [claim.title for claim in claims.claims(scores, {}, {})]
    assert len(titles) == len(set(titles))
    told = {
        rival: {title[9 : title.index(":")] for title in titles if f"AGE-VLM above {rival} (paper" in title}
        for rival in ("CA-baseline", "the concatenating twin")
    }
    assert told["CA-baseline"] == set(claims.PAPER) - {"CV-Bench 2D", "Hallusion qAcc"}  # lower and equal in the paper
    assert told["the concatenating twin"] == set(claims.PAPER) - {"CV-Bench 3D", "RealWorldQA"}
    assert set(claims.PAPER) < {title for _, _, title in TABLE_2}
    assert MASS not in claims.PAPER


def test_answers_and_attention_are_shown_together(tmp_path):
    for name in ("picture", "ours", "twin"):
        Image.new("RGB", (64, 48), "white").save(tmp_path / f"{name}.png")

    def panel(title, answer, mass, name):
        return {"title": title, "answer": answer, "correct": True, "in_mask_mass": mass,
                "overlay": str(tmp_path / f"{name}.png")}  # fmt: skip

    drawn = [panel("AGE-VLM", "Yes.", 0.5, "ours"), panel("Twin", "No.", 0.1, "twin")]
    example = {"id": "1", "question": "Is there a cup?", "answer": "yes", "image": str(tmp_path / "picture.png"),
               "has_mask": True, "panels": drawn}  # fmt: skip
    made = findings.attention_section([example, example], tmp_path / "attention.png")
    assert made["lines"] == [
        ["question", "truth", "AGE-VLM", "Twin"],
        *[["Is there a cup?", "yes", "Yes.", "No."]] * 2,
    ]
    with Image.open(tmp_path / "attention.png") as sheet:
        assert sheet.width > 3 * 300
        assert sheet.height > 2 * 225
    assert "![" in findings.markdown("tiny", {}, [], [made])


def test_what_was_not_run_is_not_claimed():
    scores = scores_of([answers(0.5, 0)], [answers(0.5, 1)])
    claim = compared("A claim", "accuracy", scores.difference("twin", "agevlm", "accuracy"))
    assert claim.holds is None
    assert "Not run" in claim.sentence
    assert claims._apart({}).holds is None
    assert "Not run" in claims._padding({"agevlm": []}).sentence


@pytest.mark.parametrize("guided, unguided, verdict", [((0.2, 0.3), (0.9, 1.1), True), ((0.2, 1.0), (0.9, 1.1), False),
                                                       ((0.2,), (0.9,), None)])  # fmt: skip
def test_padding_is_decided_by_every_seed(guided, unguided, verdict):
    def entries(values):
        return [{"variants": {"pad": {"enrichment": value}}} for value in values]

    claim = claims._padding({"agevlm": entries(guided), "ca-baseline": entries(unguided)})
    assert claim.holds is verdict
    assert f"{min(guided):.2f}" in claim.sentence
    alone = claims._looks_at_padding({"ca-baseline": entries(unguided)})
    assert alone.holds is (None if len(unguided) < 2 else False)
    if len(unguided) > 1:
        assert claims._looks_at_padding({"ca-baseline": entries([1.2, 1.1])}).holds is True
