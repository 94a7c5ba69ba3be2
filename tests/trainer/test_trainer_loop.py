"""The loop against a plain restatement of Algorithm 1."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

import pruneopd_kernels as po
import reads
from pruneopd_trainer.config import TrainConfig
from pruneopd_trainer.data import Example
from pruneopd_trainer.loop import SAMPLING, Trainer
from pruneopd_trainer.models import Pair
from pruneopd_trainer.rollouts import uniforms
from pruneopd_trainer.scoring import follow, response_logits, score
from test_trainer_rollouts import naive
from trainer_models import TOKENIZER, near, random_model, refusal

END = TOKENIZER.eos_token_id
LENGTHS = {"initial_length": 8, "minimum_length": 4, "maximum_length": 16, "truncate_length": 6, "final_length": 16}
RULE = {"length_step": 2, "margin": 2, "hit_ratio": 0.5, "patience": 2}
CONFIG = TrainConfig(k=4, w_drop=0.2, steps=10, batch_size=6, micro_batch_size=4, learning_rate=3e-3, warmup_steps=3,
                     precision="float32", **LENGTHS, **RULE)  # fmt: skip


class Sums:
    """Prompts of different lengths; a response is good if its first token is a digit."""

    graded = True
    held_out_count = None

    def example(self, index):
        return Example(" + ".join(str(index * 7 % 90 + i) for i in range(1 + index % 3)) + " =", "1")

    def held_out(self, index):
        return self.example(index + 1000)

    def grade(self, example, response, finished):
        return float(response[:1].isdigit())


def pair():
    teacher = random_model(1).requires_grad_(False)
    return Pair(near(teacher, 2, 0.35), teacher, TOKENIZER, len(TOKENIZER), [END])


def trainer(**changes):
    return Trainer(replace(CONFIG, **changes), pair(), Sums(), Accelerator(cpu=True))


def algorithm_1(config, steps):
    """Run Algorithm 1 in plain PyTorch, one response and one position at a time."""
    student, teacher = pair()[:2]
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=0)
    budget, without_growth, found = config.initial_length, 0, []
    for step in range(1, steps + 1):
        losses, effective, overlaps, tokens = [], [], [], 0
        numbers = uniforms([config.seed, step, SAMPLING], range(config.batch_size), budget)
        for row in range(config.batch_size):
            prompt = Sums().example((step - 1) * config.batch_size + row).prompt
            response = naive(student, prompt, numbers[row], [END], config.temperature)
            ids = TOKENIZER(prompt).input_ids
            whole = torch.tensor([ids + response])
            p = student(input_ids=whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            q = teacher(input_ids=whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            count, length = 0, 0
            for t in range(len(response)):
                s_top = p[t].detach().topk(config.k)
                shared = len(set(s_top.indices.tolist()) & set(q[t].topk(config.k).indices.tolist()))
                overlaps.append(shared / config.k)
                count += shared / config.k < config.threshold  # (7), (8)
                reliability = min(max(1 - config.w_drop * count, 0), 1)  # (9)
                length += reliability > config.eps  # (12)
                reward = s_top.values.softmax(-1) * (q[t, s_top.indices] - s_top.values)
                advantage = (reliability + config.w_base) * reward  # (10), (11)
                losses.append(-(advantage * p[t, s_top.indices]).sum())
            tokens += len(response)
            effective.append(length)
        loss = sum(losses) / tokens
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(step / config.warmup_steps, 1)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        hits = sum(length >= budget - config.margin for length in effective) / config.batch_size
        if hits >= config.hit_ratio:
            budget, without_growth = min(budget + config.length_step, config.maximum_length), 0
        else:
            without_growth += 1
            if without_growth >= config.patience:
                budget, without_growth = max(budget - config.length_step, config.minimum_length), 0
        found.append({
            "tokens_generated": tokens, "budget": budget, "hit_ratio": hits, "overlap": sum(overlaps) / tokens,
            "effective_length_mean": sum(effective) / config.batch_size, "grad_norm": float(norm),
        })  # fmt: skip
    return found, student


def test_ten_steps_equal_algorithm_1():
    expected, student = algorithm_1(CONFIG, 10)
    run = trainer()
    for step, values in enumerate(expected, 1):
        record = run.train_step()
        assert record["step"] == step
        for name, value in values.items():
            assert record[name] == pytest.approx(value, rel=2e-4), (step, name)
    for own, plain in zip(run.student.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-4)
    budgets = [values["budget"] for values in expected]
    assert min(budgets) < max(budgets)
    assert len({values["effective_length_mean"] for values in expected}) > 3


def weights(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.student.parameters()])


def after(steps, **changes):
    run = trainer(**changes)
    records = [run.train_step() for _ in range(steps)]
    return run, records


def test_prune_that_drops_nothing_is_plain_opd_to_the_last_bit():
    plain, _ = after(3, method="opd")
    nothing, _ = after(3, method="prune", w_drop=0.0, w_base=0.0, budget=False)
    assert torch.equal(weights(plain), weights(nothing))
    pruned, _ = after(3, method="prune", budget=False)
    assert not torch.equal(weights(plain), weights(pruned))


@pytest.mark.parametrize(
    ("changes", "longest", "kept"),
    [
        ({"method": "opd"}, 16, "all"),
        ({"method": "truncate"}, 6, "all"),
        ({"method": "prefix"}, 8, "all"),
        ({"method": "prune"}, 8, "all"),
        ({"method": "prune", "w_base": 0.0}, 8, "reliable"),
        ({"method": "random"}, 16, "some"),
        ({"method": "random", "match": "mass"}, 16, "some"),
        ({"method": "prune+grpo", "group_size": 3, "budget": False}, 16, "some"),
    ],
)
def test_what_each_method_samples_and_keeps(changes, longest, kept):
    lengths = trainer(**changes).sample(1, 16).rollouts.mask.sum(1)
    _, (record,) = after(1, **changes)
    assert record["tokens_generated"] == int(lengths.clamp_max(longest).sum())
    if kept == "all":
        assert record["tokens_kept"] == record["tokens_generated"]
    if kept == "reliable":
        assert record["tokens_kept"] == round(record["effective_length_mean"] * CONFIG.batch_size)
    assert 0 < record["tokens_kept"] <= record["tokens_generated"]


@pytest.mark.parametrize("metric", ["overlap", "top_p"])
def test_the_fused_scores_are_those_of_the_operators_one_by_one(metric):
    run = trainer(metric=metric, top_p=0.6, temperature=0.8)
    rollouts, config = run.sample(1, 16).rollouts, run.config
    with torch.no_grad():
        logits = [response_logits(model, rollouts) for model in run.pair[:2]]
        found = score(*logits, rollouts, config, len(TOKENIZER))
    heat = dict.fromkeys(["student_temperature", "teacher_temperature"], config.temperature)
    stats = po.token_stats(*logits, rollouts.mask, token_ids=rollouts.response_ids, k=config.k, **heat)
    along, accepted = follow(stats, rollouts, config.prune)
    ids, rewards, _ = po.opd_rewards(*stats[:6], rollouts.mask)
    assert torch.equal(found.drift, along.drift) and torch.equal(found.accepted, accepted)
    assert torch.equal(found.candidates, ids) and torch.equal(found.effective_length, along.effective_length)
    gap = stats.student_entropy - stats.teacher_entropy
    assert gap.min() < 0 < gap.max(), "it is logged as an absolute value (eq. 4)"
    floats = found.rewards, found.reverse_kl, found.weight, found.entropy_gap, found.loss
    torch.testing.assert_close(floats, (rewards, stats.reverse_kl, along.weight, gap.abs(), -rewards.sum(-1)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (2, 1)),
        ({"method": "opd"}, (2, 1)),
        ({"method": "random"}, (2, 1)),
        ({"method": "random", "match": "mass"}, (3, 2)),  # a pass before it, to find the share
        ({"strategy": "union"}, (3, 1)),  # the candidates follow from a read of both models
        ({"method": "prune+grpo", "group_size": 3}, (3, 1)),  # the sampled token is one more candidate
    ],
)
def test_how_often_a_step_reads_the_logits(changes, expected):
    """Count reads of the student's and the teacher's logits per gradient written."""
    run = trainer(**changes)
    run.pair.teacher.resize_token_embeddings(len(TOKENIZER) + 8)
    with reads.counted(len(TOKENIZER), len(TOKENIZER) + 8) as rows:
        run.train_step()
    assert (rows["S"] / rows["W"], rows["T"] / rows["W"]) == expected


@pytest.mark.parametrize(("match", "w_base"), [("tokens", 0.5), ("tokens", 0.0), ("mass", 0.5), ("mass", 0.0)])
def test_random_keeps_each_position_with_the_share_that_prune_would_keep(match, w_base):
    run = trainer(method="random", match=match, w_base=w_base, batch_size=240, micro_batch_size=100)
    batch = run.sample(1, 16)
    mask = batch.rollouts.mask
    with torch.no_grad():
        everything = run.score(response_logits(run.student, batch.rollouts), batch.rollouts)
    size = mask.double() if match == "tokens" else everything.rewards.double().abs().sum(-1)
    weight = everything.weight.double()
    if match == "tokens":
        weight = (weight != 0).double()
    prune = (size * weight)[:, : CONFIG.initial_length].sum()
    share = float(prune / size.sum())
    assert (0.3 if w_base else 0.15) < share < 0.95
    assert bool((weight[mask] == 0).any()) == (w_base == 0), "some are exhausted"
    kept = run.random_positions(1, batch, torch.arange(240).split(100))
    assert {*kept.unique().tolist()} == {0.0, 1.0}
    assert not kept[~mask].any()
    deviation = (share * (1 - share) * (size**2).sum()).sqrt()
    assert abs((kept * size).sum() - prune) < 4 * deviation
    late = mask[:, CONFIG.initial_length :]
    assert abs(kept[:, CONFIG.initial_length :].sum() / late.sum() - share) < 4 * (0.25 / late.sum()) ** 0.5
    assert not torch.equal(kept, run.random_positions(2, batch, torch.arange(240).split(100)))


def test_random_matches_a_mass_above_that_of_the_rewards():
    """Early weights L are above 1. A position cannot be kept twice, but it can weigh more."""
    run = trainer(method="random", match="mass", w_drop=0.0, w_base=0.5, initial_length=16, batch_size=20)
    batch = run.sample(1, 16)
    weights = run.random_positions(1, batch, torch.arange(20).split(8))
    torch.testing.assert_close(weights, 1.5 * batch.rollouts.mask.float())


def test_group_responses_share_a_prompt_and_differ():
    run = trainer(method="prune+grpo", group_size=3)
    batch = run.sample(1, 16)
    assert [example.prompt for example in batch.examples] == [Sums().example(i).prompt for i in (0, 0, 0, 1, 1, 1)]
    assert len({tuple(ids) for ids in batch.rollouts.response_ids[:3].tolist()}) == 3
    assert batch.group.shape == (6,)


def test_a_loss_that_is_not_finite_ends_the_run_and_changes_nothing():
    run, _ = after(1)
    before, parameter = weights(run), next(run.pair.teacher.parameters())
    parameter.fill_(float("nan"))
    assert refusal(run.train_step).startswith("step 2: loss and gradient norm must be finite, got nan and ")
    assert torch.equal(weights(run), before)
    assert run.step == 1


def test_what_has_no_weight_has_no_say_even_if_it_is_not_finite():
    run = trainer(w_drop=1.0, w_base=0.0)
    next(run.pair.teacher.parameters()).fill_(float("nan"))
    record = run.train_step()
    assert (record["loss"], record["grad_norm"], record["tokens_kept"]) == (0, 0, 0)
