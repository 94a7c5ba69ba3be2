"""The losses of TRL's trainers beside TRL's own: time and peak memory of one forward and backward pass.

python -m bench trl                                                4096 positions, H = 2048, V = 151936
python -m bench trl --positions 64 --vocabulary 1000 --hidden 32   a small one

On a GPU operands are bfloat16, on a CPU float32. If TRL is not installed there is nothing to compare with, and the run
says so. A loss is first held to TRL's, without pruning; what is timed has the paper's hyperparameters. The rows are
printed, and written if `--file` names a place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.measure import devices, memory, timing
from bench.measure.timing import Contender
from bench.report import rows as results
from bench.studies.command import Options, Study
from pruneopd_kernels import PruneConfig

RESPONSES = 4
STOCK = "trl"
LOSSES = ("reverse_kl", "topk_policy", "divergence")
EQUAL = ("reverse_kl", "divergence")  # to TRL's without pruning; topk_policy is with k = V alone
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Size:
    positions: int = 4096
    hidden: int = 2048
    vocabulary: int = 151936


Inputs = dict[str, Tensor]


def inputs(size: Size, device: str) -> Inputs:
    """Return hidden states and heads as TRL's loss takes them; the teacher's resemble the student's."""
    random = torch.Generator(device).manual_seed(0)
    shape = (RESPONSES, size.positions // RESPONSES, size.hidden)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    student, weight = draw(*shape), draw(size.vocabulary, size.hidden) / size.hidden**0.5
    return {
        "student_hidden_states": student.to(dtype).requires_grad_(),
        "teacher_hidden_states": (student + 0.3 * draw(*shape)).to(dtype),
        "student_lm_head_weight": weight.to(dtype).requires_grad_(),
        "teacher_lm_head_weight": weight.to(dtype),
        "completion_mask": torch.ones(shape[:2], device=device),
    }


def step(given: Inputs, loss: str, prune: PruneConfig) -> list[Tensor]:
    """Return the loss and its gradients, of the hidden states and of the head."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    from pruneopd_kernels.integrations.trl.losses import PrunedLoss

    mask = given["completion_mask"]
    form: Callable[..., Any] = _chunked_divergence_loss
    if loss != STOCK:
        form = PrunedLoss(prune, loss, torch.zeros_like(mask, dtype=torch.int64))  # type: ignore[arg-type]
    value: Tensor = form(**given, beta=1.0, num_items_in_batch=mask.numel())[0]
    gradients = torch.autograd.grad(value, [given["student_hidden_states"], given["student_lm_head_weight"]])
    return [value.detach(), *gradients]


def complaints(given: Inputs) -> list[str]:
    """Return what differs from TRL's loss and gradients without pruning."""
    names = ("the loss", "the hidden states' gradient", "the head's gradient")
    unpruned = PruneConfig(w_drop=0.0, w_base=0.0)
    norms = {loss: [float(x.float().norm()) for x in step(given, loss, unpruned)] for loss in (STOCK, *EQUAL)}
    allowed = TOLERANCE[given["student_hidden_states"].dtype]
    return [
        f"{loss}: {name} is {abs(norm - gold) / gold:.1e} from TRL's"
        for loss in EQUAL
        for name, norm, gold in zip(names, norms[loss], norms[STOCK], strict=True)
        if not abs(norm - gold) / gold <= allowed
    ]


def run(size: Size, options: Options) -> tuple[list[results.Row], list[str]]:
    """Return the rows, or what is wrong with the answers."""
    given = inputs(size, options.device)
    if wrong := complaints(given):
        return [], wrong
    on_gpu = options.device == "cuda"
    read = functools.partial(torch.amax, devices.something_else("cuda") if on_gpu else torch.ones(1))
    calls = {loss: functools.partial(step, given, loss, PruneConfig()) for loss in (STOCK, *LOSSES)}
    timings = timing.interleave(
        [Contender(loss, call, read) for loss, call in calls.items()], seconds=options.seconds,
        min_rounds=options.rounds, clock=devices.gpu_clock if on_gpu else timing.processor_clock,
    )  # fmt: skip
    dtype = str(given["student_hidden_states"].dtype).removeprefix("torch.")
    rows = []
    for loss, took in timings.items():
        fields = {"op": "distillation loss", "loss": loss, "dtype": dtype, "trl": results.version("trl")}
        row = results.head("trl", options.device, **fields, **asdict(size)) | results.times(took)
        row |= {"times_faster_than_trl": results.digits(timings[STOCK].median_s / took.median_s)}
        rows.append(row | ({"extra_bytes": memory.on_gpu(calls[loss])} if on_gpu else {}))
    return rows, []


SHOWN = ("loss", "dtype", "positions", "median_ms", "times_faster_than_trl", "extra_bytes")
STUDY = Study("trl", __doc__, Size(), run, SHOWN, seconds=5, rounds=3, package="trl")


def main(arguments: Sequence[str] | None = None) -> int:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return STUDY.main(arguments, save=False, device={"choices": ("cpu", "cuda"), "default": default})
