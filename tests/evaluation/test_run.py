"""The runner on a real folder of scenes with a random model: what it writes, resumes, refuses."""

import json
from pathlib import Path

import pytest
from hub_server import HubServer, connect
from huggingface_hub import hf_hub_download

from agevlm.data.scenes.build import build_scenes
from agevlm.evaluation import run
from agevlm.evaluation.cli import evaluate as main
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.run import evaluate_scenes, stored_fingerprint
from agevlm.evaluation.tables import summary_table
from agevlm.hub_cards import weights_fingerprint
from agevlm.models import weights_digest
from builders import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    return build_scenes(folder, captions=2, instructions=2, test=8, size=96, progress=False)


def evaluate(scenes, output, model=None, **settings):
    settings = {"max_new_tokens": 3, "batch_size": 4, "progress": False, **settings}
    return evaluate_scenes(model or tiny_model(), tiny_processor(), scenes, "composition", output, **settings)


@pytest.fixture(scope="module")
def evaluated(scenes, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    return evaluate(scenes, output), output


def test_every_benchmark_has_scores_baselines_and_grounding(evaluated):
    metrics, output = evaluated
    assert set(metrics["benchmarks"]) == set(BENCHMARKS)
    for name, result in metrics["benchmarks"].items():
        assert result["n"] == 8 and result["skipped"] == 0
        assert 0 <= result["unparsed"] <= 100
        assert result["headline"] in result and result["protocol"] and result["constants"]
        lines = [json.loads(line) for line in (output / name / "predictions.jsonl").open(encoding="utf-8")]
        assert len(lines) == 8 and all(line["output"] is not None for line in lines)
        records = [json.loads(line) for line in (output / name / "grounding.jsonl").open(encoding="utf-8")]
        assert len(records) == result["grounding"]["n"]
    assert metrics["benchmarks"]["pope"]["grounding"]["n"] == 4, "half of the objects asked for are absent"
    pooled = metrics["grounding"]
    assert pooled["n"] == sum(result["grounding"]["n"] for result in metrics["benchmarks"].values())
    assert 0 < pooled["in_mask_mass"]["mean"] < 1
    assert len(pooled["in_mask_mass"]["per_layer"]) == len(pooled["layers"]) == 2


def test_metrics_are_on_disk_and_returned_without_asking_again(evaluated, scenes, monkeypatch):
    metrics, output = evaluated
    assert json.loads((output / "metrics.json").read_text(encoding="utf-8")) == metrics
    monkeypatch.setattr(run, "generate_predictions", None)
    assert evaluate(scenes, output) == metrics


def test_a_run_without_its_metrics_goes_on_to_the_same_metrics(evaluated, scenes):
    metrics, output = evaluated
    (output / "metrics.json").unlink()
    again = evaluate(scenes, output)
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}


@pytest.mark.parametrize("change", [{"model": 1}, {"max_new_tokens": 4}, {"limit": 4}])
def test_a_folder_of_another_run_is_refused(evaluated, scenes, change):
    if "model" in change:
        change = {"model": tiny_model(seed=1)}
    with pytest.raises(ValueError, match=r"holds another run"):
        evaluate(scenes, evaluated[1], **change)


def test_limit_and_choice_of_benchmarks(scenes, tmp_path):
    metrics = evaluate(scenes, tmp_path, benchmarks=["pope"], limit=2)
    assert list(metrics["benchmarks"]) == ["pope"]
    assert metrics["benchmarks"]["pope"]["n"] == 2


def test_training_mode_is_left_as_found(scenes, tmp_path):
    model = tiny_model().train()
    evaluate(scenes, tmp_path, model=model, benchmarks=["pope"], limit=2)
    assert model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"benchmarks": ["mmlu"]}, "unknown benchmark mmlu; use pope"), ({"benchmarks": []}, "none given"),
     ({"limit": 0}, "has no rows")],
)  # fmt: skip
def test_bad_arguments(scenes, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(scenes, tmp_path, **settings)


def test_weights_digest_tells_models_apart():
    assert weights_digest(tiny_model()) == weights_digest(tiny_model())
    assert weights_digest(tiny_model()) != weights_digest(tiny_model(seed=1))


def test_summary_shows_models_and_what_not_looking_gives(evaluated):
    table = summary_table({"first": evaluated[0], "second": evaluated[0]})
    assert [column.header for column in table.columns] == ["", "first", "second", "without looking"]
    cells = [str(cell) for column in table.columns for cell in column.cells]
    assert "66.7 (always yes)" in cells and "in mask mass" in cells


def test_command_line(scenes, tmp_path, capsys):
    for seed, name in enumerate(("one", "two")):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        tiny_processor().save_pretrained(tmp_path / name)
    models = [str(tmp_path / "one"), str(tmp_path / "two")]
    rest = ["--scenes", str(scenes), "--output", str(tmp_path / "out"), "--limit", "2", "--max-new-tokens", "2"]
    main([*models, *rest, "--benchmarks", "pope", "cvbench"])
    paths = [tmp_path / "out" / name / "metrics.json" for name in ("one", "two")]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for metrics, model in zip(results, models, strict=True):
        assert set(metrics["benchmarks"]) == {"pope", "cvbench"}
        assert metrics["weights"] == weights_fingerprint(model)
    assert results[0]["weights"] != results[1]["weights"]
    assert "without looking" in capsys.readouterr().out
    # Results from before fingerprints were recorded get theirs by the same call, which measures nothing again
    paths[0].write_text(json.dumps({name: value for name, value in results[0].items() if name != "weights"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "generate_predictions", None)
        main([*models, *rest, "--benchmarks", "pope", "cvbench"])
    assert json.loads(paths[0].read_text(encoding="utf-8")) == results[0]


def test_the_fingerprint_of_a_model_of_the_hub_is_that_of_its_files(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    with HubServer(tmp_path / "hub") as hub:
        connect(hub, monkeypatch)
        hub.add_repo("org/model", tmp_path / "model")
        cached = hf_hub_download("org/model", "model.safetensors", cache_dir=tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert stored_fingerprint("org/model") == weights_fingerprint(tmp_path / "model") is not None
    assert weights_fingerprint(Path(cached).parent) == weights_fingerprint(tmp_path / "model")
    assert stored_fingerprint("org/model", adapter=str(tmp_path)) is None  # an adapter's own weights count


def test_command_line_refuses_what_is_no_checkpoint(scenes, tmp_path):
    rest = ["--scenes", str(scenes), "--output", str(tmp_path / "out")]
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ValueError, match="is no image-text-to-text model: its model type is 'llama'"):
        main([str(tmp_path / "llama"), *rest])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        main([str(tmp_path / "empty"), *rest])
    with pytest.raises(ValueError, match="called the same"):
        main([str(tmp_path / "a" / "x"), str(tmp_path / "b" / "x"), *rest])
