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
if [[ $mode == plot ]] && ! "$python" -c "import matplotlib" 2>/dev/null; then
  fail "found no matplotlib, need it for --plot: $python -m pip install matplotlib" 77
fi

read -r gpus gib < <("$python" -c 'import torch.cuda as c
n = c.device_count()
print(n, min([c.get_device_properties(i).total_memory >> 30 for i in range(n)], default=1000))')
IFS=, read -ra ids <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
cores=$(getconf _NPROCESSORS_ONLN)
spread() {  # $1 processes of pytest-xdist, if that is there, on $2 cores
  "$python" -c "import xdist" 2>/dev/null || set -- 1 "$2"
  export PYTEST_ADDOPTS="$addopts" OMP_NUM_THREADS=$(($2 / $1 > 4 ? 4 : $2 / $1))
  (($1 < 2)) || PYTEST_ADDOPTS+=" -n $1 --dist worksteal"
}
addopts=${PYTEST_ADDOPTS:-}

if [[ $mode == test ]]; then
  spread $((gpus ? 1 : cores < 8 ? cores : 8)) "$cores"  # its tests may need most of a GPU
  trap : INT
  "$python" -m pytest -q -rs --no-fold-skipped --no-header -p no:cacheprovider -W ignore \
    --show-capture=no -p no:logging "${names[@]/%/.py}"  # its log capture has Dynamo write every guard
  code=$?
  exit $((code == 2 ? 130 : code))  # pytest's 2: Ctrl-C
fi

mkdir -p results || fail "cannot make results/, need a directory that can be written" 2
side=$((cores / 4 < gib / 20 ? cores / 4 : gib / 20))  # self-tests; timings have the machine alone
side=$((side < 1 ? 1 : side < ${#names[@]} ? side : ${#names[@]}))
share=$((cores / side))
declare -A began=() pid_of=() state=() seconds=() words=()
stopped=
stop() {
  stopped=1
  for pid in $(jobs -p); do kill -INT -- "-$pid" 2>/dev/null; done
}
set -m  # every job is a group of its own, so that all of it can be stopped
trap stop INT TERM HUP

judge() {  # name, exit code, log: state and figures
  case $2 in
    0) state[$1]=PASS ;;
    77) state[$1]=SKIP ;;
    130) state[$1]=STOPPED ;;
    *) state[$1]=FAIL ;;
  esac
  [[ $stopped ]] && state[$1]=STOPPED
  words[$1]="${words[$1]:-} $(grep -a "^RESULT $1 " "$3" | tail -1 | sed -E "s/^RESULT $1 [A-Z]+ ?//; s/^checks=0 ?//")"
}

echo "=== self-tests, $side at a time, on $cores cores, GPUs: $gpus (results/NAME.test.log)"
collect() {  # waits for one self-test
  local pid code
  while :; do
    for pid in "${!pid_of[@]}"; do kill -0 "$pid" 2>/dev/null || break 2; done
    wait -n "${!pid_of[@]}"  # which a signal ends early, whatever it then says of a process
  done
  wait "$pid"
  code=$?
  local name=${pid_of[$pid]}
  unset "pid_of[$pid]"
  seconds[$name]=$((SECONDS - began[$name]))
  judge "$name" "$code" "results/$name.test.log"
  echo "$name: ${state[$name]}, ${seconds[$name]} s"
  [[ $code == 0 ]] || tail -n 40 "results/$name.test.log"
}
for name in "${names[@]}"; do
  while ((${#pid_of[@]} >= side)); do collect; done
  [[ $stopped ]] && break
  began[$name]=$SECONDS
  many=$((share < 6 ? share : 6))
  order=("${ids[@]}")
  case $name in
    nf4_triton | chunked_ce)  # may need most of a GPU: the second one's, or a test at a time
      many=$((gpus > 1 && share > 1 ? 2 : gpus ? 1 : many))
      ((gpus > 1)) && order=("${ids[1]}" "${ids[0]}" "${ids[@]:2}") ;;
    qlora_fsdp2) many=$((share < 4 ? 1 : share - 1)) ;;  # which starts ranks of its own
  esac
  devices=$(IFS=, && echo "${order[*]}")
  (((gpus < 2)) || export CUDA_VISIBLE_DEVICES="$devices"
    spread "$many" "$share" && exec "$python" "$name.py" --test) >"results/$name.test.log" 2>&1 &
  pid_of[$!]=$name
  [[ $stopped ]] && stop  # a signal came in between
done
while ((${#pid_of[@]} > 0)); do collect; done

for name in "${names[@]}"; do
  [[ $stopped ]] && break
  [[ ${state[$name]} == PASS ]] || continue
  command=("$python" "$name.py")
  if [[ $name == qlora_fsdp2 ]]; then  # one process a GPU, or 2 gloo ranks on the CPU
    command=("$python" -m torch.distributed.run --standalone --nproc-per-node "$((gpus > 0 ? gpus : 2))" "$name.py")
  fi
  command+=(--bench --json "results/$name.json")
  [[ $mode == plot ]] && command+=(--plot "results/$name.png")
  echo "=== $name"
  start=$SECONDS
  ("${command[@]}" 2>&1 | tee -i "results/$name.log"; exit "${PIPESTATUS[0]}") &
  pid=$!
  [[ $stopped ]] && stop
  while wait "$pid"; code=$?; kill -0 "$pid" 2>/dev/null; do :; done  # a signal ends a wait early
  [[ $code == 130 ]] && stopped=1
  seconds[$name]=$((seconds[$name] + SECONDS - start))
  judge "$name" "$code" "results/$name.log"
done

failed=0
{
  printf '\n%-14s %-8s %8s  %s\n' script result seconds "checks passed; figures (1.50x: one and a half times as good as the peer named)"
  for name in "${names[@]}"; do
    printf '%-14s %-8s %8s %s\n' "$name" "${state[$name]:--}" "${seconds[$name]:--}" "${words[$name]:-}"
  done
} | tee -i results/table.txt
for name in "${names[@]}"; do [[ ${state[$name]:-} == FAIL ]] && failed=1; done
[[ $stopped ]] && failed=130
exit "$failed"
