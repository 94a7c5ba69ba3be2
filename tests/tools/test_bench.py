"""The benchmarks: the protocol, the refusal of wrong answers, whole runs. No speed is tested here."""

import contextlib
import time
from dataclasses import replace

import pytest
import torch

import rehearsal
import tiers
from bench import __main__ as command
from bench.count import predictions
from bench.measure import answers, cases, devices, implementations, inputs, memory, plan, timing
from bench.measure.cases import Case
from bench.measure.plan import Wanted
from bench.measure.timing import Contender, Timing
from bench.operators import LOGIT_OPS, LOSSES, OPERATORS, USUAL
from bench.report import rows as results
from bench.report import targets

GPU = Case("reliability", "bfloat16", "cuda", device="cuda", positions=8192)
(WITH_USUAL,) = (name for name, op in OPERATORS.items() if op.usual)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    with rehearsal.small(monkeypatch, tmp_path) as folder:
        yield folder


@pytest.fixture
def gpu_file(monkeypatch, tmp_path):
    with rehearsal.on_gpu(monkeypatch, tmp_path) as file:
        yield file


def replace_eager(monkeypatch, op, eager):
    monkeypatch.setitem(OPERATORS, op, replace(OPERATORS[op], eager=eager))


def only(*ops):
    return [argument for op in ops for argument in ("--only", op)]


def test_every_contender_is_called_in_every_round_just_after_its_inputs_are_read():
    events = []

    @contextlib.contextmanager
    def setting():
        events.append("enter")
        yield
        events.append("leave")

    def contender(name):
        return Contender(name, lambda: events.append(f"run {name}"), lambda: events.append(f"read {name}"), setting)

    timings = timing.interleave([contender(name) for name in "abc"], seconds=0, min_rounds=4)
    assert {name: took.rounds for name, took in timings.items()} == {"a": 4, "b": 4, "c": 4}
    quads = [events[i : i + 4] for i in range(3 * 3, len(events), 4)]  # after one untimed call each
    assert all(quad == ["enter", f"read {quad[1][-1]}", f"run {quad[1][-1]}", "leave"] for quad in quads)
    orders = {"".join(quad[1][-1] for quad in quads[i : i + 3]) for i in range(0, 12, 3)}
    assert len(orders) > 1 and {"".join(sorted(order)) for order in orders} == {"abc"}


def test_median_and_minimum_come_from_the_clock(monkeypatch):
    # the loop looks at the clock once more per round, from the sixth on: min_rounds is 5
    times = iter([0.0, *(t for took in (3.0, 1.0, 2.0, 9.0, 5.0) for t in (10.0, 10.0 + took)), *[99.0] * 9])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    assert timing.interleave([Contender("a", run=lambda: None)], seconds=1) == {"a": Timing(5, 3.0, 1.0)}


GOLD = {
    "ids": torch.tensor([[3, 1]]),
    "x": torch.tensor([1.0, float("nan"), float("-inf")]),
    "gradient": torch.tensor([[0.5, -0.5], [1e-9, -1e-9]]),
}


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("ids", torch.tensor([[1, 3]]), "ids differs at 2 of 2 places"),
        ("x", torch.tensor([1.0, 0.0, float("-inf")]), "x is off by"),
        ("x", torch.tensor([1.0]), "x has shape [1], not [3]"),
        ("gradient", GOLD["gradient"].double(), "gradient has dtype"),
        ("gradient", torch.tensor([[0.5, -0.5], [1e-9, -1.1e-9]]), "gradient is off by 0.05"),
    ],
)
def test_a_wrong_answer_is_seen(name, value, complaint):
    assert answers.complaints(GOLD, GOLD) == []
    (found,) = answers.complaints(GOLD | {name: value}, GOLD)
    assert found.startswith(complaint)
    assert f"{name} is missing" in answers.complaints({}, GOLD)


def test_a_peer_may_break_ties_its_own_way_but_not_miss_a_larger_logit():
    logits = {"topk_ids": torch.tensor([[5.0, 4.0, 4.0, 1.0]])}
    gold = {"topk_ids": torch.tensor([[0, 1]]), "rewards": torch.tensor([[0.1, 0.2]])}
    tied = {"topk_ids": torch.tensor([[0, 2]]), "rewards": torch.tensor([[0.1, 0.7]])}
    wrong = {"topk_ids": torch.tensor([[0, 3]]), "rewards": torch.tensor([[0.1, 0.2]])}
    assert answers.peer_complaints(tied, gold, logits, 1e-4) == []
    assert answers.peer_complaints(wrong, gold, logits, 1e-4) == ["topk_ids does not hold the largest logits"]
    assert answers.peer_complaints(gold | {"rewards": torch.tensor([[0.1, 0.3]])}, gold, logits, 1e-4)


@pytest.mark.parametrize(("op", "dtype"), tiers.combinations([*LOGIT_OPS, *LOSSES], inputs.DTYPES))
def test_operators_and_peers_compute_the_same(tiny, op, dtype):
    for passes in ("forward", "backward", "both") if op in LOSSES else ("",):
        for impl in ("cpp", "eager", "eager_native", *OPERATORS[op].usual) if passes in ("", "both") else ("cpp",):
            assert cases.complaints(Case(op, dtype, impl, passes=passes)) == []


def test_a_wrong_gradient_is_seen(tiny, monkeypatch):
    """The loss is right, and so are the gradient's large values."""
    right = OPERATORS["reverse_kl"].eager

    def wrong(student, *rest, **more):
        student = student.clone()
        student.register_hook(lambda gradient: torch.where(gradient.abs() < 1e-4, 0, gradient))
        return right(student, *rest, **more)

    replace_eager(monkeypatch, "reverse_kl", wrong)
    (complaint,) = cases.complaints(Case("reverse_kl", "float32", "eager", passes="backward"))
    assert complaint.startswith("gradient is off by")


def test_counted_bytes(tiny):
    logits, outputs = 64 * 1000 * 4, 64 * (3 * 4 + 4 + 1 + 16 * 12) + 4 * 4
    candidates = 64 * 16 * (8 + 4) + 64 * 4  # and what belongs to each; the loss
    for op, passes, expected in (
        ("reliability", "", 2 * logits + outputs),
        ("topk_policy_loss", "forward", logits + candidates),
        ("topk_policy_loss", "both", 3 * logits + candidates),
        ("reverse_kl", "both", 5 * logits + 2 * 64 * 4),
        ("read_student", "both", 3 * logits),
    ):
        assert cases.counted_bytes(Case(op, "float32", "cpp", passes=passes)) == expected, (op, passes)


def test_a_run_prints_and_saves_a_row_for_every_case(tiny, capsys):
    assert command.main(["--dtype", "bfloat16", "--seconds", "0", "--no-memory", "--save", "--threads", "1"]) == 0
    (file,) = tiny.glob("*.jsonl")
    rows, printed = results.load(file), capsys.readouterr().out
    assert {row["op"] for row in rows} >= {*OPERATORS, *cases.READINGS}
    for row in rows:
        assert row["gb_s"] > 0 and row["rounds"] >= 2 and f"{row['op']} {row['dtype']} {row['impl']}" in printed
    isa = implementations.instruction_sets()[0]
    losses = {(row["op"], row["passes"]): row for row in rows if row["isa"] == isa and row["op"] in LOSSES}
    for loss in LOSSES:
        assert losses[loss, "forward"]["fraction_of_read"] > 0 and losses[loss, "both"]["fraction_of_read_write"] > 0
        for peer in ("eager", "eager_native", *OPERATORS[loss].usual):
            assert losses[loss, "both"][f"times_faster_than_{peer}"] > 0


def test_a_part_is_not_saved_unless_asked_and_what_is_wrong_is_not_timed(tiny, monkeypatch, capsys):
    part = [*only("reliability_from_drift"), "--seconds", "0", "--no-memory"]
    assert command.main(part) == 0
    assert not list(tiny.iterdir())
    right = OPERATORS["reliability_from_drift"].eager
    replace_eager(monkeypatch, "reliability_from_drift", lambda drift: right(~drift))
    assert command.main([*part, "--save"]) == 1
    (file,) = tiny.glob("*.jsonl")
    assert "eager" not in {row["impl"] for row in results.load(file)}
    assert "NOT TIMED: reliability_from_drift bool eager: drift_count differs" in capsys.readouterr().err


@pytest.mark.thorough
def test_extra_memory_is_what_a_call_allocates_beyond_its_outputs():
    logits = 64 * inputs.VOCABULARY * 2
    bounds = {"cpp": (0, 0.1), "eager": (4, 6), "chunked": (2, 4), "checkpointed": (0.9, 2)}
    assert {*USUAL} < bounds.keys()
    for impl, (least, most) in bounds.items():
        extra = memory.on_cpu(Case(WITH_USUAL, "bfloat16", impl, passes="both"), threads=1)
        assert least * logits <= extra <= most * logits, impl


RUN = ["--device", "cuda", "--seconds", "0", "--save", "--threads", "1"]


def test_a_gpu_s_run_is_saved_with_its_copies_peers_and_memory(gpu_file, capsys):
    assert command.main([*RUN, *only("reliability", WITH_USUAL)]) == 0
    assert "of copy" in capsys.readouterr().out
    rows = results.load(gpu_file)
    assert all(row["gpu"] == "Some GPU" and "threads" not in row for row in rows)
    assert {row["extra_bytes"] for row in rows if row["measure"] == "memory"} == {4096}

    def time_of(impl, positions, op="reliability", **more):
        wanted = {"measure": "time", "op": op, "impl": impl, "positions": positions}
        wanted |= {"dtype": "bfloat16", "k": 16, "rows": "random"} | more
        (row,) = (row for row in rows if row.items() >= wanted.items())
        return row

    assert time_of("torch", 64, "copy")["counted_bytes"] == 2 * 64 * 600 * 2
    assert {"fraction_of_copy", "times_faster_than_eager"} <= time_of("cuda", 1).keys()
    assert time_of("triton", 64, rows="ascending")["time_over_k16_random"] > 0
    peers = {f"times_faster_than_{peer}" for peer in ("eager", "eager_native", *OPERATORS[WITH_USUAL].usual)}
    assert peers <= time_of("cuda", 32, WITH_USUAL, passes="both").keys()


def test_an_error_on_a_gpu_stops_nothing_else(gpu_file, monkeypatch, capsys):
    right = cases.operator

    def fail(*tensors, **options):
        raise RuntimeError("CUDA: an illegal memory access\nand more")

    monkeypatch.setattr(cases, "operator", lambda op, impl: fail if impl == "cuda" else right(op, impl))
    assert command.main([*RUN, *only("reliability_from_drift"), "--no-memory"]) == 1
    assert {row["impl"] for row in results.load(gpu_file)} == {"torch", "triton", "eager"}
    assert "cuda: RuntimeError: CUDA: an illegal memory access\n" in capsys.readouterr().err


def test_a_graph_whose_answer_is_wrong_is_not_timed(gpu_file, monkeypatch):
    case = Case("reliability_from_drift", "bool", "cuda", device="cuda")
    assert devices.on_gpu(case).calls == case.sets > 1

    def unfilled(calls):
        outputs = [call() for call in calls]
        outputs[0].drift_count.zero_()
        return lambda: None, outputs

    monkeypatch.setattr(devices, "capture", unfilled)
    with pytest.raises(RuntimeError, match="in a graph, drift_count differs"):
        devices.on_gpu(case)


def test_graphs_work_on_more_than_a_cache_holds_and_many_positions_need_none():
    assert GPU.sets == 1 and GPU.shape == (16, 512)
    assert replace(GPU, positions=16).shape == (16, 1), "as in decoding"
    for positions in (1, 16, 64):
        few = replace(GPU, positions=positions)
        assert few.sets * positions * inputs.VOCABULARY * 2 * 2 >= cases.BEYOND_CACHES
        assert {replace(few, op=op).sets for op in (*LOGIT_OPS, "copy")} == {few.sets}, "they share the inputs"


def test_the_runs_for_a_gpu_hold_all_that_has_a_target_or_a_prediction(monkeypatch):
    monkeypatch.setattr(plan, "usable_on", lambda device: ("cuda", "triton"))
    monkeypatch.setattr(plan, "positions_that_fit", lambda device: 8192)
    runs = list(plan.on_gpu(Wanted()))
    timed = {case for run in runs for case in run}
    for target in targets.GPU:
        assert any(all(getattr(case, name) == value for name, value in target.where.items()) for case in timed), target
    assert {*predictions.cases()} <= timed and "compiled" in {case.impl for case in timed}
    assert [sum(case.op == "copy" for case in run) for run in runs] == [1] * len(runs), "what a run is compared with"
