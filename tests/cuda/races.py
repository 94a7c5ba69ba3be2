"""Runs the tests that were built for ThreadSanitizer; then once without each fence of the kernels, and it must show.

    python tests/cuda/races.py build/tests-cuda/cuda_tests_thread [part of a fence's place]

In the emulator a missing barrier need not lead to a wrong result: it is a data race that shows it, or a wrong result.
"""

import os
import subprocess
import sys
import time
from collections import defaultdict

TIMEOUT_S = 120


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
    for fence, tests in sorted(reached_by.items()):
        if part not in fence:
            continue
        start = time.monotonic()
        test = shows(binary, fence, tests)
        needless += test is None
        print(
            f"{time.monotonic() - start:5.1f} s  without {fence}: {f'{test} fails' if test else 'NOTHING FAILS'}",
            flush=True,
        )
    sys.exit(needless)


if __name__ == "__main__":
    main(*sys.argv[1:])
