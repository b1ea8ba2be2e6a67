#!/bin/bash
# Each task of the array draws one slice of the dataset, into a folder of its own.
# Usage: RUN=outputs/run sbatch examples/slurm/array.sh --config run.yaml
# Afterwards: optimal-sampling merge outputs/run/shard-* --output-dir outputs/run/merged
#SBATCH --job-name=optimal-sampling
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
# Two minutes before the time limit the command is told to stop; what is finished is on the disk.
#SBATCH --signal=TERM@120
set -u
run=${RUN:-outputs/run}
# Give SHARDS where only some tasks are submitted again (--array=3): the count is then theirs.
shards=${SHARDS:-$SLURM_ARRAY_TASK_COUNT}
if [ "$SLURM_ARRAY_TASK_ID" -ge "$shards" ]; then
    echo "task $SLURM_ARRAY_TASK_ID of $shards: number the array from 0 (--array=0-7)," \
        "or say of how many shards these are: SHARDS=8 sbatch --array=3 ..." >&2
    exit 2
fi

srun optimal-sampling generate "$@" \
    --data-slice "$SLURM_ARRAY_TASK_ID::$shards" \
    --output-dir "$run/shard-$SLURM_ARRAY_TASK_ID"
status=$?
# 130: interrupted, by the time limit or a preemption. The same command goes on where it stopped.
if [ "$status" -eq 130 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
