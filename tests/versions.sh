#!/usr/bin/env bash
# The releases that leetdist claims, run: what pyproject's bounds say was seen, and not in CI, for it downloads GBs.
#
#   bash tests/versions.sh                  every cell
#   bash tests/versions.sh triton-3.7 ...   some (names: bash tests/versions.sh --list)
#
# Each cell installs one other release in a temporary folder, runs the tests that depend on it and writes a line of
# tests/versions.txt: cell, release, tests, result, date, commit. So that a line is of that commit, nothing but this table
# may differ from it. Everything else is as tests/requirements.txt says, in the environment of tests/run.sh
# (LEETDIST_VENV, .venv-test), which must be there.
#
#   LEETDIST_VERSIONS       a folder where what was installed is kept for the next time
#   LEETDIST_VERSION_LIMIT  longest that the tests of one cell may take, in seconds (3600)
#   LEETDIST_TEST_WORKERS   processes that run a cell's tests side by side (2)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
top=$PWD

python=${LEETDIST_VENV:-$top/.venv-test}/bin/python
table=tests/versions.txt
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
kept=${LEETDIST_VERSIONS:-$scratch}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=$scratch/triton-cache
unset TRITON_INTERPRET

# Compile tests of kernels, whatever their number; Triton 3.5 has no Gluon that theirs could be written in.
compiled=$(grep -lE "GPUTarget" tests/*/test_*.py | paste -sd' ')
compiled_old=$(grep -lE "GPUTarget" tests/*/test_*.py | xargs grep -LiE "gluon|hopper" | paste -sd' ')
launched="tests/kernels/test_triton_driver.py tests/kernels/test_replay.py"
torch="tests/engine/test_engine.py tests/engine/test_exactness.py tests/engine/test_errors.py tests/operators
    tests/engine/test_engine_compile.py tests/engine/test_ways_of_calling.py tests/sequence/test_distributed.py"
models="tests/integrations/test_transformers.py tests/integrations/test_parallelize.py tests/integrations/test_families.py
    tests/integrations/test_model_table.py tests/inference/test_inference_generate.py
    tests/inference/test_inference_minimax_cache.py"
interpreted="tests/engine tests/inference tests/kernels tests/operators tests/sequence"
trained="tests/integrations/test_training.py"

# cell NAME INSTALLED TESTS [MARKER]: run it, if it was asked for.
cell() {
    if [[ ${wanted[*]:-} == --list ]]; then
        echo "$1"
    elif ((${#wanted[@]} == 0)) || [[ " ${wanted[*]} " == *" $1 "* ]]; then
        run "$@" </dev/null || red+=("$1")
    fi
}

run() {
    local cell=$1 specs=$2 tests=$3 marker=${4:-} folder=$kept/$1 with=$python path=$top status=0
    local install=(-m pip install --quiet --disable-pip-version-check --root-user-action=ignore)
    # As in tests/run.sh.
    local workers=(--numprocesses "${LEETDIST_TEST_WORKERS:-2}" --max-worker-restart 0 --dist)
    [[ $marker == interpreter ]] && workers+=(worksteal) || workers+=(loadfile)
    if [[ $cell == torch-* ]]; then # with all that it needs, in an environment of its own
        with=$folder/bin/python
        if [[ ! -d $folder ]]; then
            "$python" -m venv "$folder"
            # shellcheck disable=SC2086
            "$with" "${install[@]}" $specs numpy pytest pytest-timeout pytest-xdist hypothesis || return
        fi
    else
        # shellcheck disable=SC2086
        [[ -d $folder ]] || "$python" "${install[@]}" --no-deps --target "$folder" $specs || return
        path=$top:$folder
    fi
    local names
    names=$(for spec in $specs; do
        PYTHONPATH=$path "$with" -c 'import importlib.metadata as m, sys; print(sys.argv[1], m.version(sys.argv[1]))' \
            "${spec%%=*}"
    done | paste -sd, | sed 's/,/, /')
    [[ $cell == torch-* ]] && names+=$(PYTHONPATH=$path "$with" -c '
import triton
print(f", triton {triton.__version__}")' 2>/dev/null || true)
    echo "==> $cell: $names"
    [[ $marker == interpreter ]] && export TRITON_INTERPRET=1
    # shellcheck disable=SC2086
    PATH=$(dirname "$with"):$PATH PYTHONPATH=$path timeout --kill-after=30 "${LEETDIST_VERSION_LIMIT:-3600}" \
        "$with" -m pytest -q --tb=short -p no:cacheprovider "${workers[@]}" \
        -m "${marker:-not gpu and not interpreter}" $tests >"$scratch/log" 2>&1 || status=$?
    unset TRITON_INTERPRET
    tail -n 25 "$scratch/log" | grep -E "^(FAILED|ERROR)|passed|failed|error" || tail -n 25 "$scratch/log"
    local said
    said=$(grep -oE "[0-9]+ (passed|failed|skipped|errors?)" "$scratch/log" | tail -n 3 | paste -sd, | sed 's/,/, /g')
    keep "$cell" "$names" "$( ((status)) && echo RED || echo green)" "$said"
    [[ $kept == "$scratch" ]] && rm -rf "$folder"
    return "$status"
}

# keep CELL NAMES COLOUR SAID: one line a cell, the newest.
keep() {
    local line head="# bash tests/versions.sh: cell, result, releases, tests, date, commit"
    line=$(printf '%-20s %-6s %-34s %-40s %s %s' "$1" "$3" "$2" "$4" "$(date +%F)" "$(git rev-parse --short HEAD)")
    { grep -v -e "^$1 " -e "^#" "$table" 2>/dev/null || true; echo "$line"; } | sort >"$scratch/table"
    { echo "$head"; cat "$scratch/table"; } >"$table"
}

wanted=("$@")
red=()
if [[ ${wanted[*]:-} != --list && -n $(git status --porcelain -- . ":!$table") ]]; then
    echo "the tree is not its commit; commit, or run this in a clean clone:"
    git status --short -- . ":!$table"
    exit 2
fi
# The kernels are compiled for sm_80, sm_90 and sm_100, those in Gluon for sm_90.
cell triton-3.5 "triton==3.5.*" "$compiled_old $launched"
for release in 3.6 3.7 3.8 3.9; do
    cell "triton-$release" "triton==$release.*" "$compiled $launched"
done
# Triton 3.6's interpreter needs the numpy of tests/requirements.txt; that of later ones has 2.4.
cell interpreter-3.6 "triton==3.6.*" "$interpreted" interpreter
for release in 3.7 3.8 3.9; do
    cell "interpreter-$release" "triton==$release.* numpy==2.4.*" "$interpreted" interpreter
done
cell torch-oldest "torch==2.9.1" "$torch"
cell torch-newest "torch" "$torch"
cell transformers-oldest "transformers==5.15.0" "$models"
cell transformers-newest "transformers" "$models"
cell accelerate-oldest "accelerate==1.10.0" "$trained -k accelerate"
cell accelerate-newest "accelerate" "$trained -k accelerate"
cell deepspeed-oldest "deepspeed==0.17.0" "$trained -k ZeRO"
cell deepspeed-newest "deepspeed" "$trained -k ZeRO"

if ((${#red[@]})); then
    echo "red: ${red[*]}"
    exit 1
fi
