"""The benchmark of the losses from hidden states, at a size that shows no speed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import linear, results, table, targets
from bench.linear import Size

TINY = Size(positions=32, hidden=8, vocabulary=200)
ARGUMENTS = ["--positions", "32", "--hidden", "8", "--vocabulary", "200", "--seconds", "0", "--rounds", "1"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_run_saves_a_row_a_case_and_the_page_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "measure_memory", lambda size, loss, reduction, threads: 2**20 * len(reduction))
    file = tmp_path / "device.jsonl"
    for _ in range(2):  # the second run replaces the rows of the first
        assert linear.main([*ARGUMENTS, "--file", str(file)]) == 0
    rows = results.load(file)
    assert len(rows) == 6 + 1 + 3
    assert all(row["time_over_products"] > 0 for row in rows[:6])
    assert rows[6]["time_over_not_skipping"] > 0
    text = table.linear(file)
    assert text.count("\n| `") == 6
    for cell in ("`reverse_kl`", "`none`", "4 MiB", "3 MiB", "11 MiB"):
        assert f"| {cell} |" in text
    assert "50% of the positions exhausted" in text
    assert "linear_opd_loss" not in table.tables(file), "the README's table is of the operators on logits"
    assert targets.report(file) in (0, 1)


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = linear.linear_opd_loss

    def wrong(*args: object, **kwargs: object) -> object:
        out = right(*args, **kwargs)  # type: ignore[arg-type]
        return out._replace(loss=out.loss * 1.01)

    monkeypatch.setattr(linear, "linear_opd_loss", wrong)
    assert linear.main([*ARGUMENTS, "--no-save"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(re.findall("NOT TIMED: .* is off by", printed.err)) == 3 * 6, "loss and gradients of each case"


@pytest.mark.parametrize("loss", linear.LOSSES)
def test_the_peer_computes_the_same(loss: str) -> None:
    data = linear.Data.of(TINY)
    expected = linear.full_logits(data, loss)
    gradients = data.student.grad, data.student_weight.grad
    for reduction in linear.REDUCTIONS:
        got = linear.linear(data, loss, reduction, chunk_size=5)
        torch.testing.assert_close(got, expected.sum() if reduction == "sum" else expected, rtol=1e-4, atol=1e-4)
        for one, other in zip((data.student.grad, data.student_weight.grad), gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_half_of_the_positions_are_exhausted() -> None:
    skipping = linear.calls(linear.Data.of(TINY), TINY)["skip True"]
    data, *_ = skipping.args  # type: ignore[attr-defined]
    out = linear.linear_opd_loss(
        data.student, data.student_weight, data.teacher, data.teacher_weight, k=linear.K, skip_exhausted=True,
        w_base=0.0, w_drop=skipping.keywords["w_drop"],  # type: ignore[attr-defined]
    )  # fmt: skip
    assert (out.reliability > 0).float().mean().item() == pytest.approx(0.5, abs=2 * linear.RESPONSES / 32)


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    size = Size(positions=64, hidden=8, vocabulary=2**18)
    full = linear.measure_memory(size, "reverse_kl", linear.FULL, threads=1)
    assert 4 * 2**26 <= full <= linear.EAGER_BYTES * 2**24, "several tensors of 64 MiB"
