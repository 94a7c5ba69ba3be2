"""The loss `prune_opd` through verl's engine and in verl's layouts, beside verl's own top-k loss."""

import pytest
import torch
import verl_cases
from tensordict import TensorDict
from verl.trainer.distillation import losses as verl_losses
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils
from verl.workers.config import DistillationConfig
from verl.workers.utils.padding import left_right_2_no_padding
from verl_cases import K, actor, micro_batch, nested, pruned, step, stock

from pruneopd_kernels import reference
from pruneopd_kernels.integrations.verl import PruneLossConfig

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
SHARP = {"threshold": 0.8, "w_drop": 0.3, "w_base": 0.2}


def weights_of(batch, threshold, w_drop, w_base, eps=1e-8):
    """L and E, response by response in plain Python, from sets of candidates."""
    weights, lengths = [], []
    for tokens, prompt, mask, ids in zip(
        *(batch[name].unbind() for name in ("input_ids", "prompts", "response_mask", "teacher_ids")), strict=True
    ):
        logits = verl_cases.Model()(tokens).logits
        before, row, length = 0, [], 0
        for t, valid in enumerate(mask.tolist()):
            at = len(prompt) + t - 1  # the logits before a token predict it
            common = set(logits[at].topk(K).indices.tolist()) & set(ids[at].tolist())
            before += bool(valid) and len(common) / K < threshold
            reliability = min(max(1 - w_drop * before, 0), 1)
            row.append((reliability + w_base) * valid)
            length += bool(valid) and reliability > eps
        weights.append(torch.tensor(row))
        lengths.append(length)
    return weights, lengths


def stock_losses(batch, **settings):
    """verl's own loss of each token, `[B, T]`, and the padded mask."""
    seen = {}

    def keep(**arguments):
        seen["losses"], metrics = verl_losses.compute_forward_kl_topk(**arguments)
        return seen["losses"], metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(verl_losses.DISTILLATION_LOSS_REGISTRY, "forward_kl_topk", keep)
        step(stock(**settings), batch)
    return seen["losses"].detach(), batch["response_mask"].to_padded_tensor(0)


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("remove_padding", [True, False])
def test_without_pruning_it_is_verls_loss(mode, remove_padding):
    batch = micro_batch(remove_padding=remove_padding)
    loss, metrics, gradients = step(pruned(w_drop=0.0, w_base=0.0), batch, loss_agg_mode=mode)
    expected, others, expected_gradients = step(stock(), batch, loss_agg_mode=mode)
    assert loss > 0 and torch.equal(loss, expected)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient, expected)
    own = {"distillation/drift_rate", "distillation/weight", "distillation/effective_length"}
    assert own & set(others) == set() and {name: metrics[name] for name in metrics if name not in own} == others


@pytest.mark.parametrize("holes", [True, False])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_each_token_is_weighted_and_the_normaliser_stays(mode, holes):
    batch = micro_batch(holes=holes)
    weights, lengths = weights_of(batch, **SHARP)
    losses, mask = stock_losses(batch, loss_max_clamp=None)
    weight = nested(weights).to_padded_tensor(0.0)
    info = {name: batch[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
    expected = agg_loss(losses * weight, mask, mode, **info)
    loss, metrics, _ = step(pruned(loss_max_clamp=None, **SHARP), batch, loss_agg_mode=mode)
    torch.testing.assert_close(loss, expected)
    assert len(set(weight[mask.bool()].tolist())) > 3, "several weights"
    filled = [length for length, row in zip(lengths, mask, strict=True) if row.any()]
    assert metrics["distillation/effective_length"] == filled
    assert metrics["distillation/weight"] == pytest.approx(weight[mask.bool()].mean().item())


def call(counts, masks, loss_config, prompt=3, losses=None, **settings):
    """The loss by itself, of responses with these overlap counts: `(losses, metrics)` as verl aggregates them."""
    rows = [torch.tensor([9] * (prompt - 1) + row + [9]) for row in counts]  # shifted by one; the rest is not looked at
    values = nested(rows)
    ones = nested(torch.ones(len(row)) for row in rows)
    output = {"distillation_losses": ones if losses is None else losses, "student_mass": ones, "teacher_mass": ones}
    output |= {"overlap_count": values, "overlap_token_advantage": ones}
    batch = {
        "prompts": nested(torch.zeros(prompt, dtype=torch.int64) for _ in rows),
        "responses": nested(torch.zeros(len(row), dtype=torch.int64) for row in counts),
        "response_mask": nested(map(torch.tensor, masks)),
    }
    data = tensordict_utils.assign_non_tensor(TensorDict(batch, batch_size=len(rows)), **settings)
    loss = verl_losses.get_distillation_loss_fn("prune_opd")
    return loss(actor(), DistillationConfig(distillation_loss=loss_config), output, data)


def test_drift_is_below_the_threshold_and_not_at_it():
    """7 of 10 are not less than 0.7, whatever 0.7 is as a float."""
    for k in (10, 20, 30, 50, 100):
        at = 7 * k // 10
        losses, metrics = call([[at, at - 1, at]], [[1, 1, 1]], pruned(topk=k, threshold=0.7, w_drop=0.25, w_base=0.0))
        assert losses.tolist() == [[1.0, 0.75, 0.75]], k
        assert metrics["distillation/drift_rate"] == pytest.approx(1 / 3)


def test_responses_are_apart_and_masked_tokens_do_not_drift():
    counts, masks = [[0, 8, 0, 8], [8, 0], [0]], [[1, 1, 0, 1], [1, 1], [0]]
    losses, metrics = call(counts, masks, pruned(w_drop=0.5, w_base=0.25))
    assert losses.tolist() == [[0.75, 0.75, 0, 0.75], [1.25, 0.75, 0, 0], [0, 0, 0, 0]]
    assert metrics["distillation/effective_length"] == [3, 2]
    assert metrics["distillation/weight"] == pytest.approx((3 * 0.75 + 1.25 + 0.75) / 5)


def test_an_exhausted_response_ends():
    _, metrics = call([[8, 0, 0, 0], [8, 8, 8, 8]], [[1] * 4] * 2, pruned(w_drop=0.5, w_base=0.0))
    assert metrics["distillation/effective_length"] == [2, 4]


def test_with_verls_own_configuration_the_hyperparameters_are_the_defaults():
    counts, masks = [[0] * 5 + [8]], [[1] * 6]
    losses, _ = call(counts, masks, stock(loss_mode="prune_opd"))
    expected = reference.reliability_from_drift(torch.tensor([[True] * 5 + [False]])).weight
    assert torch.equal(losses, expected)
    assert torch.equal(losses, call(counts, masks, PruneLossConfig(topk=K))[0])


def test_verls_clamp_is_of_the_weighted_loss():
    loss, metrics, _ = step(pruned(loss_max_clamp=0.1, w_base=0.5), micro_batch())
    assert metrics["distillation/loss_max"][0] > 0.1 >= loss


def test_padded_batches():
    """The older trainer's layout: prompts padded left, responses right."""
    whole = micro_batch()
    expected = step(pruned(**SHARP), whole)
    P, R, k = max(verl_cases.PROMPTS), max(verl_cases.RESPONSES), K  # noqa: N806
    rows = zip(verl_cases.PROMPTS, verl_cases.RESPONSES, whole["input_ids"].unbind(), strict=True)
    padded = {name: torch.zeros(4, P + R, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    padded |= {"position_ids": torch.arange(P + R).repeat(4, 1)}
    padded |= {"teacher_ids": torch.zeros(4, P + R, k, dtype=torch.int32), "teacher_logprobs": torch.zeros(4, P + R, k)}
    for i, (p, r, tokens) in enumerate(rows):
        at = slice(P - p, P + r)
        padded["input_ids"][i, at], padded["attention_mask"][i, at] = tokens, 1
        for name in ("teacher_ids", "teacher_logprobs"):
            padded[name][i, at] = whole[name].unbind()[i]
    padded |= {"prompts": padded["input_ids"][:, :P], "responses": padded["input_ids"][:, P:]}
    padded |= {"response_mask": whole["response_mask"].to_padded_tensor(0)}
    settings = {name: whole[name] for name in whole.keys() if not isinstance(whole[name], torch.Tensor)}  # noqa: SIM118
    batch = tensordict_utils.assign_non_tensor(TensorDict(padded, batch_size=4), **settings)
    loss, metrics, gradients = step(pruned(**SHARP), left_right_2_no_padding(batch))
    torch.testing.assert_close((loss, gradients), (expected[0], expected[2]))
    assert metrics["distillation/effective_length"] == expected[1]["distillation/effective_length"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["use_task_rewards", "use_policy_gradient"])
def test_other_gradients_are_refused(setting):
    with pytest.raises(ValueError) as error:
        pruned(**{setting: True})
    assert str(error.value) == f"PruneLossConfig: {setting} must be False, got True"
    with pytest.raises(ValueError) as error:
        call([[8]], [[1]], stock(loss_mode="prune_opd", **{setting: True}))
    assert str(error.value) == f"prune_opd: {setting} must be False, got True"


def test_fused_kernels_are_refused():
    with pytest.raises(ValueError) as error:
        call([[8]], [[1]], pruned(), use_fused_kernels=True)
    why = "verl's fused kernels count no overlap"
    assert str(error.value) == f"prune_opd: use_fused_kernels must be False ({why}), got True"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_mode": "k3"}, "loss_mode must be prune_opd, got k3"),
        ({"threshold": 0.0}, "threshold must be in (0, 1], got 0.0"),
        ({"w_drop": -0.1}, "w_drop must be finite and >= 0, got -0.1"),
        ({"w_base": float("nan")}, "w_base must be finite and >= 0, got nan"),
        ({"eps": float("inf")}, "eps must be finite and >= 0, got inf"),
        ({"w_drop": "much"}, "w_drop must be a float, got str"),
        ({"topk": None}, "topk must be an int, got NoneType"),
        ({"topk": 0}, "topk must be >= 1, got 0"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises((ValueError, TypeError)) as error:
        pruned(**settings)
    assert str(error.value) == f"PruneLossConfig: {words}"
