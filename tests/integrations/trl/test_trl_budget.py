"""The response budget inside a trainer: what it sets and when, and how a run resumes."""

import json

import pytest
import torch
from tiny_pair import BUDGET, PRUNED, history, prompts, trainer
from transformers import TrainerCallback

from pruneopd_kernels import PruneConfig, ResponseBudget
from pruneopd_kernels.integrations.trl import BudgetCallback

SETTINGS = {**BUDGET, "hit_ratio": 0.3, "patience": 2}
GROWS = PruneConfig(k=8, w_drop=0.0)  # E is the length


def budgeted(folder, prune=GROWS, given=None, **settings):
    return trainer(folder, given={"prune": prune, "budget": ResponseBudget(**SETTINGS), **(given or {})}, **settings)


def lengths(made):
    """Return every copy of the length."""
    copies = made.max_completion_length, made.generation_config.max_new_tokens, made.generation_kwargs["max_new_tokens"]
    return {*copies, made.budget.length}


class Watch(TrainerCallback):
    """Record the length limit at each step and after each evaluation."""

    def __init__(self):
        self.made, self.seen = None, []

    def on_log(self, args, state, control, **kwargs):
        self.seen.append(lengths(self.made))

    on_evaluate = on_log


def test_it_sets_every_copy_of_the_length_at_the_end_of_a_step(tmp_path):
    watch, budget = Watch(), ResponseBudget(**SETTINGS)
    made = watch.made = budgeted(tmp_path, max_steps=6, given={"callbacks": [watch], "budget": budget})
    assert lengths(made) == {8}
    found = history(made, "prune/budget", "completions/max_length")
    assert watch.seen[:6] == [{10}, {12}, {14}, {16}, {16}, {16}]
    assert found == [(n, n) for n in (8, 10, 12, 14, 16, 16)]  # what the step sampled with
    assert made.budget is budget, "the user's object"


def test_the_vllm_client_samples_up_to_it(tmp_path):
    """TRL's vLLM client, colocated or on a server, keeps its own copy of the length."""
    asked = []

    class Vllm:
        max_completion_length = 20

        def generate(self, prompts, **kwargs):
            asked.append(self.max_completion_length)
            return None, [[5] * self.max_completion_length for _ in prompts], None, None

        def sync_weights(self):
            pass

    made = budgeted(tmp_path, max_steps=3)
    made.use_vllm, made.vllm_generation, made._last_loaded_step = True, Vllm(), -1
    made.train()
    assert asked == [8, 10, 12]


def test_evaluation_samples_up_to_the_maximum(tmp_path):
    watch = Watch()
    made = watch.made = budgeted(
        tmp_path, max_steps=3, given={"callbacks": [watch], "eval_dataset": prompts(4)}, eval_strategy="steps",
        eval_steps=1, per_device_eval_batch_size=4,
    )  # fmt: skip
    made.train()
    evaluated = [record for record in made.state.log_history if "eval_loss" in record]
    assert [record["eval_completions/max_length"] for record in evaluated] == [16, 16, 16]
    # Each step logs, evaluates, logs that and says that it has: M is back by then.
    assert watch.seen[:9] == [{10}] * 3 + [{12}] * 3 + [{14}] * 3
    assert "eval_prune/overlap" in evaluated[0]
    assert made.budget.length == 14  # the evaluations' responses have no say in it


def test_a_step_is_one_update_by_its_own_responses(tmp_path):
    """Gradient accumulation counts as one step. Lengths left by an interrupted step are dropped."""
    made = budgeted(tmp_path, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    callback = next(cb for cb in made.callback_handler.callbacks if isinstance(cb, BudgetCallback))
    callback.effective_lengths.append(torch.zeros(1000))
    made.train()
    assert made.budget.length == 14


# --- resuming -----------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Stop after ten steps, as an interruption would."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 10


def run(folder, resume=None, stop=False, **settings):
    """Return the trainer and what it logged at each step."""
    made = budgeted(
        folder, PRUNED, given={"callbacks": [Stop()] if stop else []}, max_steps=20, save_strategy="steps",
        save_steps=10, gradient_accumulation_steps=2, per_device_train_batch_size=2, **settings,
    )  # fmt: skip
    made.train(resume_from_checkpoint=resume)
    names = ("step", "loss", "grad_norm", "num_tokens", "prune/overlap", "prune/effective_length", "prune/budget")
    return made, [tuple(record[name] for name in names) for record in made.state.log_history if "grad_norm" in record]


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """Run twenty steps at once; also leave the checkpoint of a run that ended after ten."""
    torch.use_deterministic_algorithms(True)
    folder = tmp_path_factory.mktemp("twenty")
    run(folder / "parts", stop=True)
    return *run(folder / "whole"), folder / "parts" / "checkpoint-10"


@pytest.mark.parametrize("restore", [False, True])
def test_ten_steps_and_ten_more_are_twenty(tmp_path, twenty, restore):
    """With and without transformers' own restoring of callbacks, which creates new ones."""
    whole, logged, checkpoint = twenty
    resumed, found = run(tmp_path, str(checkpoint), restore_callback_states_from_checkpoint=restore)
    assert found == logged and len(logged) == 20
    assert len({budget for *_, budget in logged}) > 2, logged
    assert resumed.budget.state_dict() == whole.budget.state_dict() and lengths(resumed) == {whole.budget.length}
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_holds_the_budget_as_updated(tmp_path):
    every_step = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path / "without", given={"prune": GROWS}, max_steps=1, **every_step).train()
    made = budgeted(tmp_path, max_steps=3, **every_step)
    made.train(resume_from_checkpoint=str(tmp_path / "without/checkpoint-1"))  # which has no budget
    for step, length in ((2, 10), (3, 12)):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        kept = state["stateful_callbacks"]["BudgetCallback"]
        assert kept["attributes"]["saved"] == {"length": length, "counter": 0}
        assert kept["args"] == {**SETTINGS, "floor_hit_boundary": False}
