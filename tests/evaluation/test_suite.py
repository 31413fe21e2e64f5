"""The whole suite, offline, on the committed tiny checkpoint: five formats, judge, tables, differences, the page."""

import json
from pathlib import Path

import pytest

from agevlm.data.scenes.build import build_scenes, load_benchmark
from agevlm.evaluation.cli import evaluate as main
from agevlm.evaluation.cli import results as make_page
from agevlm.evaluation.leaderboard import PAPER, read_metrics, results_page
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.run import choose, compare_folders, load_scenes
from agevlm.store import write_json
from builders import tiny_model, tiny_processor


ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "agevlm-tiny"
RECORDED = sorted((ROOT / "docs" / "results").glob("*/metrics.json"))


class EveryYes:
    """A judge that finds a yes, or a right answer, or the first option, in everything."""

    name, digest = "always-yes", "0"

    def __init__(self, *arguments):
        pass

    def ask(self, prompts, progress=True):
        return [prompt.rsplit(": ", 1)[1].split(", ")[0] for prompt in prompts]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    build_scenes(folder / "scenes", captions=1, instructions=1, test=12, size=96, max_objects=3, progress=False)
    tiny_model().save_pretrained(folder / "random")
    tiny_processor().save_pretrained(folder / "random")
    rows = load_benchmark(folder / "scenes", "composition", "pope").filter(lambda row: row["mask"] is not None)
    rows.select_columns(["image", "question", "mask"]).to_parquet(folder / "masks.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agevlm.evaluation.run.Judge", EveryYes)
        main([
            str(TINY), str(folder / "random"), "--scenes", str(folder / "scenes"), "--output", str(folder / "out"),
            "--benchmarks", "all", "--max-new-tokens", "8", "--judge", "--masks", str(folder / "masks.parquet"),
        ])  # fmt: skip
    return folder


def metrics_of(evaluated, model):
    return read_metrics(evaluated / "out" / model / "metrics.json")


def test_both_columns_for_every_benchmark(evaluated):
    metrics = metrics_of(evaluated, "agevlm-tiny")
    assert list(metrics["benchmarks"]) == list(BENCHMARKS) and metrics["judge"] == "always-yes"
    for name, result in metrics["benchmarks"].items():
        headline = result["headline"]
        low, high = result["intervals"][headline]
        assert low - 1e-9 <= result[headline] <= high + 1e-9
        judged = result["judged"]
        assert judged["unjudged"] == 0 and judged["n"] == result["n"] == 12
        assert (judged["agreement"] is None) == (judged["agreement_n"] == 0)
        lines = (evaluated / "out" / "agevlm-tiny" / name / "judged.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 12
    assert metrics["benchmarks"]["pope"]["judged"]["f1"] == pytest.approx(200 / 3), "the judge finds yes everywhere"
    assert metrics["benchmarks"]["ocrbench"]["judged"]["final"] == 12
    assert set(metrics["benchmarks"]["pope"]["categories"]) == {"adversarial", "popular", "random"}
    assert set(metrics["benchmarks"]["cvbench"]["tasks"]) == {"Count", "Depth", "Relation"}


def test_looking_is_measured_on_rows_of_their_own_too(evaluated):
    metrics = metrics_of(evaluated, "agevlm-tiny")
    assert metrics["masked"]["n"] == metrics["benchmarks"]["pope"]["grounding"]["n"] == 6
    assert metrics["masked"]["uniform"] == metrics["benchmarks"]["pope"]["grounding"]["uniform"]
    area = metrics["grounding"]["token_auroc"]
    assert len(area["per_layer"]) == len(metrics["grounding"]["layers"]) == 2
    assert area["mean"] > 0.6, "the tiny checkpoint looks at the right things"
    assert metrics["grounding"]["uniform"]["token_auroc"] == 0.5


def test_two_models_are_compared_in_pairs(evaluated):
    lines = json.loads((evaluated / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert [line["benchmark"] for line in lines] == list(BENCHMARKS)
    for line in lines:
        first, second = (
            metrics_of(evaluated, line[side])["benchmarks"][line["benchmark"]] for side in ("first", "second")
        )
        assert line["difference"] == pytest.approx(second[line["metric"]] - first[line["metric"]])
    benchmarks = choose(["pope"])
    data = load_scenes(evaluated / "scenes", "composition", benchmarks)
    (same,) = compare_folders(evaluated / "out", ["random"] * 2, benchmarks, data)[:1]
    assert same["difference"] == 0 and same["p"] == same["mcnemar"]["p"] == 1


def test_the_pages_say_every_metric(evaluated):
    page = (evaluated / "out" / "results.md").read_text(encoding="utf-8")
    html = (evaluated / "out" / "results.html").read_text(encoding="utf-8")
    for words in ("categories adversarial f1", "tasks Depth", "judged: f1", "judged: agreement", "token auroc, layer",
                  "fAcc", "p (McNemar)", "rows of their own"):  # fmt: skip
        assert words in page and words in html
    assert "66.7 (always yes)" in page and "<script" not in html and "http" not in html
    for metrics in (metrics_of(evaluated, "agevlm-tiny"), metrics_of(evaluated, "random")):
        assert f"{metrics['benchmarks']['pope']['accuracy']:.1f} [" in page


def test_the_results_page_keeps_paper_and_scenes_apart(evaluated, tmp_path):
    scenes = metrics_of(evaluated, "agevlm-tiny")
    page = results_page([scenes])
    public, ours = page.split("## Grounded scenes")
    for name in PAPER:
        assert f"| {name} | paper |" in public
    assert "agevlm-tiny" not in public and "No model trained with this code" in public
    assert "agevlm-tiny" in ours and "| paper |" not in ours
    published = {**scenes, "data": "Hub", "model": "mine"}
    page = results_page([published])
    assert "| mine | ours, paper |" in page and "| mine | ours, paper, judge always-yes |" in page
    assert "No model trained" not in page and "## Grounded scenes" not in page
    with pytest.raises(ValueError, match="two results for agevlm-tiny"):
        results_page([scenes, scenes])
    write_json(tmp_path / "metrics.json", {"format": 2})
    with pytest.raises(ValueError, match=r"metrics\.json is no metrics\.json of `agevlm eval`: it lacks model"):
        make_page([str(tmp_path / "metrics.json"), "--output", str(tmp_path / "page.md")])
    assert not (tmp_path / "page.md").exists()


def test_the_committed_results_page_is_the_one_its_files_make(tmp_path):
    assert RECORDED
    make_page([*map(str, RECORDED), "--output", str(tmp_path / "results.md")])
    assert (tmp_path / "results.md").read_bytes() == (ROOT / "docs" / "results.md").read_bytes()
