"""With w_drop = w_base = 0 the losses are TRL's own; with others they are weighted by `reliability` of full logits."""

import functools

import pytest
import torch
from peft import LoraConfig
from tiny_pair import PRUNED, UNPRUNED, VOCABULARY, history, model, stock, teacher_of, trainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from pruneopd_kernels import PruneConfig, reference
from pruneopd_kernels.integrations.trl.losses import PrunedLoss

TOLERANCE = 1e-5
LOSSES = {
    "reverse_kl": PruneConfig(**UNPRUNED),
    "topk_policy": PruneConfig(k=VOCABULARY, **UNPRUNED),
    "divergence": PruneConfig(**UNPRUNED),
}
SETTINGS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "temperature": {"temperature": 0.7},
}


NAMES = ("loss", "grad_norm", "entropy", "num_tokens")


@functools.cache
def expected_of(folder, settings):
    """What TRL logs, once for all the losses that are compared with it."""
    return history(stock(folder, **dict(settings)), *NAMES)


def compare(tmp_path, loss, **settings):
    """Loss, gradient norm, entropy and the tokens seen, of two steps each."""
    expected = expected_of(tmp_path.parent / "stock", tuple(settings.items()))
    given = {"loss": loss, "prune": LOSSES[loss]}
    got = history(trainer(tmp_path, given=given, **settings), *NAMES)
    assert len(got) == len(expected) == 2
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)
    assert all(norm > 0.01 for _, norm, *_ in got), got


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_without_pruning_a_loss_is_that_of_trl(tmp_path, loss, settings):
    compare(tmp_path, loss, **SETTINGS[settings])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_without_pruning_the_divergence_is_that_of_trl_at_any_beta(tmp_path, beta):
    compare(tmp_path, "divergence", beta=beta)


@pytest.mark.parametrize("loss", ["reverse_kl", "divergence"])
def test_under_autocast(tmp_path, loss):
    compare(tmp_path, loss, bf16=True)


def test_with_lora(tmp_path):
    """The head is frozen then, and PEFT's own forward is passed by."""
    settings = {"lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    expected = history(stock(tmp_path, given={"peft_config": LoraConfig(**settings)}), *NAMES)
    given = {"prune": LOSSES["reverse_kl"], "peft_config": LoraConfig(**settings)}
    got = history(trainer(tmp_path, given=given), *NAMES)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)


# --- the loss itself ----------------------------------------------------------------------------------------------


def heads(dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    B, T, H = 3, 12, 16  # noqa: N806
    student, weight = torch.randn(B, T, H), torch.randn(VOCABULARY, H) / 3
    given = {
        "student_hidden_states": student,
        "teacher_hidden_states": student + 0.3 * torch.randn(B, T, H),
        "student_lm_head_weight": weight,
        "teacher_lm_head_weight": weight + 0.03 * torch.randn(VOCABULARY, H),
        "student_lm_head_bias": torch.randn(VOCABULARY) if bias else None,
        "teacher_lm_head_bias": torch.randn(VOCABULARY) / 3 if bias else None,
    }
    given = {name: None if x is None else x.to(dtype) for name, x in given.items()}
    for name in ("student_hidden_states", "student_lm_head_weight", "student_lm_head_bias"):
        if given[name] is not None:
            given[name].requires_grad_()
    lengths = torch.tensor([T, 5, 9])
    mask = (torch.arange(T) < lengths[:, None]).long()
    mask[0, 3:5] = 0  # as where a tool answers
    return given, mask


def gradients(given):
    found = [x.grad for name, x in given.items() if x is not None and x.requires_grad]
    for x in given.values():
        if x is not None:
            x.grad = None
    return found


@pytest.mark.parametrize("items", [None, 40, torch.tensor(40.0)])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_normaliser_logit_scale_and_bias_are_those_of_trl(loss, bias, scale, items):
    given, mask = heads(bias=bias)
    rest = {
        "completion_mask": mask, "beta": 1.0, "num_items_in_batch": items, "temperature": 0.7,
        "student_logit_scale": scale, "teacher_logit_scale": 2 * scale,
    }  # fmt: skip
    expected = _chunked_divergence_loss(**given, **rest)
    expected[0].backward()
    expected_gradients = gradients(given)
    got = PrunedLoss(LOSSES[loss], loss, torch.zeros_like(mask))(**given, **rest)
    got[0].backward()
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(gradients(given), expected_gradients, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16])
def test_logits_of_half_precision_are_kept_in_float32_as_in_trl(student, teacher):
    """Rounded to bfloat16 they would move the loss in its second digit."""
    given, mask = heads()
    dtypes = {name: student if "student" in name else teacher for name in given}
    given = {n: None if x is None else x.detach().to(dtypes[n]).requires_grad_() for n, x in given.items()}
    rest = {"completion_mask": mask, "beta": 1.0}
    expected = _chunked_divergence_loss(**given, **rest)
    got = PrunedLoss(LOSSES["reverse_kl"], "reverse_kl", torch.zeros_like(mask))(**given, **rest)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
    got[0].backward()
    assert given["student_lm_head_weight"].grad.dtype == student


@pytest.mark.parametrize("metric", ["overlap", "top_p"])
@pytest.mark.parametrize("loss", LOSSES)
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
    torch.testing.assert_close(got, expected.sum() / 40, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(pruned.scored.drift_count, scored.drift_count)


def test_pruning_changes_the_training(tmp_path):
    """Or the tests above would hold of a trainer that does nothing."""
    student = model(0)
    teacher = teacher_of(student)
    made = trainer(tmp_path, student=student, teacher=teacher, given={"prune": PRUNED})
    (loss, drift, weight), _ = history(made, "loss", "prune/drift_rate", "prune/weight")
    (whole,), _ = history(stock(tmp_path, student=model(0), teacher=teacher), "loss")
    assert 0.05 < drift < 0.95
    assert 0.5 < weight < 1.5
    assert loss != pytest.approx(whole, rel=1e-3)


def test_heads_of_fsdp_are_put_together(tmp_path):
    """A head that is a DTensor gives the loss and the gradient of a whole one."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        given, mask = heads()
        expected = PrunedLoss(PRUNED, "reverse_kl", mask)(**given, completion_mask=mask, beta=1.0)
        expected[0].backward()
        whole = gradients(given)[1]
        for side in ("student", "teacher"):
            name = f"{side}_lm_head_weight"
            given[name] = distribute_tensor(given[name].detach(), mesh, [Shard(0)]).requires_grad_(side == "student")
        got = PrunedLoss(PRUNED, "reverse_kl", mask)(**given, completion_mask=mask, beta=1.0)
        got[0].backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(given["student_lm_head_weight"].grad.full_tensor(), whole)
    finally:
        distributed.destroy_process_group()
