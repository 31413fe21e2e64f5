"""Scale: however a run is divided over processes and sharded, it is the run of one process. Ready configurations."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scale_worker
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from scale_worker import DIVISIONS, run_scaled_stage, save_start
from training_worker import KINDS, PHRASES, Stop, StopAt, step_gradients
from transformers import AutoModel
from workers import TORCHRUN, run_worker, same_weights

import agevlm.training
from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from agevlm.training.lineage import read_lineage
from builders import tiny_model


CONFIGURATIONS = Path(agevlm.training.__file__).parent / "accelerate"
SAME = ("step", "loss", "grad_norm", "learning_rate", "guided_share", "guidance_loss", "in_mask_mass", "num_tokens")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


def launch_arguments(kind: str, *flags: str):
    """What `accelerate launch --config_file` makes of one of our files."""
    command = ["--config_file", str(CONFIGURATIONS / f"{kind}.yaml"), *flags, "-m", "agevlm.training.train"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return arguments


def launch_environment(kind: str, *flags: str) -> dict[str, str]:
    arguments = launch_arguments(kind, "--main_process_port", "0", *flags)
    if arguments.use_deepspeed:
        return prepare_deepspeed_cmd_env(arguments)[1]
    return prepare_multi_gpu_env(arguments)


# ---- One process, two processes, shards ----


@pytest.mark.parametrize(
    "kind",
    [
        "ddp",
        "fsdp2",
        pytest.param("zero2", marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("zero3", marks=[needs_deepspeed, pytest.mark.slow]),
    ],
)
def test_two_processes_take_the_steps_of_one(tmp_path, kind):
    """Loss, guidance and gradient norm of each step, and the weights at the end."""
    start = tmp_path / "start"
    save_start(start)
    environment = launch_environment(kind, "--num_processes", "2")
    run_worker(scale_worker, kind, tmp_path, launcher=TORCHRUN, **environment)
    for batch, kinds in DIVISIONS.items():
        folder = tmp_path / f"{kind}-{batch}"
        alone = run_scaled_stage(tmp_path / f"alone-{batch}", start, kinds)
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert len(log) == len(alone.log_history)
        for step, reference in zip(log[:-1], alone.log_history[:-1], strict=True):
            names = [name for name in SAME if name in reference]
            assert [step[name] for name in names] == pytest.approx([reference[name] for name in names], rel=1e-4)
        assert read_lineage(folder)["recipe_hash"] == alone.lineage["recipe_hash"]
        weights = load_file(folder / "model.safetensors")
        expected = load_file(tmp_path / f"alone-{batch}" / "model.safetensors")
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
        code = {path.name for path in folder.glob("*.py")}
        assert code == {path.name for path in (tmp_path / f"alone-{batch}").glob("*.py")}
    AutoModel.from_pretrained(folder, trust_remote_code=True)


def test_rates_of_parts_survive_an_interruption(tmp_path):
    """The stages of this file have three rates; their optimizer's groups come back as they were."""
    save_start(tmp_path / "start")
    whole = run_scaled_stage(tmp_path / "whole", tmp_path / "start", save_steps=2)
    with pytest.raises(Stop):
        run_scaled_stage(tmp_path / "run", tmp_path / "start", callbacks=[StopAt(3)], save_steps=2)
    resumed = run_scaled_stage(tmp_path / "run", tmp_path / "start", save_steps=2)
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert [entry["step"] for entry in resumed.log_history] == [entry["step"] for entry in whole.log_history]


@pytest.mark.parametrize(("mass_only", "kinds"), [(True, PHRASES), (True, KINDS), (False, KINDS)])
def test_bfloat16_with_checkpointing_and_guidance_stays_close_to_float32(tmp_path, monkeypatch, mass_only, kinds):
    """By the loss and the direction of the gradient of a step, with whole maps and with the attention in the mask."""
    monkeypatch.setattr("agevlm.training.trainer.MASS_FROM_SHARE", 0.0)
    step = {"batch_size": 4, "accumulation": 2, "logging_steps": 2 if mass_only else 1, "kinds": kinds}
    exact = step_gradients(tmp_path, **step)
    checkpointed = step_gradients(tmp_path, **step, activation_checkpointing=True)
    rounded = step_gradients(tmp_path, **step, activation_checkpointing=True, bf16=True)
    assert exact.keys() == checkpointed.keys() == rounded.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)
        assert torch.isfinite(rounded[name]).all() and rounded[name].dtype == torch.float32
    first, second = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (exact, rounded))
    assert torch.cosine_similarity(first, second, dim=0) > 0.99
    assert torch.linalg.vector_norm(second) == pytest.approx(torch.linalg.vector_norm(first).item(), rel=0.05)


def test_a_step_of_text_alone_moves_all_that_trains(tmp_path):
    """By its momentum and its decay, as any step whose gradient is zero; it must not matter which weights it met."""
    save_start(tmp_path / "start")
    run_scaled_stage(tmp_path / "run", tmp_path / "start", "ggigtttt", save_steps=1)
    first, second = (load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert any("cross_attention_layers" in name for name in moved)
    assert any("encoder.stages.3" in name for name in moved)
    assert not any("language_model.layers" in name for name in moved)


# ---- Ready configurations ----


@pytest.mark.parametrize(
    ("kind", "processes", "machines", "sharding"),
    [
        ("one_gpu", 1, 1, None),
        ("ddp", 8, 1, None),
        ("fsdp2", 8, 1, "fsdp"),
        ("zero2", 8, 1, "deepspeed"),
        ("zero3", 8, 1, "deepspeed"),
        ("multi_node", 16, 2, None),
    ],
)
def test_accelerate_reads_the_ready_configurations(kind, processes, machines, sharding):
    arguments = launch_arguments(kind)
    assert (arguments.num_processes, arguments.num_machines) == (processes, machines)
    assert arguments.multi_gpu == (processes > 1 and sharding is None)
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (sharding == "fsdp", sharding == "deepspeed")
    assert arguments.mixed_precision == "no"  # the recipe decides
    assert 128 % (16 * processes) == 0 or machines > 1


def test_there_is_no_configuration_without_a_test():
    assert {path.stem for path in CONFIGURATIONS.iterdir()} == {
        "one_gpu", "ddp", "fsdp2", "zero2", "zero3", "multi_node",
    }  # fmt: skip


def test_sharded_configurations_save_whole_weights_and_wrap_blocks_that_exist():
    fsdp, zero = launch_environment("fsdp2"), launch_environment("zero3")
    assert fsdp["FSDP_VERSION"] == "2"
    assert fsdp["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    wrapped = set(fsdp["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(","))
    # accelerate refuses a class that the model does not have, such as that of layers with a cross block inside
    present = {type(module).__name__ for module in tiny_model().modules()}
    assert wrapped == present & set(AgeVlmForConditionalGeneration._no_split_modules)
    assert zero["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert zero["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


def test_the_slurm_example_starts_every_node(tmp_path):
    """With stand-ins for the cluster's commands: what reaches `accelerate launch` on each of three nodes."""
    stand_ins = {
        "scontrol": 'printf "%s\\n" node-1 node-2 node-3',
        "srun": 'shift; for id in 0 1 2; do SLURM_NODEID=$id "$@"; done',
        "accelerate": 'printf "%s\\n" "$@" end',
        "python": f'exec {sys.executable} "$@"',
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[1-3]", "SLURM_NNODES": "3", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "7"}
    script = Path(__file__).resolve().parents[2] / "examples" / "slurm.sh"
    run = subprocess.run(
        ["bash", str(script), "stage1_align", "--data", "a folder"],
        env={**os.environ, **slurm, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    nodes = [part.strip().split("\n") for part in run.stdout.strip().removesuffix("end").split("\nend\n")]
    for rank, words in enumerate(nodes):
        assert words[0] == "launch"
        arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words[1:]))
        assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (3, 12, rank)
        assert (arguments.main_process_ip, arguments.main_process_port) == ("node-1", 20007)
        assert arguments.module and arguments.training_script == "agevlm.training.train"
        assert arguments.training_script_args == ["stage1_align", "--data", "a folder"]
    assert len(nodes) == 3
