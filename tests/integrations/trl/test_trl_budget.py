"""The response budget inside a trainer: what it sets, when, and that a run goes on as if never interrupted."""

import json

import pytest
import torch
from tiny_pair import PRUNED, config, model, prompts, teacher_of, tokenizer, trainer
from transformers import TrainerCallback

from pruneopd_kernels import PruneConfig, ResponseBudget
from pruneopd_kernels.integrations.trl import BudgetCallback, PruneDistillationTrainer

SETTINGS = {"initial": 8, "minimum": 4, "maximum": 16, "step": 2, "margin": 2, "hit_ratio": 0.3, "patience": 2}
SHRINKS = PruneConfig(k=8, threshold=1.0, w_drop=1.0, w_base=0.5)  # E is where the first drift is
GROWS = PruneConfig(k=8, w_drop=0.0)  # E is the length


def budgeted(folder, prune=GROWS, given=None, **settings):
    return trainer(folder, given={"prune": prune, "budget": ResponseBudget(**SETTINGS), **(given or {})}, **settings)


def lengths(made):
    return {
        made.max_completion_length,
        made.generation_config.max_new_tokens,
        made.generation_kwargs["max_new_tokens"],
        made.budget.length,
    }


class Watch(TrainerCallback):
    """What the trainer would sample up to, step by step, and after an evaluation."""

    def __init__(self):
        self.made, self.seen = None, []

    def on_log(self, args, state, control, **kwargs):
        self.seen.append(lengths(self.made))

    on_evaluate = on_log


def test_it_sets_every_copy_of_the_length_at_the_end_of_a_step(tmp_path):
    watch = Watch()
    made = watch.made = budgeted(tmp_path, max_steps=6, given={"callbacks": [watch]})
    assert lengths(made) == {8}
    made.train()
    assert watch.seen[:6] == [{10}, {12}, {14}, {16}, {16}, {16}]
    logged = [record["prune/budget"] for record in made.state.log_history if "prune/budget" in record]
    assert logged == [8, 10, 12, 14, 16, 16]  # what the step sampled with
    longest = [record["completions/max_length"] for record in made.state.log_history if "loss" in record]
    assert longest == logged


def test_it_shrinks_where_responses_are_unreliable(tmp_path):
    made = budgeted(tmp_path, SHRINKS, max_steps=6)
    made.train()
    assert made.budget.length == 4
    assert lengths(made) == {4}


def test_the_users_object_is_the_one_that_changes(tmp_path):
    budget = ResponseBudget(**SETTINGS)
    made = trainer(tmp_path, given={"prune": GROWS, "budget": budget})
    made.train()
    assert made.budget is budget
    assert budget.length == 12


def test_the_vllm_client_samples_up_to_it(tmp_path):
    """TRL's object that asks vLLM, colocated or on a server, has a copy of its own."""
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
    made = budgeted(
        tmp_path, max_steps=3, given={"callbacks": [watch], "eval_dataset": prompts(4)}, eval_strategy="steps",
        eval_steps=1, per_device_eval_batch_size=4,
    )  # fmt: skip
    watch.made = made
    made.train()
    evaluated = [record for record in made.state.log_history if "eval_loss" in record]
    assert [record["eval_completions/max_length"] for record in evaluated] == [16, 16, 16]
    # Each step logs, evaluates, logs that and says that it has: M is back by then.
    assert watch.seen[:9] == [{10}] * 3 + [{12}] * 3 + [{14}] * 3
    assert "eval_prune/overlap" in evaluated[0]
    assert made.budget.length == 14  # the evaluations' responses have no say in it


def test_without_a_budget_the_configured_length_stays(tmp_path):
    made = trainer(tmp_path, given={"prune": GROWS})
    made.train()
    assert made.budget is None
    assert made.max_completion_length == made.generation_config.max_new_tokens == 20
    assert not any("prune/budget" in record for record in made.state.log_history)


def test_gradient_accumulation_is_one_update_a_step(tmp_path):
    made = budgeted(tmp_path, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    made.train()
    assert made.budget.length == 14


# --- resuming -----------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """After ten steps, as if it had been interrupted."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 10


def run(folder, resume=None, stop=False, **settings):
    made = budgeted(
        folder, PRUNED, given={"callbacks": [Stop()] if stop else []}, max_steps=20, save_strategy="steps",
        save_steps=10, gradient_accumulation_steps=2, per_device_train_batch_size=2, **settings,
    )  # fmt: skip
    made.train(resume_from_checkpoint=resume)
    return made


def logged(made):
    names = ("step", "loss", "grad_norm", "num_tokens", "prune/budget", "prune/overlap", "prune/effective_length")
    return [tuple(record[name] for name in names) for record in made.state.log_history if "grad_norm" in record]


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """Twenty steps at a stretch, and a folder with the checkpoint of a run that ended after ten."""
    torch.use_deterministic_algorithms(True)
    folder = tmp_path_factory.mktemp("twenty")
    run(folder / "parts", stop=True)
    return run(folder / "whole"), folder / "parts" / "checkpoint-10"


@pytest.mark.parametrize("restore", [False, True])
def test_ten_steps_and_ten_more_are_twenty(tmp_path, twenty, restore):
    """With transformers' own restoring of callbacks, which makes new ones, and without."""
    whole, checkpoint = twenty
    resumed = run(tmp_path, str(checkpoint), restore_callback_states_from_checkpoint=restore)
    assert logged(resumed) == logged(whole)
    assert len(logged(whole)) == 20
    assert len({budget for *_, budget, _, _ in logged(whole)}) > 2, logged(whole)
    assert resumed.budget.state_dict() == whole.budget.state_dict()
    assert lengths(resumed) == {whole.budget.length}
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_holds_the_budget_as_updated(tmp_path):
    made = budgeted(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    made.train()
    kept = [
        json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())["stateful_callbacks"]
        for step in (1, 2)
    ]
    assert [state["BudgetCallback"]["attributes"]["saved"] for state in kept] == [
        {"length": 10, "counter": 0},
        {"length": 12, "counter": 0},
    ]
    assert kept[0]["BudgetCallback"]["args"] == {**SETTINGS, "floor_hit_boundary": False}


def test_a_checkpoint_without_a_budget_can_be_continued_with_one(tmp_path):
    first = trainer(tmp_path, given={"prune": GROWS}, max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    second = budgeted(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.budget.length == 12


def test_a_checkpoint_of_another_budget_is_refused(tmp_path):
    first = budgeted(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    first.train()
    student = model(0)
    other = PruneDistillationTrainer(
        model=student, teacher_model=teacher_of(student), args=config(tmp_path, max_steps=6), train_dataset=prompts(),
        processing_class=tokenizer(), budget=ResponseBudget(**{**SETTINGS, "maximum": 12}),
    )  # fmt: skip
    with pytest.raises(ValueError, match="ResponseBudget: length must be between minimum = 4 and maximum = 12, got 16"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_callback_is_made_without_arguments_and_from_its_own_state():
    assert BudgetCallback().budget == ResponseBudget()
    callback = BudgetCallback.of(ResponseBudget(**SETTINGS))
    callback.budget.update([8, 8])
    again = BudgetCallback.from_state(json.loads(json.dumps(callback.state())))
    assert again.budget == callback.budget
    assert again.budget.length == 10


def test_a_broken_step_leaves_nothing_behind(tmp_path):
    made = budgeted(tmp_path, max_steps=1)
    callback = next(cb for cb in made.callback_handler.callbacks if isinstance(cb, BudgetCallback))
    callback.effective_lengths.append(torch.zeros(1000))
    made.train()
    assert made.budget.length == 10
