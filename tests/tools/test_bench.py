"""The benchmarks: their protocol, their refusal of wrong answers, their tables. Nothing is measured here."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import processes
from bench import __main__ as command
from bench import answers, cases, data, eager, eager_losses, implementations, memory, protocol, results, table, targets
from bench.cases import Case
from bench.losses import LOSSES
from bench.protocol import Contender, Timing


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The whole program on 1000 ids and 64 short responses, with its results in a folder of the test's."""
    monkeypatch.setattr(data, "VOCABULARY", 1000)
    monkeypatch.setattr(data, "LONG", (8, 32, 16))
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    threads = torch.get_num_threads()
    command._forget()
    yield tmp_path
    command._forget()
    torch.set_num_threads(threads)


def test_every_contender_is_called_in_every_round_just_after_its_inputs_are_read() -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def setting() -> Iterator[None]:
        events.append("enter")
        yield
        events.append("leave")

    def contender(name: str) -> Contender:
        return Contender(name, lambda: events.append(f"run {name}"), lambda: events.append(f"read {name}"), setting)

    timings = protocol.interleave([contender(name) for name in "abc"], seconds=0, min_rounds=4)
    assert {name: timing.rounds for name, timing in timings.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = events[3 * 3 :]  # after one untimed call each
    quads = [rounds[i : i + 4] for i in range(0, len(rounds), 4)]
    assert all(quad == ["enter", f"read {quad[1][-1]}", f"run {quad[1][-1]}", "leave"] for quad in quads)
    order = "".join(quad[1][-1] for quad in quads)
    assert all(sorted(order[i : i + 3]) == ["a", "b", "c"] for i in range(0, 12, 3))
    assert len({order[i : i + 3] for i in range(0, 12, 3)}) > 1, "the order must change from round to round"


def test_median_and_minimum_come_from_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, *(t for took in (3.0, 1.0, 2.0, 9.0, 5.0) for t in (10.0, 10.0 + took)), *[99.0] * 9])
    readings: list[float] = []

    def clock() -> float:
        # the loop looks at the clock once more per round, from the sixth on: min_rounds is 5
        readings.append(next(times))
        return readings[-1]

    monkeypatch.setattr(time, "perf_counter", clock)
    timings = protocol.interleave([Contender("a", run=lambda: None)], seconds=1)
    assert timings["a"] == Timing(rounds=5, median_s=3.0, min_s=1.0)


def test_a_slow_contender_leaves_early() -> None:
    both = [Contender("slow", run=lambda: None, max_rounds=2), Contender("fast", run=lambda: None)]
    timings = protocol.interleave(both, seconds=0, min_rounds=6)
    assert (timings["slow"].rounds, timings["fast"].rounds) == (2, 6)


def test_contenders_must_have_different_names() -> None:
    with pytest.raises(ValueError, match="contenders must have different names"):
        protocol.interleave([Contender("a", run=lambda: None)] * 2, seconds=0)


GOLD = {"ids": torch.tensor([[3, 1]]), "x": torch.tensor([1.0, float("nan"), float("-inf")])}


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"ids": torch.tensor([[1, 3]])}, "ids differs at 2 of 2 places"),
        ({"x": torch.tensor([1.0001, float("nan"), float("-inf")])}, "x is off by"),
        ({"x": torch.tensor([1.0, 0.0, float("-inf")])}, "x is off by"),
        ({"x": torch.tensor([1.0, float("nan"), -1e30])}, "x is off by"),
        ({"x": torch.tensor([1.0])}, "x has shape [1], not [3]"),
    ],
)
def test_a_wrong_answer_is_seen(changed: dict[str, torch.Tensor], complaint: str) -> None:
    assert answers.complaints(GOLD, GOLD) == []
    (found,) = answers.complaints(GOLD | changed, GOLD)
    assert found.startswith(complaint)
    assert answers.complaints({"ids": GOLD["ids"]}, GOLD) == ["x is missing"]


def test_a_peer_may_break_ties_its_own_way_but_not_miss_a_larger_logit() -> None:
    logits = {"topk_ids": torch.tensor([[5.0, 4.0, 4.0, 1.0]])}
    gold = {"topk_ids": torch.tensor([[0, 1]]), "rewards": torch.tensor([[0.1, 0.2]])}
    tied = {"topk_ids": torch.tensor([[0, 2]]), "rewards": torch.tensor([[0.1, 0.7]])}
    wrong = {"topk_ids": torch.tensor([[0, 3]]), "rewards": torch.tensor([[0.1, 0.2]])}
    assert answers.peer_complaints(tied, gold, logits, 1e-4) == []
    assert answers.peer_complaints(wrong, gold, logits, 1e-4) == ["topk_ids does not hold the largest logits"]
    assert answers.peer_complaints(gold | {"rewards": torch.tensor([[0.1, 0.3]])}, gold, logits, 1e-4)


@pytest.mark.parametrize("dtype", data.DTYPES)
@pytest.mark.parametrize("op", cases.LOGIT_OPS)
def test_the_peers_compute_the_same(tiny: Path, op: str, dtype: str) -> None:
    assert cases.complaints(Case(op, dtype, "eager")) == []
    assert cases.complaints(Case(op, dtype, "eager_native")) == []


@pytest.mark.parametrize("dtype", data.DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_losses_and_their_peers_compute_the_same(tiny: Path, loss: str, dtype: str) -> None:
    peers = ["eager", "eager_native", *(cases.USUAL if loss == "topk_forward_kl" else ())]
    for impl in ("cpp", *peers):
        assert cases.complaints(Case(loss, dtype, impl, passes="both")) == []
    for passes in ("forward", "backward"):
        got = cases.call(Case(loss, dtype, "cpp", passes=passes))()
        assert ("gradient" in got) == (passes == "backward") != ("loss" in got)  # type: ignore[operator]
        assert cases.complaints(Case(loss, dtype, "cpp", passes=passes)) == []


@pytest.mark.parametrize("passes", ["backward", "both"])
def test_a_wrong_gradient_is_seen_however_small_it_is(tiny: Path, monkeypatch: pytest.MonkeyPatch, passes: str) -> None:
    """The loss is right, and the gradient's large values are; only the many small ones are not."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, student: torch.Tensor) -> torch.Tensor:
            return student.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return torch.where(gradient.abs() < 1e-4, 0, gradient)

    right = eager_losses.reverse_kl
    monkeypatch.setattr(
        eager_losses, "reverse_kl", lambda student, *rest, **more: right(Wrong.apply(student), *rest, **more)
    )
    (complaint,) = cases.complaints(Case("reverse_kl", "float32", "eager", passes=passes))
    assert complaint.startswith("gradient is off by")


def test_a_gradient_of_the_wrong_dtype_or_with_a_nan_is_seen() -> None:
    gold = {"gradient": torch.tensor([[0.5, -0.5], [1e-9, -1e-9]])}
    assert answers.complaints(gold, gold) == []
    for wrong, complaint in (
        (gold["gradient"].double(), "gradient has dtype"),
        (torch.tensor([[0.5, -0.5], [1e-9, float("nan")]]), "gradient is off by inf"),
        (torch.tensor([[0.5, -0.5], [1e-9, -1.1e-9]]), "gradient is off by 0.05"),
    ):
        (found,) = answers.complaints({"gradient": wrong}, gold)
        assert found.startswith(complaint)


@pytest.mark.parametrize("op", cases.READINGS)
@pytest.mark.parametrize("passes", ["forward", "both"])
def test_readings_read_every_row_and_write_as_much_as_the_gradient(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, op: str, passes: str
) -> None:
    case = Case(op, "bfloat16", "cpp", passes=passes)
    assert cases.complaints(case) == []
    row, tensors = 64 * 1000 * 2, 2 if op == "read" else 1
    read_again_and_written = row * (tensors + 1) if passes == "both" else 0
    assert cases.counted_bytes(case) == row * tensors + read_again_and_written
    right = implementations.read_logits
    monkeypatch.setattr(implementations, "read_logits", lambda *logits: [maxima + 1 for maxima in right(*logits)])
    monkeypatch.setattr(cases, "read_logits", implementations.read_logits)
    assert cases.complaints(case) == ["the row maxima are wrong"]


def test_the_bytes_of_a_loss_are_those_of_its_passes(tiny: Path) -> None:
    logits = 64 * 1000 * 4
    small = 64 * 16 * (8 + 4) + 64 * 4  # candidates and what belongs to each; the loss
    of = {passes: cases.counted_bytes(Case("topk_policy_loss", "float32", "cpp", passes=passes))
          for passes in ("forward", "backward", "both")}  # fmt: skip
    assert of == {"forward": logits + small, "backward": 2 * logits, "both": 3 * logits + small}
    assert cases.counted_bytes(Case("reverse_kl", "float32", "cpp", passes="both")) == 5 * logits + 2 * 64 * 4


def test_the_losses_are_timed_in_both_passes_beside_what_is_usual(tiny: Path) -> None:
    arguments = ["--only", "topk_forward_kl", "--only", "reverse_kl", "--dtype", "bfloat16", "--seconds", "0"]
    assert command.main([*arguments, "--no-memory", "--save", "--threads", "1"]) == 0
    (file,) = tiny.glob("*.jsonl")
    rows = {(row["op"], row["impl"], row["isa"], row["passes"]): row for row in results.load(file)}
    isa = implementations.instruction_sets()[0]
    forward, both = (rows["topk_forward_kl", "cpp", isa, passes] for passes in ("forward", "both"))
    assert forward["fraction_of_read"] > 0 and "fraction_of_read_write" not in forward
    assert both["fraction_of_read_write"] > 0 and both["fraction_of_read_write_min"] > 0
    assert "fraction_of_read" not in both and "times_faster_than_eager" not in forward
    for peer in ("eager", "eager_native", *cases.USUAL):
        assert both[f"times_faster_than_{peer}"] > 0
        assert ("topk_forward_kl", peer, "none", "both") in rows
        assert ("reverse_kl", peer, "none", "both") in rows or peer in cases.USUAL
    yardsticks = {(op, passes) for op, impl, _, passes in rows if op in cases.READINGS}
    assert yardsticks == {(op, passes) for op in cases.READINGS for passes in ("forward", "both")}


@pytest.mark.parametrize(("op", "dtype"), [("reliability_from_topk", "int64"), ("reliability_from_drift", "bool")])
def test_the_peers_without_logits_compute_the_same(tiny: Path, op: str, dtype: str) -> None:
    assert cases.complaints(Case(op, dtype, "eager")) == []


def test_a_run_prints_and_saves_a_row_for_every_case(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dtype", "float32", "--seconds", "0", "--no-memory", "--save", "--threads", "1"]
    assert command.main(arguments) == 0
    (file,) = tiny.glob("*.jsonl")
    rows = results.load(file)
    assert {row["op"] for row in rows} >= {*cases.LOGIT_OPS, *cases.TOPK_OPS, *LOSSES}
    assert all(row["gb_s"] > 0 and row["rounds"] >= 2 for row in rows)
    eager_row = next(row for row in rows if row["impl"] == "eager")
    assert eager_row["counted_bytes"] == 2 * 64 * 1000 * 4 + 64 * (3 * 4 + 4 + 1 + 16 * 12) + 4 * 4
    printed = capsys.readouterr().out
    assert all(f"{row['op']} {row['dtype']} {row['impl']}" in printed for row in rows)


def test_a_part_is_not_saved_unless_asked(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "reliability_from_drift", "--seconds", "0", "--no-memory", "--no-peers"]) == 0
    assert not list(tiny.iterdir())


def test_what_is_wrong_is_not_timed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = eager.reliability_from_drift
    monkeypatch.setattr(eager, "reliability_from_drift", lambda drift: right(~drift))
    assert command.main(["--only", "reliability_from_drift", "--seconds", "0", "--no-memory", "--save"]) == 1
    (file,) = tiny.glob("*.jsonl")
    assert "eager" not in {row["impl"] for row in results.load(file)}
    assert "NOT TIMED: reliability_from_drift bool eager: drift_count differs" in capsys.readouterr().err


def test_ratios_are_of_medians_of_the_same_run(tiny: Path) -> None:
    def timing(milliseconds: float) -> Timing:
        return Timing(7, milliseconds / 1e3, milliseconds / 2e3)

    kernel = Case("reliability", "float32", "cpp", "avx2")
    rows = results.time_rows(
        {
            Case("read", "float32", "cpp", "avx2"): timing(2),
            Case("read", "float32", "cpp", "avx2", rows="ascending"): timing(1),
            Case("read", "float32", "cpp", "avx512"): timing(99),
            kernel: timing(4),
            Case("reliability", "float32", "cpp", "avx2", k=64): timing(6),
            Case("reliability", "float32", "cpp", "avx2", rows="ascending"): timing(8),
            Case("reliability", "float32", "eager"): timing(40),
        }
    )
    by_name = {(row["op"], row["impl"], row["k"], row["rows"]): row for row in rows if row["isa"] != "avx512"}
    row = by_name["reliability", "cpp", 16, "random"]
    assert (row["fraction_of_read"], row["times_faster_than_eager"], row["rounds"]) == (0.5, 10, 7)
    assert "time_over_k16_random" not in row
    assert by_name["reliability", "cpp", 64, "random"]["time_over_k16_random"] == 1.5
    ascending = by_name["reliability", "cpp", 16, "ascending"]
    assert (ascending["fraction_of_read"], ascending["time_over_k16_random"]) == (0.125, 2)
    assert "times_faster_than_eager" not in ascending


def test_a_loss_is_compared_with_what_its_passes_must_read_and_write(tiny: Path) -> None:
    def timing(milliseconds: float) -> Timing:
        return Timing(7, milliseconds / 1e3, milliseconds / 4e3)

    loss = Case("topk_policy_loss", "bfloat16", "cpp", "avx2", passes="both")
    timings = {
        Case("read", "bfloat16", "cpp", "avx2"): timing(99),
        Case("read", "bfloat16", "cpp", "avx2", passes="both"): timing(99),
        Case("read_student", "bfloat16", "cpp", "avx2", passes="forward"): timing(1),
        Case("read_student", "bfloat16", "cpp", "avx2", passes="both"): timing(3),
        replace(loss, passes="forward"): timing(2),
        loss: timing(12),
        replace(loss, impl="eager", isa="none"): timing(36),
    }
    rows = {
        (row["op"], row["passes"]): row
        for row in results.time_rows(timings)
        if row["impl"] == "cpp" and "passes" in row
    }
    assert rows["topk_policy_loss", "forward"]["fraction_of_read"] == 0.5
    assert rows["topk_policy_loss", "both"]["fraction_of_read_write"] == 0.25
    assert rows["topk_policy_loss", "both"]["times_faster_than_eager"] == 3
    assert "times_faster_than_eager" not in rows["topk_policy_loss", "forward"]


def _row(**fields: object) -> results.Row:
    head = {
        "measure": "time",
        "op": "reliability",
        "dtype": "float32",
        "impl": "cpp",
        "isa": "avx512",
        "k": 16,
        "rows": "random",
        "threads": 2,
        "cpu": "Some CPU",
        "torch": "2.13.0",
        "date": "2026-01-01 00:00:00 UTC",
        "median_ms": 5.0,
        "load_average": 0.1,
    }
    return head | fields


def test_saving_replaces_the_row_of_the_same_case(tmp_path: Path) -> None:
    path = tmp_path / "device.jsonl"
    results.save([_row(median_ms=5.0), _row(isa="avx2", median_ms=6.0)], path)
    results.save([_row(median_ms=4.0)], path)
    assert [row["median_ms"] for row in results.load(path)] == [4.0, 6.0]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_the_readme_s_table_is_written_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme, saved = tmp_path / "README.md", tmp_path / "device.jsonl"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    page = tmp_path / "page.md"
    page.write_text(f"{table.BEGIN}\n{table.END}\n{table.LINEAR_BEGIN}\n{table.LINEAR_END}\n")
    monkeypatch.setattr(table, "README", readme)
    monkeypatch.setattr(table, "PAGE", page)
    monkeypatch.setattr(table, "VERL_PAGE", page)
    results.save(
        [
            _row(fraction_of_read=0.9, times_faster_than_eager=21.5),
            _row(impl="eager", isa="none", median_ms=100.0),
            _row(measure="memory", extra_bytes=2**19, extra_bytes_per_thread=2**18),
        ],
        saved,
    )
    assert table.write(saved) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n")
    assert text.endswith(f"\n{table.END}\nafter\n")
    assert "old" not in text
    for cell in ("`reliability`", "float32, k=16", "100 ms", "5 ms (0.90)", "21.5x", "512 KiB"):
        assert f"| {cell} |" in text
    assert "Other programs" not in text
    assert "load average 3.5" in table.markdown([_row(), _row(isa="avx2", load_average=3.5)])
    readme.write_text("no markers")
    assert table.write(saved) == 1


def test_the_losses_have_tables_of_their_own(tmp_path: Path) -> None:
    saved = tmp_path / "device.jsonl"
    loss = {"op": "topk_forward_kl", "passes": "both"}
    bytes_of = {"cpp": 2**16, "eager": 2**27, "chunked": 2**26, "checkpointed": 2**25}
    results.save(
        [
            _row(fraction_of_read=0.9),
            _row(op="read_student", passes="both", median_ms=2.5),
            _row(op="topk_forward_kl", passes="forward", median_ms=2.0, fraction_of_read=0.7),
            _row(**loss, fraction_of_read_write=0.6, times_faster_than_eager=9.0),
            *(_row(**loss, impl=impl, isa="none", median_ms=50.0) for impl in ("eager", "chunked", "checkpointed")),
            *(_row(**loss, impl=impl, isa="avx512" if impl == "cpp" else "none", measure="memory", extra_bytes=size)
              for impl, size in bytes_of.items()),
        ],
        saved,
    )  # fmt: skip
    operators, losses, usual = re.split(r"\n\n(?=Some CPU|`topk_forward_kl`, )", table.tables(saved))[1:]
    assert "topk_forward_kl" not in operators and "`reliability`" in operators and "`reliability`" not in losses
    assert "| float32, k=16, forward |  |  | 2 ms (0.70) |" in losses
    both = "float32, k=16, forward and backward"
    assert f"| {both} | 50 ms |  | 5 ms (0.60) | 9x | 128 MiB | 64 KiB |" in losses
    assert "| plain reading of the student | float32, twice, and writing the gradient |" in losses
    assert f"| {both} | 5 ms, 64 KiB | 50 ms, 128 MiB | 50 ms, 64 MiB | 50 ms, 32 MiB |" in usual


def test_the_tables_are_those_of_the_saved_lines() -> None:
    """`python -m bench table` has been called since anything was saved."""
    pages = {table.README: table.tables(), table.PAGE: table.predictions(), table.VERL_PAGE: table.verl()}
    for file, expected in pages.items():
        (written,) = re.findall(f"{table.BEGIN}\n(.*?)\n{table.END}", file.read_text(), flags=re.DOTALL)
        assert written == expected, f"python -m bench table would change {file.name}"
    begin, end = table.LINEAR_BEGIN, table.LINEAR_END
    (written,) = re.findall(f"{begin}\n(.*?)\n{end}", table.PAGE.read_text(), flags=re.DOTALL)
    assert written == table.linear(), f"python -m bench table would change {table.PAGE.name}"


@pytest.mark.parametrize(
    ("fraction", "verdict", "status"), [(0.95, "aim met", 0), (0.8, "must met", 0), (0.6, "MISSED", 1)]
)
def test_the_check_compares_with_the_targets(
    fraction: float, verdict: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "device.jsonl"
    results.save([_row(fraction_of_read=fraction)], path)
    assert targets.report(path) == status
    assert verdict in capsys.readouterr().out


@pytest.mark.parametrize(("fraction", "status"), [(0.35, 0), (0.34, 1)])
def test_the_passes_of_a_loss_have_targets_of_their_own(fraction: float, status: int, tmp_path: Path) -> None:
    path = tmp_path / "device.jsonl"
    both = _row(op="reverse_kl", dtype="bfloat16", passes="both", fraction_of_read_write=fraction)
    results.save([both, _row(op="reverse_kl", dtype="bfloat16", passes="forward", fraction_of_read=0.42)], path)
    assert targets.report(path) == status


def test_nothing_measured_is_not_a_pass(tmp_path: Path) -> None:
    assert targets.report(tmp_path / "missing.jsonl") == 1


def test_extra_memory_is_what_a_call_allocates_beyond_its_outputs() -> None:
    extra = memory.measure(Case("reliability_from_drift", "bool", "eager"), threads=1)
    positions = data.LONG[0] * data.LONG[1]
    # w_drop * C and the like, in float32: at least one tensor of temporaries, and not many
    assert extra is not None
    assert 4 * positions <= extra <= 40 * positions


@pytest.mark.parametrize("impl", ["cpp", "eager", *cases.USUAL])
def test_the_memory_of_a_loss_is_what_it_takes_beyond_loss_and_gradient(impl: str) -> None:
    extra = memory.measure(Case("topk_forward_kl", "bfloat16", impl, passes="both"), threads=1)
    logits = 64 * data.VOCABULARY * 2
    least, most = {"cpp": (0, 0.1), "eager": (4, 6), "chunked": (2, 4), "checkpointed": (0.9, 2)}[impl]
    assert extra is not None
    assert least * logits <= extra <= most * logits


def test_several_processes_against_one() -> None:
    """It checks the answer of the ranks before it prints a row."""
    row = json.loads(processes.run("-m", "bench.parallel", "--shape", 1, 2, "--rounds", 1, cwd=processes.ROOT))
    assert row["ranks"] == 2 and row["median_ms"] > 0
    assert row["bytes_sent_by_a_rank"] == 32 + 2 * 4 * (5 * 16 + 2)
