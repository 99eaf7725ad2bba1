#!/usr/bin/env bash
# All that needs a GPU, in one go: tests, benchmark, compute-sanitizer, Nsight Compute.
#   tests/gpu/everything.sh RESULTS_FOLDER      (about five minutes; each part has a limit of its own)
# No part stops the next one; the exit status is 0 only if the tests and both sanitizers passed.
set -u -o pipefail
out=${1:?usage: tests/gpu/everything.sh RESULTS_FOLDER}
cd "$(dirname "$0")/../.."
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0

echo "== tests"
timeout 400 python3 -m pytest tests/gpu -m gpu -p no:cacheprovider --durations=6 >"$out/tests.log" 2>&1 || status=1
tail -n 40 "$out/tests.log" | cut -c1-300

echo "== memcheck, racecheck"
for tool in memcheck racecheck; do
  # One allocation a tensor, so that the tool sees every bound.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 100 compute-sanitizer --tool $tool --error-exitcode 9 \
    python3 tests/gpu/sanitize.py >"$out/$tool.log" 2>&1 || { echo "$tool failed: $?"; status=1; }
  tail -n 4 "$out/$tool.log" | cut -c1-300
done

echo "== Nsight Compute"
metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed
metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active
timeout 100 ncu --csv --page raw --print-units base --metrics $metrics \
  --kernel-name 'regex:^(forward|backward)_(single|wide|tall)' \
  python3 recipes/benchmark/neuron_speed.py --once >"$out/ncu.csv" 2>"$out/ncu.err" || echo "ncu failed: $?"
python3 - "$out/ncu.csv" <<'PY' || true
import csv, sys
lines = open(sys.argv[1]).read().splitlines()
start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
if start is None:
    sys.exit("no table in ncu.csv: " + " / ".join(lines[-3:]))
rows = list(csv.DictReader(lines[start:]))[1:]  # the first row holds units
number = lambda row, key: float(row[key].replace(",", ""))
print("kernel, grid: us, GB read + written, DRAM %, SM %, issue %, warps %, registers")
for row in rows[4::6] + rows[5::6]:  # the third forward and backward pass of each row
    print(
        f"{row['Kernel Name']:<16} {row['Grid Size']:>14}: {number(row, 'gpu__time_duration.sum') / 1e3:7.1f}"
        f" {number(row, 'dram__bytes_read.sum') / 1e9:.3f} + {number(row, 'dram__bytes_write.sum') / 1e9:.3f}"
        f" {number(row, 'dram__throughput.avg.pct_of_peak_sustained_elapsed'):.0f}%"
        f" {number(row, 'sm__throughput.avg.pct_of_peak_sustained_elapsed'):.0f}%"
        f" {number(row, 'smsp__issue_active.avg.pct_of_peak_sustained_active'):.0f}%"
        f" {number(row, 'sm__warps_active.avg.pct_of_peak_sustained_active'):.0f}%"
        f" {row['launch__registers_per_thread']}"
    )
PY

echo "== benchmark"
timeout 200 python3 recipes/benchmark/neuron_speed.py --out "$out/bench" --sweep 2>&1 | tee "$out/bench.log" || status=1
echo "== exit status $status"
exit $status
