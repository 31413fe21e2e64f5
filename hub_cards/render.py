"""Model cards, rendered from the facts that a run leaves behind (`facts.py`); no model is loaded.

A card is never written by hand afterwards: it says what the files in its folder say, and rendering it again gives the
same. Scores stand in the card's table and, where the Hub knows the data set (`--dataset`), in
`.eval_results/*.yaml`, the Hub's current format; the older `model-index` is not written. Results of other weights are
refused, and left out where the weights were replaced later.
"""

import argparse
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from jinja2 import Template

from agevlm.store import read_text, write_bytes, write_text

from .datasets import is_dataset, write_dataset_card
from .facts import ATTENTION_FILE, EVALUATION_FILE, LOSS_FILE, evaluation_fits, read_facts, weights_fingerprint


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
STAGES = (
    (1, "stage1-align", "projector, cross-attention blocks", "language modeling"),
    (2, "stage2-adapt-vision", "+ last ConvNeXt stage", "language modeling"),
    (3, "stage3-ground", "as 2", "language modeling + guidance"),
    (4, "stage4-instruct", "everything", "language modeling (variants `-lm`: + guidance)"),
)
TAGS = ("agevlm", "custom_code", "vision-language", "visual-grounding")
# What a model made from these must be published under, by their licenses.
LICENSES = {"meta-llama/Llama-3.2-": "llama3.2"}
SETTINGS = (
    "global_batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "num_train_epochs",
    "max_steps",
    "guidance_weight",
    "guidance_loss",
    "guidance_normalisation",
    "bf16",
    "seed",
)
EVAL_FOLDER = ".eval_results"
LOSSES = {"loss": "training loss", "guidance_loss": "of it: guidance", "eval_loss": "validation loss"}
LOOKING = {"in_mask_mass": "attention inside the mask", "pointing_accuracy": "points at the object"}


def render_card(facts: Mapping[str, Any]) -> ModelCard:
    """The card of an AGE-VLM checkpoint.

    Args:
        facts: what `read_facts` returns; every field may be missing, and what is missing is left out.
    """
    stage, parent, repo = facts.get("stage"), facts.get("parent") or {}, facts.get("repo")
    bases = _bases(facts)
    tags = [*TAGS] + ([] if stage is None else [f"stage-{stage}"])
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        language="en",
        tags=tags,
        license=next((name for start, name in LICENSES.items() for base in bases if base.startswith(start)), None),
        base_model=bases if len(bases) > 1 else bases[0] if bases else None,
        base_model_relation="finetune" if bases else None,
    )
    variant = facts.get("variant")
    title = "AGE-VLM" if variant is None else f"AGE-VLM ({variant}, {facts.get('size')} size)"
    recipe = facts.get("recipe") or {}
    training = recipe.get("training") or {}
    config, processor = facts.get("config") or {}, (facts.get("processor") or {}).get("image_processor") or {}
    content = _template().render(
        card_data=card_data.to_yaml(),
        title=title if stage is None else f"{title}, stage {stage}",
        intermediate=stage is not None and stage < len(STAGES),
        stage=stage,
        stages=STAGES,
        name=facts.get("name"),
        repo=repo,
        revision=(facts.get("push") or {}).get("tag") if repo else None,
        code=facts.get("code") or [],
        figures=facts.get("figures") or [],
        attention=ATTENTION_FILE,
        loss=LOSS_FILE,
        facts=_facts(facts, parent, bases),
        parameters=facts.get("parameters") or {},
        layers=config.get("cross_attention_layers"),
        needs=config.get("transformers_version"),
        side=(processor.get("size") or {}).get("height"),
        trains=recipe.get("trains"),
        settings=[(name, training[name]) for name in SETTINGS if training.get(name) not in (None, -1)],
        metrics=[(name, _number(value)) for name, value in (facts.get("metrics") or {}).items()],
        evaluation=_evaluation({} if facts.get("evaluation_fits") is False else facts.get("evaluation") or {}),
        evaluation_file=EVALUATION_FILE,
        evaluation_fits=facts.get("evaluation_fits"),
        command=_command(facts, parent),
        commit=facts.get("git_commit"),
        versions=facts.get("versions") or {},
    )
    return ModelCard(content)


@cache
def _template() -> Template:
    """Compiled once: `ModelCard.from_template` would do so for each card, and a run writes two with a checkpoint."""
    return Template(TEMPLATE.read_text(encoding="utf-8"))


def _bases(facts: Mapping[str, Any]) -> list[str]:
    """Hub ids of what the model was made from: the last stage, or where that lies in this repository, the parts."""
    parent = (facts.get("parent") or {}).get("repo")
    return [parent] if parent and parent != facts.get("repo") else list(facts.get("base_models") or [])


def _facts(facts: Mapping[str, Any], parent: Mapping[str, Any], bases: list[str]) -> list[tuple[str, str]]:
    data = facts.get("data") or {}
    start = parent.get("repo") or parent.get("init_from")
    rows = [
        ("stage", facts.get("name")),
        # A folder is named, not placed: paths say more about a machine than about a model.
        ("started from", None if start is None else start if parent.get("repo") else Path(start).name),
        ("revision of it", parent.get("revision")),
        ("made from", ", ".join(base for base in facts.get("base_models") or [] if base not in (start,)) or None),
        ("rows", data.get("rows")),
        ("rows with a mask", data.get("guided_rows")),
        ("masks of", data.get("masks_of")),
        ("data fingerprint", data.get("fingerprint")),
        ("recipe hash", facts.get("recipe_hash")),
        ("language before -> after", _language(facts.get("language") or {})),
    ]
    return [(key, f"{value:,}" if isinstance(value, int) else str(value)) for key, value in rows if value is not None]


def _language(language: Mapping[str, Any]) -> str | None:
    """The perplexity of a held text before and after the stage."""
    if not language:
        return None
    values = [language.get(when) or {} for when in ("before", "after")]
    ends = " -> ".join(_number(value.get("perplexity", "not measured")) for value in values)
    return f"perplexity {ends} ({language.get('text')})"


def _evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The table of results: rows of (benchmark, n, metric, score, the best that needs no looking, yes, unparsed)."""
    rows = []
    for name, result in (evaluation.get("benchmarks") or {}).items():
        metric = result["headline"]
        constants = {constant: scores[metric] for constant, scores in result.get("constants", {}).items()}
        best = max(constants, key=lambda constant: constants[constant], default=None)
        rows.append(
            [
                name,
                result.get("n", ""),
                metric,
                _number(result[metric]),
                "" if best is None else f"{_number(constants[best])} ({best})",
                _number(result["yes_ratio"]) if "yes_ratio" in result else "",
                _number(result["unparsed"]) if "unparsed" in result else "",
            ]
        )
    grounding = {
        name: (_number(value["mean"]), _number(evaluation["grounding"]["uniform"][name]))
        for name, value in (evaluation.get("grounding") or {}).items()
        if isinstance(value, Mapping) and "mean" in value
    }
    protocols = {name: result["protocol"] for name, result in (evaluation.get("benchmarks") or {}).items()}
    return {"split": evaluation.get("split"), "rows": rows, "grounding": grounding, "protocols": protocols}


def _command(facts: Mapping[str, Any], parent: Mapping[str, Any]) -> str | None:
    if facts.get("name") is None:
        return None
    start = parent.get("repo") or (parent.get("init_from") and Path(parent["init_from"]).name) or "START"
    at = f" --revision {parent['revision']}" if parent.get("repo") and parent.get("revision") else ""
    return (
        f"agevlm train {facts['name']} --variant {facts.get('variant')} --size {facts.get('size')} --data DATA "
        f"--init_from {start}{at}"
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_losses(log_history: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Draw the losses over steps, and where rows are guided how much the model looks at their masks.

    Returns:
        Whether there was anything to draw: at least two logged steps.
    """
    curves = {
        name: [(entry["step"], entry[name]) for entry in log_history if name in entry and "step" in entry]
        for name in (*LOSSES, *LOOKING)
    }
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves.keys() & LOSSES.keys():
        return False
    # Only here, as the help of a verb waits for no Matplotlib; not pyplot, which would look for a display
    from matplotlib.figure import Figure

    from agevlm.drawing import save_figure

    panels = [LOSSES] + ([LOOKING] if curves.keys() & LOOKING.keys() else [])
    figure = Figure(figsize=(5 * len(panels), 3.2), dpi=120, layout="constrained")
    for axes, titles in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, title in titles.items():
            if name in curves:
                axes.plot(*zip(*curves[name], strict=True), label=title, linewidth=1.4)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save_figure(figure, path)
    return True


def write_card(folder: str | os.PathLike) -> Path:
    """Draw the loss curve and render the card of `folder` as README.md (replaced in one step); returns its path.

    Raises:
        ValueError: a file that the card is made of is damaged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw_losses(read_facts(folder)["log_history"], folder / LOSS_FILE)
    write_text(folder / "README.md", str(render_card(read_facts(folder))))
    return folder / "README.md"


def write_eval_results(folder: Path, evaluation: Mapping[str, Any], dataset: str) -> list[Path]:
    """One `.eval_results/<benchmark>.yaml` for each benchmark: its headline on the Hub's data set `dataset`."""
    written = []
    for name, result in evaluation["benchmarks"].items():
        metric = result["headline"]
        entry = EvalResultEntry(
            dataset_id=dataset,
            task_id=f"{evaluation['split']}/{name}",
            value=round(result[metric], 4),
            notes=f"{metric}; {result['protocol']}",
        )
        written.append(folder / EVAL_FOLDER / f"{name}.yaml")
        write_text(written[-1], yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))
    return written


def add_evaluation(folder: Path, metrics: Path, dataset: str | None) -> None:
    """Put the result of `agevlm eval` into the folder, in place of an earlier one.

    Raises:
        ValueError: no such result, or that of other weights.
    """
    text = read_text(metrics)
    try:
        evaluation = json.loads(text)
        _evaluation({name: evaluation[name] for name in ("split", "benchmarks", "grounding")})
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{metrics} is no result of `agevlm eval` (its metrics.json).") from error
    if evaluation_fits(folder, evaluation) is False:
        raise ValueError(
            f"{metrics} was measured on other weights than those in {folder} (their fingerprints are "
            f"{evaluation['weights']} and {weights_fingerprint(folder)}). Evaluate these, or name their result."
        )
    shutil.rmtree(folder / EVAL_FOLDER, ignore_errors=True)
    write_text(folder / EVALUATION_FILE, text)
    if dataset is not None:
        write_eval_results(folder, evaluation, dataset)


def run_verb(options: argparse.Namespace) -> None:
    """`agevlm card`, with the arguments of `cli.py`.

    Raises:
        ValueError: no such folder, or files that are no results or pictures.
    """
    if not options.folder.is_dir():
        raise ValueError(f"There is no folder {options.folder}.")
    if options.dataset and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.dataset):
        raise ValueError(
            f"`--dataset` must be the id of a data set on the Hub, NAME/DATASET, got {options.dataset!r}."
        )
    if is_dataset(options.folder):
        print(f"written: {write_dataset_card(options.folder)}")
        return
    if not (options.folder / "config.json").is_file():
        raise ValueError(f"{options.folder} is neither a checkpoint (config.json) nor a data set (*.parquet).")
    if options.evaluation is not None:
        add_evaluation(options.folder, options.evaluation, options.dataset)
    if options.attention is not None:
        picture = options.attention.read_bytes()
        if not picture.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"{options.attention} is no PNG picture.")
        write_bytes(options.folder / ATTENTION_FILE, picture)
    print(f"written: {write_card(options.folder)}")
