#!/usr/bin/env bash
# Does compute-sanitizer's racecheck follow mbarriers? The same correct producer and consumer in CUDA and in Gluon.
#     bash tests/gpu/racecheck/run.sh > log
set -u
cd "$(dirname "$0")"
SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer | head -1)
built=$(mktemp -d)
trap 'rm -r "$built"' EXIT
nvcc -arch=sm_90 -lineinfo -o "$built/textbook" textbook.cu
"$SANITIZER" --version | tail -n 2
timeout 20 "$SANITIZER" --tool racecheck "$built/textbook"
timeout 60 "$SANITIZER" --tool racecheck "${PYTHON:-python3}" textbook.py
