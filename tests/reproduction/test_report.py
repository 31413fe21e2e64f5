"""What the numbers say: scores read from files, claims decided by their rules, a page that needs nothing else."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import TrainerState

from agevlm.data.scenes.build import build_scenes
from agevlm.evaluation import told
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.run import load_scenes
from agevlm.evaluation.tables import page_environment
from agevlm.reproduction import charts, report
from agevlm.reproduction.charts import (
    MOST_POINTS,
    language_model_loss,
    line_chart,
    over_seeds,
    stage_starts,
    timeline,
)
from agevlm.reproduction.claims import (
    FAILS,
    HIGHER,
    HOLDS,
    LOWER,
    NOT_RUN,
    ONE_SEED,
    UNCLEAR,
    UNDECIDED,
    against,
    claims,
    reading,
    summary,
)
from agevlm.reproduction.matrix import MAIN, ROWS, SIZES, STAGES, chain
from agevlm.reproduction.prepare import SPLIT
from agevlm.reproduction.scores import (
    ACCURACY,
    EVENLY,
    FALSE_YES,
    LANGUAGE,
    MASS,
    TABLE_2,
    TASKS,
    UNREAD,
    Number,
    Scores,
    Trained,
    layer_title,
    read_scores,
)
from agevlm.reproduction.setting import deviation_lines
from agevlm.stats import share
from agevlm.store import write_json, write_lines
from agevlm.training.lineage import RESULT_FIELDS


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    size = SIZES["tiny"]
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    return build_scenes(
        folder, captions=2, instructions=2, test=12, names=size.names, colors=size.colors, progress=False
    )


def write_measured(folder: Path, scenes: Path, mass: float, skipped: int = 0) -> Path:
    """All answers right, but for `skipped` first rows of POPE and one that is not read; `mass` in layer 1 and half of
    it in layer 4."""
    benchmarks = [known["paper"] for known in BENCHMARKS.values()]
    for benchmark, rows in zip(benchmarks, load_scenes(scenes, SPLIT, benchmarks).values(), strict=True):
        lines, records = [], []
        for index, row in enumerate(rows):
            bad = benchmark.name == "pope" and index < skipped
            unread = benchmark.name == "pope" and index == len(rows) - 1
            parsed = None if unread else benchmark.parse(row, benchmark.gold(row))
            lines.append({"id": row["id"], "parsed": parsed, "verdict": "skipped" if bad else "correct"})
            if row["mask"] is not None:
                looks = {"in_mask_mass": [mass, mass / 2], "pointing_accuracy": [1.0, 0.0]}
                blind = {"in_mask_mass": 0.1, "pointing_accuracy": 0.2}
                records.append({"id": row["id"], **looks, "uniform": blind, "centre": blind})
        write_lines(folder / "evaluation" / benchmark.name / "predictions.jsonl", lines)
        write_lines(folder / "evaluation" / benchmark.name / "grounding.jsonl", records)
    write_json(folder / "evaluation" / "metrics.json", {"grounding": {"layers": [1, 4]}})
    return folder


def test_numbers_are_read_from_the_files(scenes, tmp_path):
    runs = {seed: Trained(write_measured(tmp_path / str(seed), scenes, 0.4 + 0.2 * seed), [], 0) for seed in (0, 1)}
    other = {0: Trained(write_measured(tmp_path / "other", scenes, 0.2, skipped=3), [], 0)}
    scores = read_scores({"agevlm": runs, "ca-baseline": other}, scenes)
    assert list(scores.numbers) == ["agevlm", "ca-baseline"]
    for numbers in scores.numbers.values():
        assert {answer.title for answer in TABLE_2} <= set(numbers)
        assert numbers[ACCURACY].over_seeds.value() == pytest.approx(100 * 8 / 9)  # 12 rows, 3 skipped, 1 not read
        assert numbers["CV-Bench, counting"].over_seeds.value() == 100
        assert numbers[UNREAD].over_seeds.value() == pytest.approx(100 / (5 * 12 - 3))
    ours = scores.numbers["agevlm"]
    assert [measure.value() for measure in ours[MASS].seeds.values()] == pytest.approx([30, 45])
    assert ours["times an even spread"].over_seeds.value() == pytest.approx(3.75)
    assert ours["points at it"].over_seeds.value() == pytest.approx(50)
    assert ours[layer_title(4)].over_seeds.value() == pytest.approx(25)
    assert scores.blind[MASS][EVENLY] == pytest.approx(10)
    assert scores.best_blind(ACCURACY)[0] in ("always yes", "always no")
    assert scores.best_blind("POPE, says yes") is None
    assert scores.difference("ca-baseline", "agevlm", MASS)["seeds"] == {"0": pytest.approx(15)}
    assert [claim.verdict for claim in claims(scores, {}, {})][:2] == [UNDECIDED, HOLDS]  # they share one seed


def test_language_ability_is_shown_where_it_was_measured(scenes, tmp_path):
    (rows,) = load_scenes(scenes, SPLIT, [told.PAPER]).values()
    stages = [(run.recipe, tmp_path / run.name) for run in chain(ROWS["agevlm"], "tiny", 0)]
    measured = {0: Trained(write_measured(tmp_path / "new", scenes, 0.4), stages, 0)}
    before = {0: Trained(write_measured(tmp_path / "old", scenes, 0.2), [], 0)}
    lines = [{"id": row["id"], "parsed": told.gold(row), "verdict": "correct"} for row in rows]
    write_lines(tmp_path / "new" / LANGUAGE / "told" / "predictions.jsonl", lines)
    write_json(tmp_path / "new" / LANGUAGE / "metrics.json", {})
    write_lines(tmp_path / "old" / LANGUAGE / "told" / "predictions.jsonl", lines[:1])  # another call is at it
    for stage, (_, folder) in enumerate(stages, start=1):
        found = {"before": {"perplexity": 2.5}, "after": {"perplexity": 2.5 if stage < 4 else 3.0}}
        write_json(folder / "agevlm_stage.json", {"language": found})
    found = {"agevlm": measured, "ca-baseline": before}
    scores = read_scores(found, scenes)
    title = TASKS[-1].title
    assert scores.numbers["agevlm"][title].over_seeds.value() == 100 and title not in scores.numbers["ca-baseline"]
    assert 0 < scores.best_blind(title)[1] < 100
    material = report.Material("tiny", found, scores, {}, {}, [], list(found))
    assert report.number_lines([title], material)[1][:3] == [title, "100.0 [100.0, 100.0]", "–"]
    assert report.language_lines(material) == [
        ["", "start", "stage 1", "stage 2", "stage 3", "stage 4", "seeds"],
        ["AGE-VLM", "2.500", "2.500", "2.500", "2.500", "3.000", "1"],
    ]


# -- claims -----------------------------------------------------------------------------------------------------------


def scores_of(first, second, title: str = "accuracy", blind: float = 0.0) -> Scores:
    """Baseline and guided row with the given right answers per seed."""
    rows = {"ca-baseline": first, "agevlm": second}
    numbers = {
        name: {title: Number({seed: share(right) for seed, right in enumerate(seeds)}, np.arange(len(seeds[0])))}
        for name, seeds in rows.items()
    }
    return Scores(numbers, {title: {EVENLY if title == MASS else "always yes": blind}})


def answers(share_right: float, seed: int, n: int = 400) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < share_right).astype(float)


@pytest.mark.parametrize(
    "low, high, verdict, found",
    [((0.5, 0.5), (0.8, 0.8), HOLDS, HIGHER), ((0.5, 0.5), (0.5, 0.5), FAILS, UNCLEAR),
     ((0.8, 0.8), (0.5, 0.5), FAILS, LOWER), ((0.5, 0.9), (0.95, 0.7), FAILS, UNCLEAR),
     ((0.5,), (0.8,), UNDECIDED, ONE_SEED)],
    ids=["better", "equal", "worse", "seeds disagree", "one seed"],
)  # fmt: skip
def test_a_comparison_follows_from_the_numbers(low, high, verdict, found):
    ours = [answers(share_right, 10 + seed) for seed, share_right in enumerate(high)]
    theirs = [answers(share_right, seed) for seed, share_right in enumerate(low)]
    scores = scores_of(theirs, ours)
    difference = scores.difference("ca-baseline", "agevlm", "accuracy")
    assert difference["difference"] == pytest.approx(100 * (np.mean(ours) - np.mean(theirs)))
    assert reading(difference) == found
    claim = against(scores, "ca-baseline", "agevlm", "accuracy", "A claim")
    assert claim.verdict == verdict
    lower = against(scores, "ca-baseline", "agevlm", "accuracy", "A claim", wanted=LOWER).verdict
    assert lower == {HIGHER: FAILS, LOWER: HOLDS, UNCLEAR: FAILS, ONE_SEED: UNDECIDED}[found]
    ending = "higher for this seed. It takes two to decide (--seeds 0 1)." if found == ONE_SEED else f"{found}."
    assert f"{difference['difference']:+.1f} [" in claim.sentence and claim.sentence.endswith(ending)
    blind = dataclasses.replace(scores, blind={"accuracy": {"always yes": 99.0}})
    assert against(blind, "ca-baseline", "agevlm", "accuracy", "A claim").verdict == UNDECIDED
    assert against(scores, "twin", "agevlm", "accuracy", "A claim").verdict == NOT_RUN


def test_looking_and_hallucinating_are_compared_with_the_unguided_row():
    masses = [[np.full(50, mass) for mass in seeds] for seeds in ((0.2, 0.25), (0.3, 0.5))]
    scores = scores_of(*masses, MASS, 10.0)
    assert claims(scores, {}, {})[0].verdict == HOLDS
    absent, present = np.arange(400) < 200, np.arange(400) >= 200
    for right, verdict in ((0.8, HOLDS), (0.5, UNDECIDED)):
        for name, said in (("ca-baseline", 0.4), ("agevlm", 0.1)):
            numbers = scores.numbers[name]
            yes = [answers(said, seed) * absent for seed in (0, 1)]
            numbers[FALSE_YES] = Number({seed: share(part, absent) for seed, part in enumerate(yes)}, np.arange(400))
            credits = {seed: share(answers(right, 5 + seed)) for seed in (0, 1)}
            numbers[ACCURACY] = Number(credits, np.arange(400))
        scores.blind[ACCURACY] = {"always yes": 100 * present.mean()}
        found = claims(scores, {}, {})[3]
        assert found.title.startswith("Guidance lowers hallucination") and found.verdict == verdict
        assert "AGE-VLM minus CA-baseline, POPE, false yes: -" in found.sentence


@pytest.mark.parametrize("high, verdict", [((0.8, 0.9), HOLDS), ((0.8, 0.52), FAILS), ((0.4, 0.4), FAILS)])
def test_using_the_picture_needs_every_seed_above_constant_answers(high, verdict):
    ours = [answers(share_right, seed) for seed, share_right in enumerate(high)]
    claim = claims(scores_of(ours, ours, ACCURACY, 50.0), {}, {})[1]
    assert claim.verdict == verdict
    assert "(always yes) 50.0 %" in claim.sentence


def claim_of(start: str, similarity=None, padding=None):
    found = [c for c in claims(Scores(), similarity or {}, padding or {}) if c.title.startswith(start)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    "spans, verdict, below",
    [(((0.4, 0.6), (0.45, 0.55)), HOLDS, False), (((0.4, 0.6),), UNDECIDED, False),
     (((0.4, 0.6), (0.6, 0.7)), FAILS, False), (((0.4, 0.6), (0.3, 0.49)), FAILS, True)],
)  # fmt: skip
def test_similarity_is_decided_by_every_seed(spans, verdict, below):
    def entries(intervals):
        return [{"headline": {"auroc": sum(span) / 2, "auroc_interval": span, "overlap": 0.7}} for span in intervals]

    claim = claim_of("Figure 2", {"twin": entries(spans), "agevlm": entries([(0.5, 0.9)])})
    assert claim.verdict == verdict
    assert ("mismatched pairs are the closer" in claim.sentence) is below
    assert "AGE-VLM's last cross block: 0.700 [0.500, 0.900]" in claim.sentence
    assert "separate in part for ConvLLaVA. The twin's final layer: overlap 0.70 to 0.70" in claim.sentence


@pytest.mark.parametrize(
    "guided, unguided, verdict, alone",
    [((0.2, 0.3), (0.9, 1.1), HOLDS, FAILS), ((0.2, 1.2), (1.1, 1.3), FAILS, HOLDS),
     ((0.2,), (0.9,), UNDECIDED, UNDECIDED)],
)  # fmt: skip
def test_padding_is_decided_by_every_seed(guided, unguided, verdict, alone):
    files = {
        name: [{"variants": {"pad": {"enrichment": value}}} for value in values]
        for name, values in (("agevlm", guided), ("ca-baseline", unguided))
    }
    claim = claim_of("Appendix C: guidance", padding=files)
    assert claim.verdict == verdict
    assert f"{min(guided):.2f}" in claim.sentence
    assert claim_of("Appendix C: without", padding=files).verdict == alone


def test_table_2_is_claimed_where_the_paper_has_it():
    made = claims(Scores(), {}, {})
    titles = [claim.title for claim in made]
    assert len(titles) == len(set(titles))
    assert {claim.verdict for claim in made} == {NOT_RUN}
    assert summary(made) == f"Of {len(made)} claims, 0 hold, 0 do not hold, 0 are undecided, {len(made)} were not run."
    told = {
        rival: {title[9 : title.index(":")] for title in titles if f"AGE-VLM above {rival} (paper" in title}
        for rival in ("CA-baseline", "the concatenating twin")
    }
    papers = {answer.title for answer in TABLE_2 if answer.paper}
    assert told["CA-baseline"] == papers - {"CV-Bench 2D", "Hallusion qAcc"}  # lower and equal in the paper
    assert told["the concatenating twin"] == papers - {"CV-Bench 3D", "RealWorldQA"}


# -- curves -----------------------------------------------------------------------------------------------------------


def with_curves(folder: Path, *seeds: list[float]) -> dict[int, Trained]:
    """Runs of AGE-VLM whose last stage has these shares in its log, 100 questions apart."""
    runs = {}
    for seed, shares in enumerate(seeds):
        stages = [(run.recipe, folder / str(seed) / run.name) for run in chain(ROWS["agevlm"], "tiny", seed)]
        for recipe, place in stages:
            place.mkdir(parents=True)
            points = [{"step": n, "questions": 100 * n, "presence": share} for n, share in enumerate(shares)]
            log = [{"step": 1, "loss": 2.0}, *(points if recipe.stage == 4 else [])]
            TrainerState(log_history=log).save_to_json(str(place / "trainer_state.json"))
            write_json(place / "agevlm_stage.json", {"answers": {"yes": 0.4}} if recipe.stage == 4 else {})
        runs[seed] = Trained(folder, stages, 0)
    return runs


def test_curves_say_how_many_questions_it_took(tmp_path):
    found = {
        "agevlm": with_curves(tmp_path / "a", [0.5, 0.8, 0.7, 0.92], [0.4, 0.5, 0.75, 0.86], [0.4, 0.5, 0.6, 0.7]),
        "ca-baseline": with_curves(tmp_path / "b", [0.5, 0.6, 0.95]),
        "agevlm-lm": with_curves(tmp_path / "c", []),
    }
    read = charts.read_curves(found)
    assert list(read) == ["agevlm", "ca-baseline"] and read["ca-baseline"] == {0: [(0, 0.5), (100, 0.6), (200, 0.95)]}
    assert charts.curve_lines(read) == [
        ["", "questions to 75 %", "questions to 85 %", "questions to 90 %", "at the end, %", "of questions", "seeds"],
        [
            "AGE-VLM", "200 (100 to > 300)", "300 (300 to > 300)", "> 300 (300 to > 300)", "82.7 (70.0 to 92.0)",
            "300", "0, 1, 2",
        ],
        ["CA-baseline", "200", "200", "200", "95.0", "200", "0"],
    ]  # fmt: skip
    json = charts.curves_json(read)
    assert json["agevlm"]["2"]["questions_to"] == {"75": None, "85": None, "90": None}
    assert json["ca-baseline"]["0"] == {
        "points": [(0, 0.5), (100, 0.6), (200, 0.95)],
        "questions_to": {"75": 200, "85": 200, "90": 200},
    }
    assert charts.draw_curves(read, found, tmp_path / "curves.png") and (tmp_path / "curves.png").is_file()
    assert not charts.draw_curves({}, found, tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_a_section_without_lines_is_left_out(tmp_path):
    found = {"agevlm": with_curves(tmp_path, [])}
    material = report.Material("tiny", found, Scores({"agevlm": {}}), charts.read_curves(found), {}, [], ["agevlm"])
    assert [section.title for section in report.LEAD[:2]] == ["Presence on unseen compositions", "Learning curves"]
    assert all(report._made(section, material, tmp_path) is None for section in report.LEAD[:2])


def test_presence_stands_beside_the_best_constant_answer():
    able = [answers(0.9, 5), answers(0.9, 6)]
    scores = scores_of([answers(0.5, 0), answers(0.5, 1)], able, ACCURACY, 50.0)
    for numbers in scores.numbers.values():
        numbers[FALSE_YES] = numbers[ACCURACY]
    found = {name: {seed: None for seed in (0, 1)} for name in scores.numbers}
    lines = report.presence_lines(report.Material("tiny", found, scores, {}, {}, [], list(found)))
    columns = {head: column for head, *column in zip(*lines, strict=True)}
    assert columns["best constant answer"] == ["50.0 (always yes)"] * 2 and columns["above it"] == ["no", "yes"]
    assert columns["over CA-baseline"][0] == "" and columns["over CA-baseline"][1].endswith(": higher")
    assert columns["presence"][1].startswith(f"{scores.numbers['agevlm'][ACCURACY].over_seeds.value():.1f} [")


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", list(SIZES))
def test_all_that_deviates_from_the_paper_is_said(size):
    head, *lines = deviation_lines(size)
    assert head == ["setting", "stages", "paper", "here"]
    said = {(name, stage): (paper, here) for name, stages, paper, here in lines for stage in stages.split(", ")}
    for run in chain(ROWS["agevlm-lm"], size, 7):
        ours, paper = run.recipe, STAGES[run.recipe.stage](variant=run.recipe.variant)
        stage = str(ours.stage)
        pairs = {
            name: (paper.training.get(name), ours.training[name]) for name in RESULT_FIELDS if name in ours.training
        }
        pairs |= {"trains": (", ".join(paper.trains), ", ".join(ours.trains))}
        pairs |= {"rows in a step": (paper.global_batch_size, ours.global_batch_size)}
        del pairs["seed"]
        for name, (there, here) in pairs.items():
            expected = None if there == here else ("not stated" if there is None else str(there), str(here))
            assert said.get((name, stage)) == expected, (name, stage)


def test_stages_follow_each_other_and_guidance_is_taken_out_of_the_loss():
    def stages(guided: bool):
        recipes = [run.recipe for run in chain(ROWS["agevlm" if guided else "ca-baseline"], "tiny", 0)[1:3]]
        logs = [[{"step": step, "loss": 3 / step} for step in (5, 10)] + [{"step": 10, "runtime": 1.0}] for _ in "ab"]
        for entry in logs[1][:2] if guided else ():
            entry.update(loss=entry["loss"] + 1, guidance_loss=1.0)
        return list(zip(recipes, logs, strict=True))

    assert list(stage_starts(stages(True)).values()) == [0, 10]
    points = timeline(stages(True), language_model_loss)
    assert [step for step, _ in points] == [5, 10, 15, 20]
    unguided = timeline(stages(False), language_model_loss)
    assert [value for _, value in points] == pytest.approx([value for _, value in unguided])


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=400))
def test_charts_average_what_they_cannot_draw(values):
    seeds = [list(enumerate(values, start=1)), list(enumerate(reversed(values), start=1))]
    steps, mean, low, high = over_seeds(seeds)
    assert len(steps) <= MOST_POINTS and steps.min() >= 1 and steps.max() <= len(values)
    assert (low <= mean + 1e-9).all() and (mean <= high + 1e-9).all()
    if len(values) <= MOST_POINTS:
        assert mean.mean() == pytest.approx(np.mean(values), abs=1e-9)


def test_seeds_measured_at_other_steps_have_one_mean():
    """The second seed stops early; between its own steps it counts by a straight line."""
    steps, mean, low, high = over_seeds([[(0, 0.0), (4, 4.0), (8, 8.0)], [(0, 2.0), (2, 4.0), (4, 8.0)], []])
    assert steps.tolist() == [0, 2, 4, 8] and mean.tolist() == [1, 3, 6, 8]
    assert low.tolist() == [0, 2, 4, 8] and high.tolist() == [2, 4, 8, 8]


def test_a_chart_takes_its_colors_from_the_page():
    points = [(1, 2.0), (10, 1.0)]
    lines = {"none": [[]], "one": [points], "two": [points, [(1, 3.0), (10, 0.0)]]}
    svg = line_chart("losses & <more>", lines, {"align": 0.0}, percent=True)
    assert 'aria-label="losses &amp; &lt;more&gt;"' in svg and "align</text>" in svg and "%" in svg
    assert "var(--v0)" not in svg and "var(--v1)" in svg and "var(--v2)" in svg
    assert not re.search(r"(fill|stroke): #", svg)
    assert svg == line_chart("losses & <more>", lines, {"align": 0.0}, percent=True)


def test_a_chart_has_a_color_for_each_main_row():
    main = [row.title for row in ROWS.values() if row.group == MAIN]
    svg = line_chart("Loss", {title: [[(1, 2.0), (2, 1.0)]] for title in main}, {})
    style = page_environment().get_template("page.html.jinja").render(title="")
    for index in range(len(main)):
        assert f"var(--v{index})" in svg and f".v{index} " in style and style.count(f"--v{index}: #") == 2


# -- files ------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Everything a page refers to, its tags and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.references, self.tags, self.text = [], set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.references += [value for name, value in attributes if name in {"src", "href", "srcset", "data", "poster"}]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else_and_escapes_texts(tmp_path):
    Image.new("RGB", (900, 300), "teal").save(tmp_path / "drawn.png")
    made = [
        {"title": "Claim <script>", "verdict": verdict, "sentence": f"because {verdict}"}
        for verdict in (HOLDS, FAILS, UNDECIDED, NOT_RUN)
    ]
    section = {"title": "A table", "note": "Note.", "lines": [["", "<b>AGE"], ["line", "80.5"]]}
    svg = line_chart("Loss", {"AGE-VLM": [[(1, 2.0), (2, 1.0)]]}, {})
    page = {
        "title": "<i>Run",
        "lead": [{"title": "First", "note": "No curve here.", "lines": [], "picture": None}],
        "summary": "Of 4 claims, 1.",
        "claims": made,
        "sections": [{**section, "picture": "drawn.png"}, {**section, "picture": None}],
        "charts": [{"title": "Loss", "lines": ["AGE-VLM"], "svg": svg}],
        "settings": {"learning rate": "1e-3"},
        "versions": {"torch": "9.9"},
        "commit": "0123456789abcdef",
        "seconds": {"scenes": 3.2, "training": 100},
    }
    html = report.html(page, tmp_path)
    shown = Page(html)
    assert [reference[:23] for reference in shown.references] == ["data:image/webp;base64,"]
    assert not {"script", "link", "i", "b"} & shown.tags and "svg" in shown.tags
    assert not re.search(r"url\((?!#)|@import", html)
    assert set(re.findall(r"https?://[^\"]*", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    told = ("<i>Run", "<b>AGE", "80.5", "1 min 43 s", "9.9", "1e-3", "0123456789ab", "Claims not run: 1",
            "No curve here.", "AGE-VLM")  # fmt: skip
    for expected in (*told, *(f"because {claim['verdict']}" for claim in made)):
        assert expected in shown.text, expected
    with pytest.raises(ValueError, match=r"gone\.png"):
        report.html({**page, "sections": [{**section, "picture": "gone.png"}]}, tmp_path)


def test_without_rows_there_is_no_report(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        report.write_report(tmp_path, "tiny", tmp_path, {}, {}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7800, "2 h 10 min")]
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text
