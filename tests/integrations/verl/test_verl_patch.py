"""`patch_verl` and verl's own `compute_forward_kl_topk`: the same loss, masses, overlap, advantage and gradients."""

import pytest
import torch
from verl.trainer.distillation.fsdp import losses as fsdp_losses
from verl.workers.config import DistillationConfig
from verl_cases import micro_batch, nested, pruned, step, stock

import tiers
from pruneopd_kernels.integrations.verl import patch_verl

pytestmark = pytest.mark.usefixtures("patched")
VERLS = fsdp_losses.compute_forward_kl_topk
LENGTHS = (7, 3, 11)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BFLOAT16 = 0.02  # of verl's, whose log-probabilities below -4 are off by up to 2**-6


@pytest.fixture
def patched(monkeypatch):
    monkeypatch.setattr(fsdp_losses, "compute_forward_kl_topk", VERLS)
    patch_verl()
    assert fsdp_losses.compute_forward_kl_topk is not VERLS


def make(seed, dtype, vocabulary=3000, k=16, noise=1.0):
    """Return logits of a packed micro-batch and a teacher's top-k of each conversation."""
    random = torch.Generator().manual_seed(seed)
    student = torch.randn(1, sum(LENGTHS), vocabulary, generator=random) * 3
    teacher = student + noise * torch.randn(student.shape, generator=random)
    top = teacher.log_softmax(-1).topk(k)
    ids, logprobs = (nested(x[0].split(LENGTHS)) for x in (top.indices, top.values))
    return student.to(dtype), ids, logprobs, torch.randn(student.shape[:2], generator=random)


def outputs(function, inputs, **settings):
    """Return the outputs of the function and the gradient of `sum(upstream * loss)`."""
    student, ids, logprobs, upstream = inputs
    logits = student.detach().clone().requires_grad_()
    config = DistillationConfig(distillation_loss=stock(topk=ids.shape[-1], **settings))
    found = function(logits, logprobs, ids, config, "thd")
    (gradient,) = torch.autograd.grad(found["distillation_losses"], logits, upstream)
    return {name: tensor.detach() for name, tensor in found.items()} | {"gradient": gradient}


def assert_close(found, expected, names=None, where=slice(None), **tolerance):
    for name in names or found:
        one, other = found[name][where], expected[name][where].to(found[name].dtype)
        torch.testing.assert_close(one, other, **tolerance, msg=lambda words, name=name: f"{name}: {words}")


@pytest.mark.parametrize(("seed", "clamp", "chunked"), tiers.combinations(range(4), [None, -10.0, -4.0], [False, True]))
def test_float32(seed, clamp, chunked):
    inputs = make(seed, torch.float32, noise=1 + seed)
    settings = {"log_prob_min_clamp": clamp, "use_chunked_topk": chunked, "chunked_topk_chunk_size": 5}
    expected = outputs(VERLS, inputs, **settings)
    found = outputs(fsdp_losses.compute_forward_kl_topk, inputs, **settings)
    assert len(set(expected["overlap_count"].flatten().tolist())) > 3
    assert found.keys() == expected.keys() and found["overlap_count"].dtype == torch.int64
    assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("chunked", [False, True], ids=["full", "chunked"])
def test_bfloat16(chunked):
    """verl rounds log-probabilities to bfloat16. The kernel does not, so it is closer to float64."""
    inputs = make(0, torch.bfloat16)
    settings = {"log_prob_min_clamp": -10.0, "use_chunked_topk": chunked}
    gold = outputs(VERLS, (inputs[0].double(), *inputs[1:]), **settings)
    expected = outputs(VERLS, inputs, **settings)
    found = outputs(fsdp_losses.compute_forward_kl_topk, inputs, **settings)
    for name in ("distillation_losses", "student_mass", "teacher_mass", "gradient"):
        one, other, exact = (x[name].float() for x in (found, expected, gold))
        torch.testing.assert_close(one, other, rtol=BFLOAT16, atol=BFLOAT16, msg=name)
        assert (one - exact).abs().max() <= max((other - exact).abs().max(), 1e-6), name


@pytest.mark.parametrize("config", [stock(), pruned(w_drop=0.2)], ids=["forward_kl_topk", "prune_opd"])
def test_through_the_engine(config, monkeypatch):
    """Compare the whole step, with either loss."""
    loss, metrics, gradients = step(config, micro_batch())
    monkeypatch.setattr(fsdp_losses, "compute_forward_kl_topk", VERLS)
    expected = step(config, micro_batch())
    torch.testing.assert_close((loss, gradients), (expected[0], expected[2]), rtol=1e-5, atol=1e-6)
    for name, value in metrics.items():
        assert value == pytest.approx(expected[1][name], rel=1e-5), name


def test_a_policy_loss_beside_it_is_refused():
    with pytest.raises(ValueError, match=r"^patch_verl: use_policy_gradient must be False, got True$"):
        outputs(fsdp_losses.compute_forward_kl_topk, make(0, torch.float32), use_policy_gradient=True)
