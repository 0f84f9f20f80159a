#!/usr/bin/env bash
# Installs leetdist into an environment of its own and trains a small language model on one long text, sharded over
# several ranks. `bash launch/demo.sh --help` says what can be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: bash launch/demo.sh [--ranks P] [--here] [options of the demo]

  --ranks P       processes that share the text (4; with one GPU 2, with more one a GPU)
  --here          use the Python environment as it is instead of making one
  --tokens N      bytes of text, over all ranks (131072)
  --text PATH     a file or a folder (the source text of the running Python's standard library)
  --steps N       optimiser steps (8)
  --new N         bytes to generate (64)
  --device D      auto, cpu or cuda (auto)
  --dtype D       fp32 or bf16 (fp32)
  --model M       mini (0.3M parameters), tiny, 10m or 100m (mini)

environment: LEETDIST_VENV, where the environment is made and kept (.venv-demo); PYTHON, what makes it (python3, 3.10
or newer); OMP_NUM_THREADS, threads a rank (the cores divided by the ranks)
TEXT
}

ranks="" here="" device=auto arguments=()
while (($#)); do
    case $1 in
        -h | --help) usage; exit ;;
        --here) here=1; shift ;;
        --ranks) ranks=${2:?--ranks wants a number}; shift 2 ;;
        --ranks=*) ranks=${1#*=}; shift ;;
        --device) device=${2:?--device wants auto, cpu or cuda}; arguments+=("$1" "$2"); shift 2 ;;
        --device=*) device=${1#*=}; arguments+=("$1"); shift ;;
        *) arguments+=("$1"); shift ;;
    esac
done

python=${PYTHON:-python3}
if [[ -z $here ]]; then
    venv=${LEETDIST_VENV:-.venv-demo}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { echo "Python 3.10 or newer is needed, $python is $("$python" -V)" >&2; exit 1; }
    # Made again where a first attempt was interrupted, or the project's needs have changed.
    stamp=$venv/leetdist-demo want=$(sha256sum <pyproject.toml)
    if [[ ! -f $stamp || $(<"$stamp") != "$want" ]]; then
        echo "installing leetdist and what it needs into $venv: a minute or a few"
        "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$(sed -n 's/^torch==//p' tests/requirements.txt)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[launch]"
        echo "$want" >"$stamp"
    fi
    python=$venv/bin/python
else
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi

gpus=0
[[ $device == cpu ]] || gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [[ -z $ranks ]]; then
    ranks=4
    ((gpus == 1)) && ranks=2
    ((gpus > 1)) && ranks=$gpus
fi
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))} PYTHONUNBUFFERED=1
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m leetdist.launch demo "${arguments[@]}"
