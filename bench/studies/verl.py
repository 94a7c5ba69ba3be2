"""verl's `compute_forward_kl_topk`, and the operator in its place: time and memory of both passes, on the CPU.

python -m bench verl                                      256 positions, V = 151936, k = 16; writes the results
python -m bench verl --positions 32 --vocabulary 1000 --no-save                                       a small one

Both are called as verl's engine calls them. "full" is verl's older path, a log-softmax of all logits; "chunked" the one
with `use_chunked_topk`, in four chunks: verl's have 4096 positions of some ten thousand. Memory is that of a process of
its own, beyond the logits and their gradient. If verl is not installed there is nothing to compare with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.measure import memory, timing
from bench.measure.timing import Contender
from bench.operators import OPERATORS
from bench.report import rows as results
from bench.studies.command import Options, Study

K = 16
CHUNKS = 4
WAYS = ("verl full", "verl chunked", "pruneopd")
DTYPES = ("float32", "bfloat16")
TOLERANCE = 1e-5
GRADIENT = {"float32": 1e-5, "bfloat16": 2**-8}  # which is rounded to the logits' dtype


@dataclass(frozen=True)
class Size:
    positions: int = 256
    vocabulary: int = 151936


@dataclass(frozen=True)
class Data:
    """The logits of a packed micro-batch, and what a teacher's server sent for it."""

    logits: Tensor
    teacher_ids: Tensor
    teacher_logprobs: Tensor
    upstream: Tensor

    @staticmethod
    def of(size: Size, dtype: str) -> Data:
        random = torch.Generator().manual_seed(0)
        logits = torch.randn(1, size.positions, size.vocabulary, generator=random) * 3
        upstream = torch.rand(logits.shape[:2], generator=random)
        noise = torch.empty(size.vocabulary)
        tops = [(row + noise.normal_(generator=random)).log_softmax(-1).topk(K) for row in logits[0]]
        ids, logprobs = (torch.stack([getattr(top, part) for top in tops]) for part in ("indices", "values"))
        halves = size.positions // 2, size.positions - size.positions // 2
        ids, logprobs = (torch.nested.as_nested_tensor(list(x.split(halves)), layout=torch.jagged)
                         for x in (ids, logprobs))  # fmt: skip
        return Data(logits.to(getattr(torch, dtype)).requires_grad_(), ids, logprobs, upstream)


def function_of(way: str, size: Size) -> Callable[[Data], dict[str, Tensor]]:
    """Return both passes by verl's function, or by the one that `patch_verl` puts there."""
    from verl.trainer.distillation.fsdp import losses
    from verl.workers.config import DistillationConfig, DistillationLossConfig

    from pruneopd_kernels.integrations.verl import patch_verl

    forward = losses.compute_forward_kl_topk
    if way == "pruneopd":
        patch_verl()
        forward, losses.compute_forward_kl_topk = losses.compute_forward_kl_topk, forward
    config = DistillationConfig(
        distillation_loss=DistillationLossConfig(
            loss_mode="forward_kl_topk", topk=K, use_task_rewards=False, use_policy_gradient=False,
            use_chunked_topk=way == "verl chunked", chunked_topk_chunk_size=-(-size.positions // CHUNKS),
        )
    )  # fmt: skip

    def both(data: Data) -> dict[str, Tensor]:
        outputs = forward(data.logits, data.teacher_logprobs, data.teacher_ids, config, "thd")
        (gradient,) = torch.autograd.grad(outputs["distillation_losses"], data.logits, data.upstream)
        return {**outputs, "gradient": gradient}

    return both


def complaints(data: Data, size: Size, dtype: str) -> list[str]:
    """Return what differs from verl's losses, masses and gradient of the same logits in float64."""
    exact = replace(data, logits=data.logits.detach().double().requires_grad_())
    gold, found = function_of("verl full", size)(exact), function_of("pruneopd", size)(data)
    wrong = []
    for name in ("distillation_losses", "student_mass", "teacher_mass", "gradient"):
        error = float((found[name].detach() - gold[name].detach()).abs().max())
        if not error <= (GRADIENT[dtype] if name == "gradient" else TOLERANCE):
            wrong.append(f"{dtype}: {name} is {error:.1e} from that of verl in float64")
    return wrong


def _measure_here(description: dict[str, Any]) -> int:
    dtype, way = description.pop("dtype"), description.pop("way")
    size = Size(**description)
    run, data, small = function_of(way, size), Data.of(size, dtype), Data.of(Size(4, 64), dtype)
    grown, outputs = memory.growth(lambda: run(small), lambda: run(data))
    return grown - sum(tensor.nbytes for tensor in outputs.values())


def run(size: Size, options: Options) -> tuple[list[results.Row], list[str]]:
    """Return the rows, or what is wrong with the answers."""
    (replaced,) = (name for name, op in OPERATORS.items() if op.usual)
    rows: list[results.Row] = []
    wrong: list[str] = []
    for dtype in DTYPES:
        data = Data.of(size, dtype)
        if found := complaints(data, size, dtype):
            wrong += found
            continue
        read = functools.partial(torch.amax, data.logits.detach(), -1)
        contenders = [Contender(way, functools.partial(function_of(way, size), data), read) for way in WAYS]
        timings = timing.interleave(contenders, seconds=options.seconds, min_rounds=options.rounds)
        del data, contenders, read  # what is measured next has processes of its own
        for way, took in timings.items():
            fields: results.Row = {"op": replaced, "dtype": dtype, "impl": way, "k": K, "passes": "both"}
            row = results.head("verl", **fields, **asdict(size), verl=results.version("verl")) | results.times(took)
            row |= {"times_faster_than_verl": results.digits(timings[WAYS[0]].median_s / took.median_s)}
            description = {**asdict(size), "dtype": dtype, "way": way, "threads": options.threads}
            rows.append(row | {"extra_bytes": memory.of_process("bench.studies.verl", description)})
    return rows, wrong


SHOWN = ("dtype", "impl", "median_ms", "times_faster_than_verl", "extra_bytes")
STUDY = Study("verl", __doc__, Size(), run, SHOWN, seconds=20, rounds=5, package="verl", memory=_measure_here)


def main(arguments: Sequence[str] | None = None) -> int:
    return STUDY.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
