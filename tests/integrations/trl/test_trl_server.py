"""TRL's trainer for a teacher on a server; the server's answers are made here, and read by TRL's own client."""

import math

import pytest
import torch
from tiny_pair import UNPRUNED, VOCABULARY, config, history, model, prompts, teacher_of, tokenizer
from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
from trl.generation import vllm_client

from pruneopd_kernels import PruneConfig, ResponseBudget, reliability
from pruneopd_kernels.integrations.trl import PruneServerDistillationTrainer

REAL = vllm_client.VLLMClient
K = 4


class Client:
    """Answers as vLLM does, with the sampled token beside the k best; what becomes of that is TRL's business."""

    teacher = None
    fewer = 0  # how many candidates are missing

    def __init__(self, **settings):
        pass

    def get_sequence_logprobs(self, sequences, prompt_lengths, top_logprobs, temperature):
        formatted = [
            REAL._format_sequence_logprobs({"prompt_logprobs": self.prompt_logprobs(ids, top_logprobs)}, ids, start,
                                           top_logprobs)
            for ids, start in zip(sequences, prompt_lengths, strict=True)
        ]  # fmt: skip
        return {key: [one[key] for one in formatted] for key in formatted[0]}

    @torch.no_grad()
    def prompt_logprobs(self, ids, k):
        logprobs = self.teacher(torch.tensor([ids])).logits[0].log_softmax(-1)
        answer = [None]
        for position, sampled in enumerate(ids[1:]):
            ranked = logprobs[position].argsort(descending=True)
            chosen = ranked[: k - self.fewer].tolist()
            rank = ranked.tolist().index(sampled)
            places = dict(enumerate(chosen)) | ({} if sampled in chosen else {rank: sampled} if not self.fewer else {})
            answer.append({
                str(token): {"logprob": logprobs[position, token].item(), "rank": place + 1}
                for place, token in places.items()
            })  # fmt: skip
        return answer


@pytest.fixture
def student(monkeypatch):
    student = model(0)
    client = type("VLLMClient", (Client,), {"teacher": teacher_of(student).eval()})
    monkeypatch.setattr(vllm_client, "VLLMClient", client)
    return student


def made(folder, cls, student, given=None, **settings):
    args = config(folder)
    names = ("use_cpu", "bf16", "gradient_checkpointing", "per_device_train_batch_size", "max_completion_length",
             "max_steps", "logging_steps", "learning_rate", "lr_scheduler_type", "max_grad_norm", "save_strategy",
             "report_to", "disable_tqdm")  # fmt: skip
    shared = {name: getattr(args, name) for name in names}
    args = ServerDistillationConfig(
        output_dir=str(folder), teacher_model_server_url="http://nowhere",
        **{**shared, "beta": 0.0, "loss_top_k": K, **settings},
    )  # fmt: skip
    return cls(model=student, args=args, train_dataset=prompts(), processing_class=tokenizer(), **(given or {}))


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("tail", [True, False])
def test_without_pruning_the_loss_is_that_of_trl(tmp_path, student, tail, accumulated):
    settings = {"loss_add_tail": tail, "gradient_accumulation_steps": accumulated, "temperature": 0.7}
    given = {"prune": PruneConfig(k=K, **UNPRUNED)}
    names = "loss", "grad_norm", "num_tokens"
    got = history(made(tmp_path, PruneServerDistillationTrainer, student, given, **settings), *names)
    expected = history(made(tmp_path, ServerDistillationTrainer, model(0), **settings), *names)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def tensors(student, rows=3, length=7):
    """What TRL hands to its loss: log-probabilities of full logits, the server's candidates, labels."""
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
def test_each_position_has_the_weight_of_both_top_k(tmp_path, student, tail):
    prune = PruneConfig(k=K, threshold=0.6, w_drop=0.3, w_base=0.25)
    trainer = made(tmp_path, PruneServerDistillationTrainer, student, {"prune": prune}, loss_add_tail=tail)
    logits, result, labels, mask = tensors(student)
    logits.requires_grad_()
    loss = trainer._compute_server_forward_kl_loss(result, logits.log_softmax(-1), labels)
    (got,) = torch.autograd.grad(loss, logits)

    own = logits.topk(K).indices
    drift = [
        [len({*own[b, t].tolist()} & {*result["topk_token_ids"][b, t, : K - 1].tolist()}) / K < 0.6
         for t in range(mask.shape[1])]
        for b in range(len(mask))
    ]  # fmt: skip
    weight = 0.25 + (1 - 0.3 * torch.tensor(drift).logical_and(mask).cumsum(1)).clamp(0, 1)
    assert len(weight[mask].unique()) > 2
    stock = made(tmp_path, ServerDistillationTrainer, model(0), loss_add_tail=tail)
    total = 0.0
    for b, t in mask.nonzero().tolist():
        one = {name: x[b : b + 1, t : t + 1] for name, x in result.items()}
        at = slice(b, b + 1), slice(t, t + 1)
        total += weight[b, t] * stock._compute_server_forward_kl_loss(one, logits.log_softmax(-1)[at], labels[at])
    expected = total / mask.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, torch.autograd.grad(expected, logits)[0], rtol=1e-5, atol=1e-6)
    assert torch.isfinite(got).all()


def test_padding_is_no_candidate(tmp_path, student):
    """TRL pads with id 0, which the student may well have among its own."""
    trainer = made(tmp_path, PruneServerDistillationTrainer, student, {"prune": PruneConfig(k=K)})
    _, result, labels, mask = tensors(student)
    logits = torch.zeros(*mask.shape, VOCABULARY)
    logits[..., 0] = 9.0
    result["topk_token_ids"] = torch.where(result["topk_token_ids"] < K, 50, result["topk_token_ids"])
    result["topk_token_ids"][..., K - 1] = 0
    trainer._compute_server_forward_kl_loss(result, logits.log_softmax(-1), labels)
    assert trainer._scored[0].overlap[mask].max() == 0


def test_drift_by_acceptance_uses_the_servers_probabilities(tmp_path, student):
    prune = PruneConfig(k=K, metric="top_p", top_p=0.5, w_drop=0.2)
    trainer = made(tmp_path, PruneServerDistillationTrainer, student, {"prune": prune})
    logits, result, labels, mask = tensors(student)
    teacher = torch.full((*mask.shape, VOCABULARY), -50.0)
    kept = result["topk_logprobs"][..., : K - 1]
    teacher.scatter_(-1, result["topk_token_ids"][..., : K - 1], kept.masked_fill(kept == -math.inf, -50.0))
    labels = torch.where(mask, result["topk_token_ids"][..., 0], -100)
    labels[0, 2:4] = 5
    trainer._compute_server_forward_kl_loss(result, logits.log_softmax(-1), labels)
    drift = trainer._scored[0].drift
    assert drift[mask].any() and not drift[mask].all()
    assert drift[0, 2:4].all()
    assert reliability(logits, teacher, mask, k=K).drift.shape == drift.shape


def test_a_server_that_sends_fewer_candidates_makes_overlap_small(tmp_path, student):
    given = {"prune": PruneConfig(k=K)}
    full = history(made(tmp_path, PruneServerDistillationTrainer, student, given), "prune/overlap")
    vllm_client.VLLMClient.fewer = 2
    (fewer,), _ = history(made(tmp_path, PruneServerDistillationTrainer, model(0), given), "prune/overlap")
    assert fewer <= 0.5
    assert full[0][0] > fewer


def test_a_budget_and_the_measures_are_those_of_the_other_trainer(tmp_path, student):
    given = {
        "prune": PruneConfig(k=K, w_drop=0.0),
        "budget": ResponseBudget(initial=8, minimum=4, maximum=16, step=2, margin=2),
    }
    trainer = made(tmp_path, PruneServerDistillationTrainer, student, given, max_steps=3)
    assert history(trainer, "prune/budget", "completions/max_length") == [(8, 8), (10, 10), (12, 12)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 1.0, "loss_top_k": 1}, "args.beta must be 0, got 1.0"),
        ({"loss_top_k": 8}, "args.loss_top_k must be prune.k = 4, got 8"),
    ],
)
def test_refused(tmp_path, student, settings, words):
    with pytest.raises(ValueError) as error:
        made(tmp_path, PruneServerDistillationTrainer, student, {"prune": PruneConfig(k=K)}, **settings)
    assert str(error.value) == f"PruneServerDistillationTrainer: {words}"
