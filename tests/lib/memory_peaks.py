"""Run by test_compiled_files.py in a process of its own: what each operator allocates beyond its inputs and outputs.

Prints a JSON line a call: implementation, operator, dtype, k, peak beyond inputs and outputs in bytes.
"""

import functools
import json

import torch

from bench.measure import memory
from implementations import COMPILED, DECLARED

THREADS = 2


def extra(function, *args, small=lambda: None, **kwargs):
    """Return the growth of the peak of the resident memory during the call, less the outputs."""
    grown, outputs = memory.growth(small, lambda: function(*args, **kwargs))
    return grown - sum(x.nbytes for x in outputs)


def main():
    torch.set_num_threads(THREADS)
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
            of = {"impl": repr(impl), "op": op, "dtype": str(tensors[0].dtype), **options}
            print(json.dumps({**of, "extra": peak}), flush=True)


if __name__ == "__main__":
    main()
