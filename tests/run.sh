#!/usr/bin/env bash
# Everything that has to hold before a change lands: lint, types, the documentation, the tests on the CPU,
# and the Triton kernels interpreted on the CPU. Arguments go to pytest: bash tests/run.sh -k fold
#
#   LEETDIST_VENV        where the environment is made and kept (.venv-test)
#   PYTHON               the interpreter that makes it (python3)
#   LEETDIST_TEST_LIMIT  longest that one pytest step may take, in seconds (2400)
#   LEETDIST_TEST_WORKERS  processes that run tests side by side (2: a test may start four ranks itself); 0: pytest's
#                        own process alone, as --pdb and -s want it
#   OMP_NUM_THREADS      threads per process (1: tests start several processes on few cores)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${LEETDIST_VENV:-.venv-test}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 # no test may need a download
unset TRITON_INTERPRET  # the last step alone sets it
# Bytecode is kept: of the hundred processes that tests start, each would compile torch anew, three seconds, or with the
# frameworks nine.
unset PYTHONDONTWRITEBYTECODE

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

# step NAME COMMAND...: runs it, says how long it took, and stops everything where it fails.
step() {
    local name=$1 start=$SECONDS status=0
    shift
    printf '\n==> %s\n' "$name"
    "$@" || status=$?
    if ((status)); then
        printf '==> %s: FAILED (exit %d) after %d s\n' "$name" "$status" "$((SECONDS - start))"
        summary 1 || true
        exit "$status"
    fi
    printf '==> %s: %d s\n' "$name" "$((SECONDS - start))"
}

# summary LEAST: the closing line, summed over the pytest steps; at least LEAST failures.
summary() {
    "${PYTHON:-python3}" - "$results" "$1" <<'PY'
import pathlib
import sys
import xml.etree.ElementTree as ET

run = failed = skipped = 0
for report in pathlib.Path(sys.argv[1]).glob("*.xml"):
    for suite in ET.parse(report).iter("testsuite"):
        run += int(suite.get("tests"))
        failed += int(suite.get("failures")) + int(suite.get("errors"))
        skipped += int(suite.get("skipped"))
passed = max(0, run - failed - skipped)
print(f"{passed} passed, {max(failed, int(sys.argv[2]))} failed, {skipped} skipped")
PY
}

environment() {
    local stamp=$venv/leetdist-environment want
    want=$(cat tests/requirements.txt pyproject.toml | sha256sum)" $PWD"
    if [[ -f $stamp && $(<"$stamp") == "$want" ]]; then
        echo "$venv is up to date"
        return
    fi
    # `|| return`: what runs under `step` is in a condition, where `set -e` has no effect.
    [[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv" || return
    # Not compiled to bytecode, which takes half a minute: Python does that to what it imports.
    local install=("$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile)
    "${install[@]}" -r tests/requirements.txt || return
    # No build isolation: setuptools is pinned above, and nothing else is needed to build.
    "${install[@]}" --no-build-isolation --no-deps --editable . || return
    echo "$want" >"$stamp"
}

# tests NAME DEALT MARKERS ARGUMENTS...: one run of pytest, whose workers are dealt files ("loadfile") or single tests
# ("worksteal"). That no test matches is no failure here.
tests() {
    local name=$1 dealt=$2 markers=$3 status=0 limit=() workers=()
    shift 3
    # Files in the order of their names, as a single process takes them: by the number of their tests, xdist's own order,
    # the longest tests, which are few, would come last.
    if ((${LEETDIST_TEST_WORKERS:=2})); then
        workers=(--numprocesses "$LEETDIST_TEST_WORKERS" --dist "$dealt" --no-loadscope-reorder)
        workers+=(--max-worker-restart 0) # a crash is one failure, and the end: a new worker would run the same test
    fi
    # A test stuck in C++ never sees its own timeout.
    if command -v timeout >/dev/null; then
        limit=(timeout --kill-after=30 "${LEETDIST_TEST_LIMIT:-2400}")
    fi
    "${limit[@]}" "$venv/bin/python" -m pytest -m "$markers" ${workers[@]+"${workers[@]}"} \
        --junitxml="$results/$name.xml" "$@" </dev/null || status=$?
    ((status == 5)) || return "$status"
}

step "environment" environment
PATH=$(cd "$venv/bin" && pwd):$PATH # for tests that start torchrun or accelerate
step "ruff check" "$venv/bin/ruff" check
step "ruff format" "$venv/bin/ruff" format --check
step "mypy" "$venv/bin/mypy"
NO_MKDOCS_2_WARNING=1 step "mkdocs" "$venv/bin/python" -m mkdocs build --quiet --strict --site-dir "$results/site"
# By file: what the tests of a file share, a build or a run of four ranks, is made once.
step "pytest" tests cpu loadfile "not gpu and not interpreter" "$@"
TRITON_INTERPRET=1 step "pytest, Triton interpreted" tests interpreted worksteal "interpreter" "$@"

printf '\n'
closing=$(summary 0)
if [[ $closing == "0 passed, 0 failed, 0 skipped" ]]; then
    echo "no test matches"
    closing="0 passed, 1 failed, 0 skipped"
fi
echo "$closing"
[[ $closing == *" 0 failed,"* ]]
