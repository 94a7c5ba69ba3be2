"""Run by test_triton.py in a process of its own: compiles every Triton kernel that some calls launch, without a GPU.

Prints a JSON line for each: its registers, and of its machine code (sm_80 and newer) how often registers are spilled
and what the loop over the row consists of. For AMD (gfx942) only that it compiles.

    python tests/triton/triton_ahead.py 90
    python tests/triton/triton_ahead.py 90 reverse_kl reverse_kl_backward
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import pruneopd_kernels.triton
from pruneopd_kernels.config import PruneConfig
from pruneopd_kernels.ops._operator import compiled
from pruneopd_kernels.triton import position

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WIDTH = 151936
FLAGS = ("entropy", "entropy_coefficient", "entropies", "divergence")


class Ahead:
    """Stands for the driver of a GPU that is not here."""

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


def disassembled(cubin):
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1]))
    return instructions, labels


def row_loop(instructions, labels):
    """The loop over whole blocks of a row: the shortest with at least one ex2 for each element of a row."""
    loops = []
    for end, instruction in enumerate(instructions):
        label = re.search(r"^BRA.*`\(\.(L_x_\d+)\)", instruction)
        if label and labels.get(label[1], end + 1) <= end:
            loops.append(instructions[labels[label[1]] : end + 1])
    return min((x for x in loops if sum("MUFU.EX2" in y for y in x) >= 32), key=len, default=[])


def described(kernel):
    if "cubin" not in kernel.asm:
        return {}
    instructions, labels = disassembled(kernel.asm["cubin"])
    loop = row_loop(instructions, labels)
    names = [x.split()[0] for x in loop]
    return {
        "registers": 1 + max(int(n) for x in instructions for n in re.findall(r"\bR(\d+)", x)),
        "spills": sum(x.startswith(("STL", "LDL")) for x in instructions),
        "loop_spills": sum(x.startswith(("STL", "LDL")) for x in loop),
        "loop": len(loop),
        "loop_ex2": sum("MUFU.EX2" in x for x in loop),
        "loop_loads": {x: names.count(x) for x in sorted(set(names)) if x.startswith("LDG")},
        "loop_stores": {x: names.count(x) for x in sorted(set(names)) if x.startswith("STG")},
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
