"""Run in a process of its own: what operators, or functions from hidden states, allocate beyond inputs and outputs.

    python tests/lib/memory_peaks.py operators|linear

Prints a JSON line a call: its arguments, and the peak of the resident memory in bytes.
"""

import functools
import itertools
import json
import sys

import torch

from bench.measure import memory
from hidden_states import LOSSES, REDUCTIONS
from implementations import COMPILED, DECLARED
from pruneopd_kernels import linear_opd_loss


def extra(function, *args, small=lambda: None, **kwargs):
    """Return the growth of the peak of the resident memory during the call, less the outputs."""
    grown, outputs = memory.growth(small, lambda: function(*args, **kwargs))
    return grown - sum(x.nbytes for x in outputs)


def operators():
    ids, drift = torch.randint(60, (64, 1024, 16)) + 60 * torch.arange(16), torch.rand(64, 12288) < 0.5
    calls = [("reliability_from_topk", {}, ids, ids.flip(0)), ("reliability_from_drift", {}, drift)]
    for dtype in (torch.float32, torch.bfloat16):
        pair = [torch.randn(4, 16, 151936).to(dtype) for _ in range(2)]
        calls += [(op, {"k": k}, *pair) for op in ("reliability", "opd_loss", "token_stats") for k in (16, 256)]
        calls.append(("selected_logprobs", {}, pair[0], torch.randint(300, (4, 16, 512))))
    for impl in COMPILED:
        for op, options, *tensors in calls:
            given = dict(zip(DECLARED[op].tensors, tensors, strict=False)) | options
            few = given | {name: x[:8, ..., :300] for name, x in given.items() if name not in options}
            small = functools.partial(impl.call, op, **few)
            peak = extra(functools.partial(impl.call, op), small=small, **given)
            yield {"impl": repr(impl), "op": op, "dtype": str(tensors[0].dtype), **options, "extra": peak}


# A chunk's logits of 40 MiB: what is larger than 32 MiB glibc gives back to the system at once.
H, V, CHUNK_BYTES = 128, 65536, 40 * 2**20
CHUNK_SIZE = CHUNK_BYTES // (V * 4)  # logits are float32


def linear():
    """Two chunks, in which every second position is masked; of the head's gradient what is held in float32 counts."""

    def run(hidden, weight, teacher, **options):
        out = linear_opd_loss(hidden, weight, teacher, weight.detach(), k=4, **options)
        out.loss.sum().backward()
        return [*out, hidden.grad, torch.empty(weight.shape, device="meta")]

    def few():
        run(torch.randn(1, 8, H, requires_grad=True), torch.randn(64, H, requires_grad=True), torch.randn(1, 8, H))

    mask = torch.arange(CHUNK_SIZE).expand(4, -1) % 2
    for dtype, loss, reduction in itertools.product((torch.float32, torch.bfloat16), LOSSES, REDUCTIONS):
        if dtype == torch.float32 or (loss, reduction) == ("reverse_kl", "sum"):
            hidden = torch.randn(4, CHUNK_SIZE, H).to(dtype).requires_grad_()
            weight = (torch.randn(V, H) / 32).to(dtype).requires_grad_()
            options = {"loss": loss, "reduction": reduction}
            teacher = hidden.detach() + 0.1
            peak = extra(run, hidden, weight, teacher, small=few, mask=mask, chunk_size=CHUNK_SIZE, **options)
            yield {"dtype": str(dtype), **options, "extra": peak, "chunk": CHUNK_BYTES}


if __name__ == "__main__":
    torch.set_num_threads(2)
    for row in {"operators": operators, "linear": linear}[sys.argv[1]]():
        print(json.dumps(row), flush=True)
