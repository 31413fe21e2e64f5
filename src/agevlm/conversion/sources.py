"""Published weights, from a folder or from the Hub, as safetensors. Never shipped.

A part is found first, with its configuration but without its weights: that is enough to see whether it fits, whether
its license has been accepted, and how large it is. Its weights are fetched afterwards. Whatever the Hub refuses
becomes one sentence that says what to do.

Pickles are refused. The one way around it is `bins=True`, which `agevlm convert --read-bin` asks for: the published
baselines have nothing else. Such files are read with `torch.load(weights_only=True)`, which builds tensors and nothing
else, and refuses a file that asks for more. One tensor at a time is read, so memory does not grow with the checkpoint.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from agevlm.conversion.convert_vision import some
from agevlm.store import open_weights, read_table


CONFIGURATION = ["*.json", "*.jinja", "tokenizer.model"]  # with the tokenizer
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
BIN_FILE, BIN_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"


class PickledWeightsError(ValueError):
    """There are weights, but only as pickles."""


@dataclass(frozen=True)
class Source:
    """Where a part comes from.

    Attributes:
        name: what the user gave: a folder, a safetensors file or a repository.
        folder: the folder itself, or the repository's local copy. At first it holds the configuration only.
        revision: the repository's commit, None for a local part.
        weights: names of the safetensors files; of the pickled ones where these were asked for and are all there is.
    """

    name: str
    folder: Path
    revision: str | None
    weights: tuple[str, ...]

    def configuration(self, name: str = "config.json") -> dict[str, Any]:
        """A JSON file of the folder, empty where there is none."""
        return read_table(self.folder / name)


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Errors of a repository as one sentence that names the fix.

    Raises:
        ValueError: for every error of the Hub.
    """
    page = f"{constants.ENDPOINT}/{name}"
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{name} is neither a folder, nor a safetensors file, nor the id of a repository.") from error
    except GatedRepoError as error:
        raise ValueError(
            f"{name} is gated and you have no access: accept its license at {page} and log in with `hf auth login`, "
            "or pass a folder that has it."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name} is neither here nor on the Hub: check the spelling; if the repository is private, log in with "
            "`hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, DryRunError) as error:
        raise ValueError(
            f"{name} is not in the local cache and {page} cannot be reached: go online, or pass a folder that has it."
        ) from error
    except HfHubHTTPError as error:
        raise ValueError(
            f"{page} answers with status {error.response.status_code}: try again later, or pass a folder that has it."
        ) from error


def choose_weights(files: Sequence[str], name: str, bins: bool = False) -> tuple[str, ...]:
    """The safetensors files that make up one model, or with `bins` its `pytorch_model.bin` if there are none.

    Raises:
        PickledWeightsError: only pickles, without a request to read them.
        ValueError: nothing, or several files that do not belong together.
    """
    found = sorted(file for file in files if file.endswith(".safetensors") and "/" not in file)
    if SINGLE_FILE in found:
        return (SINGLE_FILE,)
    if len(found) > 1:
        raise ValueError(f"{name} holds several weights: {', '.join(found)}. Pass one of the files.")
    if not found and bins and BIN_FILE in files:
        return (BIN_FILE,)
    if not found:
        pickles = sorted(file for file in files if file.endswith(PICKLES))
        if pickles and bins:
            raise ValueError(
                f"{name} holds {', '.join(pickles[:3])}, but neither {BIN_FILE} nor {BIN_INDEX_FILE}, which names its "
                "parts. Is a file missing?"
            )
        if pickles:
            raise PickledWeightsError(
                f"{name} holds its weights only as {', '.join(pickles[:3])}, and a pickle can run code when it is "
                "read. Load it where you trust it (open_clip, timm or transformers), save its `state_dict()` with "
                "`safetensors.torch.save_file` and pass that."
            )
        raise ValueError(f"{name} holds no weights: there is no safetensors file.")
    return tuple(found)


def _shards(index: Path) -> tuple[str, ...]:
    """The files that an index names, beside it and of its kind. Raises ValueError if it leads out of the folder, or to
    pickles that were not requested."""
    weight_map = read_table(index).get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: `weight_map` is no table of tensors and files. Download it again.")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for file in set(weight_map.values()):
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != suffix:
            raise ValueError(f"{index} names {file!r}: shards are {suffix} files in the same folder.")
    return tuple(sorted(set(weight_map.values())))


def locate(name: str, revision: str | None = None, bins: bool = False) -> Source:
    """Find a part and fetch its configuration, not yet its weights.

    Args:
        name: a folder, a safetensors file, or the id of a repository.
        revision: branch, tag or commit of that repository.
        bins: take pickled weights where there are no others.

    Raises:
        ValueError: nothing there, no access, or no safetensors; see `hub_errors` and `choose_weights`.
    """
    path = Path(name)
    if path.is_file():
        return Source(name, path.parent, None, choose_weights([path.name], name))
    if path.is_dir():
        folder, revision = path, None
    else:
        with hub_errors(name):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=CONFIGURATION))
        revision = folder.name
    for index in (INDEX_FILE, BIN_INDEX_FILE) if bins else (INDEX_FILE,):
        shards = _shards(folder / index)
        if shards:
            return Source(name, folder, revision, shards)
    files = [file.name for file in folder.glob("*")]
    if revision is not None and not any(file.endswith(".safetensors") for file in files):
        with hub_errors(name):
            files = [file.filename for file in snapshot_download(name, revision=revision, dry_run=True)]
    return Source(name, folder, revision, choose_weights(files, name, bins))


def fetch(source: Source) -> list[Path]:
    """Paths of a part's weights, downloaded if need be.

    Raises:
        ValueError: a file of them is missing, or cannot be downloaded.
    """
    folder = source.folder
    if source.revision is not None:
        with hub_errors(source.name):
            folder = Path(
                snapshot_download(
                    source.name, revision=source.revision, allow_patterns=[*CONFIGURATION, *source.weights]
                )
            )
    paths = [folder / file for file in source.weights]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{source.name} holds no {', '.join(missing[:3])}, which its index names.")
    return paths


class Weights(Mapping[str, torch.Tensor]):
    """The tensors of a source by name. Each is read when it is asked for; files are mapped, not loaded.

    Raises:
        ValueError: see `fetch`; a file that is something else, not complete, or holds numbers of another kind.
    """

    def __init__(self, source: Source):
        self.name = source.name
        self._files: dict[str, Path] = {}
        self._bins: dict[Path, dict[str, torch.Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in fetch(source):
            if file.suffix == ".bin":
                self._bins[file] = _read_bin(file)
                facts = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._bins[file].items()}
            else:
                facts = _read_header(file)
            for name, (shape, dtype) in facts.items():
                self._files[name], self.shapes[name], self.dtypes[name] = file, shape, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self._files[name]
        if file in self._bins:
            return self._bins[file][name]
        with open_weights(file) as tensors:
            return tensors.get_tensor(name)

    def matching(self, pattern: str) -> tuple[str, ...]:
        """The names that a regular expression describes from end to end."""
        return tuple(name for name in self._files if re.fullmatch(pattern, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def weight_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a part's weights; of remote files only the headers are read."""
    if source.revision is None or all((source.folder / file).is_file() for file in source.weights):
        return Weights(source).shapes
    shapes: dict[str, tuple[int, ...]] = {}
    with hub_errors(source.name):
        for file in source.weights:
            header = HfApi().parse_safetensors_file_metadata(source.name, file, revision=source.revision)
            shapes.update({name: tuple(tensor.shape) for name, tensor in header.tensors.items()})
    return shapes


def _read_header(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    with open_weights(file) as tensors:
        stored = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
        kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in stored.items()}
    strange = [f"{name} ({kind})" for name, (_, kind) in kinds.items() if kind not in DTYPES]
    if strange:
        raise ValueError(
            f"{file} holds {some(strange)}. Converted are weights of {', '.join(DTYPES)}: take the checkpoint before "
            "it was quantized."
        )
    return {name: (shape, DTYPES[kind]) for name, (shape, kind) in kinds.items()}


def _read_bin(file: Path) -> dict[str, torch.Tensor]:
    again = "Download it again, or convert it to safetensors where you trust it."
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} asks for more than tensors, so it is not read: {reason}") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0]}). {again}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{file} is no table of tensors. {again}")
    return content
