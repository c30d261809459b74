#!/usr/bin/env bash
# Quantised experts on a CUDA device: the kit's cases, each scheme in a process of its own, then block sizes beside the
# same layers in bfloat16. Arguments go to `moe-core tune cuda`, instead of those below.
#     OUT=folder bash tests/gpu/quantised.sh [--quant mxfp4 --shape 2880,2880,128,4 --tokens 1,16]
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/backends" PYTHONDONTWRITEBYTECODE=1
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
. tests/gpu/site.sh
SCHEMES=$("$PYTHON" -c "from moe_core.testing import QUANT_VARIANTS; print(*QUANT_VARIANTS)")
started=$SECONDS
for scheme in $SCHEMES; do
    timeout 150 "$PYTHON" -m pytest -q -p no:cacheprovider -p no:benchmark -p moe_core.testing.pytest_plugin \
        --pyargs moe_core.testing --moe-backend=cuda --require-backend -k "quantised and $scheme" --tb=line \
        >"$OUT/kit_$scheme.log" 2>&1 &
done
wait
for scheme in $SCHEMES; do echo "$scheme: $(tail -1 "$OUT/kit_$scheme.log")"; done | tee "$OUT/kit.txt"
grep -h "^E  \|^FAILED\|Error" "$OUT"/kit_*.log | cut -c1-300 | sort | uniq -c | sort -rn | head -30
echo "kit: $((SECONDS - started)) s"
tune() { "$PYTHON" -m moe_core tune cuda --out "$OUT/quantised.json" "$@" 2>&1 | tee -a "$OUT/tune.log"; }
if [ $# -gt 0 ]; then
    tune "$@"
else
    tune --quant mxfp4 --quant int4_weight_only:128 --shape 4096,14336,8,2 --shape 2880,2880,128,4 --tokens 1,16 --seconds 60
    tune --quant fp8_block --shape 7168,2048,256,8 --tokens 1024,4096 --seconds 55
    tune --quant mxfp4 --quant int4_weight_only:128 --shape 7168,2048,256,8 --tokens 1,16 --seconds 50
    tune --quant fp8_block --shape 4096,14336,8,2 --shape 2048,768,128,8 --tokens 1024,4096 --seconds 35
fi
echo "all: $((SECONDS - started)) s"
