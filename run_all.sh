#!/usr/bin/env bash
# Runs the scripts of this collection, each in a process of its own, and prints one table.
#   bash run_all.sh           every script: self-test, then timings
#   bash run_all.sh --test    the self-tests alone, ending with pytest's own count
# Needs python3 >= 3.11 with venv. Makes .venv and installs requirements.txt only if the python at hand
# cannot import what is needed. Logs and JSON go to results/. PYTHON=... chooses another interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1

scripts=(nf4_triton.py chunked_ce.py flex_attn.py compile_qlora.py qlora_fsdp2.py gguf_vision.py)
needs="torch, triton, bitsandbytes, transformers, peft, datasets, accelerate, gguf, PIL, pytest"

fail() { echo "run_all.sh: $1" >&2; exit "$2"; }
[[ $# -eq 0 || ($# -eq 1 && $1 == --test) ]] || fail "found '$*', need nothing or --test" 2

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
mkdir -p results

present=() missing=()
for script in "${scripts[@]}"; do
  if [[ -f $script ]]; then present+=("$script"); else missing+=("$script"); fi
done

if [[ ${1:-} == --test ]]; then
  [[ ${#missing[@]} -eq 0 ]] || echo "not yet: ${missing[*]}"
  exec "$python" -m pytest -q -rs --no-fold-skipped --no-header -p no:cacheprovider -W ignore "${present[@]}"
fi

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
rows=() failed=0
for script in "${scripts[@]}"; do
  name=${script%.py}
  if [[ ! -f $script ]]; then
    rows+=("$name|not yet|-|-")
    continue
  fi
  command=("$python" "$script")
  if [[ $name == qlora_fsdp2 ]]; then  # one process a GPU, or 2 gloo ranks on the CPU
    command=("$python" -m torch.distributed.run --standalone --nproc-per-node "$((gpus > 0 ? gpus : 2))" "$script")
  fi
  echo "=== $name"
  start=$SECONDS
  "${command[@]}" --json "results/$name.json" 2>&1 | tee "results/$name.log"
  case ${PIPESTATUS[0]} in
    0) state=PASS ;;
    77) state=SKIP ;;
    130) exit 130 ;;
    *) state=FAIL failed=1 ;;
  esac
  headline=$(grep -a "^RESULT $name " "results/$name.log" | tail -1 | sed -E "s/^RESULT $name [A-Z]+ ?//")
  rows+=("$name|$state|$((SECONDS - start))|${headline:--}")
done

echo
printf '%-14s %-8s %8s  %s\n' script result seconds figures
for row in "${rows[@]}"; do
  IFS='|' read -r name state seconds headline <<<"$row"
  printf '%-14s %-8s %8s  %s\n' "$name" "$state" "$seconds" "$headline"
done
exit "$failed"
