"""Run by test_linear_passes.py in a process of its own: what a loss and its gradients need beyond themselves.

Prints a JSON line a case: dtype, loss, reduction, and bytes at the peak beyond inputs, outputs and gradients, the
head's gradient counted once, in float32.
"""

import json

import torch

from bench.measure import memory
from hidden_states import LOSSES
from pruneopd_kernels import linear_opd_loss

# A chunk's logits of 40 MiB: what is larger than 32 MiB glibc gives back to the system at once.
H, V, CHUNK_BYTES = 128, 65536, 40 * 2**20
CHUNK_SIZE = CHUNK_BYTES // (V * 4)  # logits are float32


def run(hidden, weight, teacher, **options):
    out = linear_opd_loss(hidden, weight, teacher, weight.detach(), k=4, **options)
    out.loss.sum().backward()
    return out


def extra(dtype, **options):
    """Two chunks; every second position is masked."""
    hidden = torch.randn(4, CHUNK_SIZE, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) / 32).to(dtype).requires_grad_()
    teacher = hidden.detach() + 0.1
    mask = torch.arange(CHUNK_SIZE).expand(4, -1) % 2
    grown, out = memory.growth(few, lambda: run(hidden, weight, teacher, mask=mask, chunk_size=CHUNK_SIZE, **options))
    return grown - hidden.grad.nbytes - weight.numel() * 4 - sum(x.nbytes for x in out)


def few():
    hidden = torch.randn(1, 8, H, requires_grad=True)
    run(hidden, torch.randn(64, H, requires_grad=True), hidden.detach())


def main():
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.bfloat16):
        for loss in LOSSES:
            for reduction in ("none", "sum"):
                if dtype == torch.float32 or (loss, reduction) == ("reverse_kl", "sum"):
                    peak = extra(dtype, loss=loss, reduction=reduction)
                    case = {"dtype": str(dtype), "loss": loss, "reduction": reduction}
                    print(json.dumps(case | {"extra": peak, "chunk": CHUNK_BYTES}), flush=True)


if __name__ == "__main__":
    main()
