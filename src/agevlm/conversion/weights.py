"""Published weights. Reads one tensor at a time, so memory does not grow with the checkpoint.

Safetensors, or `pytorch_model.bin` where the caller has asked for it (`conversion/sources.py`): a pickle, read
with `torch.load(weights_only=True)`, which builds tensors and nothing else, and refuses a file that asks for more.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch

from agevlm.conversion.convert_vision import read_shapes, some
from agevlm.conversion.sources import Source, fetch
from agevlm.store import open_weights


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


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
                shapes = {name: tuple(tensor.shape) for name, tensor in self._bins[file].items()}
                self.dtypes |= {name: tensor.dtype for name, tensor in self._bins[file].items()}
            else:
                shapes = read_shapes([file])
                self.dtypes |= _read_dtypes(file, list(shapes))
            self.shapes |= shapes
            self._files |= dict.fromkeys(shapes, file)

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


def _read_dtypes(file: Path, names: list[str]) -> dict[str, torch.dtype]:
    with open_weights(file) as tensors:
        stored = {name: tensors.get_slice(name).get_dtype() for name in names}
    strange = [f"{name} ({kind})" for name, kind in stored.items() if kind not in DTYPES]
    if strange:
        raise ValueError(
            f"{file} holds {some(strange)}. Converted are weights of {', '.join(DTYPES)}: take the checkpoint before "
            "it was quantized."
        )
    return {name: DTYPES[kind] for name, kind in stored.items()}


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
