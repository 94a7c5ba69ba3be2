"""The statistics that are logged beside those of TRL."""

import math
import random

import pytest
import torch
from tiny_pair import PRUNED, history, model, teacher_of, trainer

from pruneopd_kernels import opd_loss
from pruneopd_kernels.integrations.trl.measures import BANDS, means_of, totals_of

ALWAYS = ["overlap", "drift_rate", "weight", "acceptance", "entropy_gap", "first_drift_position", "effective_length",
          "weight_depth_1"]  # fmt: skip


def scores(student, teacher, mask, token_ids, **options):
    """Return what a trainer keeps of a batch, computed from full logits."""
    found = opd_loss(student, teacher, mask, token_ids=token_ids, entropies=True, **options)._asdict()
    return {**found, "entropy": found["student_entropy"]}


def by_hand(scored, mask, longest):
    """Return the statistics, computed token by token."""
    tokens, firsts, bands = [], [], {}
    gap = (scored["student_entropy"] - scored["teacher_entropy"]).abs()
    for row in range(mask.shape[0]):
        valid = [t for t in range(mask.shape[1]) if mask[row, t]]
        firsts.append(next((n for n, t in enumerate(valid) if scored["drift"][row, t]), len(valid)))
        for t in valid:
            values = *(scored[name] for name in ("overlap", "drift", "weight", "accepted")), gap
            tokens.append([x[row, t].item() for x in values])
            bands.setdefault(min((t - valid[0]) * BANDS // longest, BANDS - 1) + 1, []).append(tokens[-1][2])
    means = [math.fsum(values) / len(tokens) for values in zip(*tokens, strict=True)]
    return {
        **dict(zip(ALWAYS, means, strict=False)),
        "effective_length": sum(scored["effective_length"].tolist()) / len(mask),
        "first_drift_position": sum(firsts) / len(mask),
        **{f"weight_depth_{band}": math.fsum(values) / len(values) for band, values in bands.items()},
    }


def drawn():
    torch.manual_seed(3)
    B, T = 5, 21  # noqa: N806
    logits = torch.randn(B, T, 50)
    lengths = torch.tensor([random.Random(i).randint(1, T) for i in range(B - 1)] + [0])
    mask = (torch.arange(T) < lengths[:, None]) & (torch.rand(B, T) < 0.9)
    teacher = logits + 0.4 * torch.randn_like(logits)
    return scores(logits, teacher, mask, torch.randint(50, mask.shape), k=8, w_drop=0.1), mask


def changed(scored, change):
    return {name: change(x) for name, x in scored.items()}


def test_measures_are_those_taken_token_by_token():
    """Totals of parts add up. A response begins at its first valid position; padding may precede it."""
    scored, mask = drawn()
    totals, expected = totals_of(scored, mask, 40), by_hand(scored, mask, 40)
    assert means_of(totals) == pytest.approx(expected) and len(expected) > 9
    assert 0 < expected["acceptance"] < 1 and expected["entropy_gap"] > 0
    parts = [totals_of(changed(scored, lambda x, s=s: x[s]), mask[s], 40) for s in (slice(2), slice(2, None))]
    for name, total in totals.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], total)

    def later(x):
        return torch.cat([torch.zeros_like(x[:, :9]), x], 1) if x.ndim > 1 else x

    assert means_of(totals_of(changed(scored, later), later(mask), 40)) == pytest.approx(expected)


def test_what_there_is_nothing_of_is_not_logged():
    scored, mask = drawn()
    del scored["teacher_entropy"]  # a server does not send it
    names = means_of(totals_of(scored, mask, None)).keys()
    assert "overlap" in names and not {"entropy_gap", "weight_depth_1"} & names
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    scored = scores(torch.zeros(2, 3, 9), torch.zeros(2, 3, 9), nothing, nothing.long(), k=2)
    assert means_of(totals_of(scored, nothing, 3)) == {"effective_length": 0, "first_drift_position": 0}


@pytest.mark.parametrize("loss", ["reverse_kl", "divergence"])
def test_a_trainer_logs_what_its_models_say(tmp_path, loss):
    """Score the responses of the first step again, with full logits."""
    student = model(0)
    pair = student, teacher_of(student)
    given = {"prune": PRUNED, "teacher_model": pair[1], "loss": loss}
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
    scored = scores(*logits, mask, batch["completion_ids"], k=8, threshold=0.7, w_drop=0.1)
    expected = by_hand(scored, mask, 20)
    assert found == pytest.approx(tuple(expected[name] for name in ALWAYS), rel=1e-5)
