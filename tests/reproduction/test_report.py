"""The report: claims decided by their rules, tables honest about spread, one file that needs nothing else."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from agevlm.evaluation.cvbench import PAPER as CVBENCH
from agevlm.evaluation.looking import summarize
from agevlm.evaluation.pope import PAPER as POPE
from agevlm.reproduction.charts import MOST_POINTS, Line, line_chart
from agevlm.reproduction.report import duration, language_model_loss, timeline, write_report
from agevlm.reproduction.results import ALWAYS_YES, UNIFORM, Measured, claims, exceeds, splits, summary, tables


QUESTIONS = 400


def evaluation(accuracy: float, mass: float) -> dict:
    """Metrics as `evaluate_scenes` returns them, made by the benchmarks' own functions."""
    presence = [{"question": "?", "answer": "yes" if i % 2 else "no", "category": "random"} for i in range(QUESTIONS)]
    right = round(accuracy / 100 * QUESTIONS)
    flipped = {"yes": "no", "no": "yes"}
    said = [row["answer"] if index < right else flipped[row["answer"]] for index, row in enumerate(presence)]
    choice = [
        {"type": "2D", "task": task, "source": "Scenes", "choices": ["1", "2"], "answer": "(A)"}
        for task in ("Count", "Relation")
    ]
    baseline = {"in_mask_mass": 0.1, "pointing_accuracy": 0.1, "token_auroc": 0.5}
    measured = {"in_mask_mass": [mass] * 2, "pointing_accuracy": [1.0, 0.0], "token_auroc": [0.9, 0.7]}
    record = {**measured, "uniform": baseline, "centre": baseline}
    grounding = summarize([record], 1, [2, 7])
    return {
        "benchmarks": {
            "pope": {**POPE.score(presence, said), "constants": POPE.constants(presence), "grounding": grounding},
            "cvbench": {**CVBENCH.score(choice, ["A", None]), "constants": CVBENCH.constants(choice)},
        },
        "grounding": grounding,
    }


def stage(name: str, guided: bool, steps: int = 20) -> dict:
    log = [{"step": step, "loss": 3 / step + guided, "learning_rate": 1e-3} for step in range(5, steps + 1, 5)]
    for entry in log:
        if guided:
            entry.update(guidance_loss=1.0, in_mask_mass=entry["step"] / steps)
    return {"name": name, "log": [*log, {"step": steps, "train_runtime": 1.0}], "guidance_weight": float(guided)}


def variant(name: str, accuracies: list[float], mass: float, guided: bool) -> dict:
    runs = [
        {
            "seed": seed,
            "evaluations": {"composition": evaluation(accuracy, mass), "name": evaluation(accuracy - 5, mass)},
            "stages": [stage("align", False), stage("ground", guided)],
        }
        for seed, accuracy in enumerate(accuracies)
    ]
    return {"name": name, "title": name.upper(), "runs": runs}


def results(baseline=(60, 62), guided=(80, 81), masses=(0.15, 0.6), **changes) -> dict:
    return {
        "title": "A run",
        "variants": [
            variant("ca-baseline", list(baseline), masses[0], False),
            variant("agevlm", list(guided), masses[1], True),
        ],
        "examples": [],
        "settings": {"learning rate": "1e-3"},
        "versions": {"torch": "9.9"},
        "seconds": {"Data": 3.2, "Training": 100},
        **changes,
    }


# -- claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({}, [True, True, True]),
        ({"masses": (0.3, 0.6)}, [False, True, True]),
        ({"guided": (60, 81)}, [True, False, True]),
        ({"guided": (62.5, 63)}, [True, False, True]),
        ({"baseline": (60,), "guided": (80,)}, [True, None, True]),
        ({"guided": (80, 52)}, [True, False, False]),
    ],
)
def test_claims_follow_their_rules(changes, verdicts):
    assert [claim.holds for claim in claims(results(**changes))] == verdicts


def test_claims_say_their_numbers():
    looks, answers, uses = claims(results())
    assert "60.0 %" in looks.sentence and "15.0 %" in looks.sentence and "4.0 times" in looks.sentence
    assert "80.5 % against 61.0 % (+19.5 points)" in answers.sentence and "2.0 points" in answers.sentence
    assert "80.0 %" in uses.sentence and "50.0 % on 400 questions" in uses.sentence


def test_summary_names_what_does_not_hold():
    text = summary(claims(results(masses=(0.3, 0.6), baseline=(60,), guided=(80,))))
    assert text == (
        "Of 3 claims, “uses the picture” holds; “looks where it should” does not hold; “answers better” is undecided."
    )


def test_without_the_two_variants_nothing_is_claimed():
    some = results()
    assert claims({**some, "variants": some["variants"][:1]}) == []


@pytest.mark.parametrize("broken", ["no variants", "no runs", "no common split"])
def test_results_that_cannot_be_compared_are_refused(broken):
    some = results()
    if broken == "no variants":
        some["variants"] = []
    elif broken == "no runs":
        some["variants"][0]["runs"] = []
    else:
        some["variants"][0]["runs"][0]["evaluations"] = {"style": evaluation(50, 0.1)}
    with pytest.raises(ValueError, match="results: "):
        splits(some)


numbers = st.lists(st.floats(0, 100), min_size=2, max_size=4).map(tuple)


@given(numbers, numbers)
def test_exceeding_needs_more_than_either_spread(first, second):
    one, other = Measured(first), Measured(second)
    assert not (exceeds(one, other) and exceeds(other, one))
    if exceeds(one, other):
        assert one.mean > other.mean
        assert one.mean - other.mean > max(one.spread, other.spread)
    assert exceeds(Measured(first[:1]), other) is None


# -- tables -----------------------------------------------------------------------------------------------------------


def table_cells(some: dict, index: int = 0) -> dict[tuple[str, str], tuple[str, bool]]:
    table = tables(some, "composition")[index]
    assert sum(width for _, width in table.groups) == len(table.columns)
    return {
        (row.title, column): (cell.text, cell.best)
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
    }


def test_tables_hold_variants_and_baselines():
    answers, looking = table_cells(results()), table_cells(results(), 1)
    assert answers["AGEVLM", "accuracy"] == ("80.5", True)
    assert answers["CA-BASELINE", "accuracy"] == ("61.0", False)
    assert answers[ALWAYS_YES, "accuracy"][0] == "50.0" and answers[ALWAYS_YES, "F1"][0] == "66.7"
    assert answers["AGEVLM", "counting"][0] == "100.0" and answers["AGEVLM", "unread"][0] == "50.0"
    assert answers["Chance", "position"][0] == "50.0"
    assert looking["AGEVLM", "× even"][0] == "6.00"
    assert looking[UNIFORM, "points at it"][0] == "10.0"
    assert looking["AGEVLM", "layer 7"][0] == "60.0"


@pytest.mark.parametrize("changes", [{"guided": (61, 82)}, {"baseline": (60,), "guided": (80,)}])
def test_within_the_spread_nothing_is_marked_best(changes):
    cells = table_cells(results(**changes))
    assert not cells["AGEVLM", "accuracy"][1] and not cells["CA-BASELINE", "accuracy"][1]


def test_how_often_yes_is_said_is_no_race():
    assert not any(
        best for (_, column), (_, best) in table_cells(results()).items() if column in {"says yes", "unread"}
    )


# -- curves -----------------------------------------------------------------------------------------------------------


def test_stages_follow_each_other_and_guidance_is_taken_out_of_the_loss():
    run = results()["variants"][1]["runs"][0]
    points = timeline(run, language_model_loss)
    assert [step for step, _ in points] == [5, 10, 15, 20, 25, 30, 35, 40]
    unguided = timeline(results()["variants"][0]["runs"][0], language_model_loss)
    assert [value for _, value in points] == pytest.approx([value for _, value in unguided])


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=400))
def test_charts_stay_small_and_inside_their_frame(values):
    line = Line("a", "v0", [list(enumerate(values, start=1)), list(enumerate(reversed(values), start=1))])
    assert len(line.statistics) <= MOST_POINTS
    svg = line_chart("losses & more", [line], {"align": 0.0})
    assert "losses &amp; more" in svg
    for pair in re.search(r'<polyline [^>]*points="([^"]*)"', svg)[1].split():
        x, y = map(float, pair.split(","))
        assert 0 <= x <= 420 and 0 <= y <= 250


# -- files ------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Everything a page refers to, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.references, self.tags, self.text = [], set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.references += [value for name, value in attributes if name in {"src", "href", "srcset", "data", "poster"}]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def example(tmp_path):
    paths = []
    for name in ("picture", "overlay"):
        paths.append(tmp_path / "pictures" / f"{name}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        Image.new("RGB", (900, 300), "teal").save(paths[-1])
    panel = {"title": "AGEVLM", "answer": "<b>Yes", "correct": True, "in_mask_mass": 0.6, "overlay": str(paths[1])}
    unmeasured = {**panel, "title": "CA-BASELINE", "answer": "", "correct": None, "in_mask_mass": None}
    return {"id": "1", "question": "Is there a <script>?", "answer": "yes", "image": str(paths[0]), "has_mask": True,
            "panels": [unmeasured, panel]}  # fmt: skip


def write(tmp_path, some: dict) -> tuple[str, dict]:
    write_report(tmp_path / "out" / "report.html", tmp_path / "out" / "report.json", some)
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    return html, json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(tmp_path, example):
    html, _ = write(tmp_path, results(examples=[example]))
    page = Page(html)
    assert len(page.references) == 3
    assert all(reference.startswith("data:image/webp;base64,") for reference in page.references)
    assert "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"url\(|@import|https?://", html)
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_the_page_says_the_numbers_and_escapes_the_rest(tmp_path, example):
    html, _ = write(tmp_path, results(examples=[example], title="<i>Run", commit="0123456789abcdef"))
    page = Page(html)
    assert "i" not in page.tags and "<i>Run" in page.text
    numbers = ("80.5", "±0.5", "61.0", "66.7", "60 % in the mask", "1 min 43 s", "0123456789ab", "9.9")
    words = ("holds", "Is there a <script>?", "<b>Yes", "(empty)", "learning rate", "Language-model loss")
    for expected in (*numbers, *words):
        assert expected in page.text, expected
    assert html.count("<svg") == 3


def test_the_page_without_curves_or_examples(tmp_path):
    some = results(baseline=(60,), guided=(80,))
    for entry in some["variants"]:
        entry["runs"][0]["stages"] = []
    html, _ = write(tmp_path, some)
    page = Page(html)
    assert "svg" not in page.tags and "undecided" in page.text and "One seed" in page.text


def test_the_json_says_the_same(tmp_path, example):
    some = results(examples=[example])
    before = copy.deepcopy(some)
    _, data = write(tmp_path, some)
    assert some == before
    assert [claim["verdict"] for claim in data["claims"]] == ["holds", "holds", "holds"]
    assert data["variants"][1]["runs"][0]["evaluations"]["composition"]["benchmarks"]["pope"]["accuracy"] == 80
    assert data["examples"][0]["image"] == "../pictures/picture.png"
    assert set(data["tables"]) == {"composition", "name"}


def test_a_missing_picture_is_named(tmp_path, example):
    with pytest.raises(ValueError, match=r"gone\.png"):
        write(tmp_path, results(examples=[{**example, "image": str(tmp_path / "gone.png")}]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7800, "2 h 10 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
