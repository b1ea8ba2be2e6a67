#!/bin/bash
# One run over all GPUs of several machines: a Ray cluster for the time of the job, the driver on
# its first machine, one folder of records.
# Usage: sbatch --nodes=4 examples/slurm/ray.sh --config run.yaml --output-dir outputs/run
#SBATCH --job-name=optimal-sampling
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@120
set -u
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Whoever reaches a Ray cluster's ports may run programs in it: a secret of this job's own.
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
address=$head:${RAY_PORT:-6379}

# The run starts with the first machine; the others join while it goes. A lost one is replaced by
# none, and does not end the step.
srun --kill-on-bad-exit=0 ray symmetric-run --address "$address" --include-dashboard=false \
    -- optimal-sampling generate "$@" --ray "$address"
status=$?
# 130, 143: interrupted, by the time limit or a preemption.
if [ "$status" -eq 130 ] || [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
