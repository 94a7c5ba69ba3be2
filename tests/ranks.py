"""Processes that are the ranks of a gloo group: started once, then given one function after another to run.

What goes there and comes back is pickled as bytes, so that no memory is shared with a process that may have ended.
"""

import multiprocessing
import pickle
import traceback

import torch
from torch import distributed as dist

RANKS = 3
TIMEOUT_S = 60


class Ranks:
    """`ranks.run(function, *arguments)`: what `function(group, *arguments)` returned or raised on each of the ranks."""

    def __init__(self, rendezvous, size=RANKS, backend="gloo"):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, size, str(rendezvous), backend), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here), self.processes.append(process)

    def run(self, function, *arguments, size=RANKS):
        """With the group of the first `size` ranks; the function is one that a process can import."""
        pipes = self.pipes[:size]
        for pipe in pipes:
            pipe.send_bytes(pickle.dumps((size, function, arguments)))
        results = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(TIMEOUT_S), f"rank {rank} has not answered in {TIMEOUT_S} s"
            results.append(pickle.loads(pipe.recv_bytes()))
        for result in results:
            if isinstance(result, _Crash):
                raise AssertionError(result.report)
        return results

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()


class _Crash:
    def __init__(self, report):
        self.report = report


def raised(function, *arguments, **keywords):
    """What a call raises: `(name of the type, words)`."""
    try:
        function(*arguments, **keywords)
    except (ValueError, TypeError, RuntimeError) as error:
        kinds = [kind.__name__ for kind in (ValueError, TypeError) if isinstance(error, kind)]
        return (kinds or ["RuntimeError"])[0], str(error)
    return None


def _serve(pipe, rank, size, rendezvous, backend):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    groups = {n: dist.new_group(list(range(n))) for n in range(1, size)} | {size: None}
    while True:
        try:
            n, function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        try:
            answer = function(groups[n], *arguments)
        except Exception:
            answer = _Crash(f"rank {rank}:\n{traceback.format_exc()}")
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
