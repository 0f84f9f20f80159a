#!/usr/bin/env bash
# Makes an environment of its own with leetdist in it and runs its demo. `bash launch/demo.sh --help` says what can be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: bash launch/demo.sh [--here] [options of the demo]

  --here    use the Python environment as it is instead of making one
  the rest  python -m leetdist.launch demo --help lists it, from an environment that has torch: --ranks, --tokens,
            --text, --steps, --new, --device, --dtype, --operator, --model, --out

environment: LEETDIST_VENV, where the environment is made and kept (.venv-demo); PYTHON, what makes it (python3, 3.10
or newer); OMP_NUM_THREADS, threads a rank (the cores divided by the ranks)
TEXT
}

python=${PYTHON:-python3} here="" arguments=()
for argument in "$@"; do
    case $argument in
        -h | --help) usage; exit ;;
        --here) here=1 ;;
        *) arguments+=("$argument") ;;
    esac
done

if [[ -z $here ]]; then
    venv=${LEETDIST_VENV:-.venv-demo}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { echo "Python 3.10 or newer is needed, $python is $("$python" -V)" >&2; exit 1; }
    # Made again where a first attempt was interrupted, or the project's needs have changed.
    stamp=$venv/leetdist-demo want=$(sha256sum <pyproject.toml)
    if [[ ! -f $stamp || $(<"$stamp") != "$want" ]]; then
        torch=$(sed -n 's/^torch==//p' tests/requirements.txt)
        echo "making $venv with torch $torch and leetdist: a minute or a few, most of it the download of torch"
        "$python" -m venv "$venv"
        install=("$venv/bin/python" -m pip install --disable-pip-version-check)
        [[ -t 1 ]] || install+=(--quiet) # on a terminal pip shows what it does
        "${install[@]}" "torch==$torch"
        "${install[@]}" --editable ".[launch]"
        echo "$want" >"$stamp"
    fi
    python=$venv/bin/python
else
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi
exec "$python" -m leetdist.launch demo "${arguments[@]+"${arguments[@]}"}"
