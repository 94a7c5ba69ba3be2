"""Run by test_compiled_files.py in a process of its own: tensors that lie between pages which must not be touched.

    python tests/lib/guarded_reads.py cpp|cuda-emulated|triton

A read or a write before the first element, beyond the last one, or in a row that does not count ends this process with
a fault.
"""

import ctypes
import faulthandler
import functools
import itertools
import mmap
import sys

import torch

import interpreted
from implementations import COMPILED, CUDA_EMULATED, HOST, LOGITS, LOSSES, Unregistered, flowing, leaf, named
from operators import example

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
    pages = max(1, -(-size // PAGE))
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    tensor = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset).view(values.shape)
    tensor.copy_(values)
    base = tensor.data_ptr() - offset
    protect(base, PAGE)
    protect(base + (pages + 1) * PAGE, PAGE)
    KEEP.append(memory)
    return tensor


def guarded(op, shape, width, dtype, at_end=True, k=None, logits=None):
    """An ordinary call whose tensors lie between guards; `logits`: what they are instead."""
    arguments = example(op, shape, width, k or min(16, width), dtype=dtype)
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and x.numel():
            if logits is not None and name.endswith("logits"):
                x = logits.to(dtype).expand(x.shape)
            arguments[name] = between_guards(x, at_end)
    return arguments


def calls(impls, op):
    return [impl for impl in impls if not (impl is HOST and op in LOSSES)]


def ends_of_tensors(impls, op, widths):
    for width, dtype, at_end in itertools.product(widths, DTYPES, [True, False]):
        for k in {1, min(16, width), min(256, width)}:
            arguments = guarded(op, (1, 2), width, dtype, at_end, k)
            for impl in calls(impls, op):
                impl.run(op, **arguments)
    for logits in (torch.arange(1037.0), torch.full((1037,), torch.nan)):
        arguments = guarded(op, (1, 2), 1037, torch.float32, k=256, logits=logits)
        for impl in calls(impls, op):
            impl.run(op, **arguments)


def beyond_vocab_size(impls, op):
    """Rows of one page each and a half: what lies beyond vocab_size in the last row is forbidden."""
    arguments = guarded(op, (1, 1), PAGE // 2, torch.float32)
    for name, ids in arguments.items():
        if name.endswith("ids"):
            ids.clamp_(max=PAGE // 4 - 4)
        elif name.endswith("logits"):
            protect(ids.data_ptr() + PAGE, PAGE)
    for impl, vocab_size in itertools.product(calls(impls, op), (PAGE // 4, PAGE // 4 - 3)):
        impl.run(op, **arguments, vocab_size=vocab_size)


def rows_that_do_not_count(impls, op):
    """Masked, without a weight or a candidate that counts: six rows of a page each, of which few are read."""
    for dtype in DTYPES:
        arguments = guarded(op, (1, 6), PAGE // dtype.itemsize, dtype)
        arguments["mask"] = torch.tensor([[True, True, op not in LOSSES, False, True, False]])
        unread = [3, 5]
        if op == "reverse_kl":
            arguments["weight"][0] = torch.tensor([0.0, 2.0, -0.0, 1.0, -1.0, 1.0])
            unread += [0, 2]
        if op == "topk_policy_loss":
            arguments["topk_ids"][0, 0], arguments["advantages"][0, 2] = -1, 0.0
            unread += [0, 2]
        for name, t in itertools.product((name for name in arguments if name.endswith("logits")), unread):
            protect(arguments[name].data_ptr() + t * PAGE, PAGE)
        for impl in calls(impls, op):
            impl.run(op, **arguments)


def rows_whose_gradient_nobody_asks_for(impls, op):
    """Backwards, where the gradient that comes in is 0."""
    for impl, dtype in itertools.product(impls, DTYPES):
        arguments = guarded(op, (1, 6), PAGE // dtype.itemsize, dtype) | {"mask": None}
        logits = arguments[leaf(op)].requires_grad_()
        with impl.chosen():
            outputs = named(impl.call(op, **arguments))
            for name, t in itertools.product((name for name in arguments if name.endswith("logits")), (0, 2, 3, 5)):
                protect(arguments[name].data_ptr() + t * PAGE, PAGE)
            into = flowing(op, outputs, torch.tensor([[0.0, 2.0, -0.0, 0.0, -1.0, 0.0]]))
            torch.autograd.grad([outputs[name] for name in into], logits, [*into.values()])


def logits_that_have_changed(impls, op):
    """Through .data between the passes, where autograd does not see it: no value is an address."""
    for impl, dtype in itertools.product(impls, DTYPES):
        arguments = guarded(op, (1, 4), 301, dtype) | {"mask": None}
        logits = arguments[leaf(op)].requires_grad_()
        logits.data[..., 7] = 90.0  # a peak
        with impl.chosen():
            outputs = named(impl.call(op, **arguments))
            into = flowing(op, outputs)
            for change in (-5.0, 95.0, torch.nan, -torch.inf):
                logits.data[..., 7] = change
                torch.autograd.grad([outputs[name] for name in into], logits, [*into.values()], retain_graph=True)


def outputs_between_guards():
    """What the Triton kernels write to, made with new_empty, lies between guards too."""
    new_empty = torch.Tensor.new_empty

    @functools.wraps(new_empty)
    def guarded_empty(like, shape, dtype=None, **of_interpreter):
        if of_interpreter or 0 in tuple(shape):
            return new_empty(like, shape, dtype=dtype, **of_interpreter)
        return between_guards(torch.zeros(tuple(shape), dtype=dtype or like.dtype), True)

    torch.Tensor.new_empty = guarded_empty


def main(kernels):
    widths = [1, 7, 16, 31, 33, 511, 513, 2048]  # on each side of a step of the CPU's loops and of a tile
    impls = [*COMPILED, HOST]
    if kernels == "cuda-emulated":
        impls, widths = [CUDA_EMULATED], [1, 7, 127, 129, 4097]
    if kernels == "triton":
        interpreted.prepare()
        outputs_between_guards()
        impls, widths = [Unregistered("triton", interpreted.run_here)], [7, 257, 4096, 4100]
    for op in LOGITS:
        ends_of_tensors(impls, op, widths)
        beyond_vocab_size(impls, op)
        rows_that_do_not_count(impls, op)
    for op in LOSSES if kernels == "cpp" else []:
        rows_whose_gradient_nobody_asks_for(COMPILED, op)
        logits_that_have_changed(COMPILED, op)


if __name__ == "__main__":
    faulthandler.enable()
    torch.manual_seed(0), torch.set_num_threads(1)
    main(*sys.argv[1:])
    print("nothing else was read")
