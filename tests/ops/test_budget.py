"""Algorithm 1, lines 12-19, worked by hand."""

import subprocess

import numpy as np
import pytest
import torch

import processes
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
    assert b.update([230, 229, 0, 0, 0, 0, 0, 0, 0, 0]) == 300
    assert b.update([280] + [0] * 10) == 300  # 1 of 11 is too few


def test_it_grows_to_the_maximum_and_no_further():
    b = budget(initial=330)
    assert [b.update([400]) for _ in range(3)] == [380, 400, 400]


def test_it_shrinks_when_patience_runs_out():
    b = budget()
    assert [b.update([0]) for _ in range(7)] == [200, 200, 150, 150, 150, 100, 100]
    assert [b.update([0]) for _ in range(5)] == [100] * 5  # the minimum


def test_shrinking_stops_at_the_minimum():
    b = budget(initial=130, patience=1)
    assert [b.update([0]) for _ in range(2)] == [100, 100]


def test_a_hit_resets_the_counter():
    b = budget()
    lengths = [[0], [0], [400], [0], [0], [0]]
    assert [b.update(x) for x in lengths] == [200, 200, 250, 250, 250, 200]


def test_a_hit_at_the_maximum_resets_the_counter():
    b = budget(initial=400)
    assert [b.update(x) for x in ([0], [0], [400], [0], [0], [0])] == [400, 400, 400, 400, 400, 350]


def test_hit_ratio_is_reached_exactly():
    """H >= hit_ratio in float64: 7 of 70 is 0.1."""
    for hits, total in ((1, 10), (3, 30), (7, 70), (100, 1000)):
        b = budget()
        assert b.update([400] * hits + [0] * (total - hits)) == 250
        assert budget().update([400] * (hits - 1) + [0] * (total - hits + 1)) == 200


def test_hit_ratio_one():
    assert budget(hit_ratio=1.0).update([400, 0]) == 200
    assert budget(hit_ratio=1.0).update([400, 180]) == 250


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


def test_what_update_takes():
    for lengths in (
        [180, 10],
        (180, 10),
        torch.tensor([180, 10], dtype=torch.int32),
        torch.tensor([180, 10]),
        np.array([180, 10], np.int32),
    ):
        b = budget()
        assert b.update(lengths) == 250 and type(b.length) is int


def test_state_dict_continues_where_it_stood():
    a = budget()
    for lengths in ([400], [0], [0]):
        a.update(lengths)
    b = budget()
    b.load_state_dict(a.state_dict())
    assert b.length == a.length == 250
    assert b.update([0]) == a.update([0]) == 200


def test_state_dict_can_be_saved(tmp_path):
    a = budget()
    a.update([400])
    torch.save(a.state_dict(), tmp_path / "state.pt")
    b = budget()
    b.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert b.length == 250


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"minimum": 0}, "minimum"),
        ({"initial": 50}, "initial"),
        ({"initial": 500}, "initial"),
        ({"maximum": 50}, "maximum"),
        ({"step": 0}, "step"),
        ({"margin": -1}, "margin"),
        ({"hit_ratio": 1.5}, "hit_ratio"),
        ({"hit_ratio": float("nan")}, "hit_ratio"),
        ({"patience": 0}, "patience"),
    ],
    ids=str,
)
def test_bad_arguments(change, argument):
    with pytest.raises(ValueError, match=r"^ResponseBudget: \w+ must .*, got "):
        budget(**change)


RANK = """
    import sys
    import torch
    import torch.distributed as dist
    from pruneopd_kernels import ResponseBudget

    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
    budget = ResponseBudget(200, 100, 400, 50, 20, 0.5, 2, group=dist.group.WORLD)
    # of each rank: hits 1 of 1 and 0 of 1; 0 of 3 and 1 of 1; nothing and 1 of 1; nothing and nothing; 0 and 0 of 1
    batches = [([400], [0]), ([0, 0, 0], [400]), ([], [400]), ([], []), ([0], [0])]
    print([budget.update(torch.tensor(batch[rank], dtype=torch.int32)) for batch in batches])
    dist.destroy_process_group()
"""


def test_counts_are_summed_over_a_group(tmp_path):
    ranks = [
        subprocess.Popen(
            processes.command(rank, tmp_path / "rendezvous", code=RANK),
            stdout=subprocess.PIPE,
            text=True,
            env=processes.environment(),
        )
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=120)[0].strip() for process in ranks]
    assert answers == ["[250, 250, 300, 300, 300]"] * 2
