#!/usr/bin/env bash
# One would guess: time.sleep(0) lets other threads go on and comes back at once, a microsecond or less.
# It is so that: from Python 3.11 on it takes Linux 50 to 80 us, as long as the kernel's timers may be late (a thread's
# timer slack); up to 3.10 it took half a microsecond. Two processes that wait for each other in this way make each other
# late in turns. select.select((), (), (), 0) lets go of Python's lock and comes back at once; os.sched_yield() lets other
# processes go on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/sleep.py" <<'PY'
import os
import select
import sys
import time


def least_us(call, rows=50, calls=20):
    """Of a call, in the quickest row."""
    spans = []
    for _ in range(rows):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        spans.append((time.perf_counter() - begin) / calls * 1e6)
    return min(spans)


slept = least_us(lambda: time.sleep(0))
selected = least_us(lambda: select.select((), (), (), 0))
yielded = least_us(os.sched_yield)
print(f"Python {sys.version.split()[0]}: time.sleep(0) {slept:.1f} us, select {selected:.1f}, sched_yield {yielded:.1f}")
sys.exit(not slept > 10 * selected)
PY
python3 "$folder/sleep.py"
