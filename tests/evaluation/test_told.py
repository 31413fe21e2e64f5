"""Questions in words: rows without a picture, from scenes and from files, for every kind of model."""

import json

import pytest

from agevlm.data.scenes.build import load_benchmark, load_told
from agevlm.evaluation.cli import evaluate as main
from agevlm.evaluation.leaderboard import read_metrics, results_page
from agevlm.evaluation.registry import TEXT_ONLY
from agevlm.evaluation.run import choose, evaluate_scenes
from agevlm.store import read_lines
from builders import save_tiny, tiny_scenes
from vlms import llava


TOLD = TEXT_ONLY["told"]["paper"]
ROWS = 16


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("told") / "scenes"
    return tiny_scenes(folder, test=ROWS, size=96, max_objects=3, splits=("composition", "name"))


def test_the_pictures_of_a_split_are_told(scenes):
    rows, pictures = load_told(scenes, "composition"), load_benchmark(scenes, "composition", "hallusionbench")
    assert len(rows) == ROWS == len(set(rows["id"])) and len(set(rows["set"])) == ROWS // 4
    for row, picture in zip(rows, pictures, strict=True):
        assert row["image"] is None and row["answer"] in ("Yes", "No")
        assert row["question"].startswith(f"Scene: {picture['gt_answer_details']} {picture['question']}")
        described, _, asked = row["question"].removeprefix("Scene: ").partition(". ")
        if asked.startswith("Is there a"):
            name = asked.removeprefix("Is there an ").removeprefix("Is there a ").split(" in the image?")[0]
            assert (name in described) == (row["answer"] == "Yes"), row["question"]


def test_a_model_of_ours_and_a_stock_one_answer_text_alone(scenes, tmp_path):
    save_tiny(tmp_path / "ours")
    subject = llava()
    for part in (subject.model, subject.processor):
        part.save_pretrained(tmp_path / "llava")
    models = [str(tmp_path / "ours"), str(tmp_path / "llava")]
    rest = ["--scenes", str(scenes), "--max-new-tokens", "2", "--output", str(tmp_path / "out")]
    main([*models, *rest, "--benchmarks", "told", "--language", str(scenes)])
    for name in ("ours", "llava"):
        metrics = read_metrics(tmp_path / "out" / name / "metrics.json")
        result = metrics["benchmarks"]["told"]
        assert result["n"] == ROWS and result["skipped"] == 0 and result["grounding"]["n"] == 0
        assert set(result["constants"]) == {"always yes", "always no"} and set(result["kinds"])
        assert metrics["language"]["text"] == "scenes"
        lines = read_lines(tmp_path / "out" / name / "told" / "predictions.jsonl")
        assert all(line["verdict"] != "skipped" for line in lines)
        assert "**told**" in results_page([metrics])


def test_all_are_the_benchmarks_of_pictures_and_there_is_no_published_set(scenes, tmp_path):
    assert TOLD not in choose(["all"]) and choose(["told", "pope"])[0] is TOLD
    with pytest.raises(ValueError, match="told has no protocol 'official'"):
        choose(["told"], "official")
    save_tiny(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"told has no published set; use --scenes DIR or --data told=FILE"):
        main([str(tmp_path / "ours"), "--benchmarks", "told", "--output", str(tmp_path / "out")])


def test_rows_of_a_file_may_have_any_answer(tmp_path):
    rows = [
        {"id": "a", "question": "What is the capital of France?", "answer": "Paris"},
        {"id": "b", "question": "Is water wet?", "answer": "Yes."},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_tiny(tmp_path / "ours")
    call = [str(tmp_path / "ours"), "--benchmarks", "told", "--data", f"told={tmp_path / 'questions.jsonl'}"]
    main([*call, "--max-new-tokens", "2", "--output", str(tmp_path / "out")])
    result = read_metrics(tmp_path / "out" / "ours" / "metrics.json")["benchmarks"]["told"]
    assert result["n"] == 2 and "kinds" not in result
    outputs = (" paris.", "Yes, it is.")
    parsed = [TOLD.parse(row, output) for row, output in zip(rows, outputs, strict=True)]
    assert parsed == ["paris", "yes"] and TOLD.score(rows, parsed)["accuracy"] == 100
    assert TOLD.parse(rows[0], "It is Paris") != "paris" and TOLD.parse(rows[1], "Sure") is None
    assert TOLD.score(rows, ["rome", None])["accuracy"] == 0
    assert {name: scores["accuracy"] for name, scores in TOLD.constants(rows).items()} == {
        "always paris": 50,
        "always yes": 50,
    }


def test_a_split_has_its_own_questions(scenes, tmp_path):
    subject = llava()
    with pytest.raises(ValueError, match="split is 'train'; use one of composition"):
        evaluate_scenes(subject.model, subject.processor, scenes, "train", tmp_path, benchmarks=["told"])
    assert load_told(scenes, "name")["question"] != load_told(scenes, "composition")["question"]
