"""With w_drop = w_base = 0 the losses are TRL's own; with others they are weighted by `reliability` of full logits."""

import functools

import pytest
import torch
from peft import LoraConfig
from tiny_pair import LOGGED, LOSSES, PRUNED, VOCABULARY, assert_same_steps, history, stock, trainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

import tiers
from pruneopd_kernels import PruneConfig, reference
from pruneopd_kernels.integrations.trl.losses import PrunedLoss

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SETTINGS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "temperature": {"temperature": 0.7},
}
OTHERS = {"autocast": {"bf16": True}, "beta 0": {"beta": 0.0}, "beta 0.3": {"beta": 0.3}}
CASES = [*tiers.combinations(SETTINGS, LOSSES), ("autocast", "reverse_kl"), *((case, "divergence") for case in OTHERS)]


@functools.cache
def expected_of(folder, settings):
    """Return what TRL logs; computed once for all losses."""
    return history(stock(folder, **dict(settings)), *LOGGED)


@pytest.mark.parametrize(("case", "loss"), CASES)
def test_without_pruning_a_loss_is_that_of_trl(tmp_path, case, loss):
    """Compare loss, gradient norm, entropy and token count of two steps."""
    settings = {**SETTINGS, **OTHERS}[case]
    got = history(trainer(tmp_path, given={"loss": loss, "prune": LOSSES[loss]}, **settings), *LOGGED)
    assert_same_steps(got, expected_of(tmp_path.parent / "stock", tuple(settings.items())))
    assert all(norm > 0.01 for _, norm, *_ in got), got


def test_with_lora(tmp_path):
    """With LoRA the head is frozen and PEFT's own forward is not called."""
    settings = {"lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    expected = history(stock(tmp_path, given={"peft_config": LoraConfig(**settings)}), *LOGGED)
    given = {"prune": LOSSES["reverse_kl"], "peft_config": LoraConfig(**settings)}
    assert_same_steps(history(trainer(tmp_path, given=given), *LOGGED), expected)


# --- the loss itself ----------------------------------------------------------------------------------------------


def heads(bias=False):
    """Return arguments of TRL's loss and a mask with holes, as tool calls make them."""
    torch.manual_seed(0)
    B, T, H = 3, 12, 16  # noqa: N806
    student, weight = torch.randn(B, T, H), torch.randn(VOCABULARY, H) / 3
    given = {
        "student_hidden_states": student,
        "teacher_hidden_states": student + 0.3 * torch.randn(B, T, H),
        "student_lm_head_weight": weight,
        "teacher_lm_head_weight": weight + 0.03 * torch.randn(VOCABULARY, H),
    }
    if bias:
        given["student_lm_head_bias"] = torch.randn(VOCABULARY)
        given["teacher_lm_head_bias"] = torch.randn(VOCABULARY) / 3
    for name, x in given.items():
        x.requires_grad_(name.startswith("student"))
    mask = (torch.arange(T) < torch.tensor([T, 5, 9])[:, None]).long()
    mask[0, 3:5] = 0
    return given, mask


def answers(loss, given, mask, **rest):
    """Return (loss, entropy, tokens) and the gradients."""
    found = loss(**given, completion_mask=mask, beta=1.0, **rest)
    wanted = [x for x in given.values() if x.requires_grad]
    return found, torch.autograd.grad(found[0], wanted)


@pytest.mark.parametrize(
    ("bias", "scale", "cap", "items", "loss"),
    tiers.combinations([False, True], [1.0, 0.5], [None, 3.0], [None, 40, torch.tensor(40.0)], LOSSES),
)
def test_what_follows_the_product_and_the_normaliser_are_those_of_trl(loss, bias, scale, cap, items):
    """TRL scales, then caps (Gemma), then divides by the temperature."""
    given, mask = heads(bias=bias)
    rest = {"num_items_in_batch": items, "temperature": 0.7}
    for side, factor in (("student", 1), ("teacher", 2)):
        rest[f"{side}_logit_scale"] = factor * scale
        rest[f"{side}_final_logit_softcapping"] = None if cap is None else factor * cap
    pruned = PrunedLoss(LOSSES[loss], loss, torch.zeros_like(mask))
    torch.testing.assert_close(
        answers(pruned, given, mask, **rest), answers(_chunked_divergence_loss, given, mask, **rest), **CLOSE
    )


@pytest.mark.parametrize(("loss", "metric"), tiers.combinations(LOSSES, ["top_p", "overlap"]))
def test_the_weights_are_those_of_full_logits(loss, metric):
    given, mask = heads()
    options = {"k": 8, "threshold": 0.9, "w_drop": 0.2, "w_base": 0.25, "metric": metric, "top_p": 0.6}
    student, teacher = (
        given[f"{side}_hidden_states"].detach() @ given[f"{side}_lm_head_weight"].detach().T
        for side in ("student", "teacher")
    )
    token_ids = torch.randint(VOCABULARY, mask.shape)
    scored = reference.reliability(student, teacher, mask, token_ids=token_ids, **options)
    if loss == "topk_policy":
        expected = reference.topk_policy_loss(student, scored.topk_ids, scored.rewards, mask)
    else:
        expected = reference.reverse_kl(student, teacher, mask, weight=scored.weight)
    assert len(scored.weight.unique()) > 3
    pruned = PrunedLoss(PruneConfig(**options), loss, token_ids)
    got, _, _ = pruned(**given, completion_mask=mask, beta=1.0, num_items_in_batch=40)
    torch.testing.assert_close(got, expected.sum() / 40, **CLOSE)
    assert torch.equal(pruned.scored["drift_count"], scored.drift_count)


def test_heads_of_fsdp_are_put_together(tmp_path):
    """A head that is a DTensor gives the loss and the gradient of a whole one."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        given, mask = heads()
        expected, (_, whole) = answers(PrunedLoss(PRUNED, "reverse_kl", mask), given, mask)
        for side in ("student", "teacher"):
            name = f"{side}_lm_head_weight"
            given[name] = distribute_tensor(given[name].detach(), mesh, [Shard(0)]).requires_grad_(side == "student")
        got, (_, parts) = answers(PrunedLoss(PRUNED, "reverse_kl", mask), given, mask)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(parts.full_tensor(), whole)
    finally:
        distributed.destroy_process_group()
