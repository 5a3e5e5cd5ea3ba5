#!/usr/bin/env bash
# Run the CUDA kernels under compute-sanitizer: tests/kernels/sanitize.sh [tool ...], from the root.
# Needs an NVIDIA GPU and CUDA's tools; takes minutes.
set -euo pipefail
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # so that every tensor's end is one of an allocation
python=${PYTHON:-python3}
for tool in "${@:-memcheck racecheck synccheck}"; do
    for each in $tool; do
        echo "== $each"
        compute-sanitizer --tool "$each" --error-exitcode 1 --kernel-name regex:auto_gptq \
            "$python" -m pytest -q -p no:cacheprovider tests/kernels/test_q_matmul.py \
            -k 'cuda and (scales_of_any_type or strides or large_means or leading_shape)'
    done
done
