"""Run by test_library.py in a process of its own: logits that lie between pages which must not be touched.

A read before the first logit, beyond the last one, or of a masked position ends this process with a fault.
"""

import ctypes
import faulthandler
import itertools
import mmap

import ml_dtypes
import numpy as np
import torch

from implementations import COMPILED, as_array
from pruneopd_kernels import host

PAGE = mmap.PAGESIZE
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEEP = []


def protect(address, length):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(address, length, 0) == 0, ctypes.get_errno()


def between_guards(values, at_end):
    """A copy of the tensor that ends where a forbidden page begins, or begins where one ends."""
    size = values.numel() * values.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    tensor = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset).view(values.shape)
    tensor.copy_(values)
    base = tensor.data_ptr() - offset
    protect(base, PAGE)
    protect(base + (pages + 1) * PAGE, PAGE)
    KEEP.append(memory)
    return tensor


def call_all(student, teacher, mask=None, **kwargs):
    for impl in COMPILED:
        impl.reliability(student, teacher, mask, **kwargs)
        impl.token_stats(student, teacher, mask, **kwargs)
    host.token_stats(*map(as_array, (student, teacher)), None if mask is None else mask.numpy(), **kwargs)


def ends_of_tensors():
    for width, dtype, at_end in itertools.product(
        [1, 2, 7, 16, 31, 33, 64, 511, 512, 513, 1037, 2048], DTYPES, [True, False]
    ):
        student, teacher = (between_guards(torch.randn(1, 2, width).to(dtype), at_end) for _ in range(2))
        for k in {1, min(16, width), min(256, width)}:
            call_all(student, teacher, k=k)
    ramp = torch.arange(1037.0).expand(1, 2, -1)
    call_all(between_guards(ramp, True), between_guards(ramp.flip(-1), True), k=256)
    nan = torch.full((1, 2, 1037), torch.nan)
    call_all(between_guards(nan, True), between_guards(ramp, True), k=16)


def beyond_vocab_size():
    """Rows of one page each and a half: what lies beyond vocab_size in the last row is forbidden."""
    width = 2 * PAGE // 4
    student, teacher = (between_guards(torch.randn(1, 1, width), True) for _ in range(2))
    for x in (student, teacher):
        protect(x.data_ptr() + PAGE, PAGE)
    for vocab_size in (PAGE // 4, PAGE // 4 - 3):
        call_all(student, teacher, vocab_size=vocab_size)


def masked_positions():
    for dtype in DTYPES:
        width = PAGE // dtype.itemsize
        student, teacher = (between_guards(torch.randn(1, 6, width).to(dtype), True) for _ in range(2))
        mask = torch.tensor([[False, True, False, False, True, False]])
        for x in (student, teacher):
            for t in (0, 2, 3, 5):
                protect(x.data_ptr() + t * PAGE, PAGE)
        call_all(student, teacher, mask)


if __name__ == "__main__":
    faulthandler.enable()
    torch.manual_seed(0)
    assert ml_dtypes.bfloat16(1) == np.float32(1)
    ends_of_tensors()
    beyond_vocab_size()
    masked_positions()
    print("nothing else was read")
