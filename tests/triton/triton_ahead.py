"""Run by test_triton.py in a process of its own: compiles every Triton kernel that some calls launch, without a GPU.

Prints a JSON line for each: of its machine code (sm_80 and newer) how often registers are spilled and what the loop
over the row consists of. For AMD (gfx942), the line says only that the kernel compiles.

    python tests/triton/triton_ahead.py 90
    python tests/triton/triton_ahead.py 90 reverse_kl reverse_kl_backward
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import pruneopd_kernels.triton
from bench.count import machine_code as sass
from pruneopd_kernels.config import PruneConfig
from pruneopd_kernels.ops._operator import compiled
from pruneopd_kernels.triton import position

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WIDTH = 151936
FLAGS = ("entropy", "entropy_coefficient", "entropies", "divergence")


class Ahead:
    """Stand in for the driver of a GPU that is not here."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def calls(everything):
    """What is compiled, as operator and arguments: for one architecture much of it, for the others the usual.

    Few positions, then many: their kernels differ. Of two dtypes the first is the student's.
    """
    for positions in (1, 20):
        yield from loss_calls(positions, (BF16, BF16), 16)
        yield from logits_calls(positions, (BF16, BF16), 16)
        if everything:
            yield from loss_calls(positions, (F32, F32), 256)
            yield from loss_calls(positions, (F16, F32), 512)
            yield from logits_calls(positions, (F32, F32), 16)
            yield from logits_calls(positions, (F16, BF16), 64)
            yield from logits_calls(positions, (BF16, F32), 256)
    ids = torch.zeros(2, 8, 16, dtype=torch.int64)
    pair = {"student_topk_ids": ids, "teacher_topk_ids": ids}
    more = {"metric": "top_p", "teacher_topk_logprobs": torch.zeros(2, 8, 16), "token_ids": ids[..., 0]}
    yield "reliability_from_topk", pair
    yield "reliability_from_topk", {**pair, **more, "mask": torch.ones(2, 8)}
    yield "reliability_from_drift", {"drift": torch.zeros(2, 8, dtype=torch.bool)}


def pair_of(positions, dtypes):
    return {
        name: torch.empty(1, positions, WIDTH, dtype=dtype)
        for name, dtype in zip(("student_logits", "teacher_logits"), dtypes, strict=True)
    }


def logits_calls(positions, dtypes, k):
    pair = {**pair_of(positions, dtypes), "k": k}
    yield "reliability", pair
    yield "token_stats", pair
    scalars = {**PruneConfig(k=k).__dict__, "student_temperature": 1.0, "teacher_temperature": 1.0, "vocab_size": None}
    for entropies, divergence in ((False, False), (False, True), (True, True)):
        yield "opd_scores", {**pair, **scalars, "entropies": entropies, "divergence": divergence}


def loss_calls(positions, dtypes, m):
    """Both passes of each loss with m candidates."""
    pair = pair_of(positions, dtypes)
    one = {"logits": pair["student_logits"], "temperature": 0.6}
    ids, floats = torch.zeros(1, positions, m, dtype=torch.int64), torch.zeros(1, positions, m)
    state, scale = torch.zeros(1, positions, 5, dtype=torch.float64), torch.zeros(1, positions)
    yield "row_stats", {**one, "token_ids": ids}
    yield "row_stats", {**one, "token_ids": ids, "k": min(m, 256), "entropy": False}
    yield "reverse_kl", {**pair, "weight": scale}
    saved = {"token_ids": ids, "coefficients": floats, "state": state[..., :3]}
    for entropy_coefficient in (None, scale):
        yield "logprobs_backward", {**one, **saved, "entropy_coefficient": entropy_coefficient}
    yield "reverse_kl_backward", {**pair, "state": state, "scale": scale}


def described(kernel):
    """Return the spills, and what the loop over whole blocks of a row consists of."""
    if "cubin" not in kernel.asm:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (machine_code,) = sass.kernels(Path(file.name))
    loops = [
        Counter(one.opcode for one in machine_code.instructions if end.target <= one.address <= end.address)
        for end in machine_code.uses("BRA")
        if end.target is not None and end.target <= end.address
    ]
    # The shortest with at least one ex2 for each element of a row.
    loop = min((x for x in loops if x["MUFU.EX2"] >= 32), key=Counter.total, default=Counter())
    return {
        "spills": len(machine_code.uses("STL", "LDL")),
        "loop_spills": sum(count for name, count in loop.items() if name.startswith(("STL", "LDL"))),
        "loop": loop.total(),
        "loop_ex2": loop["MUFU.EX2"],
        "loop_loads": {name: count for name, count in sorted(loop.items()) if name.startswith("LDG")},
        "loop_stores": {name: count for name, count in sorted(loop.items()) if name.startswith("STG")},
    }


def main(target, *ops):
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target), 32)
    triton.runtime.driver.set_active(Ahead(gpu))
    if amd:
        position.registers = lambda programs: {}
    seen = set()
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            dtypes = [str(x.dtype).removeprefix("torch.") for name, x in arguments.items() if name.endswith("logits")]
            flags = [
                name
                for name in FLAGS
                if arguments.get(name, False) is True or isinstance(arguments.get(name), torch.Tensor)
            ]
            call = {"op": op, "dtypes": dtypes, "k": arguments.get("k"), "with": flags}
            line = {"kernel": self.__name__, "pass": kwargs.get("PASS"), **call, **described(kernel)}
            print(json.dumps(line), flush=True)
        return kernel

    JITFunction.run = compile_only
    declared = {op.name: op for op in compiled()}
    for op, arguments in calls(everything=target == "90"):
        if op in (ops or declared):
            vars(pruneopd_kernels.triton)[op](declared[op].arguments((), arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
