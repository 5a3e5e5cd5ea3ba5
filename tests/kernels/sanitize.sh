#!/usr/bin/env bash
# Run the CUDA kernels under compute-sanitizer, from the root:
#     tests/kernels/sanitize.sh [memcheck|racecheck|synccheck ...] [-- FAMILY ...]
# All tools and all families of tests/kernels/sanitize.py by default. LIMIT is the seconds each may
# take. Needs an NVIDIA GPU and CUDA's tools.
set -uo pipefail
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # so that every tensor's end is one of an allocation
python=${PYTHON:-python3} failed=0 tools=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do tools+=("$1"); shift; done
[ $# -eq 0 ] || shift
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck synccheck)
[ $# -gt 0 ] || set -- few dozens hundreds mma tiles experts routes decode solver
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for tool in "${tools[@]}"; do
    for family in "$@"; do
        start=$SECONDS
        timeout -k 5 "${LIMIT:-120}" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            --print-limit 3 --kernel-name kns=auto_gptq \
            "$python" -m tests.kernels.sanitize "$family" >"$log" 2>&1
        status=$?
        summary=$(grep -h SUMMARY "$log" | tail -n 1)
        echo "$tool $family: ${summary:-unfinished} (status $status, $((SECONDS - start)) s)"
        if [ $status -ne 0 ]; then failed=1 && tail -n 30 "$log"; fi
    done
done
exit $failed
