"""`pruneopd_kernels.parallel.linear_opd_loss`: heads whose rows are split, held to one process."""

import pytest
import torch

import parallel_rank
import tiers
from hidden_states import LOSSES, OF_SERVERS, REDUCTIONS, STUDENT, V, from_server, problem

# Widths of the slices of 50 ids: narrower than k, or of nothing.
CUTS = [[25, 25], [48, 2], [0, 50], *([[3, 0, 47], [20, 10, 20]] if tiers.ALL else [])]
COUNTED = ("overlap", "drift", "drift_count", "reliability", "weight", "effective_length", "topk_ids")
each_pass = pytest.mark.parametrize(("loss", "reduction"), tiers.combinations(LOSSES, REDUCTIONS))


def check(ranks, widths, arguments, wanted=STUDENT, **tolerance):
    """Hold every rank to one process: counts exactly, and gradients by slices put together."""
    tolerance = tolerance or {"rtol": 1e-11, "atol": 1e-13}
    expected, by_inputs = parallel_rank.linear(None, [], arguments, wanted)
    answers = ranks.run(parallel_rank.linear, widths, arguments, wanted, size=len(widths))
    for outputs, _ in answers:
        assert [name for name in COUNTED if not torch.equal(outputs[name], expected[name])] == []
        for name, value in expected.items():
            torch.testing.assert_close(outputs[name], value, msg=name, equal_nan=True, **tolerance)
    for name, value in by_inputs.items():
        of_ranks = [gradients[name] for _, gradients in answers]
        if name == "student_hidden":
            assert all(torch.equal(x, of_ranks[0]) for x in of_ranks)
        got = of_ranks[0] if name == "student_hidden" else torch.cat(of_ranks)
        torch.testing.assert_close(got, value, msg=name, equal_nan=True, **tolerance)


@pytest.mark.parametrize("widths", CUTS, ids=str)
@each_pass
def test_against_one_process(ranks, loss, reduction, widths):
    given = problem()
    scale = {"scale": torch.rand(given.student_hidden.shape[:-1])} if reduction == "sum" else {}
    check(ranks, widths, given.arguments(loss=loss, reduction=reduction, **scale))


@pytest.mark.parametrize("options", [
    {"student_softcap": 3.0, "teacher_softcap": 5.0, "student_temperature": 0.7, "teacher_temperature": 1.3},
    {"w_base": 0.0, "w_drop": 0.4, "skip_exhausted": True, "threshold": 1.0},
    {"metric": "top_p", "top_p": 0.6, "token_ids": torch.randint(V, (3, 7), generator=torch.manual_seed(0))},
    {"weight": torch.rand(3, 7), "reward_weight": "none"},
    {"vocab_size": V - 4},
], ids=lambda options: next(iter(options)))  # fmt: skip
@pytest.mark.parametrize("loss", LOSSES)
def test_options(ranks, loss, options):
    given = problem(mask="prefix")
    check(ranks, [20, 30], vars(given) | {"impl": "reference", "chunk_size": 4, "k": 4, "loss": loss} | options)


def test_candidates_of_a_server(ranks):
    given, sent = from_server(problem())
    check(ranks, [20, 30], given.arguments(loss=OF_SERVERS, reduction="sum", **sent))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_kernels(ranks, loss, dtype):
    """In float32 a count may differ where a product's digits do: `torch.mm` depends on the width."""
    arguments = problem(dtype).arguments(impl="auto", loss=loss, reduction="sum")
    eps = torch.finfo(dtype).eps
    check(ranks, [20, 30], arguments, rtol=8 * eps, atol=8 * eps)


def test_packed_responses_and_a_wider_teacher(ranks):
    given = problem(v=V)
    given.teacher_weight = torch.cat([given.teacher_weight, torch.randn(3, given.teacher_weight.shape[1]).double()])
    given.teacher_bias = torch.cat([given.teacher_bias, torch.zeros(3).double()])
    given = given.packed(5, 0, 7)
    given.cu_seqlens = given.cu_seqlens.long()
    check(ranks, [20, 30], given.arguments(loss="reverse_kl", vocab_size=V))


@pytest.mark.parametrize(("wanted", "reduction"), [((), "sum"), (STUDENT[:1], "none"), (STUDENT[1:2], "sum")], ids=str)
def test_what_is_frozen_gets_no_gradient(ranks, wanted, reduction):
    check(ranks, [20, 30], problem().arguments(loss="reverse_kl", reduction=reduction), wanted)


def test_chunks_are_of_one_size_on_all_ranks(ranks):
    """By the widest slice, where no rank has been told a size: 8 bytes a logit, 5 positions."""
    arguments = problem().arguments(chunk_size=None)
    expected, _ = parallel_rank.linear(None, [], arguments)
    for sent, outputs in ranks.run(parallel_rank.linear_count, [48, 2], arguments, 8 * 48 * 5, size=2):
        valid = int(arguments["mask"].sum())
        assert sent.count("all_gather") == 1 + -(-valid // 5)
        torch.testing.assert_close(outputs["loss"], expected["loss"], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("loss", "of_a_chunk"), [("topk_policy", 1), ("reverse_kl", 1), (OF_SERVERS, 5)])
def test_communication_is_what_the_docs_say(ranks, loss, of_a_chunk):
    """One exchange of a few words a chunk, and one sum of the gradient by hidden states."""
    arguments = problem().arguments(loss=loss)
    chunks = -(-int(arguments["mask"].sum()) // 4)
    for sent, _ in ranks.run(parallel_rank.linear_count, [20, 30], arguments, size=2):
        assert sent == ["all_gather"] * (1 + of_a_chunk * chunks) + ["all_reduce"]


def raised(ranks, *changes):
    whole, calls = problem().arguments(), []
    for rank, change in enumerate(changes):
        rows = {name: whole[name][25 * rank : 25 * (rank + 1)] for name in parallel_rank.HEADS}
        calls.append({**whole, **rows, **change(rows)})
    return ranks.run(parallel_rank.raised, "linear_opd_loss", calls, size=len(changes))


def same(rows):
    return {}


@pytest.mark.parametrize(("change", "kind", "words"), [
    # The others would wait for its part of the gradient.
    (lambda rows: {"student_hidden": problem().student_hidden.requires_grad_()}, "ValueError",
     "student_hidden must be equal on every rank, got [3, 7, 6] on cpu (rank 0), [3, 7, 6] on cpu, wanting a gradient"),
    (lambda rows: {"student_bias": rows["student_bias"][1:]}, "ValueError",
     "student_bias must have shape [50], got [49]"),
    (lambda rows: {"student_hidden": torch.zeros(3, 7, 6).to_sparse()}, "TypeError",
     "student_hidden must be a plain tensor"),
])  # fmt: skip
def test_what_is_wrong_on_a_rank_is_an_error_on_each(ranks, change, kind, words):
    for found, said in raised(ranks, same, change):
        assert found == kind and words in said
    assert raised(ranks, same, same) == [None, None]


def test_both_heads_are_cut_alike(ranks):
    def cut(rows):
        return {"vocab_size": 48, "teacher_weight": rows["teacher_weight"][1:], "teacher_bias": None}

    words = "teacher_weight must be cut like student_weight: on rank 0, ids end at 25, got 24"
    answers = raised(ranks, cut, lambda rows: {"vocab_size": 48, "teacher_bias": None})
    assert answers == [("ValueError", f"linear_opd_loss: {words}")] * 2
