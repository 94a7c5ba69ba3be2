"""Two processes agree with one, under sequence parallelism and tensor parallelism."""

import pytest
import torch
import verl_cases
import verl_rank
from test_verl_loss import SHARP
from test_verl_patch import LENGTHS, make

import ranks

LENGTH = "distillation/effective_length"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "TIMEOUT_S", 400)  # importing verl and Megatron is 15 seconds of a core for each of them
        group = ranks.Ranks(tmp_path_factory.mktemp("verl") / "rendezvous", 2)
        yield group
        group.close()


@pytest.mark.parametrize("patched", [False, True])
def test_sequence_parallelism(two, patched):
    """Each rank has half of the packed tokens, cut in the middle of a response; both have all weights."""
    expected = verl_cases.step(verl_cases.pruned(**SHARP), verl_cases.micro_batch())
    assert sum(verl_cases.PROMPTS + verl_cases.RESPONSES) % 2, "verl pads before it cuts"
    answers = two.run(verl_rank.step_of_a_sequence_part, SHARP, 2, patched)
    for loss, metrics, _ in answers:
        torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-6)
        assert metrics[LENGTH] == expected[1][LENGTH]
        assert metrics["distillation/weight"] == expected[1]["distillation/weight"]
    for gradient, *parts in zip(expected[2], *(answer[2] for answer in answers), strict=True):
        assert all(part.any() for part in parts)
        torch.testing.assert_close(sum(parts) / 2, gradient, rtol=1e-5, atol=1e-6)  # as FSDP averages them


@pytest.mark.parametrize("data_format", ["thd", "bshd"])
@pytest.mark.parametrize("clamp", [None, -4.0])
def test_tensor_parallelism(two, clamp, data_format):
    """Each rank has half of the vocabulary. Megatron's masses differ: they are taken after the clamp."""
    logits, ids, logprobs, upstream = make(0, torch.float32)
    inputs = logits[0].split(LENGTHS), ids.unbind(), logprobs.unbind(), upstream[0].split(LENGTHS)
    inputs = [[x.clone() for x in conversations] for conversations in inputs]
    answers = two.run(verl_rank.loss_of_a_vocabulary_slice, inputs, data_format, clamp)
    for expected, found in answers:
        assert found.keys() == expected.keys() and found["gradient"].any()
        for name in found:
            if clamp is None or not name.endswith("mass"):
                torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(answers[0][1]["distillation_losses"], answers[1][1]["distillation_losses"])


def test_the_trainer_gets_the_effective_length_of_each_response(two):
    """Two data-parallel ranks report through micro-batches and mini-batches; the empty response is left out."""
    expected = []
    for holes in (True, False):
        expected += 2 * verl_cases.step(verl_cases.pruned(**SHARP), verl_cases.micro_batch(holes=holes))[1][LENGTH]
    assert len(expected) == 14 and len(set(expected)) > 2
    for metrics in two.run(verl_rank.metrics_of_an_update, SHARP):
        assert sorted(metrics[LENGTH]) == sorted(expected)
