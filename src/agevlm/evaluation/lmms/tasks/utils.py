"""Functions that the YAML files of this folder name: prompts, pictures and scores of the protocol `paper`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agevlm.evaluation.benchmark import Benchmark
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.tables import lookup


def visual(doc: Mapping[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def _prompt(benchmark: Benchmark) -> Callable[..., str]:
    return lambda doc, lmms_eval_specific_kwargs=None: benchmark.prompt(doc)


def _gold(benchmark: Benchmark) -> Callable[[Mapping[str, Any]], str]:
    return benchmark.gold


def _results(benchmark: Benchmark, metrics: Sequence[str]) -> Callable[..., dict[str, Any]]:
    def results(doc: Mapping[str, Any], outputs: Sequence[str], **_: Any) -> dict[str, Any]:
        row = {name: value for name, value in doc.items() if name not in ("image", "mask")}
        return {metric: {"row": row, "output": outputs[0]} for metric in metrics}

    return results


def _metric(benchmark: Benchmark, *path: str) -> Callable[[Sequence[Mapping[str, Any]]], float]:
    """lmms-eval hands over every row's result once; the whole benchmark is scored for each metric."""

    def aggregate(results: Sequence[Mapping[str, Any]]) -> float:
        rows = [result["row"] for result in results]
        parsed = [benchmark.parse(row, result["output"]) for row, result in zip(rows, results, strict=True)]
        value = lookup(benchmark.score(rows, parsed), path)
        return 0.0 if value is None else float(value)

    return aggregate


_pope, _hallusionbench, _ocrbench, _cvbench, _realworldqa = (
    BENCHMARKS[name]["paper"] for name in ("pope", "hallusionbench", "ocrbench", "cvbench", "realworldqa")
)

pope_prompt, pope_gold = _prompt(_pope), _gold(_pope)
pope_results = _results(_pope, ("f1", "accuracy", "yes_ratio", "unparsed"))
pope_f1, pope_accuracy = _metric(_pope, "f1"), _metric(_pope, "accuracy")
pope_yes_ratio, pope_unparsed = _metric(_pope, "yes_ratio"), _metric(_pope, "unparsed")

hallusionbench_prompt, hallusionbench_gold = _prompt(_hallusionbench), _gold(_hallusionbench)
hallusionbench_results = _results(_hallusionbench, ("aAcc", "fAcc", "qAcc", "unparsed"))
hallusionbench_aacc, hallusionbench_facc = _metric(_hallusionbench, "aAcc"), _metric(_hallusionbench, "fAcc")
hallusionbench_qacc, hallusionbench_unparsed = _metric(_hallusionbench, "qAcc"), _metric(_hallusionbench, "unparsed")

ocrbench_prompt, ocrbench_gold = _prompt(_ocrbench), _gold(_ocrbench)
ocrbench_results = _results(_ocrbench, ("final", "scene", "key_information"))
ocrbench_final = _metric(_ocrbench, "final")
ocrbench_scene = _metric(_ocrbench, "categories", "Scene Text-centric VQA")
ocrbench_key_information = _metric(_ocrbench, "categories", "Key Information Extraction")

cvbench_prompt, cvbench_gold = _prompt(_cvbench), _gold(_cvbench)
cvbench_results = _results(_cvbench, ("overall", "2D", "3D", "unparsed"))
cvbench_overall, cvbench_unparsed = _metric(_cvbench, "overall"), _metric(_cvbench, "unparsed")
cvbench_2d, cvbench_3d = _metric(_cvbench, "2D"), _metric(_cvbench, "3D")

realworldqa_prompt, realworldqa_gold = _prompt(_realworldqa), _gold(_realworldqa)
realworldqa_results = _results(_realworldqa, ("accuracy", "unparsed"))
realworldqa_accuracy, realworldqa_unparsed = _metric(_realworldqa, "accuracy"), _metric(_realworldqa, "unparsed")
