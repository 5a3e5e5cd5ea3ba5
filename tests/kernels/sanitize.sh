#!/usr/bin/env bash
# Run the CUDA kernels under compute-sanitizer, from the root:
#     tests/kernels/sanitize.sh [memcheck|racecheck|synccheck ...] [-- FAMILY ...]
# All tools and all families of tests/kernels/sanitize.py by default, the families side by side. LIMIT
# is the seconds that each may take. Needs an NVIDIA GPU and CUDA's tools.
set -uo pipefail
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # so that every tensor's end is one of an allocation
python=${PYTHON:-python3} logs=$(mktemp -d) failed=0 tools=()
trap 'rm -rf "$logs"' EXIT
while [ $# -gt 0 ] && [ "$1" != -- ]; do tools+=("$1"); shift; done
[ $# -eq 0 ] || shift
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck synccheck)
[ $# -gt 0 ] || set -- few dozens hundreds shared mma tiles experts routes decode solver

watch() { # watch TOOL FAMILY
    local log=$logs/$2 start=$SECONDS status summary
    timeout -k 5 "${LIMIT:-120}" compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 3 \
        --kernel-name kns=auto_gptq "$python" -m tests.kernels.sanitize "$2" >"$log" 2>&1
    status=$?
    summary=$(grep -h SUMMARY "$log" | tail -n 1)
    echo "$1 $2: ${summary:-unfinished} (status $status, $((SECONDS - start)) s)"
    [ $status -eq 0 ] || tail -n 30 "$log"
    return $status
}

for tool in "${tools[@]}"; do
    pids=()
    for family in "$@"; do
        [ "$tool $family" != "racecheck shared" ] || continue # see sanitize.py
        watch "$tool" "$family" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
done
exit $failed
