#!/bin/bash
# What a card says in ten minutes, in one folder: the GPU tests that matter, profiles by kernel, the benchmarks.
#
#   examples/gpu/check.sh OUT
#
# It installs nothing, downloads nothing, and goes on where a part fails or its time is over. From the environment:
# MINUTES (10) in all; MODEL, DEVICE, BATCH (of training), BENCH (more flags of the GPU suite); PYTHON. On a CPU, with
# tiny models: MODEL=LLM+GENERATOR DEVICE=cpu BATCH=4 BENCH="--backend eager --steps 1" examples/gpu/check.sh out/check
set -u
cd "$(dirname "$0")/../.." || exit 2
out=${1:?the folder for all that is found}
python=${PYTHON:-python}
seconds=$(awk "BEGIN {print int(60 * ${MINUTES:-10})}")
device="--device ${DEVICE:-auto}"
model=${MODEL:+--model $MODEL}
against=kernels/results/2026-11-27-h100.json
mkdir -p "$out" && : > "$out/summary.txt" || exit 2
failed=0

part() {  # NAME SHARE COMMAND...: run a command for at most this percentage of the time; its output is NAME.log
  local name=$1 limit=$((seconds * $2 / 100)) began=$SECONDS code
  shift 2
  timeout -k 10 "$limit" "$@" > "$out/$name.log" 2>&1
  code=$?
  [ "$code" = 0 ] || failed=1
  echo "$name: exit $code after $((SECONDS - began)) of $limit s: $(tail -n 1 "$out/$name.log" | cut -c 1-120)" | tee -a "$out/summary.txt"
}

minutes() {  # SHARE: minutes of a budget that ends before `part` does
  awk "BEGIN {print 0.8 * $seconds * $1 / 6000}"
}

git log -1 --format='commit %h of %ad' > "$out/commit.txt" 2>&1
command -v nvidia-smi > /dev/null && nvidia-smi > "$out/nvidia-smi.txt" 2>&1
part doctor 10 "$python" -m mgp5 doctor
part profile 20 "$python" examples/gpu/by_kernel.py --out "$out/profile" $device $model --micro "${BATCH:-16}"
part tests 20 "$python" -m pytest -q -m gpu -n 0 -p no:cacheprovider -p no:warnings \
  tests/test_kernels.py tests/test_fused_decode.py tests/test_engines.py tests/test_fused.py tests/test_shortcuts.py \
  tests/test_placement.py
part bench 40 "$python" -m mgp5 bench --suite gpu --minutes "$(minutes 40)" $device $model ${BENCH:-} \
  --against "$against" --out "$out/gpu.json"
part kernels 10 "$python" -m mgp5 bench --suite kernels $device --out "$out/kernels.json"
part train 15 "$python" -m mgp5 bench --suite train --minutes "$(minutes 15)" $device $model ${BATCH:+--batch $BATCH} \
  --out "$out/train.json"
echo "all is in $out"
exit $failed
