"""Functions that the YAML files of this folder name: prompts, pictures and scores of the protocol `paper`.

Of every benchmark NAME there are NAME_prompt, NAME_gold, NAME_results, and NAME_METRIC for each of `METRICS`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agevlm.evaluation.benchmark import Benchmark
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.tables import lookup


# Benchmark -> lmms-eval's name of a metric -> its path in ours
METRICS: dict[str, dict[str, tuple[str, ...]]] = {
    "pope": {name: (name,) for name in ("f1", "accuracy", "yes_ratio", "unparsed")},
    "hallusionbench": {name: (name,) for name in ("aAcc", "fAcc", "qAcc", "unparsed")},
    "ocrbench": {
        "final": ("final",),
        "scene": ("categories", "Scene Text-centric VQA"),
        "key_information": ("categories", "Key Information Extraction"),
    },
    "cvbench": {name: (name,) for name in ("overall", "2D", "3D", "unparsed")},
    "realworldqa": {name: (name,) for name in ("accuracy", "unparsed")},
}


def visual(doc: Mapping[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def _prompt(benchmark: Benchmark) -> Callable[..., str]:
    return lambda doc, lmms_eval_specific_kwargs=None: benchmark.prompt(doc)


def _results(metrics: Sequence[str]) -> Callable[..., dict[str, Any]]:
    def results(doc: Mapping[str, Any], outputs: Sequence[str], **_: Any) -> dict[str, Any]:
        row = {name: value for name, value in doc.items() if name not in ("image", "mask")}
        return {metric: {"row": row, "output": outputs[0]} for metric in metrics}

    return results


def _metric(benchmark: Benchmark, path: Sequence[str]) -> Callable[[Sequence[Mapping[str, Any]]], float]:
    """lmms-eval hands over every row's result once; the whole benchmark is scored for each metric."""

    def aggregate(results: Sequence[Mapping[str, Any]]) -> float:
        rows = [result["row"] for result in results]
        parsed = [benchmark.parse(row, result["output"]) for row, result in zip(rows, results, strict=True)]
        value = lookup(benchmark.score(rows, parsed), path)
        return 0.0 if value is None else float(value)

    return aggregate


for _name, _metrics in METRICS.items():
    _benchmark = BENCHMARKS[_name]["paper"]
    globals().update(
        {
            f"{_name}_prompt": _prompt(_benchmark),
            f"{_name}_gold": _benchmark.gold,
            f"{_name}_results": _results(list(_metrics)),
            **{
                f"{_name}_{_metric_name.lower()}": _metric(_benchmark, _path)
                for _metric_name, _path in _metrics.items()
            },
        }
    )
