"""The lmms-eval plugin: its tasks on local rows give the numbers that `agevlm eval` gives. Skips without lmms-eval."""

import json
from pathlib import Path

import pytest

from agevlm.data.scenes.build import build_scenes
from agevlm.evaluation.lmms.tasks import utils
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.run import evaluate_scenes
from agevlm.evaluation.tables import lookup
from builders import save_tiny, tiny_model, tiny_processor


TASKS = Path(__file__).resolve().parents[2] / "src" / "agevlm" / "evaluation" / "lmms" / "tasks"


def test_every_benchmark_has_its_task():
    import yaml

    class Functions(yaml.SafeLoader):
        pass

    Functions.add_constructor("!function", lambda loader, node: node.value)
    for name, protocols in BENCHMARKS.items():
        task = yaml.load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"), Functions)
        assert task["task"] == f"agevlm_{name}"
        assert task["dataset_path"] == protocols["paper"].source.hub
        assert task["test_split"] == protocols["paper"].source.splits[0]
        assert task["generation_kwargs"]["max_new_tokens"] == protocols["paper"].max_new_tokens
        named = [task[key] for key in ("doc_to_visual", "doc_to_text", "doc_to_target", "process_results")]
        for function in [*named, *(metric["aggregation"] for metric in task["metric_list"])]:
            assert callable(getattr(utils, function.removeprefix("utils.")))


def test_lmms_eval_gives_our_numbers(tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (extra `lmms`)")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from agevlm.evaluation.lmms import manifest

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    scenes = build_scenes(tmp_path / "scenes", captions=1, instructions=1, test=12, size=96, progress=False)
    save_tiny(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "utils.py").write_text((TASKS / "utils.py").read_text(encoding="utf-8"), encoding="utf-8")
    for name, protocols in BENCHMARKS.items():
        rows = scenes / "benchmarks" / "composition" / f"{name}.parquet"
        text = (TASKS / f"{name}.yaml").read_text(encoding="utf-8")
        text = text.replace(f"dataset_path: {protocols['paper'].source.hub}", "dataset_path: parquet")
        split = protocols["paper"].source.splits[0]
        text = text.replace("max_new_tokens: 128", "max_new_tokens: 4")
        text += f"dataset_kwargs:\n  data_files:\n    {split}: {json.dumps(str(rows))}\n"
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text, encoding="utf-8")
    found = simple_evaluate(
        model="agevlm", model_args=f"pretrained={tmp_path / 'model'}", batch_size=4,
        tasks=[f"agevlm_{name}" for name in BENCHMARKS],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )["results"]  # fmt: skip
    ours = evaluate_scenes(
        tiny_model(), tiny_processor(), scenes, "composition", tmp_path / "out", max_new_tokens=4, progress=False
    )["benchmarks"]
    for name in BENCHMARKS:
        numbers = {key.split(",")[0]: value for key, value in found[f"agevlm_{name}"].items() if key.endswith(",none")}
        compared = 0
        for metric, value in numbers.items():
            expected = lookup(ours[name], utils.METRICS[name].get(metric, (metric,)))
            if expected is not None and not metric.endswith("_stderr"):
                assert value == pytest.approx(expected), (name, metric)
                compared += 1
        assert compared >= 2, f"{name}: {sorted(numbers)}"
