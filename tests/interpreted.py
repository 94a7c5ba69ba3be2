"""The Triton kernels in Triton's interpreter, on the CPU: `triton-interpreted` among the implementations.

Triton chooses between compiler and interpreter when it is imported. So the interpreter has a process of its own, which
this file starts when it is first called and which is this file again: requests come in and results go out as pickles.
"""

import atexit
import functools
import inspect
import os
import pickle
import subprocess
import sys

OPERATORS = ["reliability", "reliability_from_topk", "reliability_from_drift", "token_stats"]


class Interpreted:
    """`INTERPRETED.token_stats(student_logits, teacher_logits, k=4)`: the call is checked here, computed there."""

    def __init__(self):
        self.process = None

    def __repr__(self):
        return "triton-interpreted"

    def __getattr__(self, op):
        if op not in OPERATORS:
            raise AttributeError(op)
        return functools.partial(self.call, op)

    def call(self, op, *args, **kwargs):
        import pruneopd_kernels

        reference = getattr(pruneopd_kernels.reference, op)
        bound = inspect.signature(reference).bind(*args, **kwargs)
        bound.apply_defaults()
        getattr(pruneopd_kernels.checks, op)(**bound.arguments, values=True)
        if self.process is None:
            command = [sys.executable, "-W", "ignore", __file__]
            environment = {**os.environ, "TRITON_INTERPRET": "1"}
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=os.path.dirname(__file__)
            )
            atexit.register(self.process.stdin.close)
        pickle.dump((op, bound.arguments), self.process.stdin)
        self.process.stdin.flush()
        outputs = pickle.load(self.process.stdout)
        if isinstance(outputs, str):
            raise RuntimeError(outputs)
        names = "".join(word.capitalize() for word in op.split("_"))
        return getattr(pruneopd_kernels.results, names)(*outputs)


INTERPRETED = Interpreted()


def fused_multiply_add(self, x, y, z):
    """As on a GPU: rounded once. Of float32 the product is exact in float64."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(np.float32), z.dtype.scalar)


def patch_once(interpreter):
    """The interpreter patches triton.language anew at every call of a function: half of its time."""
    patch, patched = interpreter._patch_lang, set()

    def patch_if_new(function):
        modules = frozenset(id(x) for x in function.__globals__.values() if inspect.ismodule(x))
        if modules not in patched:
            patch(function)
            patched.add(modules)
        return interpreter._LangPatchScope()  # which has nothing to restore

    interpreter._patch_lang = patch_if_new


def serve(requests, replies):
    import traceback

    import torch
    from triton.runtime import interpreter

    from pruneopd_kernels.ops import _triton

    patch_once(interpreter)
    interpreter.InterpreterBuilder.create_fma = fused_multiply_add
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # what is not written shows
    while True:
        try:
            op, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            outputs = _triton.run(op, arguments)
        except Exception:
            outputs = traceback.format_exc()
        pickle.dump(outputs, replies)
        replies.flush()


if __name__ == "__main__":
    sys.path[0:1] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    replies = sys.stdout.buffer
    sys.stdout = sys.stderr
    serve(sys.stdin.buffer, replies)
