"""What is logged, where TRL logs."""

import math
import random

import pytest
import torch
from tiny_pair import PRUNED, history, model, teacher_of, trainer

from pruneopd_kernels import reliability
from pruneopd_kernels.integrations.trl.measures import BANDS, means_of, sums_of

ALWAYS = ["overlap", "drift_rate", "first_drift_position", "effective_length", "weight", "weight_depth_1"]


def by_hand(scored, mask, longest):
    """Token by token."""
    tokens, firsts, bands = [], [], {}
    for row in range(mask.shape[0]):
        valid = [t for t in range(mask.shape[1]) if mask[row, t]]
        firsts.append(next((n for n, t in enumerate(valid) if scored.drift[row, t]), len(valid)))
        for t in valid:
            tokens.append([x[row, t].item() for x in (scored.overlap, scored.drift, scored.weight)])
            bands.setdefault(min((t - valid[0]) * BANDS // longest, BANDS - 1) + 1, []).append(tokens[-1][-1])
    overlap, drift, weight = (math.fsum(values) / len(tokens) for values in zip(*tokens, strict=True))
    return {
        "effective_length": sum(scored.effective_length.tolist()) / len(mask),
        "first_drift_position": sum(firsts) / len(mask),
        "overlap": overlap,
        "drift_rate": drift,
        "weight": weight,
        **{f"weight_depth_{band}": math.fsum(values) / len(values) for band, values in bands.items()},
    }


def drawn():
    torch.manual_seed(3)
    B, T = 5, 21  # noqa: N806
    logits = torch.randn(B, T, 50)
    lengths = torch.tensor([random.Random(i).randint(1, T) for i in range(B - 1)] + [0])
    mask = (torch.arange(T) < lengths[:, None]) & (torch.rand(B, T) < 0.9)
    scored = reliability(logits, logits + 0.4 * torch.randn_like(logits), mask, k=8, w_drop=0.1)
    return scored, mask


def test_measures_are_those_taken_token_by_token():
    scored, mask = drawn()
    sums = sums_of(scored, mask, 40)
    assert means_of(sums) == pytest.approx(by_hand(scored, mask, 40))
    parts = [type(scored)(*(x[rows] for x in scored)) for rows in (slice(2), slice(2, None))]
    torch.testing.assert_close(sums_of(parts[0], mask[:2], 40) + sums_of(parts[1], mask[2:], 40), sums)


def test_a_response_begins_at_its_first_valid_position():
    """With a server, TRL's tensors begin earlier where prompts differ in length."""
    scored, mask = drawn()

    def later(x):
        return torch.cat([torch.zeros_like(x[:, :9]), x], 1) if x.ndim > 1 else x

    expected = sums_of(scored, mask, 40)
    torch.testing.assert_close(sums_of(type(scored)(*map(later, scored)), later(mask), 40)[7:], expected[7:])
    assert expected[-BANDS:].count_nonzero() > 2


def test_without_a_longest_response_or_a_token_there_is_nothing_to_take_the_mean_of():
    scored, mask = drawn()
    assert not any("depth" in name for name in means_of(sums_of(scored, mask, None)))
    nothing = reliability(torch.zeros(2, 3, 9), torch.zeros(2, 3, 9), torch.zeros(2, 3), k=2)
    found = means_of(sums_of(nothing, torch.zeros(2, 3, dtype=torch.bool), 3))
    assert found == {"effective_length": 0, "first_drift_position": 0}


def test_a_trainer_logs_what_its_models_say(tmp_path):
    """Of the first step, whose responses are scored again here with full logits."""
    student = model(0)
    pair = student, teacher_of(student)
    given = {"prune": PRUNED, "teacher_model": pair[1]}
    made = trainer(tmp_path, student=student, given=given, learning_rate=0.0, max_steps=1)
    kept, original = [], made._generate_and_score_completions
    made._generate_and_score_completions = lambda inputs: kept.append(original(inputs)) or kept[0]
    (found,) = history(made, *(f"prune/{name}" for name in ALWAYS))
    (batch,) = kept
    ids, attention = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    start = batch["prompt_ids"].shape[1] - 1
    with torch.no_grad():
        logits = [one.eval()(ids, attention_mask=attention).logits[:, start:-1] for one in pair]
    mask = batch["completion_mask"].bool()
    expected = by_hand(reliability(*logits, mask, k=8, threshold=0.7, w_drop=0.1), mask, 20)
    assert found == pytest.approx(tuple(expected[name] for name in ALWAYS), rel=1e-6)
