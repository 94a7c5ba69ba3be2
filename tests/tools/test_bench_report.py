"""Rows of results, the tables made of them, and the targets they are held to."""

import json
import re
from dataclasses import replace

import pytest

from bench.measure.cases import Case
from bench.measure.timing import Timing
from bench.report import chart, tables, targets
from bench.report import rows as results


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
    read, student = replace(kernel, op="read"), replace(kernel, op="read_student")
    milliseconds = {
        read: 2,
        replace(read, isa="avx512"): 99,
        replace(student, passes="forward"): 1,
        replace(student, passes="both"): 3,
        kernel: 4,
        replace(kernel, rows="ascending"): 8,
        replace(kernel, impl="eager", isa="none"): 40,
        loss: 12,
        replace(loss, impl="eager", isa="none"): 36,
    }
    rows = results.time_rows({case: Timing(7, ms / 1e3, ms / 4e3) for case, ms in milliseconds.items()})
    ratios = ("fraction_of_read", "fraction_of_read_write", "time_over_k16_random", "times_faster_than_eager")
    found = {(one["op"], one["k"], one["rows"], one.get("passes")): {name: one[name] for name in ratios if name in one}
             for one in rows if one["impl"] == "cpp"}  # fmt: skip
    assert found[kernel.op, 16, "random", None] == {"fraction_of_read": 0.5, "times_faster_than_eager": 10}
    assert found[kernel.op, 16, "ascending", None] == {"time_over_k16_random": 2}
    assert found[loss.op, 16, "random", "both"] == {"fraction_of_read_write": 0.25, "times_faster_than_eager": 3}


def test_saving_replaces_the_row_of_the_same_case(tmp_path):
    path = tmp_path / "device.jsonl"
    results.save([row(median_ms=5.0), row(isa="avx2", median_ms=6.0)], path)
    results.save([row(median_ms=4.0)], path)
    assert [one["median_ms"] for one in results.load(path)] == [4.0, 6.0]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_tables_are_written_between_their_markers(tmp_path, monkeypatch):
    readme, page, saved = tmp_path / "README.md", tmp_path / "page.md", tmp_path / "device.jsonl"
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    marks = [(tables.BEGIN, tables.END), (tables.OPERATORS_BEGIN, tables.OPERATORS_END),
             (tables.LINEAR_BEGIN, tables.LINEAR_END)]  # fmt: skip
    page.write_text("".join(f"{begin}\n{end}\n" for begin, end in marks))
    for name, file in (("README", readme), ("PAGE", page), ("VERL_PAGE", page)):
        monkeypatch.setattr(tables, name, file)
    shape = {"shape": [4, 16, 1000], "dtype": "bfloat16"}
    eager = row(impl="eager", isa="none", median_ms=100.0, **shape)
    fast = row(fraction_of_read=0.9, times_faster_than_eager=21.5, load_average=3.5, **shape)
    results.save([fast, eager, row(measure="memory", extra_bytes=2**19, **shape)], saved)
    assert tables.write(saved) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{tables.BEGIN}\n") and text.endswith(f"\n{tables.END}\nafter\n")
    assert "old" not in text and "64 positions, 1000 ids, bfloat16, k=16" in text
    assert "| `reliability` | 100 ms |  | 5 ms | 21.5x |  |  | 512 KiB |" in text
    assert "| `reliability` | bfloat16, k=16 | 100 ms |  | 5 ms (0.90) | 21.5x |  | 512 KiB |" in page.read_text()
    assert "load average 3.5" in page.read_text()
    readme.write_text("no markers")
    assert tables.write(saved) == 1


def test_the_chart_s_bars_are_as_long_as_the_times(tmp_path):
    saved = tmp_path / "device.jsonl"
    shape = {"shape": [4, 16, 1000], "dtype": "bfloat16"}
    results.save([row(median_ms=5.0, **shape), row(impl="eager", isa="none", median_ms=100.0, **shape)], saved)
    widths = [float(width) for width in re.findall(r'class="bar" .*?width="([\d.]+)"', chart.svg(saved))]
    assert widths == [chart.LONGEST, chart.LONGEST / 20]


def test_the_pages_hold_the_tables_of_the_saved_lines():
    """`python -m bench table` and `chart` have been called since anything was saved."""
    written = {
        (tables.README, tables.BEGIN, tables.END): tables.summary(),
        (tables.PAGE, tables.OPERATORS_BEGIN, tables.OPERATORS_END): tables.tables(),
        (tables.PAGE, tables.BEGIN, tables.END): tables.predictions(),
        (tables.PAGE, tables.LINEAR_BEGIN, tables.LINEAR_END): tables.linear(),
        (tables.VERL_PAGE, tables.BEGIN, tables.END): tables.verl(),
    }
    for (page, begin, end), expected in written.items():
        (found,) = re.findall(f"{begin}\n(.*?)\n{end}", page.read_text(), flags=re.DOTALL)
        assert found == expected, f"python -m bench table would change {page.name}"
    assert chart.FILE.read_text() == chart.svg(), "python -m bench chart would change the chart"


LOSS = {"op": "reverse_kl", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("rows", "verdict", "status"),
    [
        ([row(fraction_of_read=0.95)], "aim met", 0),
        ([row(**LOSS, passes="both", fraction_of_read_write=0.35)], "must met", 0),
        ([row(**LOSS, passes="both", fraction_of_read_write=0.34)], "MISSED", 1),
        ([], "0 targets", 1),
        ([gpu_row(fraction_of_copy=0.93)], "NOT MEASURED", 1),
    ],
)
def test_results_are_held_to_their_targets(rows, verdict, status, tmp_path, capsys):
    results.save(rows, tmp_path / "device.jsonl")
    assert targets.report(tmp_path / "device.jsonl") == status
    assert verdict in capsys.readouterr().out


def test_every_target_of_a_gpu_can_be_met(tmp_path):
    rows = {}
    for target in targets.GPU:
        one = gpu_row(**target.where, measure=target.measure, **{target.field: target.must})
        rows[results.key(one)] = rows.get(results.key(one), {}) | one
    results.save(list(rows.values()), tmp_path / "some-gpu.jsonl")
    assert targets.report(tmp_path / "some-gpu.jsonl") == 0
