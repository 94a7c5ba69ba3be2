"""The Triton kernels in Triton's interpreter, on the CPU.

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


@functools.cache
def process():
    command = [sys.executable, "-W", "ignore", __file__]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=os.path.dirname(__file__))
    atexit.register(started.stdin.close)
    return started


def run(op, arguments):
    """Return the outputs of a kernel, computed in the other process, with those saved for the backward pass."""
    Pickler(process().stdin).dump((op, arguments))
    process().stdin.flush()
    outputs = pickle.load(process().stdout)
    if isinstance(outputs, str):
        raise RuntimeError(outputs)
    return outputs


class Pickler(pickle.Pickler):
    """Pickle tensors of any dtype with their strides and the memory around them; torch refuses some."""

    def reducer_override(self, value):
        import torch

        if not isinstance(value, torch.Tensor):
            return NotImplemented
        memory = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy()
        return unpickled, (memory, value.dtype, value.storage_offset(), value.shape, value.stride())


def unpickled(memory, dtype, *place):
    import torch

    return torch.empty(0, dtype=dtype).set_(torch.from_numpy(memory).untyped_storage(), *place)


# --- in the process that interprets ----------------------------------------------------------------------------------


def prepare():
    """Make triton interpret, and fix the interpreter where it differs from a GPU or is slow."""
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import warnings

    import torch
    from triton.runtime import interpreter

    warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of NaN and overflow
    patch_once(interpreter)
    interpreter._convert_float = bfloat16_bits(interpreter._convert_float)
    interpreter.InterpreterBuilder.create_fma = fused_multiply_add
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # what is not written shows


def fused_multiply_add(self, x, y, z):
    """Round once, as a GPU does. The product of two float32 is exact in float64."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(np.float32), z.dtype.scalar)


def bfloat16_bits(convert):
    """Keep subnormals between bfloat16 and float32, as a GPU does; the interpreter loses them."""
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
    """Patch triton.language once per function. The interpreter does it at every call, half of its time."""
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


def run_here(op, arguments):
    """Do what `run` does, in a prepared process."""
    from pruneopd_kernels import triton
    from pruneopd_kernels.ops._operator import compiled

    declared = {op.name: op for op in compiled()}[op]
    return tuple(vars(triton)[op](declared.record(**arguments)))


def serve(requests, replies):
    import traceback

    prepare()
    while True:
        try:
            op, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            outputs = run_here(op, arguments)
        except Exception:
            outputs = traceback.format_exc()
        Pickler(replies).dump(outputs)
        replies.flush()


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[0:1] = [here, os.path.dirname(os.path.dirname(here))]
    import interpreted  # by its name, which is in the pickles

    replies = sys.stdout.buffer
    sys.stdout = sys.stderr
    interpreted.serve(sys.stdin.buffer, replies)
