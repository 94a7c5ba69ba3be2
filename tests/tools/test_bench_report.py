"""Rows of results, the tables made of them, and the targets they are held to."""

import json
import re
from dataclasses import replace

import pytest

from bench.measure.cases import Case
from bench.measure.timing import Timing
from bench.operators import OPERATORS
from bench.report import rows as results
from bench.report import tables, targets

(WITH_USUAL,) = (name for name, op in OPERATORS.items() if op.usual)


def timing(milliseconds):
    return Timing(7, milliseconds / 1e3, milliseconds / 4e3)


def row(**fields):
    head = {"measure": "time", "op": "reliability", "dtype": "float32", "impl": "cpp", "isa": "avx512", "k": 16}
    head |= {"rows": "random", "threads": 2, "cpu": "Some CPU", "torch": "2.13.0", "date": "2026-01-01 00:00:00 UTC"}
    return head | {"median_ms": 5.0, "load_average": 0.1} | fields


def gpu_row(**fields):
    head = {name: value for name, value in row(dtype="bfloat16", impl="cuda", isa="none").items() if name != "cpu"}
    return head | {"positions": 8192, "gpu": "Some GPU", "triton": "3.6.0", "median_ms": 1.25} | fields


def test_ratios_are_of_medians_of_the_same_run():
    kernel = Case("reliability", "float32", "cpp", "avx2")
    loss = Case("topk_policy_loss", "float32", "cpp", "avx2", passes="both")
    rows = results.time_rows(
        {
            Case("read", "float32", "cpp", "avx2"): timing(2),
            Case("read", "float32", "cpp", "avx2", rows="ascending"): timing(1),
            Case("read", "float32", "cpp", "avx512"): timing(99),
            Case("read", "float32", "cpp", "avx2", passes="both"): timing(99),
            Case("read_student", "float32", "cpp", "avx2", passes="forward"): timing(1),
            Case("read_student", "float32", "cpp", "avx2", passes="both"): timing(3),
            kernel: timing(4),
            replace(kernel, k=64): timing(6),
            replace(kernel, rows="ascending"): timing(8),
            replace(kernel, impl="eager", isa="none"): timing(40),
            replace(loss, passes="forward"): timing(2),
            loss: timing(12),
            replace(loss, impl="eager", isa="none"): timing(36),
        }
    )
    found = {(one["op"], one["k"], one["rows"], one.get("passes")): one for one in rows if one["impl"] == "cpp"}
    plain = found["reliability", 16, "random", None]
    assert (plain["fraction_of_read"], plain["times_faster_than_eager"], plain["rounds"]) == (0.5, 10, 7)
    assert "time_over_k16_random" not in plain
    assert found["reliability", 64, "random", None]["time_over_k16_random"] == 1.5
    ascending = found["reliability", 16, "ascending", None]
    assert (ascending["fraction_of_read"], ascending["time_over_k16_random"]) == (0.125, 2)
    assert "times_faster_than_eager" not in ascending
    forward, both = (found[loss.op, 16, "random", passes] for passes in ("forward", "both"))
    assert forward["fraction_of_read"] == 0.5 and "times_faster_than_eager" not in forward
    assert (both["fraction_of_read_write"], both["times_faster_than_eager"]) == (0.25, 3)


def test_saving_replaces_the_row_of_the_same_case(tmp_path):
    path = tmp_path / "device.jsonl"
    results.save([row(median_ms=5.0), row(isa="avx2", median_ms=6.0)], path)
    results.save([row(median_ms=4.0)], path)
    assert [one["median_ms"] for one in results.load(path)] == [4.0, 6.0]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_tables_are_written_between_their_markers(tmp_path, monkeypatch):
    readme, page, saved = tmp_path / "README.md", tmp_path / "page.md", tmp_path / "device.jsonl"
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    page.write_text(f"{tables.BEGIN}\n{tables.END}\n{tables.LINEAR_BEGIN}\n{tables.LINEAR_END}\n")
    for name, file in (("README", readme), ("PAGE", page), ("VERL_PAGE", page)):
        monkeypatch.setattr(tables, name, file)
    kernel = row(fraction_of_read=0.9, times_faster_than_eager=21.5)
    eager = row(impl="eager", isa="none", median_ms=100.0)
    results.save([kernel, eager, row(measure="memory", extra_bytes=2**19)], saved)
    assert tables.write(saved) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{tables.BEGIN}\n") and text.endswith(f"\n{tables.END}\nafter\n")
    assert "old" not in text and "Other programs" not in text
    assert "| `reliability` | float32, k=16 | 100 ms |  | 5 ms (0.90) | 21.5x |  | 512 KiB |" in text
    assert "load average 3.5" in tables.markdown([row(), row(isa="avx2", load_average=3.5)])
    readme.write_text("no markers")
    assert tables.write(saved) == 1


def test_losses_have_tables_of_their_own(tmp_path):
    saved, loss = tmp_path / "device.jsonl", {"op": WITH_USUAL, "passes": "both"}
    bytes_of = {"cpp": 2**16, "eager": 2**27, "chunked": 2**26, "checkpointed": 2**25}
    rows = [
        row(fraction_of_read=0.9),
        row(op="read_student", passes="both", median_ms=2.5),
        row(op=WITH_USUAL, passes="forward", median_ms=2.0, fraction_of_read=0.7),
        row(**loss, fraction_of_read_write=0.6, times_faster_than_eager=9.0),
    ]
    for impl, size in bytes_of.items():
        rows += [row(**loss, impl=impl, isa="none", median_ms=50.0)] if impl != "cpp" else []
        isa = "avx512" if impl == "cpp" else "none"
        rows += [row(**loss, impl=impl, isa=isa, measure="memory", extra_bytes=size)]
    results.save(rows, saved)
    operators, losses, usual = re.split(rf"\n\n(?=Some CPU|`{WITH_USUAL}`, )", tables.tables(saved))[1:]
    assert WITH_USUAL not in operators and "`reliability`" in operators and "`reliability`" not in losses
    assert "| float32, k=16, forward |  |  | 2 ms (0.70) |" in losses
    both = "float32, k=16, forward and backward"
    assert f"| {both} | 50 ms |  | 5 ms (0.60) | 9x | 128 MiB | 64 KiB |" in losses
    assert "| plain reading of the student | float32, twice, and writing the gradient |" in losses
    assert f"| {both} | 5 ms, 64 KiB | 50 ms, 128 MiB | 50 ms, 64 MiB | 50 ms, 32 MiB |" in usual


def test_a_gpu_s_table_has_its_prediction_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert tables.NO_GPU in tables.tables()
    expected = gpu_row(measure="prediction", fraction_of_copy=0.91, at_worst=0.84, at_best=0.98)
    results.save([expected], tmp_path / results.PREDICTIONS)
    assert tables.NO_GPU in tables.tables(), "a prediction is not a result"
    rows = [
        gpu_row(op="copy", impl="torch", median_ms=1.16, gb_s=4290.0),
        gpu_row(fraction_of_copy=0.93, times_faster_than_eager=31.0, times_faster_than_compiled=9.1),
        gpu_row(impl="triton", median_ms=1.3, fraction_of_copy=0.9),
        gpu_row(impl="eager", median_ms=38.8),
        gpu_row(measure="memory", extra_bytes=2048),
        gpu_row(measure="memory", impl="eager", extra_bytes=2**34),
    ]
    results.save(rows, tmp_path / "some-gpu.jsonl")
    text = tables.tables()
    assert tables.NO_GPU not in text and "4.29 TB/s" in text
    cells = ["`reliability`", "8192 positions, bfloat16, k=16", "38.8 ms", "", "1.3 ms (0.90)", "1.25 ms (0.93)"]
    cells += ["0.91 (0.84 to 0.98)", "31x", "9.1x", "1.64e+04 MiB", "2 KiB"]
    assert f"| {' | '.join(cells)} |" in text


def test_the_pages_hold_the_tables_of_the_saved_lines():
    """`python -m bench table` has been called since anything was saved."""
    written = {
        (tables.README, tables.BEGIN, tables.END): tables.tables(),
        (tables.PAGE, tables.BEGIN, tables.END): tables.predictions(),
        (tables.PAGE, tables.LINEAR_BEGIN, tables.LINEAR_END): tables.linear(),
        (tables.VERL_PAGE, tables.BEGIN, tables.END): tables.verl(),
    }
    for (page, begin, end), expected in written.items():
        (found,) = re.findall(f"{begin}\n(.*?)\n{end}", page.read_text(), flags=re.DOTALL)
        assert found == expected, f"python -m bench table would change {page.name}"


LOSS = {"op": "reverse_kl", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("rows", "verdict", "status"),
    [
        ([row(fraction_of_read=0.95)], "aim met", 0),
        ([row(fraction_of_read=0.8)], "must met", 0),
        ([row(fraction_of_read=0.6)], "MISSED", 1),
        ([row(**LOSS, passes="both", fraction_of_read_write=0.35)], "must met", 0),
        ([row(**LOSS, passes="both", fraction_of_read_write=0.34)], "MISSED", 1),
        ([row(k=64, time_over_k16_random=1.1)], "aim met", 0),
        ([row(k=64, time_over_k16_random=1.31)], "MISSED", 1),
        ([], "0 targets", 1),
        ([gpu_row(fraction_of_copy=0.93)], "NOT MEASURED", 1),
    ],
)
def test_results_are_held_to_their_targets(rows, verdict, status, tmp_path, capsys):
    results.save(rows, tmp_path / "device.jsonl")
    assert targets.report(tmp_path / "device.jsonl") == status
    assert verdict in capsys.readouterr().out


def test_every_target_of_a_gpu_can_be_met(tmp_path, capsys):
    rows = {}
    for target in targets.GPU:
        one = gpu_row(**target.where, measure=target.measure, **{target.field: target.must})
        rows[results.key(one)] = rows.get(results.key(one), {}) | one
    results.save(list(rows.values()), tmp_path / "some-gpu.jsonl")
    assert targets.report(tmp_path / "some-gpu.jsonl") == 0
    assert "MISSED" not in capsys.readouterr().out
