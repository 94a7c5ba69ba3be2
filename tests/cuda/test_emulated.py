"""The CUDA kernels in the emulator: what splits a row must not change a bit. Values are tested with all others'."""

import pytest
import torch

import cuda_emulated
from comparison import differing
from implementations import BACKWARD_PASSES, EMULATED, LOGITS, LOSSES, REFERENCE, leaf
from operators import example
from pruneopd_kernels import formulas

pytestmark = pytest.mark.thorough
KERNELS = EMULATED[-1]  # as nvcc compiles them, if it is there
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"], ids=["f32", "bf16", "f16", "mixed"])
@pytest.mark.parametrize("op", LOGITS)
def test_neither_the_split_nor_the_order_changes_a_bit(op, dtype):
    """One block a row, or up to as many as it has units; a row alone or in a batch."""
    arguments = example(op, (3, 1), 33001, dtype=torch.float32 if dtype == "mixed" else dtype)
    arguments[leaf(op)][1, 0, 17000] = 60.0  # a peak
    if dtype == "mixed" and "teacher_logits" in arguments:
        arguments["teacher_logits"] = arguments["teacher_logits"].bfloat16()
    results, upstream = [], torch.tensor([[1.0], [-0.3], [2.0]])
    for multiprocessors, seed in ((1, 1), (4, 2), (132, 3), (132, 4)):
        with cuda_emulated.device(multiprocessors, seed):
            results.append(KERNELS.run(op, upstream, **arguments))
    assert [differing(results[0], result) for result in results[1:]] == [[]] * 3


@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"], ids=["f32", "bf16", "f16", "mixed"])
@pytest.mark.parametrize("op", LOSSES)
def test_alignment_changes_no_bit(op, dtype):
    """Rows, and those of the gradient, that begin anywhere within the 16 bytes of a load."""
    for width in (5, 17, 2100):
        arguments = example(op, (1, 3), width, k=4, dtype=torch.bfloat16 if dtype == "mixed" else dtype)
        arguments["mask"] = None
        if dtype == "mixed" and "teacher_logits" in arguments:
            arguments["teacher_logits"] = arguments["teacher_logits"].float()
        expected = KERNELS.run(op, **arguments)
        for offset in (1, 3, 6):
            for name in [name for name in arguments if name.endswith("logits")]:
                logits = arguments[name]
                memory = torch.zeros(1, 3, width + offset, dtype=logits.dtype)
                arguments[name] = memory[..., offset:].copy_(logits)
            assert differing(KERNELS.run(op, **arguments), expected) == [], (width, offset)


def logprobs_backward(**arguments):
    arguments = {"entropy_coefficient": None} | arguments
    op = "logprobs_backward"
    (gradient,) = KERNELS.kernel(op, BACKWARD_PASSES[op].arguments((), arguments)._asdict())
    return gradient, torch.ops.pruneopd._logprobs_backward(**arguments, impl="reference")


def test_candidates_that_do_not_exist():
    """They spoil a loss; in the backward pass, where another rank may have them, they count in the sum."""
    student, ids = torch.randn(2, 300), torch.tensor([[5, 400, 2**40, 5], [299, 298, 7, 7]])
    call = {"student_logits": student, "topk_ids": ids, "advantages": torch.ones(2, 4), "vocab_size": 299}
    result = KERNELS.run("topk_policy_loss", **call)
    assert result["loss"].isnan().all() and result["gradient"][:, :299].isnan().all()
    assert not result["gradient"][:, 299].any()
    away = (student - student.amax(-1, True)).double()
    state = torch.stack(
        [student.amax(-1).double(), away.exp().sum(-1), (away.exp() * away).sum(-1) / away.exp().sum(-1)], -1
    )
    coefficients = torch.tensor([[1.0, 2.0, -0.5, 0.25], [-1.0, 1.0, 3.0, 0.5]])
    got, expected = logprobs_backward(
        logits=student,
        token_ids=ids,
        coefficients=coefficients,
        state=state,
        entropy_coefficient=torch.tensor([0.0, -2.0]),
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for spoilt in ({"state": state * torch.nan}, {"coefficients": coefficients * torch.inf}):
        arguments = {"token_ids": ids, "coefficients": coefficients, "state": state} | spoilt
        got, _ = logprobs_backward(logits=student, **arguments, vocab_size=299)
        assert got[:, :299].isnan().all() and not got[:, 299].any()


def test_of_an_id_given_twice_the_first_counts():
    """Nothing looks at the values on a GPU. Nor is an id beyond an empty slot a repetition."""
    op = "reliability_from_topk"
    teacher = {"teacher_topk_ids": torch.tensor([[3, 3, 1, 0], [2, 2, 2, 5]])}
    teacher["teacher_topk_logprobs"] = torch.tensor([[0.5, 0.5, 0.2, 0.1], [0.0, 0.4, 0.3, 0.2]]).log()
    first = {"teacher_topk_ids": torch.tensor([[3, -1, 1, 0], [-1, 2, -1, 5]])}
    other = {"student_topk_ids": torch.tensor([[1, 3, 4, 5], [2, 5, 7, 8]]), "cu_seqlens": torch.tensor([0, 2])}
    other |= {"token_ids": torch.tensor([1, 5]), "metric": "top_p"}
    expected = REFERENCE.run(op, **other, **teacher | first)
    assert differing(KERNELS.run(op, **other, **teacher), KERNELS.run(op, **other, **teacher | first)) == []
    assert torch.equal(KERNELS.run(op, **other, **teacher)["overlap"], expected["overlap"])


def test_repetitions_are_empty_slots_of_topk_forward_kl():
    """What its formula does on a GPU; on a CPU they are refused."""
    ids = torch.tensor([[3, 3, 1, 0], [-1, 2, -1, 2]])
    assert formulas.without_repetitions(ids).tolist() == [[3, -1, 1, 0], [-1, 2, -1, -1]]
