"""Scores: constant answers have known values, on made-up rows and (where they lie at hand) on the public files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from public_data import public

from agevlm.evaluation.benchmark import check_fields, verdict
from agevlm.evaluation.run import choose


pope, cvbench, ocrbench, hallusionbench, realworldqa = choose(["all"])


# -- POPE ------------------------------------------------------------------------------------------------------------


def pope_rows(golds, categories=("random", "popular")):
    return [
        {"question": "Is there a cat in the image?", "answer": gold, "category": categories[index % len(categories)]}
        for index, gold in enumerate(golds)
    ]


def test_pope_constants_on_a_balanced_set():
    constants = pope.constants(pope_rows(["yes", "no"] * 50))
    yes, no = constants["always yes"], constants["always no"]
    assert (yes["accuracy"], yes["recall"], yes["yes_ratio"], yes["false_yes"]) == (50, 100, 100, 100)
    assert yes["f1"] == pytest.approx(200 / 3)
    assert (no["accuracy"], no["f1"], no["recall"], no["yes_ratio"], no["false_yes"]) == (50, 0, 0, 0, 0)


def test_pope_counts_unread_answers_as_wrong_and_not_yes():
    rows = pope_rows(["yes", "yes", "no", "no"])
    metrics = pope.score(rows, ["yes", None, "no", None])
    assert metrics["accuracy"] == 50
    assert metrics["false_yes"] == 0 and pope.score(rows, ["yes", None, "yes", None])["false_yes"] == 50
    assert metrics["unparsed"] == 50
    assert metrics["precision"] == 100
    assert metrics["recall"] == 50
    assert metrics["yes_ratio"] == 25
    assert {name: part["n"] for name, part in metrics["categories"].items()} == {"popular": 2, "random": 2}


@given(
    st.lists(st.tuples(*[st.sampled_from(["yes", "no"])] * 2, st.sets(st.sampled_from("abc"), min_size=1)), min_size=1)
)
def test_pope_counts_a_merged_row_once_for_each_of_its_categories(rows):
    """VLMEvalKit's file holds duplicates once; its scores are those of the rows written out."""
    merged = [{"question": "", "answer": gold, "category": ",".join(sorted(names))} for gold, _, names in rows]
    apart = [{**row, "category": name} for row in merged for name in row["category"].split(",")]
    said = [answer for _, answer, names in rows for _ in names]
    values = [
        {path: measure.value() for path, measure in pope.all_measures(of, parsed).items()}
        for of, parsed in ((merged, [answer for _, answer, _ in rows]), (apart, said))
    ]
    assert values[0] == pytest.approx(values[1])


answers = st.sampled_from(["yes", "no", None])


@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), answers), min_size=1))
def test_pope_agrees_with_the_textbook(pairs):
    metrics = pope.score(pope_rows([gold for gold, _ in pairs]), [said for _, said in pairs])
    true_yes = sum(gold == said == "yes" for gold, said in pairs)
    false_yes = sum(gold == "no" and said == "yes" for gold, said in pairs)
    missed = sum(gold == "yes" and said != "yes" for gold, said in pairs)
    assert metrics["accuracy"] == pytest.approx(100 * sum(gold == said for gold, said in pairs) / len(pairs))
    if true_yes:
        precision, recall = true_yes / (true_yes + false_yes), true_yes / (true_yes + missed)
        assert metrics["f1"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))
    else:
        assert metrics["f1"] == 0


def test_pope_rows_of_several_categories_count_in_each():
    metrics = pope.score(pope_rows(["yes"], ["random,popular"]), ["yes"])
    assert metrics["n"] == 1
    assert {name: part["n"] for name, part in metrics["categories"].items()} == {"popular": 1, "random": 1}


# -- CV-Bench --------------------------------------------------------------------------------------------------------


def choice_row(task, answer, choices=("left", "right"), side="2D", source="COCO"):
    return {"type": side, "task": task, "source": source, "question": "?", "prompt": "?", "choices": list(choices),
            "answer": answer}  # fmt: skip


def test_cvbench_averages_sources_then_sides():
    rows = [
        choice_row("Count", "(A)", source="COCO"),
        choice_row("Relation", "(B)", source="ADE20K"),
        choice_row("Relation", "(B)", source="ADE20K"),
        choice_row("Depth", "(A)", side="3D", source="Omni3D"),
    ]
    metrics = cvbench.score(rows, ["A", "B", None, "B"])
    assert metrics["tasks"] == {"Count": 100, "Depth": 0, "Relation": 50}
    assert metrics["2D"] == 75  # COCO 100, ADE20K 50
    assert metrics["3D"] == 0
    assert metrics["overall"] == 37.5
    assert metrics["accuracy"] == 50
    assert metrics["unparsed"] == 25


def test_cvbench_baselines():
    rows = [choice_row("Count", f"({letter})", choices="1234") for letter in "ABCD"]
    rows += [choice_row("Relation", "(A)"), choice_row("Relation", "(A)")]
    constants = cvbench.constants(rows)
    assert constants["chance"]["tasks"] == {"Count": 25, "Relation": 50}
    assert constants["always (A)"]["tasks"] == {"Count": 25, "Relation": 100}
    assert constants["always (D)"]["tasks"] == {"Count": 25, "Relation": 0}


@given(st.lists(st.tuples(st.sampled_from("AB"), st.sampled_from(["A", "B", None])), min_size=1))
def test_cvbench_one_source_is_plain_accuracy(pairs):
    rows = [choice_row("Count", f"({gold})", source="Scenes") for gold, _ in pairs]
    metrics = cvbench.score(rows, [said for _, said in pairs])
    assert metrics["overall"] == pytest.approx(metrics["accuracy"])
    assert metrics["accuracy"] == pytest.approx(100 * sum(gold == said for gold, said in pairs) / len(pairs))


# -- OCRBench --------------------------------------------------------------------------------------------------------


def ocr_rows(rows):
    """The public JSON in the columns of its data set."""
    return [
        {"dataset": row["dataset_name"], "question": row["question"], "question_type": row["type"],
         "answer": row["answers"]}
        for row in rows
    ]  # fmt: skip


def test_ocrbench_containment():
    row = {"dataset": "IIIT5K", "question": "?", "question_type": "Regular Text Recognition", "answer": ["CENTRE"]}
    assert verdict(ocrbench, row, ocrbench.parse(row, "The word is centre.")) == "correct"
    assert verdict(ocrbench, row, ocrbench.parse(row, "center")) == "wrong"
    assert verdict(ocrbench, row, ocrbench.parse(row, "  ")) == "unparsed"
    formula = {**row, "dataset": "HME100k", "answer": ["a + B\n"]}
    assert ocrbench.is_correct(formula, ocrbench.parse(formula, "a+B"))
    assert not ocrbench.is_correct(formula, ocrbench.parse(formula, "a+b"))


def test_public_ocrbench_gold_is_right_everywhere():
    rows = ocr_rows(public("OCRBench.json"))
    golds = [row["answer"] if isinstance(row["answer"], str) else row["answer"][-1] for row in rows]
    outputs = [f"It says: {gold}" for gold in golds]
    metrics = ocrbench.score(rows, [ocrbench.parse(row, output) for row, output in zip(rows, outputs, strict=True)])
    assert metrics["final"] == 1000
    counts = metrics["categories"]
    assert counts["Scene Text-centric VQA"] == counts["Key Information Extraction"] == 200


# -- HallusionBench --------------------------------------------------------------------------------------------------


def test_hallusionbench_groups():
    rows = [
        {"category": "VD", "subcategory": "x", "set_id": "0", "figure_id": figure, "question_id": question,
         "question": "?", "gt_answer": gold}
        for figure, question, gold in (("0", "0", "1"), ("0", "1", "0"), ("1", "0", "0"), ("1", "1", "1"))
    ]  # fmt: skip
    metrics = hallusionbench.score(rows, ["yes", "no", "no", None])
    assert metrics["aAcc"] == 75
    assert metrics["fAcc"] == 50
    assert metrics["qAcc"] == 50
    assert metrics["unparsed"] == metrics["yes_ratio"] == 25
    assert metrics["average"] == pytest.approx(175 / 3)
    assert metrics["categories"] == {"VD": {name: metrics[name] for name in ("aAcc", "fAcc", "qAcc", "average")}}
    mixed = hallusionbench.score([*rows, *({**row, "category": "VX"} for row in rows)], ["yes", "no", "no", None] * 2)
    assert mixed["categories"] == {name: metrics["categories"]["VD"] for name in ("VD", "VX")}
    low, high = hallusionbench.intervals(rows, ["yes", "no", "no", None])["average"]
    assert low - 1e-9 <= metrics["average"] <= high + 1e-9


def test_public_hallusionbench_constants():
    rows = [row for row in public("HallusionBench.json") if row["filename"]]
    assert len(rows) == 951
    constants = hallusionbench.constants(rows)
    found = {
        name: tuple(round(metrics[key], 2) for key in ("aAcc", "fAcc", "qAcc")) for name, metrics in constants.items()
    }
    assert found == {"always yes": (42.17, 7.23, 4.62), "always no": (57.83, 12.14, 20.0)}


# -- RealWorldQA -----------------------------------------------------------------------------------------------------

CHOICE = {
    "question": "What color is the clock?\nA. orange\nB. red\nPlease answer directly with only the letter.",
    "answer": "B",
}
OPEN = {"question": "How many objects are in the image?\nPlease answer with a single word.", "answer": "two"}


@pytest.mark.parametrize(
    ("row", "output", "expected"),
    [
        (CHOICE, "B", "correct"),
        (CHOICE, "B. red", "correct"),
        (CHOICE, "red", "correct"),
        (CHOICE, "A", "wrong"),
        (CHOICE, "blue", "unparsed"),
        (OPEN, "Two.", "correct"),
        (OPEN, "2", "correct"),
        (OPEN, "The answer is two", "correct"),
        (OPEN, "12", "wrong"),
        (OPEN, "", "unparsed"),
    ],
)
def test_realworldqa_verdicts(row, output, expected):
    assert verdict(realworldqa, row, realworldqa.parse(row, output)) == expected


def test_realworldqa_score_and_constant():
    rows = [CHOICE, CHOICE, OPEN]
    metrics = realworldqa.score(rows, ["B", "A", "2"])
    assert metrics["accuracy"] == pytest.approx(200 / 3)
    assert (metrics["choice"], metrics["open"]) == (50, 100)
    assert realworldqa.constants(rows) == {"always 'B' / '2'": realworldqa.score(rows, ["B", "B", "2"])}
    assert realworldqa.query(CHOICE) == "What color is the clock?"


@pytest.mark.parametrize("benchmark", [pope, cvbench, ocrbench, hallusionbench, realworldqa])
def test_a_missing_column_is_named(benchmark):
    check_fields(benchmark, benchmark.fields, "here")
    with pytest.raises(ValueError, match=f"here: {benchmark.name} lacks the columns {benchmark.fields[-1]}"):
        check_fields(benchmark, benchmark.fields[:-1], "here")
