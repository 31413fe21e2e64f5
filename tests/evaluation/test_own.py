"""Own questions: forms of files, what is guessed, bad rows, scores by hand, two models, masks, the page of errors."""

import base64
import csv
import io
import json
import re
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import builders
from agevlm.data.rows import GUIDANCE, ROW_FEATURES, undecoded
from agevlm.evaluation.benchmark import verdict
from agevlm.evaluation.cli import evaluate as main
from agevlm.evaluation.errors import MOST
from agevlm.evaluation.inputs import open_phrases
from agevlm.evaluation.leaderboard import read_metrics
from agevlm.evaluation.looking import measure_looking
from agevlm.evaluation.own import PAPER, lettered, words
from agevlm.evaluation.own_rows import load_own
from agevlm.evaluation.run import evaluate, parse_places, score_predictions
from agevlm.stats import mcnemar
from agevlm.store import read_lines
from builders import mask, picture, save_tiny, stored, tiny_model, tiny_processor
from vlms import llava


GUIDED = Features({**ROW_FEATURES, "guidance": List({**GUIDANCE, "occurrence": Value("int32")})})
TINY = Path(__file__).resolve().parents[2] / "checkpoints" / "agevlm-tiny"
CHOICE = "Which color?\nA. red\nB. blue"
ROWS = [
    {"image": "a.png", "question": "Is there a cup?", "answer": "Yes", "category": "there"},
    {"image": "a.png", "question": "Is there a cat?", "answer": "No", "category": "there"},
    {"image": "b.png", "question": "Which color?", "answer": "blue", "options": ["red", "blue"], "category": "color"},
    {"image": "b.png", "question": "What is it?", "answer": "a cup", "category": "thing"},
]


def table(rows, delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["image", "question", "answer", "category", "options"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows({**row, "options": "|".join(row.get("options", []))} for row in rows)
    return text.getvalue()


def parquet(path, rows):
    features = Features({"image": ImageFeature(), **{n: Value("string") for n in ("question", "answer", "category")}})
    rows = [{**row, "image": stored(picture(40, 30))} for row in rows]
    plain = [{name: row[name] for name in features} for row in rows]
    Dataset.from_list(plain, features=features).to_parquet(path)


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate("ab"):
        picture(40, 30, seed=seed).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder, rows, name="own.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


FORMS = {
    "own.jsonl": lambda path: write(path.parent, ROWS),
    "own.json": lambda path: path.write_text(json.dumps(ROWS)),
    "own.csv": lambda path: path.write_text("\ufeff" + table(ROWS), encoding="utf-8"),
    "semicolons.csv": lambda path: path.write_text(table(ROWS, ";")),
    "own.tsv": lambda path: path.write_text(table(ROWS, "\t")),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_gives_the_same_rows(folder, name):
    FORMS[name](folder / name)
    rows = load_own(folder / name)
    assert rows["question"] == [row["question"] for row in ROWS]
    assert rows["kind"] == ["yes-no", "yes-no", "choice", "contains"] and all(rows["guessed"])
    assert rows["answers"] == [["yes"], ["no"], ["B"], ["a cup"]] and rows["options"][2] == ["red", "blue"]
    assert [Path(image["path"]).name for image in rows["image"]] == ["a.png", "a.png", "b.png", "b.png"]
    assert rows["category"] == ["there", "there", "color", "thing"] and len(set(rows["id"])) == 4
    assert PAPER.note(rows) == "Without `kind`, guessed from the answers: 2 yes-no, 1 choice, 1 contains."


def test_pictures_inside_of_the_file(folder):
    parquet(folder / "own.parquet", ROWS[:2])
    rows = load_own(folder / "own.parquet")
    assert rows["answers"] == [["yes"], ["no"]] and all(image["bytes"] for image in rows["image"])
    data = base64.b64encode(stored(picture(40, 30))["bytes"]).decode()
    (folder / "own.csv").write_text(table([{**ROWS[0], "image": data}]))
    assert load_own(folder / "own.csv")[0]["image"]["bytes"] == base64.b64decode(data)


def test_pictures_are_found_where_training_finds_them(folder, tmp_path_factory):
    """In an archive, and under a name in other case; the folder of the rows stays as it is."""
    apart = tmp_path_factory.mktemp("pictures") / "all.tar"
    with tarfile.open(apart, "w") as tar:
        tar.add(folder / "a.png", "a.png")
    path = write(folder, ROWS[:2])
    rows = load_own(path, apart)
    assert [image["bytes"] for image in rows["image"]] == [(folder / "a.png").read_bytes()] * 2
    with pytest.raises(ValueError, match="gone does not exist; give the folder, or the archives"):
        load_own(path, folder / "gone")
    (folder / "a.png").rename(folder / "A.PNG")
    assert load_own(path)[0]["image"]["path"] == str(folder / "A.PNG")
    assert sorted(file.name for file in folder.iterdir()) == ["A.PNG", "b.png", "own.jsonl"]


@pytest.mark.parametrize("layout", ["conversations", "messages"])
def test_every_question_of_a_conversation_is_a_row(folder, layout):
    names = (
        ("from", "human", "gpt", "value") if layout == "conversations" else ("role", "user", "assistant", "content")
    )
    said = [("<image>\nIs there a cup?", "Yes, there is."), ("What color is it?", "red"), (CHOICE, "B")]
    turns = [{names[0]: who, names[3]: text} for pair in said for who, text in zip(names[1:3], pair, strict=True)]
    pictures = {"image": "a.png"} if layout == "conversations" else {"images": ["a.png"]}
    (folder / "train.json").write_text(json.dumps([{"id": "x", **pictures, layout: turns}]))
    rows = load_own(folder / "train.json")
    assert rows["id"] == ["x-1", "x-2", "x-3"] and rows["question"] == ["Is there a cup?", "What color is it?", CHOICE]
    assert rows["answers"] == [["yes"], ["red"], ["B"]] and rows["kind"] == ["yes-no", "contains", "choice"]
    asked = ["Is there a cup? Please answer yes or no.", *rows["question"][1:]]
    assert [PAPER.prompt(row) for row in rows] == asked, "options that are listed are not listed again"
    assert PAPER.prompt({**rows[0], "question": asked[0]}) == asked[0]


BAD = {
    "gone": ({"image": "c.png"}, "image_missing: c.png is in none of"),
    "outside": ({"image": "../a.png"}, "leaves its folder"),
    "absolute": ({"image": "/etc/passwd"}, "leaves its folder"),
    "url": ({"image": "https://example.org/a.png"}, "image_url"),
    "none": ({"image": None}, "0 pictures"),
    "two": ({"image": ["a.png", "b.png"], "question": "<image><image>Same?"}, "2 pictures"),
    "no answer": ({"answer": ""}, "empty_answer"),
    "no words": ({"answer": "?!"}, "expected a word"),
    "answer of mappings": ({"answer": {"text": "x"}}, "field answer"),
    "no question": ({"question": " "}, "empty_question"),
    "question of a number": ({"question": 3}, "bad_text"),
    "control token": ({"question": "Say <|eot_id|>"}, "special_token"),
    "half a surrogate": ({"category": "\ud800"}, "invalid_encoding"),
    "NUL": ({"answer": "a\0b"}, "nul_character"),
    "kind": ({"kind": "boolean"}, "use yes-no, choice, exact, contains"),
    "no yes or no": ({"kind": "yes-no", "answer": "maybe"}, "expected yes or no"),
    "no option": ({"options": ["red", "blue"], "answer": "green"}, "one of the options"),
    "yes and no": ({"answer": ["yes", "No."]}, "none is wrong"),
    "yes and no of a kind": ({"kind": "yes-no", "answer": ["no", "yes"]}, "none is wrong"),
    "all options": ({"options": ["red", "blue"], "answer": ["blue", "A"]}, "none is wrong"),
    "two options": ({"options": ["red", "RED"], "answer": "red"}, "one of the options"),
    "one option": ({"kind": "choice", "options": ["red"], "answer": "A"}, "1 options"),
    "mask": ({"mask": "c.png"}, "image_missing: c.png"),
    "phrase": ({"guidance": {"query": "dog", "mask": "a.png"}}, "does not hold 'dog'"),
    "phrase of a number": ({"guidance": {"query": 3, "mask": "a.png"}}, "use {query, mask}"),
    "phrases of text": ({"guidance": ["cup"]}, "use {query, mask}"),
    "video": ({"video": "a.mp4"}, "other_medium"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_recorded_and_strict_stops(folder, name):
    change, message = BAD[name]
    path = write(folder, [ROWS[0], {**ROWS[0], "id": "x", **change}, ROWS[1]])
    rows = load_own(path)
    assert [bool(reason) for reason in rows["unusable"]] == [False, True, False]
    assert message in rows["unusable"][1] and rows["unusable"][1].startswith("row 2 (id '")
    with pytest.raises(ValueError, match="row 2"):
        load_own(path, strict=True)


def test_where_no_row_can_be_used_the_reason_is_given(folder):
    rows = load_own(write(folder, ROWS[:2]))
    skipped = [{"verdict": "skipped", "error": f"row {name}: broken"} for name in rows["id"]]
    with pytest.raises(ValueError, match=f"own: none of 2 rows could be used; row {rows['id'][0]}: broken"):
        score_predictions(PAPER, rows, skipped)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("[]", "holds no rows|one JSON array"),
        ('{"image": "a.png", "text": "x"}\n', "none of 1 rows can be asked.*the row has the fields image, text"),
        ("not json\n", "begins with"),
    ],
)
def test_a_file_without_a_row_to_ask_is_refused(folder, text, message):
    (folder / "own.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_own(folder / "own.jsonl")


def test_tables_that_are_damaged(folder):
    path = folder / "own.csv"
    path.write_text("image,question,answer\na.png,Is it red, or blue?,red\na.png,Is it red?,yes\na.png,What?\n")
    rows = load_own(path)
    assert "more fields than the header" in rows["unusable"][0] and rows["unusable"][1] is None
    assert "empty_answer" in rows["unusable"][2]
    path.write_text(",image,question,answer,A,B\n0,a.png,Which?,2,1,2\n")  # as pandas writes an index
    assert load_own(path)["answers"] == [["B"]]
    path.write_text('image,question,answer\na.png,"Is it,yes\n')
    with pytest.raises(ValueError, match="is no CSV file"):
        load_own(path)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.sampled_from(
        ["a.png", "yes", "choice", "A", "red|blue", "[1, 2]", "Is it? <image>", "<|image|>", "\ud800"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
        st.sampled_from(["query", "mask", "role", "content", "from", "value"]), inner, max_size=3)),
    max_leaves=4,
)  # fmt: skip
FIELDS = st.sampled_from([*ROWS[2], "id", "kind", "mask", "guidance", "A", "B", "conversations", "messages"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(FIELDS, VALUES, min_size=1, max_size=4), base=st.sampled_from(ROWS))
def test_whatever_a_row_holds_it_is_asked_or_named(folder, changes, base):
    rows = load_own(write(folder, [{**base, **changes}, ROWS[0]]))
    assert all(row["unusable"] or (row["answers"] and PAPER.prompt(row)) for row in rows)
    for row in rows:
        if not row["unusable"]:
            right = row["answers"][0]
            assert PAPER.is_correct(row, PAPER.parse(row, right)), "its own right answer is right"


def test_masks_by_phrase_give_the_looks_of_training_rows(folder):
    """Rows of training, whose looks `--masks --rows` measures over the whole conversation."""
    one, two = builders.row("one", guided=True), builders.row("two", guided=True, seed=3)
    phrase = one["guidance"]
    for index, place in enumerate((one, two)):
        said = [{**phrase, "query": words, "occurrence": 0} for words in ("red apple", "image")[index:]]
        place["guidance"] = [{**part, "mask": stored(part["mask"])} for part in said]
        place["images"] = [stored(image) for image in place["images"]]
    rows = Dataset.from_list([one, two], features=GUIDED)
    rows.to_parquet(folder / "train.parquet")
    model, processor = tiny_model(), tiny_processor()
    wanted, _ = measure_looking(model, processor, undecoded(rows), progress=False)
    own = load_own(folder / "train.parquet")
    metrics = evaluate(
        model, processor, [PAPER], {"own": own}, folder / "out", source={}, max_new_tokens=2, progress=False
    )
    found = metrics["benchmarks"]["own"]["grounding"]
    assert found["n"] == wanted["n"] == 2
    for name in ("in_mask_mass", "pointing_accuracy", "token_auroc"):
        assert found[name]["per_layer"] == pytest.approx(wanted[name]["per_layer"], rel=1e-4)


def asked(kind, *answers, options=()):
    return {"kind": kind, "answers": list(answers), "options": list(options), "question": "?"}


@pytest.mark.parametrize(
    ("row", "output", "expected"),
    [
        (asked("yes-no", "yes"), "Yes, there is.", "correct"),
        (asked("yes-no", "yes"), "Yes and no", "unparsed"),
        (asked("choice", "B", options=("red", "blue")), "(B)", "correct"),
        (asked("choice", "B", options=("red", "blue")), "It is blue.", "correct"),
        (asked("choice", "B", options=("red", "blue")), "green", "unparsed"),
        (asked("exact", "2"), "Two.", "correct"),
        (asked("exact", "red car"), "The red car", "correct"),
        (asked("exact", "red car"), "a red car there", "wrong"),
        (asked("contains", "two"), "There are 2 of them.", "correct"),
        (asked("contains", "red"), "It is bored.", "wrong"),
        (asked("contains", "sofa", "couch"), "A couch!", "correct"),
        (asked("contains", "红色"), "这是一只红色的猫", "correct"),
        (asked("contains", "red"), "  ", "unparsed"),
    ],
)
def test_how_answers_are_read(row, output, expected):
    assert verdict(PAPER, row, PAPER.parse(row, output)) == expected


def test_scores_are_those_of_a_hand_computation(folder):
    rows = load_own(
        write(folder, [*ROWS, {**ROWS[3], "answer": ["cup", "mug"], "kind": "exact"}, {**ROWS[0], "answer": ""}])
    )
    said = ["Yes", "Yes", "(A)", "It is a cup", "Mug.", None]
    predictions = []
    for row, output in zip(rows, said, strict=True):
        parsed = None if output is None else PAPER.parse(row, output)
        found = "skipped" if output is None else verdict(PAPER, row, parsed)
        predictions.append({"id": row["id"], "output": output, "parsed": parsed, "verdict": found})
    result, _ = score_predictions(PAPER, rows, predictions)
    assert result["accuracy"] == pytest.approx(100 * 3 / 5) and result["n"] == 5 and result["skipped"] == 1
    assert result["kinds"] == pytest.approx({"yes-no": 50, "choice": 0, "contains": 100, "exact": 100})
    assert result["categories"] == pytest.approx({"there": 50, "color": 0, "thing": 100})
    assert result["yes_ratio"] == 100 and result["false_yes"] == 100 and result["unparsed"] == 0
    best = result["constants"]["always 'no' / 'B' / 'cup' / 'a cup'"]
    assert best["accuracy"] == pytest.approx(100 * 4 / 5), "no, B, the cup twice"
    low, high = result["intervals"]["accuracy"]
    draws = [np.mean(np.concatenate([(((1, 0), (0, 1, 1))[unit]) for unit in drawn]))  # two pictures: a.png, b.png
             for drawn in ((0, 0), (0, 1), (1, 1))]  # fmt: skip
    assert (low, high) == pytest.approx((100 * min(draws), 100 * max(draws)))
    assert "1 exact" not in result["note"] and "1 contains" in result["note"]


def no_network(*_, **__):
    raise OSError("asks the network")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Two models' answers to questions of which some have masks and one no picture, without a network."""
    folder = tmp_path_factory.mktemp("own")
    for seed, name in enumerate("ab"):
        picture(96, 64, seed=seed).save(folder / f"{name}.png")
        mask(96, 64).save(folder / f"{name}-mask.png")
    rows = [{**row, "mask": row["image"].replace(".png", "-mask.png")} for row in ROWS]
    phrases = [{"query": words, "mask": "b-mask.png"} for words in ("red", "cup")]
    rows.append({"image": "b.png", "question": "Is the <b>red</b> cup there?", "answer": "no", "guidance": phrases})
    write(folder, [*rows, {**ROWS[0], "image": "gone.png"}])
    save_tiny(folder / "random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_network)
        main([str(TINY), str(folder / "random"), "--data", str(folder / "own.jsonl"), "--max-new-tokens", "4",
              "--output", str(folder / "out")])  # fmt: skip
    return folder


def test_two_models_answer_own_questions_and_are_compared(evaluated):
    lines = {
        name: read_lines(evaluated / "out" / name / "own" / "predictions.jsonl") for name in ("agevlm-tiny", "random")
    }
    for name, predictions in lines.items():
        result = read_metrics(evaluated / "out" / name / "metrics.json")["benchmarks"]["own"]
        right = [line["verdict"] == "correct" for line in predictions]
        assert result["accuracy"] == pytest.approx(100 * sum(right) / 5) and result["skipped"] == 1
        assert predictions[-1]["verdict"] == "skipped" and "gone.png" in predictions[-1]["error"]
        assert result["grounding"]["n"] == 5, "four masks of whole questions, one row with two phrases"
    (compared,) = json.loads((evaluated / "out" / "comparison.json").read_text())
    first, second = ([line["verdict"] == "correct" for line in found[:-1]] for found in lines.values())
    assert compared["difference"] == pytest.approx(100 * (sum(second) - sum(first)) / 5)
    assert compared["mcnemar"] == mcnemar(np.array(first), np.array(second))


def test_the_page_shows_errors_with_pictures_and_attention(evaluated):
    html = (evaluated / "out" / "results.html").read_text(encoding="utf-8")
    text = (evaluated / "out" / "results.md").read_text(encoding="utf-8")
    lines = read_lines(evaluated / "out" / "random" / "own" / "predictions.jsonl")
    wrong = [line for line in lines if line["verdict"] in ("wrong", "unparsed")]
    part = html.partition("Errors of random")[2]
    assert wrong and part.count("<figure") == len(wrong) and f"{len(wrong)} wrong or unread answers." in part
    assert part.count("data:image/webp") == 2 * len(wrong), "the picture, and the map over it"
    assert "&lt;b&gt;red&lt;/b&gt;" in html and "<b>red" not in html and "<script" not in html and "http" not in html
    for page in (html, text):
        assert "guessed from the answers: 3 yes-no, 1 choice, 1 contains" in page and "categories there" in page


def test_the_page_stays_small(folder, monkeypatch):
    monkeypatch.setattr("agevlm.evaluation.errors.MOST", 1)
    save_tiny(folder / "model")
    path = write(folder, [{**ROWS[3], "answer": "nothing like it"}] * 3)
    main([str(folder / "model"), "--data", str(path), "--max-new-tokens", "2", "--output", str(folder / "out")])
    html = (folder / "out" / "results.html").read_text(encoding="utf-8")
    assert (
        html.count("<figure") == 1 and re.search("3 wrong or unread answers, of which the first", html) and MOST <= 40
    )


def test_a_stock_model_answers_own_questions_without_maps(folder):
    subject = llava()
    for part in (subject.model, subject.processor):
        part.save_pretrained(folder / "llava")
    path = write(folder, ROWS)
    main([str(folder / "llava"), "--data", str(path), "--max-new-tokens", "2", "--output", str(folder / "out")])
    html = (folder / "out" / "results.html").read_text(encoding="utf-8")
    assert 0 < html.count("<figure") == html.count("data:image/webp")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [(mask(48, 64), "48 x 64 but the picture is 96 x 64"), (mask(96, 64, box=(0, 0, 0, 0)), "marks no pixel")],
)
def test_a_mask_that_cannot_be_used_is_named(capsys, bad, reason):
    row = {"id": "x", "question": "Is it red?", "mask": stored(bad)}
    assert open_phrases(PAPER, row, picture(96, 64), strict=False, tell=True) == []
    assert "row x, field mask" in (told := capsys.readouterr().err) and reason in told
    with pytest.raises(ValueError, match=reason):
        open_phrases(PAPER, row, picture(96, 64), strict=True)


def test_masks_alone_print_looking_and_ask_no_network(folder, monkeypatch, capsys):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    save_tiny(folder / "model")
    features = Features({"image": ImageFeature(), "question": Value("string"), "mask": ImageFeature()})
    row = {"image": stored(picture(96, 64)), "question": "Is it red?", "mask": stored(mask(96, 64))}
    Dataset.from_list([row, {**row, "image": {"bytes": b"x", "path": None}}], features=features).to_parquet(
        folder / "m.parquet"
    )
    main([str(folder / "model"), "--masks", str(folder / "m.parquet"), "--output", str(folder / "out")])
    shown = capsys.readouterr().out
    assert "in mask mass, --masks" in shown and "1 (1)" in shown and not re.search(r"\bpope\b", shown)
    assert read_metrics(folder / "out" / "model" / "metrics.json")["benchmarks"] == {}


def test_without_a_network_published_sets_end_in_a_sentence_at_once(folder, monkeypatch):
    save_tiny(folder / "model")
    tries = []
    monkeypatch.setattr(socket.socket, "connect", lambda *_: tries.append(1) or no_network())
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: tries.append(1) or no_network())
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: tries.append(1) or no_network())
    with pytest.raises(ValueError, match=r"lmms-lab/POPE cannot be fetched: the Hub is out of reach.*--data FILE"):
        main([str(folder / "model"), "--output", str(folder / "out")])
    assert len(tries) <= 1 and not (folder / "out").exists()


def test_a_file_is_own_questions_and_a_folder_published_ones(folder):
    path = write(folder, ROWS)
    assert parse_places([str(path)]) == {"own": str(path)} == parse_places([f"own={path}"])
    assert "own" not in parse_places([str(folder)]) and len(parse_places([str(folder), str(path)])) > 2
    with pytest.raises(ValueError, match="a second file"):
        parse_places([str(path), str(path)])
    with pytest.raises(ValueError, match="no such file or folder"):
        parse_places([str(folder / "gone.jsonl")])
    assert words("Is it red? Please answer yes or no.") == "Is it red?" and words(CHOICE) == "Which color?"
    assert lettered(CHOICE) == ["red", "blue"] and lettered("A. B. See") == []
