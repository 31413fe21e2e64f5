"""`agevlm convert`: a published baseline as a checkpoint of transformers (section 4).

OUT loads with `AutoProcessor` and `AutoModelForImageTextToText` (MobileVLM with `trust_remote_code=True`: its
projector travels with it), and speaks the originals' prompt token for token. Configuration, names and shapes are
checked before anything is written; then tensors are copied one shard at a time. OUT appears complete or not at all;
its `agevlm_conversion.json` says what it was made of.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from agevlm.conversion import convllava, mobilevlm
from agevlm.conversion.layout import Target, check_names, generation_config
from agevlm.conversion.sources import INDEX_FILE, PickledWeightsError, Source, locate
from agevlm.progress import Bar, written
from agevlm.store import check_free, new_folder, write_json


RECORD_FILE = "agevlm_conversion.json"
SHARD_SIZE = "2GB"


def write_weights(target: Target, folder: Path, shard_size: str = SHARD_SIZE) -> None:
    """The model's tensors as safetensors, at most one shard of them in memory.

    Raises:
        ValueError: see `check_names`.
    """
    shapes = check_names(target)
    sizes = {name: torch.empty(shape.shape, dtype=target.dtype(name), device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=shard_size)
    with Bar(total=split.metadata["total_size"], unit="B", unit_scale=True, desc="converting") as bar:
        for file, names in split.filename_to_tensors.items():
            shard = {name: target.tensor(name).contiguous() for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
            bar.update(sum(tensor.nbytes for tensor in shard.values()))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_checkpoint(target: Target, source: Source, system: str, folder: Path) -> None:
    """Weights, configuration, processor, code where there is any, and the record.

    Raises:
        ValueError: see `check_names`.
    """
    write_weights(target, folder)
    config = target.config
    config.architectures = [target.model_class.__name__]
    config.dtype = target.dtype("lm_head.weight")
    config.save_pretrained(folder)
    generation_config(config.text_config, target.processor, target.num_words).save_pretrained(folder)
    target.processor.save_pretrained(folder)
    record = {
        "system": system,
        "source": source.name,
        "revision": source.revision,
        "files": list(source.weights),
        "read_with": "torch.load(weights_only=True)" if source.weights[0].endswith(".bin") else "safetensors",
        **target.notes,
        "tensors": len(target.origins),
        "left_out": len(target.left_out),
        "made": sorted(target.made),
        "versions": {package: version(package) for package in ("agevlm", "torch", "transformers")},
    }
    write_json(folder / RECORD_FILE, record)


def run_verb(args: argparse.Namespace) -> None:
    """`agevlm convert`, with the arguments of `cli.py`.

    Raises:
        ValueError: a folder that is in use, or a source that cannot be had or is something else.
    """
    check_free(args.output)
    try:
        source = locate(args.source, args.revision, bins=args.read_bin)
    except PickledWeightsError as error:
        raise ValueError(
            f"{error} Or pass `--read-bin`: torch.load(weights_only=True) builds its tensors and refuses the rest."
        ) from error
    if args.system == "convllava":
        target = convllava.prepare(source, args.vision_tower, args.vision_from_checkpoint, args.read_bin)
    else:
        target = mobilevlm.prepare(source)
    with new_folder(args.output) as folder:
        write_checkpoint(target, source, args.system, folder)
    tower = target.notes["vision_tower"]
    print(f"vision tower: {tower['source']}" + (f" at {tower['revision'][:12]}" if tower["revision"] else ""))
    if "largest_difference_from_checkpoint" in tower:
        difference = tower["largest_difference_from_checkpoint"]
        shown = "is of another shape" if difference is None else f"differs by at most {difference:.3g}"
        print(f"the tower inside the checkpoint, not used, {shown}")
    print(
        f"{args.output}: {len(target.origins)} tensors, {len(target.left_out)} left out (buffers that transformers "
        f"computes). Load it with AutoModelForImageTextToText"
        + ("" if args.system == "convllava" else " and trust_remote_code=True")
        + "."
    )
    written(args.output, "agevlm eval {}" + ("" if args.system == "convllava" else " --trust-remote-code"))
