#!/bin/bash
# One training stage on several nodes:
#
#     sbatch examples/slurm.sh stage1_align --init_from start --data DATA --output_dir runs/stage1
#
# The output folder must be on a file system that all nodes see. A job that is killed, by its time limit or a failing
# node, goes on from its newest checkpoint when it is submitted again, or by itself where the site allows --requeue.
#SBATCH --job-name=agevlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=2-00:00:00
#SBATCH --requeue
set -euo pipefail

export CONFIG HEAD
CONFIG="$(python -c 'import pathlib, agevlm.training as t; print(pathlib.Path(t.__file__).parent / "accelerate")')"
# No pipe into head: it may close before the last name is written, which pipefail takes for an error.
read -r HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# SLURM_NODEID differs from node to node, so the inner shell reads it there.
srun --kill-on-bad-exit=1 bash -c 'accelerate launch \
    --config_file "$CONFIG/multi_node.yaml" \
    --num_machines "$SLURM_NNODES" \
    --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
    --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$HEAD" \
    --main_process_port "$((20000 + SLURM_JOB_ID % 20000))" \
    -m agevlm.training.train "$@"' train "$@"
