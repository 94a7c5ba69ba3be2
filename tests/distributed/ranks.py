"""Processes that are the ranks of a group: started once, then given one function after another to run.

What goes there and comes back is pickled as bytes, so that no memory is shared with a process that may have ended.
"""

import faulthandler
import functools
import io
import multiprocessing
import tempfile
import traceback
import warnings

import torch
from torch import distributed as dist

import tiers

TIMEOUT_S = 120


class Ranks:
    """`ranks.run(function, *arguments)`: what `function(group, *arguments)` returned on each rank."""

    def __init__(self, rendezvous, size, backend="gloo"):
        context = multiprocessing.get_context("spawn")
        self.size, self.pipes, self.processes = size, [], []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (there, rank, size, str(rendezvous), backend)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function, *arguments, size=None):
        """In the group of the first `size` ranks; the function is one that a process can import."""
        size = size or self.size
        message = _dumps((size, function, arguments))
        for pipe in self.pipes[:size]:
            pipe.send_bytes(message)
        answers = []
        for rank, pipe in enumerate(self.pipes[:size]):
            assert pipe.poll(TIMEOUT_S), f"rank {rank} has not answered in {TIMEOUT_S} s"
            answers.append(_loads(pipe.recv_bytes()))
        reports = [answer.report for answer in answers if isinstance(answer, _Crash)]
        assert not reports, "\n".join(reports)
        return answers

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()  # it has nothing to put away
            process.join()


@functools.cache
def of_session():
    """A group of two processes, with --all of three, that ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="pruneopd-ranks-")
    ranks = Ranks(f"{folder.name}/rendezvous", 3 if tiers.ALL else 2)
    ranks.folder = folder
    return ranks


def _dumps(answer):
    """Pickled as torch.save does it, because the tensors of plain pickles have no unsigned integers."""
    torch.save(answer, file := io.BytesIO())
    return file.getvalue()


def _loads(message):
    return torch.load(io.BytesIO(message), weights_only=False)


class _Crash:
    def __init__(self, report):
        self.report = report


def _serve(pipe, rank, size, rendezvous, backend):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    groups = {n: dist.new_group(list(range(n))) for n in range(1, size)} | {size: None}
    warnings.simplefilter("error")
    while True:
        try:
            n, function, arguments = _loads(pipe.recv_bytes())
        except EOFError:
            break
        faulthandler.dump_traceback_later(TIMEOUT_S - 10)  # where it hangs, if it does
        try:
            answer = function(groups[n], *arguments)
        except Exception:
            answer = _Crash(f"rank {rank}:\n{traceback.format_exc()}")
        faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(_dumps(answer))
    dist.destroy_process_group()
