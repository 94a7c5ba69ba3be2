"""The loss `prune_opd` through verl's engine and in verl's layouts, beside verl's own top-k loss."""

import pytest
import torch
import verl_cases
from tensordict import TensorDict
from verl.trainer.distillation import losses as verl_losses
from verl.utils import tensordict_utils
from verl.workers.config import DistillationConfig
from verl_cases import K, actor, micro_batch, nested, pruned, step, stock

import tiers
from pruneopd_kernels import reference
from pruneopd_kernels.integrations.verl import PruneLossConfig

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
SHARP = {"threshold": 0.8, "w_drop": 0.3, "w_base": 0.2}


def weights_of(batch, threshold, **scalars):
    """Yield L and E of each response, from sets of candidates."""
    names = ("input_ids", "prompts", "response_mask", "teacher_ids")
    for tokens, prompt, mask, ids in zip(*(batch[name].unbind() for name in names), strict=True):
        own = verl_cases.Model()(tokens).logits.topk(K).indices
        before = range(len(prompt) - 1, len(tokens) - 1)  # the logits before a token predict it
        common = torch.tensor([len({*own[t].tolist()} & {*ids[t].tolist()}) for t in before])
        trust = reference.reliability_from_drift((common / K < threshold)[None], mask[None], **scalars)
        yield trust.weight[0], trust.effective_length.item()


@pytest.mark.parametrize(("mode", "remove_padding"), tiers.combinations(AGGREGATIONS, [True, False]))
def test_without_pruning_it_is_verls_loss(mode, remove_padding):
    batch = micro_batch(remove_padding=remove_padding)
    loss, metrics, gradients = step(pruned(w_drop=0.0, w_base=0.0), batch, loss_agg_mode=mode)
    expected, others, expected_gradients = step(stock(), batch, loss_agg_mode=mode)
    assert loss > 0 and torch.equal(loss, expected) and all(map(torch.equal, gradients, expected_gradients))
    own = {"distillation/drift_rate", "distillation/weight", "distillation/effective_length"}
    assert own & set(others) == set() and {name: metrics[name] for name in metrics if name not in own} == others


@pytest.mark.parametrize(("mode", "holes"), tiers.combinations(AGGREGATIONS, [True, False]))
def test_each_token_is_weighted_and_the_normaliser_stays(mode, holes):
    batch = micro_batch(holes=holes)
    weights, lengths = zip(*weights_of(batch, **SHARP), strict=True)
    weight, mask = nested(weights).to_padded_tensor(0.0), batch["response_mask"].to_padded_tensor(0)

    def weighted(**arguments):
        losses, metrics = verl_losses.compute_forward_kl_topk(**arguments)
        return losses * weight, metrics

    with pytest.MonkeyPatch.context() as patch:  # verl's own loss of each token, times these weights
        patch.setitem(verl_losses.DISTILLATION_LOSS_REGISTRY, "forward_kl_topk", weighted)
        expected, *_ = step(stock(loss_max_clamp=None), batch, loss_agg_mode=mode)
    loss, metrics, _ = step(pruned(loss_max_clamp=None, **SHARP), batch, loss_agg_mode=mode)
    torch.testing.assert_close(loss, expected)
    assert len(set(weight[mask.bool()].tolist())) > 3, "several weights"
    filled = [length for length, row in zip(lengths, mask, strict=True) if row.any()]
    assert metrics["distillation/effective_length"] == filled
    assert metrics["distillation/weight"] == pytest.approx(weight[mask.bool()].mean().item())


def call(counts, masks, loss_config, **settings):
    """Return `(losses, metrics)` of responses with these overlap counts."""
    prompt = 3
    rows = [torch.tensor([9] * (prompt - 1) + row + [9]) for row in counts]  # shifted by one; the rest is not looked at
    ones = nested(torch.ones(len(row)) for row in rows)
    output = dict.fromkeys(("distillation_losses", "student_mass", "teacher_mass", "overlap_token_advantage"), ones)
    output["overlap_count"] = nested(rows)
    batch = {
        "prompts": nested(torch.zeros(prompt, dtype=torch.int64) for _ in rows),
        "responses": nested(torch.zeros(len(row), dtype=torch.int64) for row in counts),
        "response_mask": nested(map(torch.tensor, masks)),
    }
    data = tensordict_utils.assign_non_tensor(TensorDict(batch, batch_size=len(rows)), **settings)
    loss = verl_losses.get_distillation_loss_fn("prune_opd")
    return loss(actor(), DistillationConfig(distillation_loss=loss_config), output, data)


def test_drift_is_below_the_threshold_and_not_at_it():
    """7 of 10 is not below 0.7, regardless of how 0.7 is rounded."""
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
    _, metrics = call([[8, 0, 0, 0], [8] * 4], [[1] * 4] * 2, pruned(w_drop=0.5, w_base=0.0))
    assert metrics["distillation/effective_length"] == [2, 4], "an exhausted response ends"


def test_with_verls_own_configuration_the_hyperparameters_are_the_defaults():
    counts, masks = [[0] * 5 + [8]], [[1] * 6]
    losses, _ = call(counts, masks, stock(loss_mode="prune_opd"))
    expected = reference.reliability_from_drift(torch.tensor([[True] * 5 + [False]])).weight
    assert torch.equal(losses, expected)
    assert torch.equal(losses, call(counts, masks, PruneLossConfig(topk=K))[0])


def test_verls_clamp_is_of_the_weighted_loss():
    loss, metrics, _ = step(pruned(loss_max_clamp=0.1, w_base=0.5), micro_batch())
    assert metrics["distillation/loss_max"][0] > 0.1 >= loss


# --- what is refused --------------------------------------------------------------------------------------------------


WHY = "verl's fused kernels count no overlap"
REFUSED = [
    (lambda: call([[8]], [[1]], stock(loss_mode="prune_opd", use_task_rewards=True)),
     "prune_opd: use_task_rewards must be False, got True"),
    (lambda: call([[8]], [[1]], pruned(), use_fused_kernels=True),
     f"prune_opd: use_fused_kernels must be False ({WHY}), got True"),
    (lambda: pruned(use_policy_gradient=True), "PruneLossConfig: use_policy_gradient must be False, got True"),
    (lambda: pruned(loss_mode="k3"), "PruneLossConfig: loss_mode must be prune_opd, got k3"),
    (lambda: pruned(w_drop="much"), "PruneLossConfig: w_drop must be a float, got str"),
    (lambda: pruned(topk=None), "PruneLossConfig: topk must be an int, got NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refused(function, words):
    with pytest.raises((ValueError, TypeError)) as error:
        function()
    assert str(error.value) == words
