#!/usr/bin/env bash
# Runs the scripts of this collection in turn, each in a process of its own, and prints one table.
#   bash run_all.sh                  every script: self-test, then timings
#   bash run_all.sh --test           the self-tests, then `pytest tests`, which prints the closing count
#   bash run_all.sh flex_attn ...    these scripts only (with --test before them, too)
# Needs python3 >= 3.11 with venv: makes .venv and installs requirements.txt if the python at hand
# (PYTHON=... chooses another) cannot import what is needed. Uses the GPUs it finds. Logs and figures
# go to results/, the table to results/table.txt. Exit code 1 if anything failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1

all=(nf4_triton chunked_ce flex_attn compile_qlora qlora_fsdp2 gguf_vision)
needs="torch, triton, bitsandbytes, transformers, peft, datasets, accelerate, gguf, PIL, pytest, hypothesis, xdist"
fail() { echo "run_all.sh: $1" >&2; exit "$2"; }
phases=(--test --bench)
[[ ${1:-} == --test ]] && phases=(--test) && shift
names=("${@:-${all[@]}}")
for name in "${names[@]}"; do
  [[ " ${all[*]} " == *" $name "* ]] || fail "found '$name', need --test or some of ${all[*]}" 2
done

python=${PYTHON:-python3}
if ! "$python" -c "import $needs" 2>/dev/null; then
  if ! .venv/bin/python -c "import $needs" 2>/dev/null; then
    "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
      fail "found $("$python" --version 2>&1 | head -1), need python3 >= 3.11 with venv" 1
    echo "run_all.sh: installing requirements.txt into .venv (minutes, once)"
    "$python" -m venv .venv && .venv/bin/python -m pip install -q -r requirements.txt ||
      fail "could not install requirements.txt into .venv, see pip's words above" 1
  fi
  python=.venv/bin/python
fi
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') cores=$(getconf _NPROCESSORS_ONLN)

mkdir -p results && rm -f results/*.log || fail "cannot write to results/" 1
printf '%-14s %-6s %7s  %s\n' script result seconds "checks passed; figures" >results/table.txt
failed=0
for name in "${names[@]}"; do
  start=$SECONDS state=PASS many=$((gpus > 0 ? 4 : cores < 8 ? cores : 8))
  [[ $name == qlora_fsdp2 ]] && many=$((many < 4 ? 1 : many - 1))  # its tests start ranks
  for phase in "${phases[@]}"; do
    echo "=== $name $phase"
    run=("$python" "$name.py" "$phase" --json "results/$name$phase.json")
    if [[ $phase == --test ]]; then  # by pytest-xdist in scripts whose self-test is pytest's
      run=(env PYTEST_ADDOPTS="-n $many" OMP_NUM_THREADS=$((cores < many ? 1 : cores / many)) "${run[@]}")
    elif [[ $name == qlora_fsdp2 ]]; then  # one process a GPU, or 2 gloo ranks on the CPU
      run=("$python" -m torch.distributed.run --standalone --nproc-per-node $((gpus > 0 ? gpus : 2)) "${run[@]:1}")
    fi
    "${run[@]}" 2>&1 | tee "results/$name$phase.log" || { state=FAIL failed=1; break; }
  done
  words=$(cat results/"$name"--{test,bench}.log 2>/dev/null | sed -n "s/^RESULT $name [A-Z]* //p" |
    sed 's/^checks=0 *//' | tr -s ' ' '\n' | awk '!seen[$0]++' | tr '\n' ' ')
  printf '%-14s %-6s %7s  %s\n' "$name" "$state" $((SECONDS - start)) "$words" >>results/table.txt
done
cat results/table.txt
[[ ${phases[*]} != --test || $# -gt 0 ]] || "$python" -m pytest -q -rs -n auto tests || failed=1
exit "$failed"
