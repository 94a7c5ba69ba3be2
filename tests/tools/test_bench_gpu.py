"""The benchmarks of GPUs, rehearsed on a CPU; what is made of machine code; the predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench import (
    cases,
    data,
    eager,
    gpu,
    implementations,
    others,
    plan,
    predict,
    protocol,
    results,
    sass,
    table,
    targets,
)
from bench.cases import Case
from bench.losses import LOSSES
from bench.plan import Wanted

GPU = Case("reliability", "bfloat16", "cuda", device="cuda", positions=8192)


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The whole program for a GPU with the CPU in its place: 600 ids, at most 64 positions, cpp as cuda."""

    def on_cpu(function: Any) -> Callable[..., Any]:
        instead = functools.wraps(function)(lambda *arguments: function(*arguments[:-1], "cpu"))
        instead.cache_clear = function.cache_clear
        return instead

    def capture(calls: list[Callable[[], object]]) -> tuple[Callable[[], object], list[object]]:
        return lambda: [call() for call in calls], [call() for call in calls]

    real = implementations.operator
    as_cpp = {"cuda": "cpp", "triton": "cpp"}
    monkeypatch.setattr(data, "VOCABULARY", 600)
    monkeypatch.setattr(data, "LONG", (8, 32, 16))
    monkeypatch.setattr(cases, "BEYOND_CACHES", 2**17)
    monkeypatch.setattr(cases, "operator", lambda op, impl: real(op, as_cpp.get(impl, impl)))
    monkeypatch.setattr(plan, "FEW", (1, 16))
    monkeypatch.setattr(plan, "positions_that_fit", lambda device: 64)
    monkeypatch.setattr(plan, "usable_on", lambda device: ("cuda", "triton"))
    for function in (
        data.logits, data.like_logits, data.token_ids, data.topk_ids, data.drift, data.candidates, data.advantages,
        data.weights,
    ):  # fmt: skip
        monkeypatch.setattr(data, function.__name__, on_cpu(function))
    monkeypatch.setattr(gpu, "clock", protocol.processor_clock)
    monkeypatch.setattr(gpu, "capture", capture)
    monkeypatch.setattr(gpu, "extra_bytes", lambda case: 4096)
    monkeypatch.setattr(gpu, "_something_else", lambda device: torch.ones(2))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(results, "gpu", lambda device: "Some GPU")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    threads = torch.get_num_threads()
    command._forget()
    yield tmp_path
    command._forget()
    torch.set_num_threads(threads)


RUN = ["--device", "cuda", "--seconds", "0", "--save", "--threads", "1"]


def test_a_run_is_saved_with_its_copies_peers_and_memory(rehearsal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*RUN, "--only", "reliability"]) == 0
    rows = results.load(rehearsal / "some-gpu.jsonl")
    assert all(row["gpu"] == "Some GPU" and "threads" not in row for row in rows)
    times = {(row["op"], row["impl"], row["dtype"], row["k"], row["rows"], row["positions"]): row for row in rows
             if row["measure"] == "time"}  # fmt: skip
    for positions in (1, 16, 64):
        assert ("copy", "torch", "bfloat16", 16, "random", positions) in times
        row = times["reliability", "cuda", "bfloat16", 16, "random", positions]
        copy = times["copy", "torch", "bfloat16", 16, "random", positions]
        assert copy["counted_bytes"] == 2 * positions * 600 * 2
        assert row["fraction_of_copy"] > 0 and row["times_faster_than_eager"] > 0
    assert times["reliability", "cuda", "bfloat16", 256, "random", 64]["time_over_k16_random"] > 0
    assert times["reliability", "triton", "bfloat16", 16, "ascending", 64]["time_over_k16_random"] > 0
    assert times["reliability", "cuda", "float32", 16, "random", 16]["fraction_of_copy"] > 0
    assert {row["extra_bytes"] for row in rows if row["measure"] == "memory"} == {4096}
    assert "of copy" in capsys.readouterr().out


def test_the_operators_without_logits_are_timed_too(rehearsal: Path) -> None:
    assert command.main([*RUN, "--only", "reliability_from_topk", "--only", "reliability_from_drift"]) == 0
    rows = results.load(rehearsal / "some-gpu.jsonl")
    timed = {(row["op"], row["impl"]) for row in rows if row["measure"] == "time" and row["op"] != "copy"}
    assert timed == {(op, impl) for op in cases.TOPK_OPS for impl in ("cuda", "triton", "eager")}


def test_the_losses_are_timed_pass_by_pass_and_with_their_peers(rehearsal: Path) -> None:
    arguments = [argument for loss in LOSSES for argument in ("--only", loss)]
    assert command.main([*RUN, *arguments]) == 0
    rows = results.load(rehearsal / "some-gpu.jsonl")
    times = {(row["op"], row["impl"], row["passes"], row["positions"]): row for row in rows
             if row["measure"] == "time" and row["op"] in LOSSES}  # fmt: skip
    for loss in LOSSES:
        for impl in ("cuda", "triton"):
            for passes in ("forward", "backward"):
                assert times[loss, impl, passes, 64]["fraction_of_copy"] > 0
            both = times[loss, impl, "both", 32]
            assert both["times_faster_than_eager"] > 0 and both["times_faster_than_eager_native"] > 0
        assert {row["passes"] for row in rows if row["measure"] == "memory"} == {"forward", "backward", "both"}
    assert times["topk_forward_kl", "cuda", "both", 32]["times_faster_than_checkpointed"] > 0
    backward = times["reverse_kl", "cuda", "backward", 64]
    assert backward["counted_bytes"] == 3 * 64 * 600 * 2


def test_what_is_wrong_is_not_timed_and_the_rest_is(
    rehearsal: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = cases.operator

    def operator(op: str, impl: str) -> Callable[..., object]:
        def fail(*tensors: object, **options: object) -> object:
            raise RuntimeError("CUDA: an illegal memory access\nand more")

        return fail if impl == "cuda" else right(op, impl)

    monkeypatch.setattr(cases, "operator", operator)
    assert command.main([*RUN, "--only", "reliability_from_drift", "--no-memory"]) == 1
    assert {row["impl"] for row in results.load(rehearsal / "some-gpu.jsonl")} == {"torch", "triton", "eager"}
    assert "cuda: RuntimeError: CUDA: an illegal memory access\n" in capsys.readouterr().err
    monkeypatch.setattr(cases, "operator", right)
    monkeypatch.setattr(eager, "reliability_from_drift", lambda drift: {"drift_count": drift.cumsum(-1) + 1})
    assert command.main([*RUN, "--only", "reliability_from_drift", "--no-memory"]) == 1
    assert "NOT TIMED: reliability_from_drift bool eager: drift_count differs" in capsys.readouterr().err


def test_a_graph_whose_answer_is_wrong_is_not_timed(rehearsal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("reliability_from_drift", "bool", "cuda", device="cuda")
    assert gpu.contender(case).calls == case.sets > 1

    def unfilled(calls: list[Callable[[], object]]) -> tuple[Callable[[], object], list[object]]:
        outputs = [call() for call in calls]
        outputs[0].drift_count.zero_()  # type: ignore[attr-defined]
        return lambda: None, outputs

    monkeypatch.setattr(gpu, "capture", unfilled)
    with pytest.raises(RuntimeError, match="in a graph, drift_count differs"):
        gpu.contender(case)


def test_graphs_work_on_more_than_a_cache_holds_and_many_positions_need_none() -> None:
    for op in (*cases.LOGIT_OPS, "copy"):
        assert replace(GPU, op=op).sets == 1
        for positions in (1, 16, 64):
            few = replace(GPU, op=op, positions=positions)
            assert few.sets * positions * data.VOCABULARY * 2 * 2 >= cases.BEYOND_CACHES
            assert few.sets == replace(GPU, positions=positions).sets, "of one run, so that they share the inputs"
    assert replace(GPU, positions=16).shape == (16, 1), "as in decoding"
    assert GPU.shape == (16, 512)


def test_the_runs_for_a_gpu_hold_all_that_has_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "usable_on", lambda device: ("cuda", "triton"))
    monkeypatch.setattr(plan, "positions_that_fit", lambda device: 8192)
    runs = list(plan.on_gpu(Wanted()))
    timed = {case for run in runs for case in run}
    for target in targets.GPU:
        assert any(all(getattr(case, name) == value for name, value in target.where.items()) for case in timed), target
    assert runs[0][0] == Case("copy", "bfloat16", "torch", device="cuda", positions=8192)
    assert {"compiled"} <= {case.impl for run in runs for case in run}
    assert all(case in timed for case in predict.cases()), "what is predicted is measured"
    for run in runs:
        copies = [case for case in run if case.op == "copy"]
        assert len(copies) == 1, "each run has the copy that it is compared with"


def test_absent_libraries_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(others, "installed", lambda impl: impl == "eager")
    parts = plan._parts("cuda", 8192, Wanted())
    assert [(case.op, case.impl) for case in parts] == [("topk", "eager"), ("kl", "eager")]
    assert "flashinfer is not installed" in capsys.readouterr().out


def test_the_parts_of_others_are_those_of_the_operators(rehearsal: Path) -> None:
    case = Case("kl", "float32", "eager", device="cuda", positions=64)
    student, teacher = cases.inputs(case)
    stats = eager.token_stats(student, teacher, torch.zeros(student.shape[:-1], dtype=torch.int64))
    torch.testing.assert_close(others.PARTS["kl"]["eager"](student, teacher)["mean_kl"], stats["reverse_kl"].mean())
    top = others.PARTS["topk"]["eager"](student, teacher)["teacher"]
    assert torch.equal(top, teacher.gather(-1, stats["teacher_topk_ids"]))


# --- tables and targets -------------------------------------------------------------------------------------------


def _row(**fields: object) -> results.Row:
    head = {"measure": "time", "op": "reliability", "dtype": "bfloat16", "impl": "cuda", "isa": "none", "k": 16}
    head |= {"rows": "random", "positions": 8192, "gpu": "Some GPU", "torch": "2.11.0", "triton": "3.6.0"}
    return head | {"date": "2026-01-01 00:00:00 UTC", "median_ms": 1.25, "gb_s": 4000.0, "load_average": 0.1} | fields


def test_a_gpu_s_table_has_its_prediction_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert table.NO_GPU in table.tables()
    expected = _row(measure="prediction", fraction_of_copy=0.91, at_worst=0.84, at_best=0.98)
    results.save([expected], tmp_path / results.PREDICTIONS)
    assert table.NO_GPU in table.tables(), "a prediction is not a result"
    rows = [
        _row(op="copy", impl="torch", median_ms=1.16, gb_s=4290.0),
        _row(fraction_of_copy=0.93, times_faster_than_eager=31.0, times_faster_than_compiled=9.1),
        _row(impl="triton", median_ms=1.3, fraction_of_copy=0.9),
        _row(impl="eager", median_ms=38.8),
        _row(measure="memory", extra_bytes=2048),
        _row(measure="memory", impl="eager", extra_bytes=2**34),
    ]
    results.save(rows, tmp_path / "some-gpu.jsonl")
    text = table.tables()
    assert table.NO_GPU not in text
    cells = ["`reliability`", "8192 positions, bfloat16, k=16", "38.8 ms", "", "1.3 ms (0.90)", "1.25 ms (0.93)"]
    cells += ["0.91 (0.84 to 0.98)", "31x", "9.1x", "1.64e+04 MiB", "2 KiB"]
    assert f"| {' | '.join(cells)} |" in text
    assert "4.29 TB/s" in text


def test_targets_that_were_not_measured_on_a_gpu_are_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "some-gpu.jsonl"
    results.save([_row(fraction_of_copy=0.93)], file)
    assert targets.report(file) == 1
    printed = capsys.readouterr().out
    assert printed.count("NOT MEASURED") == len(targets.GPU) - 1
    rows: dict[tuple[object, ...], results.Row] = {}
    for target in targets.GPU:
        row = _row(**target.where, measure=target.measure, **{target.field: target.must})
        rows[results.key(row)] = rows.get(results.key(row), {}) | row
    results.save(list(rows.values()), file)
    assert targets.report(file) == 0
    assert "MISSED" not in capsys.readouterr().out


# --- machine code -------------------------------------------------------------------------------------------------

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


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> sass.Kernel:
    listings = {"-sass": LISTING, "-res-usage": USAGE}
    monkeypatch.setattr(sass, "_listing", lambda option, file: listings[option].splitlines())
    (found,) = sass.kernels(Path("some.cubin"))
    return found


def test_the_row_loop_is_counted_along_its_shortest_path(kernel: sass.Kernel) -> None:
    assert (kernel.arch, kernel.registers, kernel.stack_bytes, kernel.local_bytes) == ("sm_90", 42, 16, 8)
    assert len(kernel.instructions) == 16
    loop = sass.row_loop(kernel)
    assert loop is not None
    assert [hex(found.address) for found in loop.instructions] == [hex(address) for address in range(0x10, 0x80, 0x10)]
    assert (loop.loaded_bytes, loop.exponentials) == (32, 1)
    assert [found.bits_loaded for found in kernel.uses("LDG")] == [128, 128, 32, 32]
    pipes = {found.opcode: found.pipe for found in kernel.instructions}
    assert pipes["MUFU.EX2"] == "mufu" and pipes["FADD"] == "fma" and pipes["FSETP.GTU.AND"] == "integer"


def test_a_cubin_does_not_name_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's are for sm_90a, and cuobjdump lists their resources without it."""
    listings = {"-sass": LISTING.replace("sm_90", "sm_90a"), "-res-usage": USAGE.removeprefix("arch = sm_90\n")}
    monkeypatch.setattr(sass, "_listing", lambda option, file: listings[option].splitlines())
    (found,) = sass.kernels(Path("some.cubin"))
    assert (found.arch, found.registers) == ("sm_90", 42)


def test_a_kernel_without_exponentials_has_no_row_loop(kernel: sass.Kernel) -> None:
    without = tuple(replace(found, opcode=found.opcode.replace("MUFU.EX2", "FADD")) for found in kernel.instructions)
    assert sass.row_loop(replace(kernel, instructions=without)) is None


# --- predictions --------------------------------------------------------------------------------------------------


@functools.cache
def _kernel(slots: int) -> sass.Kernel:
    """With a loop of 8 x 16 bytes of two-byte elements, that many instructions a pair."""
    load = [sass.Instruction(0, "", "LDG.E.128", "")] * 8 + [sass.Instruction(0, "", "MUFU.EX2", "")] * 64
    rest = [sass.Instruction(0, "", "FFMA", "")] * (slots * 32 - len(load) - 1)
    body = [*load, *rest, sass.Instruction(0, "@P0", "BRA", "0x0")]
    numbered = tuple(replace(one, address=16 * i) for i, one in enumerate(body))
    return sass.Kernel("reliability_kernel<BFloat16>", "sm_90", 80, 0, 0, 0, numbered)


def test_predictions_lie_between_their_ends_and_grow_with_the_work() -> None:
    row = predict.predict(GPU, _kernel(11))
    assert row["slots_per_pair"] == 11 and row["blocks"] == 3
    assert 0.5 < row["at_worst"] < row["fraction_of_copy"] < row["at_best"] <= 1
    bytes_alone_ms = 8192 * 151936 * 2 * 2 / predict.H200.copy_gb_s / 1e6
    assert row["median_ms"] > bytes_alone_ms
    slower = predict.predict(replace(GPU, k=256), _kernel(11))
    assert slower["fraction_of_copy"] < row["fraction_of_copy"]
    assert predict.predict(GPU, _kernel(60))["bound_by"] == "computing"
    few = predict.predict(replace(GPU, positions=1), _kernel(11))
    assert few["bound_by"] == "latency" and few["median_ms"] < 0.05


def test_a_prediction_takes_the_kernel_of_its_case() -> None:
    of_two_bytes = _kernel(11)
    more = {"registers": 250, "name": "reliability_kernel"}
    loads = [replace(one, opcode=one.opcode.replace("LDG.E.128", "LDG.E.64")) for one in of_two_bytes.instructions]
    kernels = [
        of_two_bytes,
        replace(of_two_bytes, **more),
        replace(of_two_bytes, name="reliability_kernel"),
        replace(of_two_bytes, name="reliability_kernel", registers=60, instructions=tuple(loads)),
    ]
    assert predict.kernel_of(GPU, kernels) is kernels[0]
    assert predict.kernel_of(replace(GPU, impl="triton"), kernels) is kernels[2], "not that of another k or dtype"
    assert predict.kernel_of(replace(GPU, op="token_stats"), kernels) is None


def test_many_blocks_reach_the_bandwidth_and_one_waits_for_itself() -> None:
    alone = predict.Work(memory_us=10, compute_us=5, wait_us=5, blocks=1)
    assert predict.position_us(alone) == (20, 20)
    best, worst = predict.position_us(replace(alone, blocks=32))
    assert best == 10
    assert 10 < worst < 10.01
