"""The compiled files: what they link to, what they read, what they allocate."""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import pruneopd_kernels
from implementations import LOSSES, OPERATORS
from processes import command, environment, run

PACKAGE = Path(pruneopd_kernels.__file__).parent
LIB = Path(__file__).parents[1] / "lib"


def files(pattern):
    found = sorted(PACKAGE.glob(pattern))
    assert found, f"no {pattern} in {PACKAGE}: build it with make"
    return found


def torch_libraries():
    return [*files("_cpp*.so"), *PACKAGE.glob("_cuda*.so")]  # the latter where there was nvcc


def tool(name, *arguments):
    """What a tool of binutils or of the system says of a file."""
    assert shutil.which(name), f"{name} is missing: install binutils"
    return subprocess.run([name, *arguments], capture_output=True, text=True, check=True).stdout


def undefined_symbols(path):
    return [line.split(maxsplit=1)[1] for line in tool("nm", "-D", "-C", "--undefined-only", path).splitlines()]


def test_the_operators_use_the_stable_abi_only():
    for path in torch_libraries():
        symbols = undefined_symbols(path)
        assert any("aoti_torch" in name or name.startswith("torch_") for name in symbols)  # it does use torch
        unstable = r"\b(at|c10|torch|caffe2)::|^_?Py[A-Z_]"  # nor must it depend on a Python
        assert [name for name in symbols if re.search(unstable, name)] == []


def test_the_numpy_module_knows_no_torch():
    for path in files("_host*.so"):
        assert [name for name in undefined_symbols(path) if re.search(r"aoti_torch|\b(at|c10|torch)::", name)] == []
        assert not re.search("lib(torch|c10)", tool("ldd", path))


def test_the_cuda_library_needs_no_other_than_torch_s():
    """The CUDA runtime is inside, so one build serves a torch of another CUDA."""
    for path in PACKAGE.glob("_cuda*.so"):
        needed = set(re.findall(r"NEEDED +(\S+)\.so", tool("objdump", "-p", path)))
        assert {"libtorch", "libtorch_cpu"} <= needed
        assert needed <= set("libtorch libtorch_cpu libc10 libstdc++ libm libgcc_s libc ld-linux-x86-64".split())
        assert " w aoti_torch_get_current_cuda_stream\n" in tool("nm", "-D", path)


def test_only_what_is_meant_is_exported():
    """The libraries live in one process: none shows its insides to the others."""
    for path in [*torch_libraries(), *files("_host*.so")]:
        lines = tool("nm", "-D", "--defined-only", path).splitlines()
        names = [line.split()[-1].partition("@")[0] for line in lines]
        ours = re.compile(r"pruneopd_|PyInit__host|_init$|_fini$|torch_library_|PRUNEOPD|GLIBC")
        assert [name for name in names if not ours.match(name)] == []


@pytest.mark.parametrize(
    "kernels", ["cpp", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("cuda-emulated", "triton"))]
)
def test_nothing_is_read_beyond_a_tensor_or_behind_a_mask(kernels):
    assert run(LIB / "guarded_reads.py", kernels).strip() == "nothing else was read"


def test_the_guard_pages_do_guard():
    code = """
        import ctypes, torch, guarded_reads
        x = guarded_reads.between_guards(torch.zeros(3), True)
        ctypes.string_at(x.data_ptr(), 12)
        print("inside", flush=True)
        ctypes.string_at(x.data_ptr(), 13)
    """
    done = subprocess.run(command(code=code), env=environment(), cwd=LIB, capture_output=True, text=True)
    assert done.stdout == "inside\n" and done.returncode == -signal.SIGSEGV


def test_memory_beyond_inputs_and_outputs():
    """At most 1 MiB for each of two threads."""
    rows = [json.loads(line) for line in run(LIB / "memory_peaks.py", "operators").splitlines()]
    assert {row["op"] for row in rows} == {*OPERATORS} - {*LOSSES} | {"opd_loss", "selected_logprobs"}
    assert [row for row in rows if row["extra"] > 2 * 2**20] == []


def test_the_measure_of_memory_can_fail():
    """A copy of four rows is seen."""
    code = """
        import memory_peaks, torch
        x = torch.randn(64, 151936)
        x[:4].clone()
        print(memory_peaks.extra(lambda: [x[:4].clone()[:0]][:0]))
    """
    assert 2 * 2**20 < int(run(code=code, cwd=LIB)) < 3 * 2**20


def test_instruction_sets():
    from pruneopd_kernels.dispatch import cpp

    names = cpp.instruction_sets()
    assert names[-1] == "portable" and set(names) <= {"avx512", "avx2", "portable"}
    assert cpp.instruction_set() == names[0]
    with open("/proc/cpuinfo") as lines:
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
    assert ("avx2" in names) == ({"avx2", "fma", "f16c"} <= set(flags))
    with cpp.use_instruction_set("portable"):
        assert cpp.instruction_set() == "portable"
    assert cpp.instruction_set() == names[0]
    with pytest.raises(ValueError, match="must be one of"), cpp.use_instruction_set("sse9"):
        pass


def test_loading_twice_is_harmless():
    for path in files("_cpp*.so"):
        torch.ops.load_library(path)
