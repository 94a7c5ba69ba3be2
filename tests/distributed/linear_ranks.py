"""Run by test_linear_passes.py: two processes of DistributedDataParallel, and one that has all the data.

`linear_ranks.py <rank> <file for gloo to meet at> <loss> <reduction> <folder>` saves the gradients that its rank has.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hidden_states import K, problem
from pruneopd_kernels import linear_opd_loss

RANKS = 2


class Student(nn.Module):
    """One layer, and a head that is also the embedding of what goes in."""

    def __init__(self, given, loss, reduction):
        super().__init__()
        self.embedding = nn.Parameter(given.student_weight.clone())
        self.trunk = nn.Linear(6, 6, dtype=given.student_weight.dtype)
        self.options = {"loss": loss, "reduction": reduction, "k": K, "w_drop": 0.2, "chunk_size": 4}
        self.options |= {"teacher_weight": given.teacher_weight, "impl": "reference"}

    def forward(self, token_ids, teacher_hidden, mask):
        hidden = self.trunk(self.embedding[token_ids])
        loss = linear_opd_loss(hidden, self.embedding, teacher_hidden, mask=mask, **self.options).loss
        return loss.sum()


def student(loss, reduction):
    torch.manual_seed(0)
    return Student(problem(torch.float64, bias=False), loss, reduction)


def batch(rank):
    """Of two responses each, one rank's or all ranks' (None)."""
    given = problem(torch.float64, bias=False, b=2 * RANKS)
    token_ids = torch.randint(50, given.mask.shape, generator=torch.Generator().manual_seed(1))
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    return token_ids[rows], given.teacher_hidden[rows], given.mask[rows]


def gradients(model):
    return [parameter.grad for parameter in model.parameters()]


def main(rank, meeting, loss, reduction, folder):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=RANKS)
    model = DistributedDataParallel(student(loss, reduction))
    for _ in range(2):  # twice, so that what one step leaves behind would show in the next
        model.zero_grad()
        model(*batch(int(rank))).backward()
    torch.save(gradients(model.module), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
