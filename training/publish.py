"""Finished checkpoints on the Hub: complete in one commit, or not there at all.

The flags are transformers' own, the implementation is not. Trainer's push asks the Hub before training (which then
ends the run), writes into the finished folder file by file, and pickles the training arguments, token included, next
to the weights that it uploads. And `upload_folder` (huggingface_hub 2.4 with hf_xet) divides a commit of more than 20
files that fails, so a part of a checkpoint could be seen.

Here the files go up first and become visible by one commit. Files that an interrupted push has sent are not sent again
(LFS and Xet find them by their hash). Each stage gets a tag (`stage1-align`), which moves if the stage is trained
again. `main` shows the latest push.

Push errors are logged, not raised: training is already finished. `agevlm_push.json` in the folder, which is not
pushed, records them; the same command, the end of the next stage, and `agevlm push` finish the push.
"""

import argparse
import errno
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, httpx
from rich.console import Console

from agevlm.hub_cards.facts import ATTENTION_FILE, EVALUATION_FILE, LOSS_FILE, STATE_FILE, evaluation_fits
from agevlm.hub_cards.render import write_card
from agevlm.store import read_json, read_table, write_json
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.lineage import INIT_FILE, LINEAGE_FILE, PUSH_FILE, read_lineage, write_lineage


INDEX_FILE = "model.safetensors.index.json"
CODE = ("compatibility", "configuration", "cross_attention", "guidance", "image_processing", "modeling", "processing")
# What we and transformers write into a checkpoint. Whatever else lies in the folder stays here.
PUBLISHED = (
    *("model.safetensors", "model-?????-of-?????.safetensors", INDEX_FILE, "config.json", "generation_config.json"),
    *("adapter_model.safetensors", "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "processor_config.json"),
    *("preprocessor_config.json", *(f"{name}_agevlm.py" for name in CODE), "modeling_mobilevlm.py", "README.md"),
    *(LINEAGE_FILE, INIT_FILE, STATE_FILE, "agevlm_conversion.json", EVALUATION_FILE, ".eval_results/*.yaml"),
    *(LOSS_FILE, ATTENTION_FILE),
)
# Files that would be wrong beside another checkpoint's.
RESULTS = (EVALUATION_FILE, ".eval_results/*.yaml")
REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.png", *RESULTS)
_TOKEN = re.compile(r"\bhf_\w+|(?<=Bearer )[^\s'\"]+")
WAITS = (5.0, 30.0)  # seconds before the second and the third try
SILENCE = 300.0  # seconds without a byte; huggingface_hub itself waits without end


class PushError(ValueError):
    """A push that failed, in one sentence that says what to do."""


def push(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    *,
    token: str | None = None,
    private: bool = True,
    branch: str | None = None,
    message: str | None = None,
) -> dict[str, Any]:
    """Publish a finished checkpoint with its card, and tag it with its stage.

    Args:
        repo_id: made if it is not there; by default the one of the last push.
        token: with the right to write; by default the one of `hf auth login`.
        private: of a repository that is made.
        branch: where to commit, made if need be; by default `main`.
        message: of the commit.

    Returns:
        What `agevlm_push.json` holds: `repo`, `private`, `branch`, `tag`, `status` (`pending`, `failed` or `pushed`),
        `commit`, `tries`, `error`.

    Raises:
        PushError: the Hub does not take it. The folder is as before, and the record says why.
        ValueError: no finished checkpoint, or no repository to push to.
    """
    folder = Path(folder)
    lineage = read_lineage(folder) or {}
    _check_finished(folder, lineage)
    earlier = read_record(folder)
    repo_id = repo_id or earlier.get("repo")
    if not repo_id:
        raise ValueError(f"{folder} was never pushed: name the repository, `agevlm push {folder} NAME/REPOSITORY`.")
    record = {
        "repo": repo_id,
        "private": private,
        "branch": branch,
        "tag": lineage.get("name", "").replace("_", "-") or None,  # `stage1-align`
        "status": "pending",
        "commit": None,
        "tries": earlier.get("tries", 0),
        "error": None,
    }
    api = HfApi(token=token, library_name="agevlm")
    for wait in (*WAITS, None):
        record["tries"] += 1
        try:
            _write_record(folder, record)
            commit = _publish(api, folder, lineage, record, message)
            record |= {"status": "pushed", "commit": commit}
            _write_record(folder, record)
            return record
        except Exception as error:  # of the Hub, the network, the disk, Xet's own: none may end a finished run
            if wait is None or not is_temporary(error):
                reason = explain(error, record["repo"])
                with suppress(OSError):  # the disk may be what has failed
                    _write_record(folder, {**record, "status": "failed", "error": reason})
                raise PushError(
                    f"{folder} is complete, but not on the Hub: {reason}. Push it later with "
                    f"`agevlm push {folder} {record['repo']}`."
                ) from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _publish(api: HfApi, folder: Path, lineage: dict[str, Any], record: dict[str, Any], message: str | None) -> str:
    """One try, which completes the name of the repository; returns the commit."""
    get_session().timeout = SILENCE
    repo = record["repo"] = api.create_repo(record["repo"], private=record["private"], exist_ok=True).repo_id
    if lineage and lineage["repo"] != repo:
        lineage["repo"] = repo
        write_lineage(folder, lineage)
    write_card(folder)
    tag, refs = record["tag"], api.list_repo_refs(repo)
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    branch = record["branch"] or "main"
    if branch not in {ref.name for ref in refs.branches} | {"main"}:
        api.create_branch(repo, branch=branch)
    files = published_files(folder)
    gone = [
        path
        for path in api.list_repo_files(repo, revision=branch)
        if path not in files and any(fnmatch(path, pattern) for pattern in REPLACED)
    ]
    commit = api.create_commit(
        repo,
        [
            *(CommitOperationAdd(name, path) for name, path in files.items()),
            *(CommitOperationDelete(path) for path in gone),
        ],
        commit_message=message or f"{lineage.get('name', 'checkpoint')} (recipe {lineage.get('recipe_hash', 'none')})",
        revision=branch,
    )
    if tag is not None and tags.get(tag) != commit.oid:
        if tag in tags:
            api.delete_tag(repo, tag=tag)
        api.create_tag(repo, tag=tag, revision=commit.oid)
    return commit.oid


def published_files(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint that go to the Hub, by their names there. Results of other weights stay here."""
    found = sorted(path for pattern in PUBLISHED for path in folder.glob(pattern) if path.is_file())
    kept = {path.relative_to(folder).as_posix(): path for path in found}
    if evaluation_fits(folder) is False:
        kept = {name: path for name, path in kept.items() if not any(fnmatch(name, result) for result in RESULTS)}
    return kept


def _check_finished(folder: Path, lineage: Mapping[str, Any]) -> None:
    """Raises ValueError: no checkpoint, an unfinished one, or one without all its weights."""
    if lineage.get("status", "finished") != "finished":
        raise ValueError(f"{folder} holds an unfinished run ({lineage['name']}). Run it again to finish it.")
    shards = {"model.safetensors"}
    if (folder / INDEX_FILE).is_file():
        shards = set(read_json(folder / INDEX_FILE)["weight_map"].values())
    elif (folder / "adapter_config.json").is_file():
        shards = {"adapter_model.safetensors"}
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing or not ((folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()):
        raise ValueError(f"{folder} is no checkpoint: there is no {missing[0] if missing else 'config.json'}.")


# ---- The record ----


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """The record of the last push of a folder; empty if there was none."""
    return read_table(Path(folder) / PUSH_FILE)


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_json(folder / PUSH_FILE, record)


# ---- Stages ----


def publish_stage(folder: Path, args: AgeVlmSFTConfig, init_from: str | Path | None, console: Console) -> None:
    """Push a finished stage as its flags say; first the one that it started from, if its push to the same repository
    has failed. A folder of other origin cannot name another repository.

    Errors are recorded and printed, not raised.
    """
    if not args.push_to_hub or args.process_index != 0:
        return
    parent = {} if init_from is None else read_record(init_from)
    wanted, settings = repository_name(args), {"private": args.hub_private_repo is not False}
    if init_from is not None and parent.get("status") in ("pending", "failed") and _is_in(parent, wanted):
        branch = parent.get("branch")
        parent = _push_and_tell(
            Path(init_from), parent["repo"], console, token=args.hub_token, branch=branch, **settings
        )
    lineage = read_lineage(folder)
    if lineage is not None and lineage["parent"]["repo"] is None and parent.get("status") == "pushed":
        link = {"repo": parent["repo"], "revision": parent["commit"]}
        write_lineage(folder, {**lineage, "parent": {**lineage["parent"], **link}})
    record = read_record(folder)
    if record.get("status") == "pushed" and _is_in(record, wanted):
        return
    _push_and_tell(folder, wanted, console, token=args.hub_token, branch=args.hub_revision, **settings)


def _is_in(record: Mapping[str, Any], wanted: str) -> bool:
    """Whether a record is of the repository `wanted`, which may lack its owner's name."""
    return f"/{record.get('repo')}".endswith(f"/{wanted}")


def _push_and_tell(folder: Path, repo_id: str, console: Console, **settings: Any) -> dict[str, Any]:
    try:
        record = push(folder, repo_id, **settings)
    except PushError as error:
        console.print(str(error), style="yellow", soft_wrap=True)
        return read_record(folder)
    console.print(f"{folder}: on the Hub as {_place(record)}.", soft_wrap=True)
    return record


def _place(record: Mapping[str, Any]) -> str:
    tag = "" if record["tag"] is None else f", tag {record['tag']}"
    return f"{constants.ENDPOINT}/{record['repo']}{tag}, commit {record['commit'][:12]}"


def repository_name(args: AgeVlmSFTConfig) -> str:
    """`--hub_model_id`, or as Trainer has it the name of the output folder."""
    return args.hub_model_id or Path(str(args.output_dir)).absolute().name


def warn_early(args: AgeVlmSFTConfig, console: Console) -> None:
    """Say before training, not days later, if the Hub would not take a push."""
    if not args.push_to_hub or args.process_index != 0:
        return
    get_session().timeout = 30.0
    try:
        HfApi(token=args.hub_token, library_name="agevlm").whoami()
    except Exception as error:  # as in `push`
        reason = explain(error, repository_name(args))
        console.print(
            f"The push would fail: {reason}. Training continues; the push is tried after it.",
            style="yellow",
            soft_wrap=True,
        )


# ---- Errors ----


def _cause(error: BaseException) -> BaseException:
    """huggingface_hub wraps what goes wrong in one of several uploads."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def is_temporary(error: BaseException) -> bool:
    """Whether trying again soon may help: the network, or a Hub in trouble."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429, 500, 502, 503, 504)
    return isinstance(error, httpx.TransportError)


def explain(error: BaseException, repo_id: str) -> str:
    """What went wrong and what to do about it, without a token or a stack of addresses in it."""
    error = _cause(error)
    hub = constants.ENDPOINT
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reasons = {
            401: f"{hub} does not accept the token (status 401); log in with `hf auth login`",
            402: f"{hub} asks for a payment or more storage (status 402)",
            403: f"the token may not write to {repo_id} (status 403); take one that may, or another repository",
            404: f"{hub} has no {repo_id} that the token may see (status 404)",
            413: f"a file is too large for {hub} (status 413)",
            507: f"{hub} has no space left for {repo_id} (status 507)",
        }
        return reasons.get(status, f"{hub} answered with status {status}")
    for kind, reason in (
        (LocalTokenNotFoundError, "there is no token; log in with `hf auth login` or set HF_TOKEN"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
        (HFValidationError, f"{repo_id!r} is no name of a repository; take NAME/REPOSITORY"),
        (httpx.ConnectError, f"{hub} cannot be reached"),
        (httpx.TimeoutException, f"{hub} did not answer in time"),
        (httpx.TransportError, f"the connection to {hub} broke"),
    ):
        if isinstance(error, kind):
            return reason
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "there is no space left on this machine"
    return _TOKEN.sub("(token)", f"{type(error).__name__}: {' '.join(str(error).split())}")


def run_verb(options: argparse.Namespace) -> None:
    """`agevlm push`, with the arguments of `cli.py`.

    Raises:
        ValueError: nothing to push, or the Hub does not take it.
    """
    if not options.folder.is_dir():
        raise ValueError(f"There is no folder {options.folder}.")
    record = push(
        options.folder, options.repo_id or options.hub_model_id, private=not options.public, branch=options.branch
    )
    print(f"{options.folder}: on the Hub as {_place(record)}")
