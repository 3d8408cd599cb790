# shellcheck shell=bash
# Settings of your cluster, the only file to edit. fit.sbatch reads it on the first node of a job.
# `source launchers/environment.sh` in your shell, too, before sbatch, for the SBATCH_* below.
# A variable that is already set keeps its value.

# --- Who pays, and where it runs (optional; sbatch reads these) -----------------------------------
# export SBATCH_ACCOUNT=my-project
# export SBATCH_PARTITION=gpu
# export SBATCH_TIMELIMIT=24:00:00

# --- Software -------------------------------------------------------------------------------------
# module purge
# module load cuda/12.8

# The Python of the environment in which percov2 is installed.
export PERCOV2_PYTHON="${PERCOV2_PYTHON:-.venv/bin/python}"

# --- Folders, which every node must see -----------------------------------------------------------
# Data sets; configs/*.yaml say what they expect in it. Required.
export PERCOV2_DATA="${PERCOV2_DATA:-}"

# Models from the Hugging Face Hub (SD3), by default in your home. Compute nodes often cannot reach
# the Hub: download once on the login node, then set HF_HUB_OFFLINE.
# export HF_HOME=/scratch/huggingface
# export HF_HUB_OFFLINE=1

# Runs go to the folder `runs` of the repository: make that a link if they belong on another disk.

# --- Threads and network --------------------------------------------------------------------------
# With an optimiser in the main memory (configs/strategy/zero3_offload.yaml) the step runs on the CPUs:
# as many as --cpus-per-task of fit.sbatch, 8, make it several times as fast.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# The network interface between the nodes, when NCCL or gloo picks the wrong one.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=INFO

# --- Requeueing -----------------------------------------------------------------------------------
# A job that keeps being stopped fails after so many restarts.
export PERCOV2_MAX_RESTARTS="${PERCOV2_MAX_RESTARTS:-100}"
