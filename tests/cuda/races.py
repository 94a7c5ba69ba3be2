"""Runs the tests that were built for ThreadSanitizer; then once without each fence of the kernels, and it must show.

    python tests/cuda/races.py build/tests-cuda/cuda_tests_thread [part of a fence's place]

In the emulator a missing barrier need not lead to a wrong result: it is a data race that shows it, or a wrong result.
"""

import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120


def fences_of_the_source():
    """As the emulator names them; `__syncthreads csrc/cuda/scan.cuh:75`."""
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for name in re.findall(r"\b(?:__syncthreads\w*|__threadfence)\b", line.partition("//")[0]):
                yield f"{name} {path.relative_to(ROOT)}:{number}"


def run(binary, *arguments, **options):
    for prefix in ([], ["setarch", "--addr-no-randomize"]):
        done = subprocess.run([*prefix, binary, *arguments], capture_output=True, text=True, check=False, **options)
        # Where the kernel places memory in an order that this ThreadSanitizer has not heard of.
        if "unexpected memory mapping" not in done.stderr:
            break
    return done


def shows(binary, fence, tests):
    """The test that fails without the fence, or None."""
    # The first race is enough, and nobody asks where it is.
    env = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 symbolize=0"}
    for test in tests:
        try:
            if run(binary, "--only", test, "--without", fence, env=env, timeout=TIMEOUT_S).returncode:
                return test
        except subprocess.TimeoutExpired:  # threads that go round for ever show it too
            return test
    return None


def main(binary, part=""):
    complete = run(binary, "--fences")
    reached_by = defaultdict(list)
    for line in complete.stdout.splitlines():
        test, reaches, fence = line.partition(" reaches ")
        if reaches:
            reached_by[fence].append(test)
        else:
            print(line)
    if complete.returncode or not reached_by:
        sys.exit(complete.stderr or "no fences")

    needless = 0
    for fence in sorted({*reached_by, *fences_of_the_source()}):
        if part in fence:
            start = time.monotonic()
            test = shows(binary, fence, reached_by[fence])
            needless += test is None
            seconds = time.monotonic() - start
            print(f"{seconds:5.1f} s  without {fence}: {f'{test} fails' if test else 'NOTHING FAILS'}", flush=True)
    sys.exit(f"{needless} fences that no test needs" if needless else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
