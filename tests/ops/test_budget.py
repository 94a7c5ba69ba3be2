"""Algorithm 1, lines 12-19, worked by hand."""

import numpy as np
import pytest
import torch

from pruneopd_kernels import ResponseBudget


def budget(**change):
    return ResponseBudget(**{"initial": 200, "minimum": 100, "maximum": 400, "step": 50, "margin": 20, **change})


def test_defaults():
    default = ResponseBudget()
    assert default.length == 2048
    assert default.update([2048] * 10) == default.length == 2148
    for _ in range(3):
        default.update([1] * 10)
    assert default.length == 2048


def test_it_grows_when_enough_reach_the_boundary():
    b = budget()
    assert b.update([180] + [0] * 9) == 250  # 1 of 10 at M - margin = 180: h = hit_ratio counts
    assert b.update([229] * 10) == 250  # 230 is the boundary now
    assert b.update([230] + [0] * 10) == 250  # 1 of 11 is too few
    for hits, total in ((3, 30), (7, 70), (100, 1000)):  # h >= hit_ratio in float64: 7 of 70 is 0.1
        assert budget().update([400] * hits + [0] * (total - hits)) == 250
        assert budget().update([400] * (hits - 1) + [0] * (total - hits + 1)) == 200


@pytest.mark.parametrize(("change", "batches", "lengths"), [
    ({"initial": 330}, [400, 400, 400], [380, 400, 400]),  # grows to the maximum and no further
    ({}, [0] * 10, [200, 200, 150, 150, 150, 100, 100, 100, 100, 100]),  # shrinks when patience runs out
    ({"initial": 130, "patience": 1}, [0, 0], [100, 100]),  # to the minimum
    ({}, [0, 0, 400, 0, 0, 0], [200, 200, 250, 250, 250, 200]),  # a hit resets the counter,
    ({"initial": 400}, [0, 0, 400, 0, 0, 0], [400, 400, 400, 400, 400, 350]),  # at the maximum, too
])  # fmt: skip
def test_it_grows_and_shrinks(change, batches, lengths):
    b = budget(**change)
    assert [b.update([batch]) for batch in batches] == lengths


def test_an_empty_batch_changes_nothing():
    b = budget(patience=2)
    b.update([0])
    before = b.state_dict()
    assert b.update([]) == 200
    assert b.update(torch.zeros(0, dtype=torch.int32)) == 200
    assert b.state_dict() == before
    assert b.update([0]) == 150  # the counter stood at 1


def test_floor_of_the_hit_boundary():
    """At M = 110 the boundary is 90; with the floor it is the minimum, 100."""
    assert budget(initial=110).update([95]) == 160
    assert budget(initial=110, floor_hit_boundary=True).update([95]) == 110
    assert budget(initial=110, floor_hit_boundary=True).update([100]) == 160


def test_update_takes_integers_of_any_kind():
    for kind in (list, tuple, torch.tensor, np.array, torch.IntTensor):
        b = budget()
        assert b.update(kind([180, 10])) == 250 and type(b.length) is int
    assert budget().update([torch.tensor(180), np.int32(10), 10.0]) == 250


def test_state_dict_continues_where_it_stood(tmp_path):
    a, b = budget(), budget()
    for lengths in ([400], [0], [0]):
        a.update(lengths)
    torch.save(a.state_dict(), tmp_path / "state.pt")
    b.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert b.length == a.length == 250
    assert b.update([0]) == a.update([0]) == 200


@pytest.mark.parametrize(("argument", "value"), [
    ("minimum", 0), ("initial", 50), ("initial", 500), ("maximum", 50), ("step", 0), ("margin", -1), ("hit_ratio", 1.5),
    ("hit_ratio", float("nan")), ("patience", 0),
])  # fmt: skip
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=rf"^ResponseBudget: {argument} must .*, got {value}$"):
        budget(**{argument: value})


@pytest.mark.parametrize(("lengths", "words"), [
    (3, "be a tensor, an array or a sequence of lengths, got int"),
    ("123", "be a tensor, an array or a sequence of lengths, got str"),
    ([200, "x"], "hold numbers, got str"),
    (torch.ones(2, dtype=torch.complex64), "have dtype integer or float, got complex64"),
    (torch.ones(2).to_sparse(), "be a plain tensor, got one of layout torch.sparse_coo: pass .to_dense()"),
])  # fmt: skip
def test_bad_lengths(lengths, words):
    with pytest.raises(TypeError) as raised:
        budget().update(lengths)
    assert str(raised.value) == f"ResponseBudget: effective_lengths must {words}"


@pytest.mark.parametrize(("state", "error"), [
    (None, TypeError), ({"length": 250, "counter": True}, TypeError), ({"length": 250}, ValueError),
    ({"length": 450, "counter": 0}, ValueError), ({"length": 250, "counter": 3}, ValueError),
])  # fmt: skip
def test_bad_state(state, error):
    with pytest.raises(error, match=r"^ResponseBudget: (state|length|counter) must .*, got "):
        budget().load_state_dict(state)


def test_a_group_that_is_none():
    with pytest.raises(TypeError, match=r"^ResponseBudget: group must be a torch\.distributed group or None, got str$"):
        budget(group="WORLD")
