"""Learning curves: points are what the model answers, training stays the same, an interruption leaves no trace."""

import json

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from training_worker import Stop, StopAt, make_rows, quick

from agevlm.conversion.twin import concatenating_twin
from agevlm.data.scenes.build import build_scenes, load_benchmark
from agevlm.images import open_image
from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from agevlm.training import curve
from agevlm.training.curve import answer_tokens, answer_turns, read_questions
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import STAGES
from builders import picture, stored, tiny_model, tiny_processor


FROZEN, TRAINS = ("projector", "cross_attention"), ("projector", "cross_attention", "vision_all", "language_model")
TOWERS = pytest.mark.parametrize("trains", [FROZEN, TRAINS], ids=["tower frozen", "tower trains"])
POINT = {"presence", "presence_yes", "questions"}
SPEED = {"tokens_per_second", "images_per_second", "data_wait", "mfu", "memory_gib", "train_runtime"}
SPEED |= {"train_samples_per_second", "train_steps_per_second"}


def questions(count: int = 7, **columns) -> Dataset:
    """Rows in the columns of POPE about pictures of noise, every third one Yes."""
    rows = [
        {
            "image": stored(picture(seed=100 + index)),
            "question": f"Is there a {'red apple' if index % 2 else 'blue car'} in the image?",
            "answer": "no" if index % 3 else "Yes",
            **columns,
        }
        for index in range(count)
    ]
    return Dataset.from_list(
        rows, features=Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    )


def run(output, answers, callbacks=(), start=None, variant="agevlm", stored=None, trains=FROZEN, **changes):
    changes = {"max_steps": 5, "save_steps": 3, "logging_steps": 2, "answer_steps": 2, **changes}
    recipe = quick(STAGES["stage4_instruct"](size="tiny", variant=variant), rows=4, trains=trains, **changes)
    model, processor = start or (tiny_model(), tiny_processor())
    return run_stage(
        recipe,
        output,
        data=make_rows(),
        model=model,
        processor=processor,
        answers=answers,
        stored_features=stored,
        callbacks=callbacks,
    )


def points(result) -> list[dict]:
    return [entry for entry in result.log_history if "presence" in entry]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(curve, "BATCH", 3)


def undecided(model=None, processor=None):
    """The model, half of whose answers are Yes, and its processor: the head's row for Yes is moved to the middle."""
    model, processor = model or tiny_model(), processor or tiny_processor()
    yes, no = answer_tokens(processor)
    with torch.no_grad():
        states = torch.cat([model.model(**batch).last_hidden_state[:, -1] for batch in asked_alone(processor)])
        middle, weight = states.mean(0), model.lm_head.weight
        bias = (states @ (weight[yes] - weight[no])).median() / (middle @ middle)
        weight[yes] -= bias * middle
    return model, processor


def asked_alone(processor) -> list[dict]:
    """The inputs of each question without the others."""
    texts = [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>" + row["question"] + " Please answer "
        "yes or no.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        for row in questions()
    ]
    return [
        processor(text=[text], images=[[row["image"]]], return_tensors="pt")
        for text, row in zip(texts, questions(), strict=True)
    ]


def answered_alone(model, processor) -> list[bool]:
    """Whether Yes beats No."""
    yes, no = (processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    with torch.no_grad():
        logits = [model(**batch).logits[0, -1] for batch in asked_alone(processor)]
    return [bool(row[yes] > row[no]) for row in logits]


@TOWERS
def test_points_are_what_the_model_answers(tmp_path, trains):
    result = run(tmp_path / "run", questions(), start=undecided(), trains=trains)
    assert [(point["step"], point["questions"]) for point in points(result)] == [(0, 0), (2, 8), (4, 16), (5, 20)]
    assert all(point.keys() == POINT | {"step", "epoch"} for point in points(result))
    trained = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "run").eval()
    models = (undecided()[0], trained)
    first, last = (answered_alone(model, tiny_processor()) for model in models)
    assert len(set(first)) == 2 and first != last, "answers differ, and have changed"
    for said, point in ((first, points(result)[0]), (last, points(result)[-1])):
        assert point["presence_yes"] == pytest.approx(sum(said) / 7)
        right = [yes == (row["answer"] == "Yes") for yes, row in zip(said, questions(), strict=True)]
        assert point["presence"] == pytest.approx(sum(right) / 7)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert [entry for entry in state["log_history"] if "presence" in entry] == points(result)
    assert result.lineage["answers"]["number"] == 7 and result.lineage["answers"]["yes"] == pytest.approx(3 / 7)


@TOWERS
def test_a_curve_changes_nothing_else(tmp_path, trains):
    settings = {"guidance_weight": 1.0, "train_sampling_strategy": "random", "trains": trains}
    settings["stored"] = tmp_path / "store" if trains == FROZEN else None
    drawn, plain = (run(tmp_path / name, rows, **settings) for name, rows in (("a", questions()), ("b", None)))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    assert drawn.lineage["recipe_hash"] == plain.lineage["recipe_hash"] and "answers" not in plain.lineage
    logs = [
        [
            {name: value for name, value in entry.items() if name not in SPEED}
            for entry in result.log_history
            if "presence" not in entry
        ]
        for result in (drawn, plain)
    ]
    assert logs[0] == logs[1] and len(logs[0]) > 2


def test_an_interrupted_curve_goes_on_as_if_nothing_had_been(tmp_path, capsys):
    with pytest.raises(Stop):
        run(tmp_path / "run", questions(), [StopAt(4)])
    with pytest.raises(ValueError, match=r"holds another learning curve \(number: 7 there, 5 asked"):
        run(tmp_path / "run", questions(5))
    result = run(tmp_path / "run", questions())
    assert points(result) == points(run(tmp_path / "whole", questions()))
    with pytest.raises(Stop):
        run(tmp_path / "plain", None, [StopAt(4)])
    for _ in ("goes on", "is done"):
        later = run(tmp_path / "plain", questions())
        assert not points(later) and "answers" not in later.lineage
        said = " ".join(capsys.readouterr().out.split())
        assert "it began without a learning curve; a run in another folder would have one" in said


def test_a_frozen_tower_sees_each_picture_once(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(curve, "open_image", lambda image, where: opened.append(where) or open_image(image, where))
    run(tmp_path / "frozen", questions())
    assert opened == [f"rows, row {index}, field image" for index in range(7)]
    opened.clear()
    run(tmp_path / "trains", questions(), trains=TRAINS)
    assert len(opened) == 4 * 7


@TOWERS
def test_the_twin_has_curves_too(tmp_path, trains):
    model, processor = undecided(*concatenating_twin(tiny_model(), tiny_processor()))
    said = answered_alone(model, processor)
    assert len(set(said)) == 2
    settings = {"variant": "twin", "mask_fraction": 0.0, "guidance_weight": 0.0, "trains": trains}
    result = run(tmp_path / "run", questions(), start=(model, processor), learning_rate=0.0, **settings)
    assert [point["presence_yes"] for point in points(result)] == [pytest.approx(sum(said) / 7)] * 4


def test_questions_come_from_scenes_and_files(tmp_path):
    build_scenes(tmp_path / "curve", captions=0, instructions=0, test=4, size=64, progress=False)
    found = read_questions(tmp_path / "curve")
    assert found.name == "curve"
    assert found.rows["question"] == load_benchmark(tmp_path / "curve", "composition", "pope")["question"]
    questions().to_parquet(tmp_path / "rows.parquet")
    found = read_questions(tmp_path / "rows.parquet")
    assert found.name == "rows.parquet" and found.yes.tolist() == [True, False, False, True, False, False, True]


def test_questions_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows: no column answer, .* there are image, question"):
        read_questions(questions().remove_columns("answer"))
    with pytest.raises(ValueError, match="rows holds no questions"):
        read_questions(questions().select([]))
    with pytest.raises(ValueError, match="rows, row 0, field answer: 'maybe' is neither Yes nor No"):
        read_questions(questions(answer="maybe"))
    with pytest.raises(ValueError, match="rows, row 0, field image: "):
        run(tmp_path / "run", questions(image={"bytes": b"no picture", "path": None}))
    with pytest.raises(ValueError, match="`answer_steps` must be positive, got 0"):
        run(tmp_path / "none", questions(), answer_steps=0)


def test_yes_and_no_must_begin_apart():
    processor = tiny_processor()
    assert processor.tokenizer.convert_ids_to_tokens(answer_tokens(processor)) == ["Yes", "No"]
    processor.chat_template = processor.chat_template.replace(
        "{{- content + '<|eot_id|>' -}}{%- endgen", "A{%- endgen"
    )
    with pytest.raises(ValueError, match="they do not begin apart right behind the header"):
        answer_tokens(processor)


def test_turns_are_runs_of_learned_tokens():
    assert answer_turns(torch.tensor([[-100, 3, 4, -100, 5], [6, -100, -100, -100, -100], [-100] * 5])) == 3
