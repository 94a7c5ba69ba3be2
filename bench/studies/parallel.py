"""`pruneopd_kernels.parallel` by several processes on this machine, against one process with all its threads.

python -m bench parallel                                   reliability by two processes at N = 64, V = 151936, k = 16
python -m bench parallel --op token_stats --ranks 4

Each process has its slice of the logits, and an equal share of the threads. A round begins when all are ready, and
takes as long as the slowest. Prints one line of JSON, after the answer has been checked.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

import pruneopd_kernels
from bench.measure import answers, inputs
from bench.operators import LOGIT_OPS
from bench.report import rows as results


@dataclass(frozen=True)
class Case:
    op: str
    dtype: str
    shape: tuple[int, ...]  # of the positions
    k: int
    ranks: int
    threads: int  # of all processes together
    rounds: int


def main(arguments: Sequence[str] | None = None) -> int:
    case = _parse(arguments)
    torch.set_num_threads(case.threads)
    student, teacher = inputs.logits(case.dtype, "random", case.shape, "cpu")
    function = getattr(pruneopd_kernels, case.op)
    expected = function(student, teacher, k=case.k)
    alone = [_seconds(lambda: function(student, teacher, k=case.k)) for _ in range(case.rounds)]
    outputs, together, sent = _by_ranks(case)
    if wrong := answers.complaints(answers.fields(outputs), answers.fields(expected)):
        print(f"NOT TIMED: {'; '.join(wrong)}")
        return 1
    print(json.dumps(_row(case, alone, together, sent)))
    return 0


def _by_ranks(case: Case) -> tuple[Any, list[float], int]:
    """Return the answer of the first rank, the seconds of each round, and the bytes that one rank sends in a call."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(case.ranks):
            here, there = context.Pipe()
            process = context.Process(target=_rank, args=(there, case, rank, f"file://{folder}/rendezvous"))
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        reports = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    fields, _, sent = reports[0]
    rounds = [max(seconds) for seconds in zip(*(seconds for _, seconds, _ in reports), strict=True)]
    return {name: torch.from_numpy(array) for name, array in fields.items()}, rounds, sent


def _rank(pipe: Connection, case: Case, rank: int, rendezvous: str) -> None:
    """Do one process's part of the work, timed, and send a report."""
    torch.set_num_threads(max(1, case.threads // case.ranks))
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=case.ranks)
    begin, end = (inputs.VOCABULARY * r // case.ranks for r in (rank, rank + 1))
    pair = [whole[..., begin:end].clone() for whole in inputs.logits(case.dtype, "random", case.shape, "cpu")]
    inputs.forget()

    def run() -> Any:
        return getattr(pruneopd_kernels.parallel, case.op)(*pair, k=case.k)

    outputs, sent = _counting_bytes(run)
    seconds = []
    for _ in range(case.rounds):
        dist.barrier()
        seconds.append(_seconds(run))
    pipe.send(({name: tensor.numpy() for name, tensor in outputs._asdict().items()}, seconds, sent))
    dist.destroy_process_group()


def _counting_bytes(run: Callable[[], Any]) -> tuple[Any, int]:
    """Return what `run` returns, and the bytes of the messages that this rank sends meanwhile."""
    sent, all_gather = [], dist.all_gather

    def counting(received: list[Tensor], message: Tensor, group: Any = None) -> None:
        sent.append(message.nbytes)
        all_gather(received, message, group=group)

    dist.all_gather = counting  # type: ignore[assignment]
    try:
        return run(), sum(sent)
    finally:
        dist.all_gather = all_gather


def _seconds(run: Callable[[], object]) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def _row(case: Case, alone: list[float], together: list[float], sent: int) -> results.Row:
    itemsize = getattr(torch, case.dtype).itemsize
    medians = [statistics.median(seconds) for seconds in (alone, together)]
    of_case: results.Row = {"op": case.op, "dtype": case.dtype, "k": case.k, "shape": [*case.shape, inputs.VOCABULARY]}
    return results.head("parallel", **of_case, ranks=case.ranks) | {
        "rounds": case.rounds,
        "one_process_ms": results.digits(medians[0] * 1e3),
        "median_ms": results.digits(medians[1] * 1e3),
        "times_one_process": results.digits(medians[1] / medians[0]),
        "bytes_sent_by_a_rank": sent,
        "bytes_of_both_slices": 2 * torch.Size(case.shape).numel() * (inputs.VOCABULARY // case.ranks) * itemsize,
    }


def _parse(arguments: Sequence[str] | None) -> Case:
    parser = argparse.ArgumentParser(prog="python -m bench parallel", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--op", choices=LOGIT_OPS, default="reliability")
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="float32")
    parser.add_argument("--shape", type=int, nargs=2, default=(4, 16), metavar=("B", "T"))
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of all processes together")
    parser.add_argument("--rounds", type=int, default=20)
    given = vars(parser.parse_args(arguments))
    return Case(**given | {"shape": tuple(given["shape"])})
