#!/usr/bin/env bash
# Everything that needs a CUDA device: the tests, the proof that they notice, the overhead. From anywhere, no install:
#     OUT=folder bash tests/gpu/run.sh
# Logs, JUnit XML and JSON go to $OUT (build/gpu). A failure stops nothing; the exit status counts the failed steps.
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/backends" PYTHONDONTWRITEBYTECODE=1
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
failed=0
summary="$OUT/summary.txt"
: >"$summary"

step() { # step NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    status=${PIPESTATUS[0]}
    if [ "$status" -eq 0 ]; then status=ok; else failed=$((failed + 1)); status="FAILED ($status)"; fi
    echo "$name: $status, $((SECONDS - started)) s" >>"$summary"
}

. tests/gpu/site.sh
SPREAD=(-p no:cacheprovider -q)
"$PYTHON" -c "import xdist" 2>/dev/null && SPREAD+=(-n 8 -p no:benchmark)

step device 60 "$PYTHON" -c "
import platform, torch
assert torch.cuda.is_available(), 'torch sees no CUDA device'
print(torch.cuda.get_device_name(), '| torch', torch.__version__, '| CUDA', torch.version.cuda, '| Python', platform.python_version())
import moe_core; print(moe_core.__file__, [status.name for status in moe_core.backends()])
"
step streams 60 "$PYTHON" -m pytest tests/gpu/test_streams.py -W default -p no:cacheprovider -v --tb=short --junitxml="$OUT/streams.xml"
step graphs 70 "$PYTHON" -m pytest tests/gpu/test_graphs.py -W default -p no:cacheprovider -v --tb=short --junitxml="$OUT/graphs.xml"
step overlap 90 "$PYTHON" -m pytest tests/gpu/test_overlap.py -W default -p no:cacheprovider -v --tb=short --durations=5 --junitxml="$OUT/overlap.xml"
step prove 120 "$PYTHON" tests/gpu/prove_streams.py --log "$OUT/prove_details.log"
step overhead_cuda 90 "$PYTHON" benchmarks/runner_overhead.py --device cuda --json "$OUT/runner_overhead_cuda.json"
step overhead_cpu 90 "$PYTHON" benchmarks/runner_overhead.py --device cpu --json "$OUT/runner_overhead_cpu.json"
step capture 60 "$PYTHON" -m pytest tests/gpu/test_capture.py -W default -p no:cacheprovider -v --tb=short
step regressions 120 "$PYTHON" -m pytest tests/gpu/test_regressions.py -W default -p no:cacheprovider -v --tb=short
step cuda_kernels 400 "$PYTHON" -m pytest tests/kernels/cuda "${SPREAD[@]}"
step cuda_kit 500 "$PYTHON" -m pytest "${SPREAD[@]}" -p moe_core.testing.pytest_plugin --pyargs moe_core.testing --moe-backend=cuda --require-backend
for tool in memcheck racecheck; do
    step "cuda_$tool" 300 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" tests/gpu/each_kernel.py
done
echo "== summary"
cat "$summary"
exit "$failed"
