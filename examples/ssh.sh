#!/bin/bash
# One slice of the dataset on each of several machines, by SSH; then one folder of all records.
# Every machine has this package, the dataset and the models under the same paths.
# Stop it with Ctrl-C. The same command goes on, also after a machine has failed.
# Usage: HOSTS="gpu1 gpu2" RUN=outputs/run examples/ssh.sh --config run.yaml
set -u
run=$(realpath -m "${RUN:-outputs/run}")
read -ra hosts <<<"$HOSTS"
mkdir -p "$run"
options=""
[ $# -gt 0 ] && options=$(printf '%q ' "$@")

pids=()
for i in "${!hosts[@]}"; do
    # -tt: with a terminal, so that Ctrl-C and a lost connection reach the remote command.
    ssh -tt "${hosts[$i]}" "cd $(printf '%q' "$PWD") && optimal-sampling generate $options" \
        "--data-slice $i::${#hosts[@]} --output-dir $(printf '%q' "$run/shard-$i")" \
        </dev/null >"$run/${hosts[$i]}.log" 2>&1 &
    pids+=($!)
done
failed=0
for i in "${!hosts[@]}"; do
    wait "${pids[$i]}" || {
        echo "${hosts[$i]}: exit code $?; see $run/${hosts[$i]}.log" >&2
        failed=1
    }
done
[ "$failed" -eq 0 ] || exit 1

for i in "${!hosts[@]}"; do
    rsync -a "${hosts[$i]}:$(printf '%q' "$run/shard-$i")" "$run/" || exit 1
done
optimal-sampling merge "$run"/shard-* --output-dir "$run/merged"
