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

from arrays import as_array
from implementations import COMPILED
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


def call_losses(student, teacher, mask=None, **kwargs):
    """Forwards and backwards, where only the logits lie between guards."""
    shape, width = student.shape[:-1], kwargs.get("vocab_size", student.shape[-1])
    for impl, m in itertools.product(COMPILED, {1, min(16, width)}):
        ids = torch.randint(width, (*shape, m))
        ids[..., -1] = width - 1
        advantages, log_q = torch.randn(*shape, m), torch.randn(*shape, m) - 3
        impl.loss("topk_policy_loss", None, student, ids, advantages, mask, **kwargs)
        impl.loss("reverse_kl", None, student, teacher, mask, **kwargs)
        impl.loss("topk_forward_kl", None, student, ids, log_q, mask, **kwargs)


def ends_of_tensors():
    for width, dtype, at_end in itertools.product(
        [1, 2, 7, 16, 31, 33, 64, 511, 512, 513, 1037, 2048], DTYPES, [True, False]
    ):
        student, teacher = (between_guards(torch.randn(1, 2, width).to(dtype), at_end) for _ in range(2))
        for k in {1, min(16, width), min(256, width)}:
            call_all(student, teacher, k=k)
        call_losses(student, teacher)
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
        call_losses(student, teacher, vocab_size=vocab_size)


def rows_of_a_page(dtype, readable):
    """Six positions of a page each, of which only these may be read."""
    width = PAGE // dtype.itemsize
    pair = [between_guards(torch.randn(1, 6, width).to(dtype), True) for _ in range(2)]
    for x, t in itertools.product(pair, {0, 1, 2, 3, 4, 5} - set(readable)):
        protect(x.data_ptr() + t * PAGE, PAGE)
    return pair


def masked_positions():
    for dtype in DTYPES:
        student, teacher = rows_of_a_page(dtype, readable=[1, 4])
        mask = torch.tensor([[False, True, False, False, True, False]])
        call_all(student, teacher, mask)
        call_losses(student, teacher, mask)


def rows_that_no_loss_needs():
    """Without a weight, without a candidate that counts; and backwards, without a gradient that is asked for."""
    for impl, dtype in itertools.product(COMPILED, DTYPES):
        student, teacher = rows_of_a_page(dtype, readable=[1, 4])
        weight = torch.tensor([[0.0, 2.0, -0.0, 0.0, -1.0, 0.0]])
        impl.loss("reverse_kl", None, student, teacher, weight=weight)
        ids, advantages = torch.full((1, 6, 3), 5), torch.ones(1, 6, 3)
        ids[0, 0], advantages[0, 2:4], ids[0, 5] = -1, 0.0, torch.tensor([-1, 5, -7])
        advantages[0, 5] = torch.tensor([1.0, 0.0, torch.nan])
        impl.loss("topk_policy_loss", None, student, ids, advantages)

        pair = rows_of_a_page(dtype, readable=range(6))
        options = {"impl": "cpp"}
        with impl.chosen():
            _, state = torch.ops.pruneopd._reverse_kl(*pair, **options)
            _, coefficients, of_student = torch.ops.pruneopd._topk_policy_loss(
                pair[0], ids.clamp(min=0), torch.ones(1, 6, 3), **options
            )
            for x, t in itertools.product(pair, (0, 2, 3, 5)):
                protect(x.data_ptr() + t * PAGE, PAGE)
            torch.ops.pruneopd._reverse_kl_backward(*pair, state, weight, **options)
            torch.ops.pruneopd._logprobs_backward(
                pair[0], ids.clamp(min=0), coefficients, of_student, weight, **options
            )


def logits_that_have_changed():
    """Through .data between the passes, where autograd does not see it: no value is an address."""
    for impl, dtype, op in itertools.product(COMPILED, DTYPES, ["reverse_kl", "topk_policy_loss"]):
        student, teacher = (between_guards(torch.randn(4, 301).to(dtype), True) for _ in range(2))
        student[:, 7] = 90.0  # a peak
        others = [teacher] if op == "reverse_kl" else [torch.full((4, 2), 7), torch.ones(4, 2)]
        leaf = student.detach().requires_grad_()
        loss = impl.call(op, leaf, *others)
        for change in (-5.0, 95.0, torch.nan, -torch.inf):
            student.data[:, 7] = change
            with impl.chosen():
                torch.autograd.grad(loss.sum(), leaf, retain_graph=True)


if __name__ == "__main__":
    faulthandler.enable()
    torch.manual_seed(0)
    assert ml_dtypes.bfloat16(1) == np.float32(1)
    ends_of_tensors()
    beyond_vocab_size()
    masked_positions()
    rows_that_no_loss_needs()
    logits_that_have_changed()
    print("nothing else was read")
