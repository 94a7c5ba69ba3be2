"""Run by test_library.py in a process of its own: what each operator allocates beyond its inputs and outputs.

Prints a JSON line a call: operator, dtype, k, peak beyond inputs and outputs in bytes, threads.
"""

import ctypes
import functools
import json

import torch

from implementations import COMPILED

THREADS = 2


def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def reset_peak():
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")


def extra(function, *args, **kwargs):
    """Peak of the resident memory during the call, less what was there before, less the outputs."""
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would be used again unseen
    before = status("VmRSS")
    reset_peak()
    outputs = function(*args, **kwargs)
    peak = status("VmHWM")
    return peak - before - sum(x.numel() * x.element_size() for x in outputs)


def main():
    torch.set_num_threads(THREADS)
    for impl in COMPILED:
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = (torch.randn(64, 151936).to(dtype) for _ in range(2))
            for op, shape in (("reliability", (4, 16, -1)), ("token_stats", (64, -1))):
                small = torch.randn(8, 8, 300).to(dtype)
                impl.call(op, student_logits=small, teacher_logits=small)  # threads and lazily loaded code
                pair = {"student_logits": student.view(shape), "teacher_logits": teacher.view(shape)}
                for k in (16, 256):
                    peak = extra(impl.call, op, **pair, k=k)
                    print(json.dumps({"impl": repr(impl), "op": op, "dtype": str(dtype), "k": k, "extra": peak}))
        ids = torch.randint(1000, (64, 1024, 16))
        for_topk = functools.partial(impl.call, "reliability_from_topk")
        for_topk(student_topk_ids=ids[:, :8], teacher_topk_ids=ids[:, :8])
        peak = extra(for_topk, student_topk_ids=ids, teacher_topk_ids=ids.flip(0))
        print(json.dumps({"impl": repr(impl), "op": "reliability_from_topk", "extra": peak}))
        drift = torch.rand(64, 12288) < 0.5
        for_drift = functools.partial(impl.call, "reliability_from_drift")
        for_drift(drift=drift[:, :8])
        peak = extra(for_drift, drift=drift)
        print(json.dumps({"impl": repr(impl), "op": "reliability_from_drift", "extra": peak}))


if __name__ == "__main__":
    main()
