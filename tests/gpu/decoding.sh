#!/usr/bin/env bash
# Event-driven decoding on a GPU in one go: tests, compute-sanitizer, benchmark, Nsight Compute.
#   tests/gpu/decoding.sh RESULTS_FOLDER [SIZE...]      (under ten minutes; each part has a limit of its own)
# No part stops the next one; the exit status is 0 only if the tests and memcheck passed.
set -u -o pipefail
out=${1:?usage: tests/gpu/decoding.sh RESULTS_FOLDER [SIZE...]}
shift
sizes=${*:-1.3b 130m}
cd "$(dirname "$0")/../.."
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0

echo "== the smallest run, to see that kernels launch"
timeout 60 python3 recipes/benchmark/gpu_decoding.py --smoke --seconds 0 --batches 1 --dense-batches \
  --out "$out/smoke" >"$out/smoke.log" 2>&1 || { status=1; tail -n 15 "$out/smoke.log" | cut -c1-300; }

echo "== tests"
timeout 170 python3 -m pytest tests/gpu/test_event_linear.py tests/gpu/test_event_driven.py -m gpu -p no:cacheprovider \
  --durations=5 >"$out/tests.log" 2>&1 || status=1
tail -n 30 "$out/tests.log" | cut -c1-300

for size in $sizes; do
  echo "== benchmark, $size"
  timeout 122 python3 recipes/benchmark/gpu_decoding.py --size "$size" --batches 1 8 --dense-batches 1 \
    --tokens 100 --repeats 4 --seconds 1.2 --limit 75 --out "$out/bench" 2>&1 | tee "$out/$size.log" | tail -n 40
done

echo "== memcheck"
PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 60 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 \
  python3 tests/gpu/sanitize.py --decoding >"$out/memcheck.log" 2>&1 || { echo "memcheck failed: $?"; status=1; }
tail -n 3 "$out/memcheck.log" | cut -c1-300

echo "== Nsight Compute"
metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active
timeout 45 ncu --clock-control none --csv --page raw --metrics $metrics --kernel-name 'regex:^(project|scan_token)' \
  --launch-count 24 python3 recipes/benchmark/gpu_decoding.py --size 1.3b --layers 2 --batches 1 --dense-batches \
  --shares 0.63 --tokens 4 --repeats 1 --seconds 0 --out "$out/ncu" >"$out/ncu.csv" 2>&1 || echo "ncu failed: $?"
tail -n 30 "$out/ncu.csv" | cut -d, -f5,8- | cut -c1-220
echo "== exit status $status"
exit $status
