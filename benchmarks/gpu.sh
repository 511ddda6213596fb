#!/bin/bash
# What must hold, and what is to be measured, on a GPU, in at most eight minutes: benchmarks/gpu.sh [folder of DrQ-v2's code]
#
# Needs the wheels that pyproject.toml names, those of the extra `test` among them; `semore-bench doctor` says what is
# missing. The official code is github.com/facebookresearch/drqv2. Without a GPU it does the same in a tiny form, and
# takes its time (`timeout 0` is no limit).
set -euo pipefail
cd "$(dirname "$0")/.."
export MUJOCO_GL="${MUJOCO_GL:-egl}" PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}"
official="${1:-}"
bench="import sys; from semore_bench.cli import main; main(sys.argv[1:])"
runs="$(mktemp -d)"
trap 'rm -rf "$runs"' EXIT

if [ "$("$python" -c 'import torch; print(torch.cuda.is_available())')" = True ]; then
    device=cuda seconds=95 steps=20000 blocks=5 preset=(--preset reference --batch-size 256)
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
else
    device=cpu seconds=0 steps=200 blocks=1 preset=(--preset lite --batch-size 4)
    echo "no GPU: a tiny form on the CPU"
fi

echo "== tests"
timeout "$((2 * seconds))" "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py

echo "== updates"
flags=("${preset[@]}" --blocks "$blocks" --block-steps $((blocks * 4)))
timeout "$seconds" "$python" -c "$bench" benchmark agents --names drqv2 "${flags[@]}"
if [ -n "$official" ]; then
    timeout "$seconds" "$python" -c "$bench" benchmark agents --against drqv2-official "$official" "${flags[@]}"
fi

echo "== a short training"
timeout "$seconds" "$python" agents/drqv2.py --env-id dm_control/cartpole-balance-v0 --action-repeat 8 --device "$device" \
    --total-env-steps "$steps" --eval-every "$steps" --eval-episodes 1 --run-dir "$runs/run" "${preset[@]}"
cat "$runs/run/eval.csv"
