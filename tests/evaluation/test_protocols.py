"""Protocols: each harness reads as it does, the paper's own answers get a reader's verdict, and no text breaks one."""

import time

import pytest
from benchmark_rows import ROWS
from hypothesis import given
from hypothesis import strategies as st
from public_data import public

from agevlm.evaluation.benchmark import PROTOCOLS, verdict
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.run import choose


EVERY = [benchmark for known in BENCHMARKS.values() for benchmark in known.values()]
OPEN = {"id": "1", "question": "How many?\nPlease answer with a single word or number.", "answer": "3"}


def outcome(name: str, protocol: str, output: str, **row) -> str:
    benchmark = BENCHMARKS[name][protocol]
    full = {**ROWS[name], **row}
    return verdict(benchmark, full, benchmark.parse(full, output))


# -- the paper's own answers (Fig. 1, Tables 3 and 5), in its words, with the verdict a reader gives ------------------

SIDES = {"choices": ["left", "right"], "answer": "(A)", "question": "Where is the wall?", "task": "Relation"}
WALL_OURS = "The wall (annotated by the red box) is located to the left of the fireplace."
WALL_MOBILE = (
    "The image shows a living room with a fireplace, a couch, and a chair. The wall (annotated by the red box) is "
    "located to the left of the fireplace. The fireplace is in the middle of the room. The couch is to the right of "
    "the fireplace. The chair is to the left of the couch. The relative positions of the objects are as described. "
    "The answer is B."
)
CATS_OURS = (
    "The correct answer is (B) 1. The image shows only one cat, which is the orange and white cat looking at its "
    "reflection in the glass. There are no other cats present in the image."
)
LAPTOP = (
    "Yes, there is a laptop in the image. It is partially visible in the background, partially obscured by the hands "
    "of the person typing on the keyboard. The laptop is positioned to the left side of the image, and it appears to "
    "be a standard model with a white exterior and black keys."
)
CUP = (
    "Yes, there is a cup in the image. It is located on the right side of the plate, partially obscured by the bread. "
    "The cup appears to be a clear glass, and it is filled with a transparent liquid, which could be water or another "
    "clear beverage."
)
NO_CUP = (
    "No, there is no cup in the image. The image primarily features fresh produce and does not include any cups or "
    "containers that could be used for drinking. The focus is on the display of fruits and vegetables, which are "
    "typically used for consumption rather than for drinking."
)
NO_CHAIR = (
    "No, there is no chair in the image. The image is focused on the pizza and the person’s hands, with no chairs or "
    "furniture visible in the frame."
)
NO_BICYCLE = (
    "No, there is no bicycle in the image. The image is a natural scene with animals and vegetation, and it does not "
    "contain any man-made objects such as a bicycle."
)


@pytest.mark.parametrize(
    ("row", "output", "expected"),
    [
        (SIDES, WALL_OURS, "correct"),
        (SIDES, WALL_MOBILE, "wrong"),
        ({}, CATS_OURS, "correct"),
        ({}, "3", "wrong"),
    ],
)
def test_figure_1(row, output, expected):
    assert outcome("cvbench", "paper", output, **row) == expected


@pytest.mark.parametrize(
    ("gold", "output", "expected"),
    [
        # Table 3
        ("yes", "0", "unparsed"),
        ("yes", "no", "wrong"),
        ("yes", "No, there is no laptop in the image. The image features a person typing on a keyboard.", "wrong"),
        ("yes", LAPTOP, "correct"),
        ("yes", CUP, "correct"),
        # Table 5
        ("no", "Yes, there is a cup in the image.", "wrong"),
        ("no", NO_CUP, "correct"),
        ("no", NO_CHAIR, "correct"),
        ("no", NO_BICYCLE, "correct"),
        ("no", "There is no person visible in the image.", "correct"),
    ],
)  # fmt: skip
def test_tables_3_and_5(gold, output, expected):
    assert outcome("pope", "paper", output, answer=gold) == expected


# -- where harnesses disagree ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "output", "verdicts"),
    [
        ("pope", {}, "Yes", "correct correct correct correct"),
        ("pope", {}, "Yes.", "correct correct unparsed correct"),
        ("pope", {}, LAPTOP, "correct correct unparsed correct"),
        ("pope", {"answer": "no"}, "NO", "correct wrong correct correct"),
        ("pope", {"answer": "no"}, "There is no cup.", "correct correct unparsed unparsed"),
        ("pope", {}, "", "unparsed correct unparsed unparsed"),
        ("cvbench", {}, "B", "correct correct correct correct"),
        ("cvbench", {}, CATS_OURS, "correct correct unparsed correct"),
        ("cvbench", {}, "The answer is: (B)", "correct unparsed unparsed unparsed"),
        ("cvbench", {}, "1", "correct unparsed unparsed unparsed"),
        ("cvbench", SIDES, WALL_OURS, "correct unparsed unparsed unparsed"),
        (
            "cvbench",
            {**SIDES, "choices": ["apple", "bookcase"], "answer": "(A)"},
            "bookcase",
            "wrong wrong wrong wrong",
        ),
        ("ocrbench", {}, "It says CAFÉ 12!", "correct correct correct correct"),
        ("ocrbench", {}, "café １２", "wrong wrong correct wrong"),
        ("ocrbench", {}, "Cafe 12", "wrong wrong wrong wrong"),
        ("realworldqa", {}, "B", "correct - correct correct"),
        ("realworldqa", {}, "B. right", "correct - correct wrong"),
        ("realworldqa", {}, "right", "correct - unparsed wrong"),
        ("realworldqa", {}, "The answer is B", "correct - correct correct"),
        ("realworldqa", OPEN, "Three.", "correct - wrong wrong"),
        ("realworldqa", OPEN, "3", "correct - correct correct"),
        ("realworldqa", OPEN, "13", "wrong - wrong wrong"),
        ("realworldqa", OPEN, "", "unparsed - unparsed unparsed"),
    ],
)
def test_the_gap_between_harnesses(name, row, output, verdicts):
    for protocol, expected in zip(PROTOCOLS, verdicts.split(), strict=True):
        if expected != "-":
            assert outcome(name, protocol, output, **row) == expected, protocol


def test_prompts_differ_by_harness():
    assert [BENCHMARKS["pope"][p].prompt(ROWS["pope"]).removeprefix(ROWS["pope"]["question"]) for p in PROTOCOLS] == [
        " Please answer yes or no.",
        "",
        "\nAnswer the question using a single word or phrase.",
        "\nAnswer the question using a single word or phrase.",
    ]
    note = BENCHMARKS["cvbench"]["lmms-eval"].prompt(ROWS["cvbench"])
    assert note.startswith("Note: You only need to respond with A, B, C, D, E without providing any additional")
    for benchmark in EVERY:
        assert benchmark.query(ROWS[benchmark.name]) in benchmark.prompt(ROWS[benchmark.name])


def test_lmms_eval_drops_unread_yes_from_the_recall():
    rows = [{**ROWS["pope"], "id": str(i), "answer": answer} for i, answer in enumerate(["yes", "yes", "no"])]
    parsed = ["yes", None, "no"]
    assert BENCHMARKS["pope"]["paper"].score(rows, parsed)["recall"] == 50
    assert BENCHMARKS["pope"]["lmms-eval"].score(rows, parsed)["recall"] == 100


@pytest.mark.parametrize("name", ["pope", "hallusionbench"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_public_constants_under_every_protocol(name, protocol):
    if protocol not in BENCHMARKS[name]:
        pytest.skip(f"{name} has no protocol {protocol}")
    benchmark = BENCHMARKS[name][protocol]
    if name == "pope":
        rows = [
            {"id": f"{category}-{row['question_id']}", "question": row["text"], "answer": row["label"],
             "category": category, "image_source": row["image"]}
            for category in ("random", "popular", "adversarial") for row in public(f"coco_pope_{category}.json")
        ]  # fmt: skip
        metrics = benchmark.score(rows, [benchmark.parse(row, "yes") for row in rows])
        assert metrics["n"] == 9000 and metrics["f1"] == pytest.approx(200 / 3)
        assert {round(part["f1"], 2) for part in metrics["categories"].values()} == {66.67}
    else:
        rows = [row for row in public("HallusionBench.json") if benchmark.uses(row)]
        assert len(rows) == (1129 if protocol == "official" else 951)
        metrics = benchmark.score(rows, [benchmark.parse(row, "No.") for row in rows])
        keys = ("category", "subcategory", "set_id", "question_id")
        with_yes = {tuple(row[key] for key in keys) for row in rows if row["gt_answer"] == "1"}
        questions = {tuple(row[key] for key in keys) for row in rows}
        assert len(questions) == 455
        assert metrics["qAcc"] == pytest.approx(100 * (1 - len(with_yes) / 455))
        assert round(metrics["aAcc"], 2) == (57.13 if protocol == "official" else 57.83)
        assert round(metrics["fAcc"], 2) == 12.14


# -- arguments and odd answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "protocol", "message"),
    [
        (["pope"], "vlmevalkit", "unknown protocol 'vlmevalkit'; use paper, official, lmms-eval, cambrian"),
        (["hallusionbench"], "cambrian", "hallusionbench has no protocol 'cambrian'.*it has paper, official"),
        (["realworldqa"], "official", "realworldqa has no protocol 'official'"),
        (["all", "pope"], "paper", "unknown benchmark all"),
    ],
)
def test_unknown_protocols_are_refused(names, protocol, message):
    with pytest.raises(ValueError, match=message):
        choose(names, protocol)


def test_all_is_what_the_harness_scores():
    assert [b.name for b in choose(["all"], "cambrian")] == ["pope", "cvbench", "ocrbench", "realworldqa"]
    assert len(choose(["all"])) == 5


@pytest.mark.parametrize("benchmark", EVERY, ids=lambda b: f"{b.name}-{b.protocol}")
@given(output=st.text())
def test_any_text_is_read(benchmark, output):
    for row in (ROWS[benchmark.name], OPEN) if benchmark.name == "realworldqa" else (ROWS[benchmark.name],):
        parsed = benchmark.parse(row, output)
        assert parsed is None or isinstance(parsed, str)
        assert parsed is None or parsed or output == ""
        metrics = benchmark.score([row], [parsed])
        assert metrics["unparsed"] == (100 if parsed is None else 0)


@pytest.mark.parametrize("benchmark", EVERY, ids=lambda b: f"{b.name}-{b.protocol}")
def test_an_empty_answer_is_never_right(benchmark):
    for output in ("", " \n"):
        row = {**ROWS[benchmark.name], **({"answer": "no"} if benchmark.name == "pope" else {})}
        assert not benchmark.is_correct(row, benchmark.parse(row, output))


@pytest.mark.parametrize("benchmark", EVERY, ids=lambda b: f"{b.name}-{b.protocol}")
@pytest.mark.parametrize("filler", ["the answer is ", "answer" + " " * 60, "answer* ", "(A", ". ,", "A. "])
def test_ten_thousand_tokens_are_read_at_once(benchmark, filler):
    output, start = filler * (60_000 // len(filler)), time.process_time()
    benchmark.parse(ROWS[benchmark.name], output)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("output", "expected"), [("１", "correct"), ("١", "correct"), ("३", "wrong"), ("①", "unparsed")]
)
def test_decimal_digits_of_any_script_are_numbers(output, expected):
    """Circled ones are no decimal digits and are not guessed."""
    assert outcome("cvbench", "paper", output) == expected
    benchmark = BENCHMARKS["realworldqa"]["paper"]
    found = verdict(benchmark, {**OPEN, "answer": "1"}, benchmark.parse(OPEN, output))
    assert found == ("wrong" if expected == "unparsed" else expected)


# -- slips and forms that people type ---------------------------------------------------------------------------------

LISTS = [
    "A. 25\nB 30\nC. 35",  # a sign is missing
    "A. 25\nB. 30\nC.35",  # a space
    "A. 25\nB. 30\n35",  # a letter
    "A. 25\nB. 30\nB. 35",  # twice the same
    " A) 25\n B) 30\n C) 35",
    "A: 25\nC: 35",
]


@pytest.mark.parametrize("listed", LISTS)
@pytest.mark.parametrize("answer", ["C", "c", "C "])
@pytest.mark.parametrize("output", ["C", "C. 35", "(C)", "The answer is C.", "c"])
def test_a_gold_letter_makes_a_choice_question_however_its_list_is_typed(listed, answer, output):
    row = {"question": f"How fast may I drive?\n\n{listed}\nAnswer with the letter.", "answer": answer}
    assert outcome("realworldqa", "paper", output, **row) == "correct"
    score = BENCHMARKS["realworldqa"]["paper"].score([{"id": "0", **row}], ["C"])
    assert score["choice"] == score["accuracy"] == 100 and "open" not in score
    assert outcome("realworldqa", "paper", "B", **row) == "wrong"


def test_an_open_answer_beside_lines_that_look_like_options_is_open():
    row = {"question": "What is on the sign?\nA bus\nB road", "answer": "a bus"}
    assert [outcome("realworldqa", "paper", said, **row) for said in ("A bus.", "A", "bus")] == [
        "correct", "wrong", "correct",
    ]  # fmt: skip


@pytest.mark.parametrize("dataset", ["HME100k", "IIIT5K"])
@pytest.mark.parametrize("gold", ["x=1", "ｘ＝１"])
def test_lmms_eval_folds_full_width_signs_except_in_formulas(dataset, gold):
    said = {"x=1": "ｘ＝１", "ｘ＝１": "x=1"}[gold]
    row = {"dataset": dataset, "answer": [gold]}
    assert outcome("ocrbench", "lmms-eval", said, **row) == ("wrong" if dataset == "HME100k" else "correct")
    assert outcome("ocrbench", "lmms-eval", gold, **row) == "correct"
    assert outcome("ocrbench", "paper", said, **row) == "wrong"
