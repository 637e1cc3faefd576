#!/usr/bin/env bash
# Supervised fine-tuning as a Slurm job. Submit it from the checkout:
#
#   sbatch --nodes=4 --gpus-per-node=8 slurm/sft.sh [--config configs/sft.yaml] [key=value ...]
#
# Whole nodes unless you say otherwise (sbatch --oversubscribe --cpus-per-task=16 --gpus-per-node=2 --mem=200G ...).
# A node with fewer GPUs than cluster.gpus_per_node ends the job with status 2.
# What can be set in the environment stands in ray_cluster.sh. --dry-run prints what would run.
#SBATCH --job-name=tatar-sft
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@180
trap 'interrupted=1' USR1 TERM # first of all: Slurm may send it a minute early, and its default ends this shell
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
# shellcheck source=slurm/ray_cluster.sh
source slurm/ray_cluster.sh || { echo "submit from the directory that holds slurm/ray_cluster.sh" >&2; exit 2; }
run_stage sft "$@"
