"""TRL's private names that the integration relies on: they are as expected and stay unchanged."""

import inspect

import pytest
import trl.trainer.distillation_trainer as theirs
from tiny_pair import BUDGET, tokenizer, trainer

from pruneopd_kernels import ResponseBudget
from pruneopd_kernels.integrations.trl import BudgetCallback
from pruneopd_kernels.integrations.trl.losses import TRL_LOSS, PrunedLoss
from trl import DistillationTrainer


def test_the_loss_is_called_as_that_of_trl():
    own, stock = (inspect.signature(f).parameters for f in (PrunedLoss.__call__, theirs._chunked_divergence_loss))
    assert [(p.name, p.default) for p in own.values()][1:] == [(p.name, p.default) for p in stock.values()]
    assert TRL_LOSS in DistillationTrainer._compute_loss.__code__.co_names
    assert DistillationTrainer._compute_loss.__globals__ is vars(theirs)


def test_nothing_is_patched(tmp_path, monkeypatch):
    """TRL's names are unchanged while a loss is computed, so threads cannot interfere."""

    def module_names():
        return DistillationTrainer._compute_loss, dict(vars(theirs))

    before, seen, call = module_names(), [], PrunedLoss.__call__
    monkeypatch.setattr(PrunedLoss, "__call__", lambda *args, **kw: seen.append(module_names()) or call(*args, **kw))
    trainer(tmp_path).train()
    assert seen == [before, before]


def test_a_method_that_calls_another_loss_is_an_error(tmp_path, monkeypatch):
    """A class in between may call TRL's loss directly; that loss would not be weighted."""
    original = DistillationTrainer._compute_loss
    monkeypatch.setattr(DistillationTrainer, "_compute_loss", lambda self, *args: original(self, *args))
    with pytest.raises(RuntimeError, match="TRL formed its loss without calling what weighs it"):
        trainer(tmp_path).train()


# --- what is refused ----------------------------------------------------------------------------------------------


def look_up(word: str) -> str:
    """Looks a word up.

    Args:
        word: The word.

    Returns:
        What it means.
    """
    return word


def with_tools():
    """Return a tokenizer whose chat template supports tool calls."""
    from trl.chat_template_utils import qwen3_chat_template

    made = tokenizer()
    made.chat_template = qwen3_chat_template
    return made


REFUSED = {
    "loss": ({"loss": "kl"}, {}, "loss must be one of 'reverse_kl', 'topk_policy', 'divergence', got 'kl'"),
    "beta": ({"loss": "topk_policy"}, {"beta": 0.5}, "args.beta must be 1 when loss is 'topk_policy', got 0.5"),
    "a length": (
        {"budget": ResponseBudget(**BUDGET)},
        {"generation_kwargs": {"max_new_tokens": 5}},
        "args.generation_kwargs must not have max_new_tokens when a budget is given, got 5",
    ),
    "tools": (
        {"budget": ResponseBudget(**BUDGET), "tools": [look_up], "processing_class": with_tools},
        {},
        "budget must be None when tools are given, got 1 tools",
    ),
    "no teacher": ({"teacher_model": None}, {}, "teacher_model must be given, got None"),
    "prune's type": ({"prune": {"k": 8}}, {}, "prune must be a PruneConfig, got a dict"),
    "a callback": (
        {"callbacks": [BudgetCallback()]},
        {},
        "callbacks must have no BudgetCallback, which budget makes, got one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    given, settings, words = REFUSED[case]
    given = {name: value() if value is with_tools else value for name, value in given.items()}
    with pytest.raises(TypeError if case.endswith("type") else ValueError) as error:
        trainer(tmp_path, given=given, **settings)
    assert str(error.value) == f"PruneDistillationTrainer: {words}"
