#!/usr/bin/env bash
# Several GPUs of one host: every parallel case beside one process, speed-ups, and a rank that dies. No install needed:
#     OUT=folder bash tests/gpu/run_parallel.sh
# SPEED and CASES are more arguments: SPEED="--tokens 16384 4096 --ways together tp" CASES="--only direct" is a short run.
# Results go to $OUT (build/gpu) as they come; the exit status counts the failed steps.
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/backends" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
GPUS=${GPUS:-$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")}
: >"$OUT/parallel_summary.txt"

step() { # step NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    echo "== $name"
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$OUT/$name.log" | cut -c1-400
    status=${PIPESTATUS[0]}
    if [ "$status" -eq 0 ]; then status=ok; else status="FAILED ($status)"; fi
    echo "$name: $status, $((SECONDS - started)) s" | tee -a "$OUT/parallel_summary.txt"
}

. tests/gpu/site.sh
run=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$GPUS")

nvidia-smi topo -m >"$OUT/topology.txt" 2>&1
rm -f "$OUT/parallel_cases.jsonl"
step parallel_speed 150 "${run[@]}" benchmarks/parallel_layers.py --parts --budget 125 --json "$OUT/parallel.json" ${SPEED:-}
# Beside the cases: most of it is waiting for a rank that does not come.
step parallel_death 75 "${run[@]}" tests/parallel/ranks.py --device cuda --only bury --die --out "$OUT/parallel_cases.jsonl" &
death=$!
# shellcheck disable=SC2086
step parallel_cases 120 "${run[@]}" tests/parallel/ranks.py --device cuda --out "$OUT/parallel_cases.jsonl" ${CASES:-}
wait "$death"
"$PYTHON" - "$OUT/parallel_cases.jsonl" <<'END' || echo "FAILED: cases" >>"$OUT/parallel_summary.txt"
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
bad = [row for row in rows if not row["ok"]]
print(len(rows), "cases,", len(bad), "failed")
for row in bad:
    print({name: str(value)[-1500:] for name, value in row.items()})
sys.exit(bool(bad))
END
cat "$OUT/parallel_summary.txt"
exit "$(grep -c FAILED "$OUT/parallel_summary.txt")"
