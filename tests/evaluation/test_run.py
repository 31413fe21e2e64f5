"""The runner, offline, on the committed tiny checkpoint and a random one: five formats, judge, looking, tables,
differences, the results page; what it resumes and refuses.
"""

import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hub_server import HubServer, connect
from huggingface_hub import hf_hub_download
from PIL import Image
from rich.console import Console

from agevlm.data.scenes.build import load_benchmark
from agevlm.evaluation import run
from agevlm.evaluation.cli import evaluate as main
from agevlm.evaluation.cli import results as make_page
from agevlm.evaluation.leaderboard import PAPER, read_metrics, results_page
from agevlm.evaluation.looking import load_masked
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.run import choose, compare_folders, evaluate_scenes, load_scenes, stored_fingerprint
from agevlm.evaluation.tables import summary_table
from agevlm.hub_cards.facts import weights_fingerprint
from agevlm.language import perplexity, read_held_text
from agevlm.models import weights_digest
from agevlm.store import locked, read_lines, write_json
from builders import save_tiny, tiny_model, tiny_processor, tiny_scenes
from vlms import llava


ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "agevlm-tiny"
RECORDED = sorted((ROOT / "docs" / "results").glob("*/metrics.json"))
ROWS = 12


class EveryYes:
    """A judge that finds a yes, or a right answer, or the first option, in everything."""

    name, digest = "always-yes", "0"

    def __init__(self, *arguments):
        pass

    def ask(self, prompts, progress=True):
        return [prompt.rsplit(": ", 1)[1].split(", ")[0] for prompt in prompts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`out`, what `agevlm eval` made of the tiny checkpoint and a random one, and what it was given."""
    folder = tmp_path_factory.mktemp("run")
    tiny_scenes(folder / "scenes", test=ROWS, size=96, max_objects=3)
    save_tiny(folder / "random")
    rows = load_benchmark(folder / "scenes", "composition", "pope").filter(lambda row: row["mask"] is not None)
    rows.select_columns(["image", "question", "mask"]).to_parquet(folder / "masks.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agevlm.evaluation.run.Judge", EveryYes)
        main(command(folder, "--judge", "--masks", str(folder / "masks.parquet")))
    return folder


def command(folder, *more):
    models = [str(TINY), str(folder / "random")]
    rest = ["--scenes", str(folder / "scenes"), "--output", str(folder / "out"), "--max-new-tokens", "8"]
    return [*models, *rest, *more]


def metrics_of(folder, model="agevlm-tiny"):
    return read_metrics(folder / "out" / model / "metrics.json")


def evaluate(folder, output, model=None, **settings):
    settings = {"max_new_tokens": 3, "batch_size": 4, "progress": False, "limit": 4, **settings}
    scenes = folder / "scenes"
    return evaluate_scenes(model or tiny_model(), tiny_processor(), scenes, "composition", output, **settings)


def test_both_columns_for_every_benchmark(folder):
    metrics = metrics_of(folder)
    assert list(metrics["benchmarks"]) == list(BENCHMARKS) and metrics["judge"] == "always-yes"
    for name, result in metrics["benchmarks"].items():
        headline = result["headline"]
        low, high = result["intervals"][headline]
        assert low - 1e-9 <= result[headline] <= high + 1e-9
        assert result["n"] == ROWS and result["skipped"] == 0 and result["protocol"] and result["constants"]
        judged = result["judged"]
        assert judged["unjudged"] == 0 and judged["n"] == ROWS
        assert (judged["agreement"] is None) == (judged["agreement_n"] == 0)
        files = {file: read_lines(folder / "out" / "agevlm-tiny" / name / f"{file}.jsonl")
                 for file in ("predictions", "judged", "grounding")}  # fmt: skip
        assert len(files["predictions"]) == len(files["judged"]) == ROWS
        assert all(line["output"] is not None for line in files["predictions"])
        assert len(files["grounding"]) == result["grounding"]["n"]
    assert metrics["benchmarks"]["pope"]["judged"]["f1"] == pytest.approx(200 / 3), "the judge finds yes everywhere"
    assert metrics["benchmarks"]["ocrbench"]["judged"]["final"] == ROWS
    assert set(metrics["benchmarks"]["pope"]["categories"]) == {"adversarial", "popular", "random"}
    assert set(metrics["benchmarks"]["cvbench"]["tasks"]) == {"Count", "Depth", "Relation"}


def test_looking_is_measured_on_the_rows_with_masks_and_on_rows_of_their_own(folder):
    metrics = metrics_of(folder)
    found = {name: result["grounding"] for name, result in metrics["benchmarks"].items()}
    pooled = metrics["grounding"]
    assert pooled["n"] == sum(result["n"] for result in found.values())
    assert found["pope"]["n"] == ROWS // 2, "half of the objects asked for are absent"
    assert metrics["masked"]["n"] == ROWS // 2 and metrics["masked"]["uniform"] == found["pope"]["uniform"]
    assert metrics["masked"]["in_mask_mass"]["mean"] == pytest.approx(found["pope"]["in_mask_mass"]["mean"], rel=1e-4)
    assert 0 < pooled["in_mask_mass"]["mean"] < 1
    assert len(pooled["token_auroc"]["per_layer"]) == len(pooled["layers"]) == 2
    assert pooled["token_auroc"]["mean"] > 0.6, "the tiny checkpoint looks at the right things"
    assert pooled["uniform"]["token_auroc"] == 0.5


def test_two_models_are_compared_in_pairs(folder):
    lines = json.loads((folder / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert [line["benchmark"] for line in lines] == list(BENCHMARKS)
    for line in lines:
        first, second = (
            metrics_of(folder, line[side])["benchmarks"][line["benchmark"]] for side in ("first", "second")
        )
        assert line["difference"] == pytest.approx(second[line["metric"]] - first[line["metric"]])
    benchmarks = choose(["pope"])
    data = load_scenes(folder / "scenes", "composition", benchmarks)
    (same,) = compare_folders(folder / "out", ["random"] * 2, benchmarks, data)[:1]
    assert same["difference"] == 0 and same["p"] == same["mcnemar"]["p"] == 1


def test_the_pages_say_every_metric(folder):
    page = (folder / "out" / "results.md").read_text(encoding="utf-8")
    html = (folder / "out" / "results.html").read_text(encoding="utf-8")
    for words in ("categories adversarial f1", "tasks Depth", "judged: f1", "judged: agreement", "token auroc, layer",
                  "fAcc", "p (McNemar)", "rows of their own"):  # fmt: skip
        assert words in page and words in html
    assert "66.7 (always yes)" in page and "<script" not in html and "http" not in html
    for model in ("agevlm-tiny", "random"):
        assert f"{metrics_of(folder, model)['benchmarks']['pope']['accuracy']:.1f} [" in page


def test_the_terminal_shows_models_by_any_name_and_what_not_looking_gives(folder):
    metrics = metrics_of(folder)
    console = Console(width=200, record=True, quiet=True)
    with console.capture() as shown:
        console.quiet = False
        console.print(summary_table({"[red]first[/red]": metrics, "second": metrics}))
    for words in ("[red]first[/red]", "second", "without looking", "66.7 (always yes)", "in mask mass"):
        assert words in shown.get()


def test_the_results_page_keeps_paper_and_scenes_apart(folder, tmp_path):
    scenes = metrics_of(folder)
    public, ours = results_page([scenes]).split("## Grounded scenes")
    for name in PAPER:
        assert f"| {name} | paper |" in public
    assert "agevlm-tiny" not in public and "No model trained with this code" in public
    assert "agevlm-tiny" in ours and "| paper |" not in ours
    page = results_page([{**scenes, "data": "Hub", "model": "mine"}])
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


def test_a_folder_is_resumed_returned_or_refused(folder, tmp_path, monkeypatch, capsys):
    metrics = evaluate(folder, tmp_path)
    path = tmp_path / "metrics.json"
    assert json.loads(path.read_text(encoding="utf-8")) == metrics
    path.unlink()
    again = evaluate(folder, tmp_path)
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}
    for change in ({"model": tiny_model(seed=1)}, {"max_new_tokens": 4}, {"limit": 3}):
        with pytest.raises(ValueError, match=r"holds another run"):
            evaluate(folder, tmp_path, **change)
    monkeypatch.setattr(run, "generate_predictions", None)
    assert evaluate(folder, tmp_path) == again and not capsys.readouterr().err
    write_json(path, {**again, "format": 2})
    with pytest.raises(ValueError, match=f"format: 2 there, {run.FORMAT} asked"):
        evaluate(folder, tmp_path)


def painted(rows, column):
    """The rows with other pictures or masks of the same size under the same ids."""

    def turned(cell):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(cell["bytes"])).rotate(180).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    cells = [cell and turned(cell) for cell in rows.with_format("arrow")[:][column].to_pylist()]
    feature = rows.features[column]
    return rows.remove_columns(column).add_column(column, pa.array(cells, feature.pa_type), feature=feature)


@pytest.mark.parametrize("column", ["image", "mask"])
def test_other_pictures_and_masks_are_another_run(folder, tmp_path, monkeypatch, column):
    """Under the same ids, sizes and questions: of the benchmark, and of `--masks`."""
    masked = load_masked(folder / "masks.parquet").select(range(3))
    first = evaluate(folder, tmp_path, benchmarks=["pope"], masked=masked)
    assert evaluate(folder, tmp_path, benchmarks=["pope"], masked=masked) == first
    with pytest.raises(ValueError, match=r"holds another run \(masked_pictures: "):
        evaluate(folder, tmp_path, benchmarks=["pope"], masked=painted(masked, column))
    monkeypatch.setattr(run, "load_benchmark", lambda *place: painted(load_benchmark(*place), column))
    with pytest.raises(ValueError, match=r"holds another run \(pictures.pope: "):
        evaluate(folder, tmp_path, benchmarks=["pope"], masked=masked)
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"pope holds another run \(pictures: "):
        evaluate(folder, tmp_path, benchmarks=["pope"], masked=masked)


def test_limit_choice_and_training_mode(folder, tmp_path):
    model = tiny_model().train()
    metrics = evaluate(folder, tmp_path, model=model, benchmarks=["pope"], limit=2)
    assert list(metrics["benchmarks"]) == ["pope"] and metrics["benchmarks"]["pope"]["n"] == 2
    assert model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"benchmarks": ["mmlu"]}, "unknown benchmark mmlu; use pope"), ({"benchmarks": []}, "none given"),
     ({"limit": 0}, "has no rows")],
)  # fmt: skip
def test_bad_arguments(folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(folder, tmp_path, **settings)


def test_weights_digest_tells_models_apart():
    assert weights_digest(tiny_model()) == weights_digest(tiny_model())
    assert weights_digest(tiny_model()) != weights_digest(tiny_model(seed=1))


def test_results_are_those_of_their_weights(folder, tmp_path):
    models = {"agevlm-tiny": TINY, "random": folder / "random"}
    found = {name: metrics_of(folder, name)["weights"] for name in models}
    assert found == {name: weights_fingerprint(path) for name, path in models.items()}
    assert found["agevlm-tiny"] != found["random"]
    # Results from before fingerprints were recorded get theirs by the same call, which measures nothing again
    rest = ["--scenes", str(folder / "scenes"), "--output", str(tmp_path), "--limit", "2", "--max-new-tokens", "2"]
    call = [str(folder / "random"), *rest, "--benchmarks", "pope"]
    main(call)
    path = tmp_path / "random" / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {name: value for name, value in metrics.items() if name != "weights"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "generate_predictions", None)
        main(call)
    assert json.loads(path.read_text(encoding="utf-8")) == metrics


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


def test_what_is_no_checkpoint_is_refused(folder, tmp_path):
    rest = ["--scenes", str(folder / "scenes"), "--output", str(tmp_path / "out")]
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for models, message in (
        (["llama"], "is no image-text-to-text model: its model type is 'llama'"),
        (["empty"], r"has no config\.json"),
        (["a/x", "b/x"], "called the same"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*(str(tmp_path / model) for model in models), *rest])


def test_a_stock_model_is_evaluated_but_for_the_maps_that_it_does_not_have(folder, tmp_path):
    subject = llava()
    for part in (subject.model, subject.processor):
        part.save_pretrained(tmp_path / "llava")
    rest = ["--scenes", str(folder / "scenes"), "--benchmarks", "pope", "cvbench", "--max-new-tokens", "3"]
    found = []
    for size in ("1", "5"):
        main([str(tmp_path / "llava"), *rest, "--batch-size", size, "--output", str(tmp_path / size)])
        output = tmp_path / size / "llava"
        found.append((read_metrics(output / "metrics.json"), read_lines(output / "pope" / "predictions.jsonl")))
    (single, lines), (batched, others) = found
    assert list(batched["benchmarks"]) == ["pope", "cvbench"]
    assert batched["grounding"] == {"n": 0, "skipped": 0, "layers": []}
    assert single["benchmarks"] == batched["benchmarks"] and lines == others
    with pytest.raises(ValueError, match="the model has no cross-attention maps: looking cannot be measured"):
        evaluate_scenes(subject.model, subject.processor, folder / "scenes", "composition", tmp_path / "masked",
                        benchmarks=["pope"], max_new_tokens=1, masked=load_masked(folder / "masks.parquet"),
                        progress=False)  # fmt: skip


def test_language_ability_stands_beside_the_answers(folder, tmp_path):
    (tmp_path / "held.txt").write_text("A red apple on the left. " * 20, encoding="utf-8")
    rest = ["--scenes", str(folder / "scenes"), "--benchmarks", "pope", "--limit", "2", "--max-new-tokens", "1"]
    call = [str(TINY), str(folder / "random"), *rest, "--output", str(tmp_path / "out")]
    main([*call, "--language", str(tmp_path / "held.txt")])
    found = read_metrics(tmp_path / "out" / "random" / "metrics.json")
    held = read_held_text(tmp_path / "held.txt", tiny_processor())
    assert found["language"] == {**held.stated, **perplexity(tiny_model(), tiny_processor().tokenizer, held)}
    assert "language" not in metrics_of(folder)
    for page in ((tmp_path / "out" / "results.md").read_text(encoding="utf-8"), results_page([found])):
        assert f"{found['language']['perplexity']:.4g}" in page and "held.txt" in page
    with pytest.raises(ValueError, match=r"holds another run \(language\.text: 'held\.txt' there, None asked"):
        main(call)
    main([str(folder / "random"), "--language", str(tmp_path / "held.txt"), "--output", str(tmp_path / "alone")])
    alone = read_metrics(tmp_path / "alone" / "random" / "metrics.json")
    assert alone["benchmarks"] == {} and alone["language"] == found["language"]


def test_a_protocol_of_judges_needs_one(folder, tmp_path):
    assert BENCHMARKS["hallusionbench"]["official"].judged_only
    with pytest.raises(ValueError, match="hallusionbench: the protocol 'official' is scored by a judge alone"):
        evaluate(folder, tmp_path, benchmarks=["hallusionbench"], protocol="official")


def test_a_second_run_into_a_folder_is_refused(folder, tmp_path):
    with locked(tmp_path / "agevlm-tiny"), pytest.raises(ValueError, match=r"another run is writing to .*agevlm-tiny"):
        main([str(TINY), "--masks", str(folder / "masks.parquet"), "--output", str(tmp_path)])


def test_masks_alone_are_measured_without_questions(folder, tmp_path):
    main([str(TINY), "--masks", str(folder / "masks.parquet"), "--output", str(tmp_path)])
    found = read_metrics(tmp_path / "agevlm-tiny" / "metrics.json")
    assert found["benchmarks"] == {} and found["grounding"]["n"] == 0
    assert found["masked"] == metrics_of(folder)["masked"]
    assert "The rows given by --masks." in (tmp_path / "results.md").read_text()


def test_a_model_in_training_is_one_again_after_a_failure(folder, tmp_path, model, processor, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "generate", fail)
    model.train()
    try:
        with pytest.raises(RuntimeError, match="no memory"):
            evaluate_scenes(model, processor, folder / "scenes", "composition", tmp_path, benchmarks=["pope"])
        assert model.training
    finally:
        model.eval()
