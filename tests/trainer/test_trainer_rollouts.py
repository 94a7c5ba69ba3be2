"""Sampling: the same tokens as without a cache, regardless of the batch."""

import pytest
import torch

from pruneopd_trainer.rollouts import Rollouts, draw, sample, uniforms
from trainer_models import TOKENIZER, random_model

END = TOKENIZER.eos_token_id
PROMPTS = ["4 + 17 =", "9 - 1 + 30 - 2 =", "1 =", "88 - 9 + 1 ="]


@pytest.fixture(scope="module")
def model():
    return random_model(0)


def encoded(prompts=PROMPTS):
    batch = TOKENIZER(prompts, padding=True, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def naive(model, prompt, numbers, end_ids, temperature=1.0, vocab_size=None):
    """Sample one response without cache or padding."""
    ids = TOKENIZER(prompt).input_ids
    start = len(ids)
    for number in numbers.tolist():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :vocab_size]
        mass, token = 0.0, -1
        for token, p in enumerate((logits.double() / temperature).softmax(-1).tolist()):  # noqa: B007
            mass += p
            if mass > number:
                break
        ids.append(token)
        if token in end_ids:
            break
    return ids[start:]


@pytest.mark.parametrize("end_ids", [[END], [END, 5, 7, 9, 20, 21, 22, 23]])
@pytest.mark.parametrize("vocab_size", [None, 40])
def test_sampling_equals_one_pass_a_token(model, end_ids, vocab_size):
    length = 80  # longer than the room that the cache begins with
    numbers = uniforms([3, 1], range(4), length)
    rollouts = sample(
        model, *encoded(), length=length, end_ids=end_ids, uniforms=numbers, temperature=0.8, vocab_size=vocab_size
    )
    lengths = rollouts.mask.sum(1).tolist()
    for row, prompt in enumerate(PROMPTS):
        expected = naive(model, prompt, numbers[row], end_ids, 0.8, vocab_size)
        assert rollouts.response_ids[row, : lengths[row]].tolist() == expected
        assert (rollouts.response_ids[row, lengths[row] :] == end_ids[0]).all()
    assert rollouts.mask.shape[1] == max(lengths)
    if len(end_ids) > 1:
        assert len(set(lengths)) > 1  # rows were dropped


def test_a_response_does_not_depend_on_its_neighbours(model):
    assert torch.equal(uniforms([1, 2], [0, 5], 8)[1], uniforms([1, 2], [5], 20)[0, :8])
    assert len({tuple(uniforms(key, [row], 8)[0].tolist()) for key in ([1, 2], [1, 3]) for row in (0, 1)}) == 4
    all_rows = sample(model, *encoded(), length=30, end_ids=[END], uniforms=uniforms([0], range(4), 30))
    alone = sample(model, *encoded(PROMPTS[2:3]), length=30, end_ids=[END], uniforms=uniforms([0], [2], 30))
    length = int(alone.mask.sum())
    assert all_rows.response_ids[2, :length].tolist() == alone.response_ids[0].tolist()


def test_draw_follows_the_distribution_and_never_takes_what_is_impossible():
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]])
    numbers = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    drawn = draw(logits.expand(10000, -1), numbers, 1.0)
    share = (drawn == 1).double().mean()
    assert abs(share - logits[0].softmax(-1)[1]) < 1e-3
    extremes = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits.expand(2, -1), extremes, 1.0).tolist() == [1, 2]
    assert draw(torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([0.5], dtype=torch.float64), 0.01).tolist() == [1]


def test_take_keeps_rows_and_drops_columns_without_tokens():
    ids = torch.arange(24).reshape(3, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    taken = Rollouts(ids, mask, 4).take(torch.tensor([1, 0]))
    assert taken.prompt_length == 3
    assert taken.token_ids.tolist() == [[9, 10, 11, 12, 13], [1, 2, 3, 4, 5]]
    assert taken.mask.tolist() == [[True, False], [True, True]]
    assert taken.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 3], [0, 0, 1, 2, 3]], "padding does not count"
