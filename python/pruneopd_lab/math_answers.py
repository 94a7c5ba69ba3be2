r"""Grades by the last \boxed{...}: math-verify compares the answers, in a process of its own.

An answer such as 9^{9^{9^9}} keeps a computer algebra system busy for ever. math-verify's own time limit works in a
main thread only, and not within a long operation on one integer; a process is ended by its alarm at any point.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from pruneopd_trainer.errors import TrainerError

LONGEST_ANSWER = 1000
"""Characters in a box that are still compared with an answer."""
SECONDS = 3
"""For one comparison."""
MEMORY = 4 * 2**30
"""Bytes of address space of the process."""
READY = "ready"


def boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} that is closed, without blanks around it; None if there is none."""
    opened: list[re.Match[str]] = []
    last: tuple[int, int] | None = None
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append(token)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{" and (last is None or start.end() > last[0]):
                last = (start.end(), token.start())
    return None if last is None else text[slice(*last)].strip()


class MathAnswers:
    """Compare answers, from any thread, in a process that is started again after a comparison has ended it."""

    def __init__(self) -> None:
        """Start the process.

        Raises:
            TrainerError: It does not start, for instance because math-verify is not installed.
        """
        self._lock = threading.Lock()
        self._start()

    def __call__(self, answer: str, response: str) -> float:
        r"""Grade a response: 1.0 if the content of its last closed \boxed{...} equals the answer, else 0.0.

        Equal is literally, without the blanks around it, or to math-verify. If the answer has a \boxed{...} itself, the
        content of the last one counts.
        """
        given = boxed(response)
        if given is None or len(given) > LONGEST_ANSWER:
            return 0.0
        answer = boxed(answer) or answer.strip()
        return float(given == answer or self.equal(answer, given))

    def equal(self, answer: str, other: str) -> bool:
        """Return whether two answers in LaTeX are equal; False if that needs more than SECONDS or MEMORY."""
        with self._lock:
            if self._process.poll() is not None:  # also after a fork: it is the child of another process
                self._end()
                self._start()
            try:
                self._process.stdin.write(json.dumps([answer, other]) + "\n")
                self._process.stdin.flush()
                reply = self._process.stdout.readline().strip()
            except BrokenPipeError:
                reply = ""
            if not reply:
                self._end()
            return bool(reply == "true")

    def _start(self) -> None:
        # Isolated: no module of the working directory takes the place of another.
        paths = [path for path in sys.path if path] + [str(Path(__file__).parents[1])]
        code = f"import sys; sys.path[:] = {paths!r}; from {__name__} import serve; serve()"
        process: Any = subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the trainer, which may grade once more before it stops
        )
        self._process, self._end = process, weakref.finalize(self, _end, process)
        reply = process.stdout.readline().strip()
        if reply != READY:
            self._end()
            raise TrainerError(f"math-verify cannot be started: {reply or 'its process ends at once'}")


def _end(process: Any) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # what was still to be written has no reader
            pipe.close()


def serve() -> None:
    """Run the process: read `[answer, other]` a line and write whether they are equal, until the input ends."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # nothing else that is printed gets among the replies
    logging.disable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most), most))
    try:
        import math_verify
    except ImportError as error:
        print(error, file=replies, flush=True)
        return
    print(READY, file=replies, flush=True)
    for line in sys.stdin:
        answer, other = (f"\\boxed{{{text}}}" for text in json.loads(line))
        signal.alarm(SECONDS)
        try:
            parsed = [math_verify.parse(text, parsing_timeout=None) for text in (answer, other)]
            equal = all(parsed) and math_verify.verify(*parsed, timeout_seconds=None)
        except (Exception, MemoryError, RecursionError):  # what a computer algebra system makes of any text
            equal = False
        signal.alarm(0)
        print(json.dumps(bool(equal)), file=replies, flush=True)
