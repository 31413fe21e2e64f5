"""The record of a run: recipe, parent, data, code, libraries and metrics in `agevlm_stage.json`.

The *identity* of a run is everything that decides its result. It is hashed, stored when the run starts, and compared
when the same folder is used again: the same identity means resume or done; another one is refused by naming the
changed fields.
"""

import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import cached_file

from agevlm.data.rows import which_guided
from agevlm.store import as_json, check_same, digest, read_table, write_json
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.sampling import guided_flags
from agevlm.training.stages.recipe import StageRecipe
from agevlm.training.streaming import reader_of


LINEAGE_FILE = "agevlm_stage.json"
INIT_FILE, PUSH_FILE = "agevlm_init.json", "agevlm_push.json"
WHOLE_TEXTS = 20_000

# The training arguments that decide the result. The batch counts as one number, however it is divided among devices
# and accumulated batches; logging, saving and worker settings are free to change.
RESULT_FIELDS = (
    "learning_rate",
    "projector_learning_rate",
    "cross_attention_learning_rate",
    "vision_learning_rate",
    "language_model_learning_rate",
    "guidance_weight",
    "guidance_normalization",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "max_length",
    "train_sampling_strategy",
    "spread_guided_rows",
    "dataloader_drop_last",
)

# Names under which identities keep an argument, so that folders of earlier runs can be resumed.
STORED_NAMES = {"guidance_normalization": "guidance_normalisation"}

# These decide it as well. No recipe touches them, so they are named only where a run does.
SWITCHES = (
    "guidance_loss",
    "loss_type",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "optim_args",
    "optim_target_modules",
    "average_tokens_across_devices",
)


def training_identity(args: AgeVlmSFTConfig) -> dict[str, Any]:
    """The part of the training arguments that decides the result, JSON-ready."""
    values = args.to_dict()
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    usual = {item.name: item.default for item in dataclasses.fields(args)}
    switched = {name: values[name] for name in SWITCHES if values[name] != usual[name]}
    return {"global_batch_size": batch, **{name: values[name] for name in RESULT_FIELDS}, **switched}


def stored_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments under the names that identities have for them."""
    return {STORED_NAMES.get(name, name): value for name, value in arguments.items()}


def data_fingerprint(rows: datasets.Dataset) -> dict[str, Any]:
    """`rows`, `guided_rows` and a `fingerprint` of the content.

    The fingerprint covers all ids in their order, which of them are guided, and the whole texts and masks of up to
    20,000 evenly spaced rows; pictures are not read, nothing is decoded. Of rows in shards it covers the footers, the
    order and which are guided.
    """
    guided_rows, reader = 0, reader_of(rows)
    if reader is not None:
        fingerprint = reader.fingerprint(rows)
        return {"rows": len(rows), "guided_rows": int(guided_flags(rows).sum()), "fingerprint": fingerprint}

    def pieces() -> Iterator[str | bytes]:
        nonlocal guided_rows
        for batch in rows.with_format("arrow").select_columns(["id", "guidance"]).iter(batch_size=10_000):
            guided = [guidance is not None for guidance in _queries(batch)]
            guided_rows += sum(guided)
            yield json.dumps([batch["id"].to_pylist(), guided])
        stride = max(1, -(-len(rows) // WHOLE_TEXTS))
        texts = rows.select(range(0, len(rows), stride)).with_format("arrow").select_columns(["messages", "guidance"])
        for batch in texts.iter(batch_size=1_000):
            yield json.dumps([batch["messages"].to_pylist(), _queries(batch)])
            yield from _masks(batch)

    fingerprint = digest(pieces())
    return {"rows": len(rows), "guided_rows": guided_rows, "fingerprint": fingerprint}


def masks_of(rows: datasets.Dataset) -> str | None:
    """What masks of rows are of, `phrases` or whole `texts`; None without masks."""
    guided = guided_flags(rows)
    if not guided.any():
        return None
    return "phrases" if isinstance(rows[int(guided.argmax())]["guidance"], list) else "texts"


def _queries(batch: Any) -> list[str | list[list] | None]:
    """The guidance query of each row of an arrow table, None where a row is not guided; by phrase, with all that
    says which words are meant."""
    guidance = batch["guidance"].combine_chunks()
    if str(guidance.type) == "null":
        return [None] * len(guidance)
    guided = which_guided(guidance).tolist()
    if pa.types.is_list(guidance.type):
        words = (guidance.flatten().field(name).to_pylist() for name in ("query", "message_index", "occurrence"))
        phrases = map(list, zip(*words, strict=True))
        lengths = pc.list_value_length(guidance).to_pylist()
        return [list(islice(phrases, n)) if valid else None for n, valid in zip(lengths, guided, strict=True)]
    queries = guidance.field("query").to_pylist()
    return [query if valid else None for query, valid in zip(queries, guided, strict=True)]


def _masks(batch: Any) -> Iterator[bytes]:
    """A digest of each mask as it is stored, or its file's name where it lies elsewhere: folders may be moved."""
    guidance = batch["guidance"].combine_chunks()
    if str(guidance.type) == "null":
        return
    phrases = guidance.flatten() if pa.types.is_list(guidance.type) else guidance
    for mask in phrases.field("mask").to_pylist():
        if mask is not None:
            stored = mask["bytes"] if mask["bytes"] is not None else Path(mask["path"]).name.encode()
            yield bytes.fromhex(digest(stored))


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of all weights and their names: equal for equal models, wherever they were loaded from.

    It is that of a model in memory; `hub_cards.weights_fingerprint` is that of stored files. Under DeepSpeed ZeRO-3
    all processes must call it: each holds a part of the weights.
    """

    def pieces() -> Iterator[Any]:
        for name, tensor in sorted(model.state_dict().items()):
            yield name
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()

    with _gathered(model):
        return digest(pieces())


def _gathered(model: PreTrainedModel) -> AbstractContextManager:
    """While inside, parameters that `from_pretrained` has divided among processes (ZeRO-3) are whole."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")])


def identity_hash(identity: Mapping[str, Any]) -> str:
    """A short hash of an identity."""
    return digest(json.dumps(identity, sort_keys=True), size=8)


def read_lineage(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The lineage of a folder, None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    return read_table(Path(folder) / LINEAGE_FILE) or None


def parent_lineage(init_from: str | os.PathLike | None, revision: str = "main") -> dict[str, Any]:
    """The model that a run starts from.

    Returns:
        `parent`: `init_from` (the name of a folder, not its place: paths say more about a machine than about a model),
        and where it is on the Hub `repo` and `revision`; `base_models`: Hub ids of the published parts.
    """
    if init_from is None:
        return {"parent": {"init_from": None, "revision": None, "repo": None}, "base_models": []}
    folder = Path(init_from)
    if folder.is_dir():
        pushed = read_table(folder / PUSH_FILE)
        link = {"revision": None, "repo": None}
        if pushed.get("status") == "pushed" and _is_link(pushed.get("repo"), pushed.get("commit")):
            link = {"revision": pushed["commit"], "repo": pushed["repo"]}
        parent = {"init_from": folder.resolve().name, **link}
        files = {name: folder / name for name in (LINEAGE_FILE, INIT_FILE)}
    else:
        names = ("config.json", LINEAGE_FILE, INIT_FILE)
        found = {
            name: cached_file(init_from, name, revision=revision, _raise_exceptions_for_missing_entries=False)
            for name in names
        }
        files = {name: Path(path) for name, path in found.items() if path is not None}
        # The cache keeps what belongs to a commit in a folder of its name.
        commit = files.pop("config.json").parent.name
        parent = {"init_from": str(init_from), "revision": commit, "repo": str(init_from)}
    known = {name: read_table(path) for name, path in files.items()}
    made = [known.get(INIT_FILE, {}).get(part, {}) for part in ("language_model", "vision_tower")]
    published = [part.get("source") for part in made if isinstance(part, dict) and part.get("revision")]
    stated = known.get(LINEAGE_FILE, {}).get("base_models") or published
    return {"parent": parent, "base_models": [name for name in stated if _is_link(name)]}


def _is_link(repo: Any, commit: Any = None) -> bool:
    """Whether a loaded file states a repository's id (and commit), and not some text that a card would show."""
    named = isinstance(repo, str) and re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo, re.ASCII) is not None
    return named and (commit is None or re.fullmatch(r"[0-9a-f]{40}", str(commit)) is not None)


def describe_run(
    recipe: StageRecipe,
    args: AgeVlmSFTConfig,
    rows: datasets.Dataset,
    model: PreTrainedModel,
    init_from: str | Path | None,
    revision: str | None,
    adapters: dict[str, Any],
) -> dict[str, Any]:
    """The lineage of a run when it starts: everything that is known of it."""
    data = data_fingerprint(rows)
    identity = as_json(
        {
            "stage": recipe.stage,
            "variant": recipe.variant,
            "trains": recipe.trains,
            "frozen": recipe.frozen,
            "training": stored_names(training_identity(args)),
            "data": data,
            "parent_weights": model_fingerprint(model),
            **adapters,
        }
    )
    return {
        "name": recipe.name,
        "stage": recipe.stage,
        "variant": recipe.variant,
        "size": recipe.size,
        "status": "unfinished",
        "repo": args.hub_model_id,
        **parent_lineage(init_from, revision or "main"),
        "recipe_hash": identity_hash(identity),
        "recipe": identity,
        "data": {"part": recipe.data, "mask_fraction": recipe.mask_fraction, **data, "masks_of": masks_of(rows)},
        "git_commit": git_commit(),
        "versions": library_versions(),
        "metrics": {},
    }


def earlier_lineage(output_dir: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The lineage of an earlier run of the same recipe in `output_dir`, None if nothing is there. Raises ValueError if
    the folder belongs to another recipe, or to something else altogether."""
    lineage = read_lineage(output_dir)
    if lineage is None:
        foreign = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
        if "config.json" in foreign or any(name.startswith("checkpoint-") for name in foreign):
            raise ValueError(f"{output_dir} holds a model of another origin. Choose an empty folder as output.")
        return None
    check_same(output_dir, lineage["recipe"], identity, "recipe's run")
    return lineage


def write_lineage(folder: str | os.PathLike, lineage: Mapping[str, Any]) -> None:
    """Write the lineage of a folder, replacing an older one in one step."""
    write_json(Path(folder) / LINEAGE_FILE, lineage)


def library_versions() -> dict[str, str]:
    """The versions of the libraries that a result depends on."""
    names = ("agevlm", "torch", "transformers", "trl", "accelerate", "datasets")
    return {name: import_module(name).__version__ for name in names}


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed package or without git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
