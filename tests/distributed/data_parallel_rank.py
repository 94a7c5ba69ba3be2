"""What a rank does in the tests of data parallelism: importable by its process, which imports no tests."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hidden_states import problem
from pruneopd_kernels import ResponseBudget, linear_opd_loss


class Student(nn.Module):
    """One layer, and a head that is also the embedding of what goes in."""

    def __init__(self, loss, reduction):
        super().__init__()
        given = problem(bias=False)
        self.embedding = nn.Parameter(given.student_weight.clone())
        self.trunk = nn.Linear(6, 6, dtype=given.student_weight.dtype)
        self.options = {"loss": loss, "reduction": reduction, "k": 4, "w_drop": 0.2, "chunk_size": 4}
        self.options |= {"teacher_weight": given.teacher_weight, "impl": "reference"}

    def forward(self, token_ids, teacher_hidden, mask):
        hidden = self.trunk(self.embedding[token_ids])
        return linear_opd_loss(hidden, self.embedding, teacher_hidden, mask=mask, **self.options).loss.sum()


def gradients(group, loss, reduction, is_whole=False):
    """Those of this rank's two responses, averaged over two ranks; or of all four by this process."""
    torch.manual_seed(0)
    model = student = Student(loss, reduction)
    given, rows = problem(bias=False, b=4), slice(None)
    token_ids = torch.randint(50, given.mask.shape, generator=torch.Generator().manual_seed(1))
    if not is_whole:
        model, rank = DistributedDataParallel(student, process_group=group), dist.get_rank(group)
        rows = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):  # twice, so that what one step leaves behind would show in the next
        model.zero_grad()
        model(token_ids[rows], given.teacher_hidden[rows], given.mask[rows]).backward()
    return [parameter.grad for parameter in student.parameters()]


def budgets(group, batches):
    """The lengths after each batch, of which this rank has its part."""
    budget = ResponseBudget(200, 100, 400, 50, 20, 0.5, 2, group=group or dist.group.WORLD)
    return [budget.update(torch.tensor(batch[dist.get_rank(group)], dtype=torch.int32)) for batch in batches]
