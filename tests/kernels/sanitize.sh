#!/usr/bin/env bash
# Run the CUDA kernels under compute-sanitizer: tests/kernels/sanitize.sh [tool ...], from the root.
# Needs an NVIDIA GPU and CUDA's tools; the tools run side by side: memcheck and synccheck take
# 20 seconds, racecheck more than 40.
set -euo pipefail
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # so that every tensor's end is one of an allocation
python=${PYTHON:-python3}
# Every kernel: 1 to 300 rows, a padded K, orders, groups that end inside a tile; odd addresses.
few="cuda-4-128-asymmetric-act-order-torch.float16 or cuda-3-32-symmetric-ordered-torch.bfloat16"
few="$few or cuda-8-16-symmetric-ordered-torch.float16 or (cuda and strides)"
tools=${*:-memcheck racecheck synccheck}
pids=()
for tool in $tools; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$python" -m pytest -q -p no:cacheprovider tests/kernels/test_q_matmul.py \
        -k "$few" >"sanitize-$tool.log" 2>&1 &
    pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do
    wait "$pid" || failed=1
done
for tool in $tools; do
    echo "== $tool"
    tail -n 15 "sanitize-$tool.log"
    rm "sanitize-$tool.log"
done
exit $failed
