#!/usr/bin/env bash
# Measurements on one large GPU in under ten minutes, without network: benchmarks/gpu.py describes them.
#
#   benchmarks/gpu.sh                               writes runs/gpu/gpu.json and runs/gpu/gpu.md, the table of docs/gpu.md;
#                                                   models of 8 GB and runs go to WORK=runs/gpu/work
#   SIZE=tiny DEVICE=cpu benchmarks/gpu.sh          the same with tiny models on a CPU: does the script run through?
#   OUT=DIR PYTHON=python3 LIMIT=540 benchmarks/gpu.sh awm full       some cases, another folder, interpreter, limit in seconds
set -eu
cd "$(dirname "$0")/.."
export OUT="${OUT:-runs/gpu}" SIZE="${SIZE:-real}" DEVICE="${DEVICE:-cuda}" LIMIT="${LIMIT:-560}" HF_HUB_OFFLINE=1
export WORK="${WORK:-$OUT/work}"
[ "$DEVICE" = cuda ] || export ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES=
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
exec "$PYTHON" -m benchmarks.gpu "$@"
