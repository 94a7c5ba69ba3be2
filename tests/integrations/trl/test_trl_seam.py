"""What of TRL is private and used all the same: that it is as expected, and that it is left as it was found."""

import inspect
import subprocess
import sys
import threading

import pytest
import trl.trainer.distillation_trainer as theirs
from tiny_pair import config, model, prompts, teacher_of, tokenizer, trainer
from trl.experimental.server_distillation import ServerDistillationTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from pruneopd_kernels import PruneConfig, ResponseBudget
from pruneopd_kernels.integrations.trl import BudgetCallback, PruneDistillationTrainer
from pruneopd_kernels.integrations.trl.losses import TRL_LOSS, PrunedLoss, with_loss
from trl import DistillationTrainer


def parameters(function):
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if name != "self"}


NONE = inspect.Parameter.empty
BOTH_HEADS = {
    "student_logit_scale": 1.0,
    "teacher_logit_scale": 1.0,
    "student_final_logit_softcapping": None,
    "teacher_final_logit_softcapping": None,
    "temperature": 1.0,
}
SIGNATURES = [
    (
        theirs._chunked_divergence_loss,
        {
            "student_hidden_states": NONE, "teacher_hidden_states": NONE, "student_lm_head_weight": NONE,
            "teacher_lm_head_weight": NONE, "completion_mask": NONE, "beta": NONE, "num_items_in_batch": None,
            "student_lm_head_bias": None, "teacher_lm_head_bias": None, **BOTH_HEADS,
        },
    ),
    (
        ChunkedDivergenceFunction.forward,
        {
            "ctx": NONE, "student_hidden": NONE, "student_weight": NONE, "student_bias": NONE, "teacher_hidden": NONE,
            "teacher_weight": NONE, "teacher_bias": NONE, "beta": NONE, "temperature": 1.0,
            "student_logit_scale": 1.0, "student_final_logit_softcapping": None,
            "teacher_logit_scale": 1.0, "teacher_final_logit_softcapping": None,
        },
    ),
    (maybe_gather_lm_head_ctx, {"params": NONE}),
    (DistillationTrainer._compute_loss, {"unwrapped_student": NONE, "inputs": NONE, "num_items_in_batch": NONE}),
    (DistillationTrainer._generate_and_score_completions, {"inputs": NONE}),
    (
        DistillationTrainer.compute_loss,
        {"model": NONE, "inputs": NONE, "return_outputs": False, "num_items_in_batch": None},
    ),
    (
        ServerDistillationTrainer._compute_server_forward_kl_loss,
        {"teacher_result": NONE, "student_log_probs": NONE, "labels": NONE},
    ),
    (
        ServerDistillationTrainer._reduce_divergence_loss,
        {"jsd": NONE, "completion_mask": None, "reduction": "batchmean", "num_items_in_batch": None},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "expected"), SIGNATURES, ids=lambda x: getattr(x, "__name__", ""))
def test_signatures(function, expected):
    assert parameters(function) == expected


def test_the_loss_is_called_as_that_of_trl():
    assert parameters(PrunedLoss.__call__) == parameters(theirs._chunked_divergence_loss)
    assert TRL_LOSS in DistillationTrainer._compute_loss.__code__.co_names
    assert DistillationTrainer._compute_loss.__globals__ is vars(theirs)


def test_the_copies_of_the_length_are_those_that_the_budget_sets(tmp_path):
    made = trainer(tmp_path)
    assert made.max_completion_length == made.generation_config.max_new_tokens == 20
    assert made.generation_kwargs["max_new_tokens"] == 20
    lines = inspect.getsource(DistillationTrainer.__init__).splitlines()
    assert [line.strip() for line in lines if "max_completion_length" in line] == [
        "self.max_completion_length = args.max_completion_length",
        '"max_new_tokens": self.max_completion_length,',
        "max_completion_length=self.max_completion_length,",  # of VLLMGeneration
    ]
    lines = inspect.getsource(VLLMGeneration).splitlines()
    assert [line.strip() for line in lines if "self.max_completion_length" in line] == [
        "self.max_completion_length = max_completion_length",
        "max_completion_length = self.max_completion_length",  # in generate
    ]


# --- nothing is patched -------------------------------------------------------------------------------------------


def module_names():
    return DistillationTrainer._compute_loss, dict(vars(theirs))


def test_trl_is_as_it_was_during_a_step_and_after_an_error(tmp_path, monkeypatch):
    before, seen = module_names(), []

    def fail(self, *args, **kwargs):
        seen.append(module_names() == before)
        raise ZeroDivisionError

    made = trainer(tmp_path)
    made.train()
    assert module_names() == before
    monkeypatch.setattr(PrunedLoss, "__call__", fail)
    with pytest.raises(ZeroDivisionError):
        made.train()
    assert seen == [True]
    assert module_names() == before


def test_threads_do_not_meet():
    """Two calls of one method at a time, each with a loss of its own, and the plain method in between."""
    both_inside = threading.Barrier(3, timeout=30)

    def loss(name):
        def called(*args, **kwargs):
            both_inside.wait()
            return name

        return called

    names = {"__name__": "elsewhere", TRL_LOSS: loss("their own")}
    exec(f"def method(x): return {TRL_LOSS}(x)", names)
    method, found = names["method"], {}

    def run(name):
        found[name] = with_loss(method, loss(name))(1) if name else method(1)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"a": "a", "b": "b", None: "their own"}


def test_a_method_that_calls_another_loss_is_an_error(tmp_path, monkeypatch):
    """Such as that of a class in between, which calls TRL's: its loss would not be weighted."""
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


def budget(**settings):
    return ResponseBudget(**{"initial": 8, "minimum": 4, "maximum": 16, "step": 2, "margin": 2, **settings})


def with_tools():
    """A chat template that TRL knows to call tools, and what parses them."""
    from trl.chat_template_utils import qwen3_chat_template

    made = tokenizer()
    made.chat_template = qwen3_chat_template
    return made


REFUSED = {
    "loss": ({"loss": "kl"}, {}, "loss must be one of 'reverse_kl', 'topk_policy', 'divergence', got 'kl'"),
    "beta": ({"loss": "topk_policy"}, {"beta": 0.5}, "args.beta must be 1 when loss is 'topk_policy', got 0.5"),
    "k": ({"prune": PruneConfig(k=97)}, {}, "k must be between 1 and min(vocab_size, 256) = 96, got 97"),
    "a length": (
        {"budget": budget()},
        {"generation_kwargs": {"max_new_tokens": 5}},
        "args.generation_kwargs must not have max_new_tokens when a budget is given, got 5",
    ),
    "tools": (
        {"budget": budget(), "tools": [look_up], "processing_class": with_tools},
        {},
        "budget must be None when tools are given, got 1 tools",
    ),
    "prune's type": ({"prune": {"k": 8}}, {}, "prune must be a PruneConfig, got a dict"),
    "budget's type": ({"budget": {"initial": 8}}, {}, "budget must be a ResponseBudget, got a dict"),
    "a callback": (
        {"callbacks": [BudgetCallback()]},
        {},
        "callbacks must have no BudgetCallback, which budget makes, got one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    given, settings, words = REFUSED[case]
    student = model(0)
    given = {"processing_class": tokenizer, **given}
    given["processing_class"] = given["processing_class"]()
    with pytest.raises(TypeError if case.endswith("type") else ValueError) as error:
        PruneDistillationTrainer(
            model=student, teacher_model=teacher_of(student), args=config(tmp_path, **settings),
            train_dataset=prompts(), **given,
        )  # fmt: skip
    assert str(error.value) == f"PruneDistillationTrainer: {words}"


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("when", ["before", "at the loss"])
def test_heads_with_a_soft_cap_are_refused(tmp_path, side, when):
    student = model(0)
    pair = {"student": student, "teacher": teacher_of(model(0))}
    words = f"PruneDistillationTrainer: {side}'s final_logit_softcapping must be None, got 30.0"
    if when == "before":
        pair[side].config.final_logit_softcapping = 30.0
        with pytest.raises(ValueError) as error:
            trainer(tmp_path, **pair)
    else:
        made = trainer(tmp_path, **pair)
        pair[side].config.final_logit_softcapping = 30.0
        with pytest.raises(ValueError) as error:
            made.train()
    assert str(error.value) == words


def test_no_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        PruneDistillationTrainer(
            model=model(0), args=config(tmp_path), train_dataset=prompts(), processing_class=tokenizer()
        )
    assert str(error.value) == "PruneDistillationTrainer: teacher_model must be given, got None"


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr.strip().rpartition("\n")[2]


def test_trl_is_imported_only_on_request():
    code = "import sys, pruneopd_kernels.integrations, pruneopd_kernels.linear; print('trl' in sys.modules)"
    assert run(code) == (0, "False\n")
