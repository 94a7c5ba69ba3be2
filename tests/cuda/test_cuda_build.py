"""What nvcc made of the CUDA sources: machine code for every architecture, and nothing of it in local memory.

The library that the build made is looked at, not built again. Where there is no nvcc there is nothing to look at, and
the reason stands in pytest's summary.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.count import machine_code as sass

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "pruneopd_kernels" / "_cuda.so"
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
THREADS, REGISTERS = 256, 65536  # of a block that reads logits, and of a multiprocessor
DTYPES = ["float", "Half", "BFloat16"]
ONE_ROW = ["row_stats", "row_stats_true", "row_stats_2", "row_stats_2_true"]  # the last two: with the entropy
TWO_ROWS = ["reliability", "reliability_1", "reliability_2", "token_stats", "reverse_kl"]  # which may be of two dtypes
FORWARD = ONE_ROW + TWO_ROWS
BACKWARD = ["logprobs_backward", "reverse_kl_backward"]


pytestmark = pytest.mark.thorough


def why_not() -> str | None:
    """Why the library is rightly not there, or not whole."""
    if os.environ.get("PRUNEOPD_CUDA") == "OFF":
        return "PRUNEOPD_CUDA is OFF: nothing of the CUDA sources was compiled, and nothing of them is tested here"
    if chosen := os.environ.get("PRUNEOPD_CUDA_ARCHITECTURES"):
        return f"PRUNEOPD_CUDA_ARCHITECTURES is {chosen}: the machine code of a part of the architectures is not tested"
    places = [f"{os.environ[name]}/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if any(map(shutil.which, [*places, "nvcc", "/usr/local/cuda/bin/nvcc"])):
        return None
    return "there is no nvcc: the CUDA sources are not compiled, and nothing of their machine code is tested here"


@pytest.fixture(scope="module")
def library():
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    assert LIBRARY.exists(), "there is an nvcc, so `make test-all` must build _cuda.so"
    try:
        sass.tool("cuobjdump")
    except FileNotFoundError as missing:
        pytest.skip(f"the CUDA library was built, but its machine code is not tested here: {missing}")
    return LIBRARY


@pytest.fixture(scope="module")
def kernels(library):
    return sass.kernels(library)


@pytest.fixture(scope="module")
def row_loops(kernels):
    """(operator, dtype, architecture) -> kernel and row loop, for the kernels over logits."""
    found = {}
    for kernel in kernels:
        if name := re.fullmatch(r"(\w+)_kernel<(\w+)(?:, \2)?>", kernel.short_name):
            found[name[1], name[2], kernel.arch] = kernel, sass.row_loop(kernel)
    return found


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def where(kernels):
    return [f"{kernel.arch} {kernel.short_name}" for kernel in kernels]


def test_every_source_was_compiled_for_every_architecture(kernels):
    by_architecture = {
        arch: sorted(kernel.short_name for kernel in kernels if kernel.arch == arch) for arch in ARCHITECTURES
    }
    first = by_architecture[ARCHITECTURES[0]]
    assert {kernel.arch for kernel in kernels} == set(ARCHITECTURES)
    assert all(names == first for names in by_architecture.values())
    over_logits = {f"{operator}_kernel<{dtype}>" for operator in TWO_ROWS for dtype in (*DTYPES, "AnyLogit")}
    over_logits |= {f"{operator}_kernel<{dtype}>" for operator in [*ONE_ROW, BACKWARD[0]] for dtype in DTYPES}
    of_pairs = {f"{BACKWARD[1]}_kernel<{rows}, {dtype}>" for dtype in DTYPES for rows in (dtype, "AnyLogit")}
    assert set(first) == over_logits | of_pairs | {"drift_kernel", "scan_kernel"}


def test_newer_architectures_find_ptx(library):
    listing = subprocess.run([sass.tool("cuobjdump"), "-lptx", library], capture_output=True, text=True, check=True)
    assert "sm_100.ptx" in listing.stdout


def test_no_kernel_spills_or_uses_local_memory(kernels):
    spilling = [kernel for kernel in kernels if kernel.stack_bytes or kernel.local_bytes]
    assert where(spilling) == []
    assert where(kernel for kernel in kernels if kernel.uses("LDL", "STL")) == []


def test_two_blocks_fit_on_a_multiprocessor(kernels):
    assert where(kernel for kernel in kernels if kernel.registers * THREADS * 2 > REGISTERS) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", FORWARD + BACKWARD)
def test_the_row_pass_loads_16_bytes_at_a_time(operator, dtype, architecture, row_loops):
    _, loop = row_loops[operator, dtype, architecture]
    loads = [found for found in loop.instructions if found.bits_loaded]
    assert {found.bits_loaded for found in loads} == {128}
    assert loop.element_bytes == (4 if dtype == "float" else 2)
    per_pair = loop.exponentials_per_pair
    assert loop.exponentials == per_pair * loop.pairs, "one exponential for each element, and each element loaded once"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", BACKWARD)
def test_gradients_are_stored_16_bytes_at_a_time(operator, dtype, architecture, row_loops):
    _, loop = row_loops[operator, dtype, architecture]
    stored = [found.bits_stored for found in loop.instructions if found.bits_stored]
    assert set(stored) == {128} and sum(stored) // 8 == loop.loaded_bytes / loop.rows, "each element once"


@pytest.mark.parametrize("dtype", ["Half", "BFloat16"])
@pytest.mark.parametrize(
    ("operator", "most"),
    [
        *[("reliability", 13), ("reliability_1", 16), ("reliability_2", 18), ("token_stats", 18), ("reverse_kl", 16)],
        *[("row_stats", 7), ("row_stats_true", 7), ("row_stats_2", 9), ("row_stats_2_true", 9)],  # while 2 bytes arrive
        *[("logprobs_backward", 10), ("reverse_kl_backward", 20)],  # while 2 or 4 arrive and 2 leave
    ],
)
def test_the_row_pass_is_bound_by_memory(operator, most, dtype, architecture, row_loops):
    """While 4 bytes reach an H200's multiprocessor it can issue 27 instructions: the rest is for the selection."""
    _, loop = row_loops[operator, dtype, architecture]
    assert loop.slots_per_pair < most


def test_nothing_is_contracted_in_the_scan(kernels):
    """1 - w_drop * C is rounded twice: a product and a sum. The other kernels have DFMA from libm and from division."""
    scans = [kernel for kernel in kernels if kernel.short_name == "scan_kernel"]
    assert sorted(kernel.arch for kernel in scans) == sorted(ARCHITECTURES)
    for kernel in scans:
        assert kernel.uses("DMUL") and kernel.uses("DADD") and not kernel.uses("DFMA"), kernel.short_name
