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
# Those of a loss, in two passes: all arguments by name, a tuple of tensors back.
PASSES = ["topk_policy_loss", "reverse_kl", "topk_forward_kl", "logprobs_backward", "reverse_kl_backward"]


def checked(op, *args, **kwargs):
    """All arguments of a call by name, as `triton.run` takes them."""
    from pruneopd_kernels import checks, reference
    from pruneopd_kernels.reference import _saving

    bound = inspect.signature(getattr(_saving if op in PASSES else reference, op)).bind(*args, **kwargs)
    bound.apply_defaults()
    if hasattr(checks, op):  # a backward pass gets what a forward pass has checked
        getattr(checks, op)(**bound.arguments, values=op in OPERATORS)  # on a GPU no values are looked at
    return dict(bound.arguments)


class Interpreted:
    """`INTERPRETED.token_stats(student_logits, teacher_logits, k=4)`: the call is checked here, computed there."""

    def __init__(self):
        self.process = None

    def __repr__(self):
        return "triton-interpreted"

    def __getattr__(self, op):
        if op not in OPERATORS + PASSES:
            raise AttributeError(op)
        return functools.partial(self.call, op)

    def call(self, op, *args, **kwargs):
        from pruneopd_kernels import results

        arguments = checked(op, *args, **kwargs)
        if self.process is None:
            command = [sys.executable, "-W", "ignore", __file__]
            environment = {**os.environ, "TRITON_INTERPRET": "1"}
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=os.path.dirname(__file__)
            )
            atexit.register(self.process.stdin.close)
        Pickler(self.process.stdin).dump((op, arguments))
        self.process.stdin.flush()
        outputs = pickle.load(self.process.stdout)
        if isinstance(outputs, str):
            raise RuntimeError(outputs)
        if op in PASSES:
            return outputs
        names = "".join(word.capitalize() for word in op.split("_"))
        return getattr(results, names)(*outputs)


INTERPRETED = Interpreted()


class Pickler(pickle.Pickler):
    """Tensors of any dtype with their strides and the memory around them, which torch's own way refuses for some."""

    def reducer_override(self, value):
        import torch

        if not isinstance(value, torch.Tensor):
            return NotImplemented
        memory = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy()
        return unpickled, (memory, value.dtype, value.storage_offset(), value.shape, value.stride())


def unpickled(memory, dtype, *place):
    import torch

    return torch.empty(0, dtype=dtype).set_(torch.from_numpy(memory).untyped_storage(), *place)


def fused_multiply_add(self, x, y, z):
    """As on a GPU: rounded once. Of float32 the product is exact in float64."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(np.float32), z.dtype.scalar)


def bfloat16_bits(convert):
    """The interpreter loses subnormals on the way between bfloat16 and float32, which a GPU does not."""
    import ml_dtypes
    import numpy as np
    import triton.language as tl

    def convert_exactly(data, from_dtype, to_dtype, rounding_mode):
        if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
            return data.astype(ml_dtypes.bfloat16).view(np.uint16)
        return convert(data, from_dtype, to_dtype, rounding_mode)

    return convert_exactly


def patch_once(interpreter):
    """The interpreter patches triton.language anew at every call of a function: half of its time."""
    patch, patched = interpreter._patch_lang, set()

    def patch_if_new(function):
        modules = frozenset(id(x) for x in function.__globals__.values() if inspect.ismodule(x))
        if modules not in patched:
            patch(function)
            patched.add(modules)
            # Triton 3.6 gives NumPy an array where a newer NumPy insists on a number.
            interpreter.tl.tensor.__index__ = lambda tensor: int(tensor.handle.data.item())
        return interpreter._LangPatchScope()  # which has nothing to restore

    interpreter._patch_lang = patch_if_new


class InThisProcess:
    """The same in a process that has not imported triton yet, and that will interpret whatever it calls."""

    def __init__(self):
        os.environ["TRITON_INTERPRET"] = "1"
        prepare()

    def __getattr__(self, op):
        return lambda *args, **kwargs: run(op, checked(op, *args, **kwargs))


def run(op, arguments):
    from pruneopd_kernels.dispatch import triton

    return triton.run(op, arguments)


def prepare():
    """Mends the interpreter where it computes other than a GPU, and where it takes its time."""
    import warnings

    import torch
    from triton.runtime import interpreter

    warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of NaN and overflow
    patch_once(interpreter)
    interpreter._convert_float = bfloat16_bits(interpreter._convert_float)
    interpreter.InterpreterBuilder.create_fma = fused_multiply_add
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # what is not written shows


def serve(requests, replies):
    import traceback

    prepare()
    while True:
        try:
            op, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            outputs = run(op, arguments)
        except Exception:
            outputs = traceback.format_exc()
        Pickler(replies).dump(outputs)
        replies.flush()


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[0:1] = [here, os.path.join(os.path.dirname(here), "lib"), os.path.dirname(os.path.dirname(here))]
    import interpreted  # by its name, which is in the pickles

    replies = sys.stdout.buffer
    sys.stdout = sys.stderr
    interpreted.serve(sys.stdin.buffer, replies)
