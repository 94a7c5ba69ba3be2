"""Instructions counted in machine code, and the times that are predicted from them."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest

from bench.count import machine_code, predictions
from bench.measure.cases import Case

GPU = Case("reliability", "bfloat16", "cuda", device="cuda", positions=8192)
LISTING = """
	code for sm_90
		Function : row_pass_kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   S2R R0, SR_TID.X ;                               /* 0x0 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;        /* 0x0 */
        /*0020*/               @P1 BRA 0x90 ;                                       /* 0x0 */
        /*0030*/                   LDG.E.NA.128.CONSTANT R8, desc[UR4][R2.64+0x10] ;/* 0x0 */
        /*0040*/                   FSETP.GTU.AND P0, PT, R4, R9, PT ;               /* 0x0 */
        /*0050*/               @P0 BRA 0xc0 ;                                       /* 0x0 */
        /*0060*/                   MUFU.EX2 R4, R4 ;                                /* 0x0 */
        /*0070*/              @!P2 BRA 0x10 ;                                       /* 0x0 */
        /*0080*/                   EXIT ;                                           /* 0x0 */
        /*0090*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;                 /* 0x0 */
        /*00a0*/                   LDG.E.U16 R9, desc[UR4][R2.64+0x2] ;             /* 0x0 */
        /*00b0*/                   BRA 0x40 ;                                       /* 0x0 */
        /*00c0*/                   FADD R9, R9, R4 ;                                /* 0x0 */
        /*00d0*/                   BRA.U !UP0, 0x60 ;                               /* 0x0 */
        /*00e0*/                   BRA 0x60 ;                                       /* 0x0 */
        /*00f0*/                   BRA 0xf0;                                        /* 0x0 */
"""
USAGE = "arch = sm_90\n Function row_pass_kernel:\n  REG:42 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:560\n"


# cuobjdump lists the resources of a cubin, as Triton's are, without its architecture; Triton's are for sm_90a
@pytest.mark.parametrize(("arch", "usage"), [("sm_90", USAGE), ("sm_90a", USAGE.removeprefix("arch = sm_90\n"))])
def test_the_row_loop_is_counted_along_its_shortest_path(monkeypatch, arch, usage):
    listings = {"-sass": LISTING.replace("sm_90", arch), "-res-usage": usage}
    monkeypatch.setattr(machine_code, "_listing", lambda option, file: listings[option].splitlines())
    (kernel,) = machine_code.kernels(Path("some.cubin"))
    assert (kernel.arch, kernel.registers, kernel.stack_bytes, kernel.local_bytes) == ("sm_90", 42, 16, 8)
    assert len(kernel.instructions) == 16
    loop = machine_code.row_loop(kernel)
    assert [hex(found.address) for found in loop.instructions] == [hex(address) for address in range(0x10, 0x80, 0x10)]
    assert (loop.loaded_bytes, loop.exponentials) == (32, 1)
    assert [found.bits_loaded for found in kernel.uses("LDG")] == [128, 128, 32, 32]
    without = tuple(replace(found, opcode=found.opcode.replace("MUFU.EX2", "FADD")) for found in kernel.instructions)
    assert machine_code.row_loop(replace(kernel, instructions=without)) is None, "no exponentials, no row loop"


@functools.cache
def kernel(slots):
    """Return a kernel whose loop reads 8 x 16 bytes of two-byte elements, with `slots` instructions per pair."""
    load = [machine_code.Instruction(0, "", "LDG.E.128", "")] * 8
    load += [machine_code.Instruction(0, "", "MUFU.EX2", "")] * 64
    rest = [machine_code.Instruction(0, "", "FFMA", "")] * (slots * 32 - len(load) - 1)
    body = [*load, *rest, machine_code.Instruction(0, "@P0", "BRA", "0x0")]
    numbered = tuple(replace(one, address=16 * i) for i, one in enumerate(body))
    return machine_code.Kernel("reliability_kernel<BFloat16>", "sm_90", 80, 0, 0, 0, numbered)


def test_predictions_lie_between_their_ends_and_grow_with_the_work():
    row = predictions.predict(GPU, kernel(11))
    assert row["slots_per_pair"] == 11 and row["blocks"] == 3
    assert 0.5 < row["at_worst"] < row["fraction_of_copy"] < row["at_best"] <= 1
    assert row["median_ms"] > 8192 * 151936 * 2 * 2 / predictions.H200.copy_gb_s / 1e6, "the bytes alone"
    assert predictions.predict(GPU, kernel(60))["bound_by"] == "computing"
    few = predictions.predict(replace(GPU, positions=1), kernel(11))
    assert few["bound_by"] == "latency" and few["median_ms"] < 0.05
