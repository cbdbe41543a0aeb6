#!/usr/bin/env bash
# Runs the scripts of this collection, each in a process of its own, and prints one table.
#   bash run_all.sh                  every script: self-test, then timings
#   bash run_all.sh --plot           the same, and draws the timings as results/NAME.png
#   bash run_all.sh --test           the self-tests alone, ending with pytest's own count
#   bash run_all.sh flex_attn ...    these scripts only (with --plot or --test before them, too)
# Needs python3 >= 3.11 with venv. Makes .venv and installs requirements.txt only if the python at hand
# cannot import what is needed. Uses the GPUs it finds. Logs and JSON go to results/, the table to
# results/table.txt. PYTHON=... chooses another interpreter. Exit code 1 if any script failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1

all=(nf4_triton chunked_ce flex_attn compile_qlora qlora_fsdp2 gguf_vision)
needs="torch, triton, bitsandbytes, transformers, peft, datasets, accelerate, gguf, PIL, pytest, hypothesis"

fail() { echo "run_all.sh: $1" >&2; exit "$2"; }
mode=run
case ${1:-} in --test | --plot) mode=${1#--} && shift ;; esac
for name in "$@"; do
  [[ " ${all[*]} " == *" $name "* ]] || fail "found '$name', need --test, --plot or some of ${all[*]}" 2
done
if [[ $# -gt 0 ]]; then names=("$@"); else names=("${all[@]}"); fi
for name in "${names[@]}"; do
  [[ -f $name.py ]] || fail "found no $name.py beside this script, need the whole collection" 2
done

python=${PYTHON:-python3}
if ! "$python" -c "import $needs" 2>/dev/null; then
  if ! .venv/bin/python -c "import $needs" 2>/dev/null; then
    "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
      fail "found $("$python" --version 2>&1 | head -1), need python3 >= 3.11 with venv" 77
    echo "run_all.sh: installing requirements.txt into .venv (minutes, once)"
    "$python" -m venv .venv && .venv/bin/python -m pip install -q -r requirements.txt ||
      fail "could not install requirements.txt into .venv, see pip's words above" 77
  fi
  python=.venv/bin/python
fi
plot=()
if [[ $mode == plot ]]; then
  "$python" -c "import matplotlib" 2>/dev/null || fail "found no matplotlib, need it for --plot: pip install matplotlib" 77
fi

if [[ $mode == test ]]; then
  exec "$python" -m pytest -q -rs --no-fold-skipped --no-header -p no:cacheprovider -W ignore \
    --show-capture=no "${names[@]/%/.py}"
fi

mkdir -p results || fail "cannot make results/, need a directory that can be written" 2
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
rows=() failed=0 stopped=
trap 'stopped=1' INT  # torchrun exits with 1 then
for name in "${names[@]}"; do
  command=("$python" "$name.py")
  if [[ $name == qlora_fsdp2 ]]; then  # one process a GPU, or 2 gloo ranks on the CPU
    command=("$python" -m torch.distributed.run --standalone --nproc-per-node "$((gpus > 0 ? gpus : 2))" "$name.py")
  fi
  [[ $mode == plot ]] && plot=(--plot "results/$name.png")
  echo "=== $name"
  start=$SECONDS
  "${command[@]}" --json "results/$name.json" "${plot[@]}" 2>&1 | tee -i "results/$name.log"
  code=${PIPESTATUS[0]}
  [[ $stopped ]] && code=130
  case $code in
    0) state=PASS ;;
    77) state=SKIP ;;
    130) state=STOPPED failed=130 ;;
    *) state=FAIL failed=1 ;;
  esac
  words=$(grep -a "^RESULT $name " "results/$name.log" | tail -1 | sed -E "s/^RESULT $name [A-Z]+ ?//")
  rows+=("$name|$state|$((SECONDS - start))|${words:--}")
  [[ $code == 130 ]] && break
done

{
  printf '\n%-14s %-8s %8s  %s\n' script result seconds "checks passed; figures (1.50x: one and a half times as good as the peer named)"
  for row in "${rows[@]}"; do
    IFS='|' read -r name state seconds words <<<"$row"
    printf '%-14s %-8s %8s  %s\n' "$name" "$state" "$seconds" "$words"
  done
} | tee -i results/table.txt
exit "$failed"
