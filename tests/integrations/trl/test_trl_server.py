"""TRL's trainer for a teacher on a server. The answers are made here and parsed by TRL's own client."""

import math

import pytest
import tiny_pair
import torch
from tiny_pair import BUDGET, UNPRUNED, VOCABULARY, assert_same_steps, history, model, teacher_of
from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
from trl.generation import vllm_client

from pruneopd_kernels import PruneConfig, ResponseBudget
from pruneopd_kernels.integrations.trl import PruneServerDistillationTrainer

REAL = vllm_client.VLLMClient
K = 4


class Client:
    """Answer as vLLM does: the sampled token beside the k best."""

    teacher = None

    def __init__(self, **settings):
        pass

    def get_sequence_logprobs(self, sequences, prompt_lengths, top_logprobs, temperature):
        formatted = []
        for ids, start in zip(sequences, prompt_lengths, strict=True):
            answer = {"prompt_logprobs": self.prompt_logprobs(ids, top_logprobs)}
            formatted.append(REAL._format_sequence_logprobs(answer, ids, start, top_logprobs))
        return {key: [one[key] for one in formatted] for key in formatted[0]}

    @torch.no_grad()
    def prompt_logprobs(self, ids, k):
        logprobs = self.teacher(torch.tensor([ids])).logits[0].log_softmax(-1)
        answer = [None]
        for said, sampled in zip(logprobs, ids[1:], strict=False):
            ranked = said.argsort(descending=True).tolist()
            tokens = ranked[:k]
            if sampled not in tokens:
                tokens.append(sampled)
            entries = {str(i): {"logprob": said[i].item(), "rank": ranked.index(i) + 1} for i in tokens}
            answer.append(entries)
        return answer


@pytest.fixture(autouse=True)
def client(monkeypatch):
    client = type("VLLMClient", (Client,), {"teacher": teacher_of(model(0)).eval()})
    monkeypatch.setattr(vllm_client, "VLLMClient", client)
    return client


def made(folder, cls=PruneServerDistillationTrainer, given=None, prune=None, **settings):
    if cls is PruneServerDistillationTrainer:
        given = {"prune": PruneConfig(**{"k": K, **(prune or {})}), **(given or {})}
    settings = {"teacher_model_server_url": "http://nowhere", "beta": 0.0, "loss_top_k": K, **settings}
    return tiny_pair.trainer(folder, cls, ServerDistillationConfig, given=given, **settings)


@pytest.mark.parametrize(("tail", "accumulated"), [(True, 2), (False, 1)])
def test_without_pruning_the_loss_is_that_of_trl(tmp_path, tail, accumulated):
    settings = {"loss_add_tail": tail, "gradient_accumulation_steps": accumulated, "temperature": 0.7}
    names = "loss", "grad_norm", "num_tokens"
    got = history(made(tmp_path, prune=UNPRUNED, **settings), *names)
    assert_same_steps(got, history(made(tmp_path, ServerDistillationTrainer, **settings), *names))


def tensors(rows=3, length=7):
    """Return what TRL passes to its loss: full logits, the server's candidates, labels, mask."""
    torch.manual_seed(0)
    logits = torch.randn(rows, length, VOCABULARY)
    teacher = logits + 0.5 * torch.randn_like(logits)
    values, ids = teacher.log_softmax(-1).topk(K)
    mask = torch.arange(length) < torch.tensor([length, 4, 5])[:, None]
    labels = torch.where(mask, torch.randint(VOCABULARY, mask.shape), -100)
    padding = ~mask[..., None] | (torch.arange(K) >= K - 1)  # a server that knows one candidate fewer
    result = {
        "topk_logprobs": values.masked_fill(padding, -math.inf),
        "topk_token_ids": ids.masked_fill(padding, 0),
        "actual_logprobs": torch.zeros(mask.shape),
    }
    return logits, result, labels, mask


@pytest.mark.parametrize("tail", [True, False])
def test_each_position_has_the_weight_of_both_top_k(tmp_path, tail):
    trainer = made(tmp_path, prune={"threshold": 0.6, "w_drop": 0.3, "w_base": 0.25}, loss_add_tail=tail)
    logits, result, labels, mask = tensors()
    logits.requires_grad_()
    loss = trainer._compute_server_forward_kl_loss(result, logits.log_softmax(-1), labels)
    (got,) = torch.autograd.grad(loss, logits)

    own, theirs = logits.topk(K).indices, result["topk_token_ids"][..., : K - 1]
    drift = (own[..., None] == theirs[..., None, :]).sum((-2, -1)) / K < 0.6
    weight = 0.25 + (1 - 0.3 * (drift & mask).cumsum(1)).clamp(0, 1)
    assert len(weight[mask].unique()) > 2
    stock = made(tmp_path, ServerDistillationTrainer, loss_add_tail=tail)
    total = 0.0
    for b, t in mask.nonzero().tolist():
        one = {name: x[b : b + 1, t : t + 1] for name, x in result.items()}
        at = slice(b, b + 1), slice(t, t + 1)
        total += weight[b, t] * stock._compute_server_forward_kl_loss(one, logits.log_softmax(-1)[at], labels[at])
    expected = total / mask.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, torch.autograd.grad(expected, logits)[0], rtol=1e-5, atol=1e-6)
    assert torch.isfinite(got).all()


def test_padding_is_no_candidate(tmp_path):
    """TRL pads with id 0, which may be one of the student's candidates."""
    trainer = made(tmp_path)
    _, result, labels, mask = tensors()
    logits = torch.zeros(*mask.shape, VOCABULARY)
    logits[..., 0] = 9.0
    result["topk_token_ids"] = torch.where(result["topk_token_ids"] < K, 50, result["topk_token_ids"])
    result["topk_token_ids"][..., K - 1] = 0
    trainer._compute_server_forward_kl_loss(result, logits.log_softmax(-1), labels)
    assert trainer._scored[0]["overlap"][mask].max() == 0


def test_drift_by_acceptance_uses_the_servers_probabilities(tmp_path):
    trainer = made(tmp_path, prune={"metric": "top_p", "top_p": 0.5, "w_drop": 0.2})
    logits, result, labels, mask = tensors()
    labels = torch.where(mask, result["topk_token_ids"][..., 0], -100)  # the most probable one
    foreign = next(i for i in range(VOCABULARY) if not (result["topk_token_ids"][0, 2:4] == i).any())
    labels[0, 2:4] = foreign
    trainer._compute_server_forward_kl_loss(result, logits.log_softmax(-1), labels)
    scored = trainer._scored[0]
    assert scored["drift"][0, 2:4].all() and scored["drift"].sum() == 2
    assert torch.equal(scored["accepted"], mask & ~scored["drift"])


def test_a_budget_and_the_measures_are_those_of_the_other_trainer(tmp_path):
    trainer = made(tmp_path, prune={"w_drop": 0.0}, given={"budget": ResponseBudget(**BUDGET)}, max_steps=3)
    assert history(trainer, "prune/budget", "completions/max_length") == [(8, 8), (10, 10), (12, 12)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 1.0, "loss_top_k": 1}, "args.beta must be 0, got 1.0"),
        ({"loss_top_k": 8}, "args.loss_top_k must be prune.k = 4, got 8"),
    ],
)
def test_refused(tmp_path, settings, words):
    with pytest.raises(ValueError) as error:
        made(tmp_path, **settings)
    assert str(error.value) == f"PruneServerDistillationTrainer: {words}"
