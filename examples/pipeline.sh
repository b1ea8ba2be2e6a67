#!/bin/sh
# From problems to a better student, with the pair of small models that ships with the package.
# Every command goes on where it was stopped, so this script can be stopped and called again.
# Usage: examples/pipeline.sh [FOLDER [PROBLEMS [QUESTIONS]]]
set -eu
folder=${1:-outputs/pipeline}
problems=${2:-1200}
questions=${3:-400}

step() {
    echo "+ optimal-sampling $*"
    optimal-sampling "$@"
}

step generate --dataset synthetic --num-examples "$problems" --max-new-tokens 160 \
    --output-dir "$folder/run"
step verify "$folder/run" --grader synthetic
step export "$folder/run" --only correct --output-dir "$folder/data" --overwrite
step sft --model_name_or_path toy-student --dataset_name "$folder/data" \
    --output_dir "$folder/student" --learning_rate 1e-3 --per_device_train_batch_size 16 \
    --num_train_epochs 6
step evaluate --extra-models toy-student "$folder/student" --benchmarks synthetic \
    --num-examples "$questions" --temperature 1 --top-p 1 --max-new-tokens 160 \
    --output-dir "$folder/scores"
