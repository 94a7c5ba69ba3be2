"""The budget's trainer and agent loop: verl's own methods around fakes for Ray and GPUs."""

import asyncio
import copy
import functools
import json
from pathlib import Path
from types import SimpleNamespace as Namespace
from unittest.mock import AsyncMock, Mock

import pytest
import torch
from hydra import compose, initialize_config_module
from tensordict import NonTensorData, TensorDict
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass

from pruneopd_kernels import ResponseBudget
from pruneopd_kernels.integrations.verl import PruneLossConfig
from pruneopd_kernels.integrations.verl.budget import BudgetAgentLoop, PruneTrainerSync

LOSS = "distillation.distillation_loss"
OVERRIDES = [
    "algorithm.adv_estimator=grpo",
    "trainer.v1.trainer_mode=prune_opd",
    "distillation.enabled=True",
    f"{LOSS}._target_=pruneopd_kernels.integrations.verl.PruneLossConfig",
    f"{LOSS}.loss_mode=prune_opd",
    f"{LOSS}.use_task_rewards=False",
    f"{LOSS}.topk=16",
    f"+{LOSS}.w_drop=0.02",
    "data.max_response_length=4096",
    "+trainer.v1.prune_opd={initial: 2048, minimum: 1024, step: 512, patience: 2}",
]


@functools.cache
def config_of(*overrides):
    """Return verl's configuration, as its command line reads it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", [*OVERRIDES, *overrides])


class Workers:
    """Stand in for Ray's worker group."""

    def __init__(self):
        self.lengths, self.calls = [], []

    def update_actor(self, batch):
        metrics = {"loss": [0.5], "mfu": [0.1], "distillation/effective_length": list(self.lengths)}
        return tensordict_utils.get_tensordict({}, {"metrics": metrics})

    def save_checkpoint(self, *arguments, **_):
        self.calls.append(("save", *arguments))

    def load_checkpoint(self, *_, **arguments):
        self.calls.append(("load", arguments["local_path"]))


def trainer_of(tmp_path, *overrides):
    """Return a trainer that is set up as verl does it."""
    config = copy.deepcopy(config_of(*overrides))
    config.trainer.default_local_dir = str(tmp_path)
    trainer, state, loss = PruneTrainerSync(config), {"seen": 0}, config.distillation.distillation_loss
    trainer.actor_rollout_wg = Workers()
    trainer.train_dataloader = Namespace(state_dict=lambda: state, load_state_dict=state.update)
    trainer.distillation_config = Namespace(distillation_loss=omega_conf_to_dataclass(loss))
    trainer.checkpoint_manager = Namespace(update_weights=lambda step: None)
    trainer._load_checkpoint()
    trainer.on_init_end()
    return trainer


def update(trainer, lengths):
    """Update the actor, whose workers report these effective lengths; return what is logged."""
    trainer.global_steps += 1
    trainer.actor_rollout_wg.lengths = lengths
    metrics = {}
    trainer._update_actor(Namespace(extra_info={}), metrics)
    return metrics


def test_the_configuration_is_read_as_verl_reads_it(tmp_path):
    trainer = trainer_of(tmp_path)
    loss_config = trainer.distillation_config.distillation_loss
    assert type(loss_config) is PruneLossConfig and loss_config.loss_settings.use_topk
    assert (loss_config.w_drop, loss_config.w_base, loss_config.topk) == (0.02, 0.5, 16)
    budget = trainer.budget
    assert budget == ResponseBudget(initial=2048, minimum=1024, maximum=4096, step=512, patience=2)
    without = PruneTrainerSync(config_of("~trainer.v1.prune_opd", "data.max_response_length=12288"))
    assert without.budget == ResponseBudget(), "the paper's"
    assert trainer.trainer_mode == "sync" and type(trainer.replay_buffer) is ReplayBuffer


def test_the_budget_follows_the_effective_lengths(tmp_path):
    trainer = trainer_of(tmp_path)
    logged = [update(trainer, lengths) for lengths in ([2048] + [10] * 9, [10] * 10, [10] * 10, [], [4096] * 3)]
    assert [metrics["training/response_budget"] for metrics in logged] == [2048, 2560, 2560, 2048, 2048]
    assert trainer.budget.length == 2560
    assert logged[0]["actor/distillation/effective_length"] == (2048 + 90) / 10


def test_the_budget_goes_with_the_prompts(tmp_path, monkeypatch):
    """The agent loop's workers read it from each part of a batch."""
    sent, put = [], []
    monkeypatch.setattr(trainer_base, "tq", Namespace(kv_batch_put=lambda **kwargs: put.append(kwargs)))
    trainer = trainer_of(tmp_path)
    trainer.agent_loop_manager = Namespace(generate_sequences=sent.append)
    update(trainer, [2048])
    batch = TensorDict({"index": torch.arange(4)}, batch_size=4)
    batch["uid"] = tensordict_utils.get_tensordict({"uid": [f"u{i}" for i in range(4)]})["uid"]
    assert trainer._submit_batch_to_rollout(batch) == 4
    assert put[0]["keys"] == ["u0", "u1", "u2", "u3"]
    for part in sent[0].chunk(2):
        values = {key: value.data for key, value in part.items() if isinstance(value, NonTensorData)}
        assert values == {"agent_name": "prune_opd", "response_budget": 2560}
    with pytest.raises(ValueError, match=r"data must have no agent_name beside prune_opd, got tool_agent$"):
        trainer._submit_batch_to_rollout(tensordict_utils.assign_non_tensor(batch, agent_name="tool_agent"))
    batch["agent_name"] = tensordict_utils.get_tensordict({"a": ["tool_agent", "react", "react", "react"]})["a"]
    with pytest.raises(ValueError, match=r"data must have no agent_name beside prune_opd, got react, tool_agent$"):
        trainer._submit_batch_to_rollout(batch)


def run_loop(sampling_params, **fields):
    """Run the agent loop on an answer of 50 tokens; return what it asked for and its output."""
    asked = []

    def answer(sampling_params, **_):
        asked.append(sampling_params)
        tokens = list(range(50))[: sampling_params.get("max_tokens", 50)]
        return Namespace(token_ids=tokens, log_probs=None, num_preempted=0, routed_experts=None, extra_fields={})

    def merge(prompt_ids, tokens, *_, **__):
        return Namespace(token_ids=prompt_ids + tokens), [1] * len(tokens), None

    loop = object.__new__(BudgetAgentLoop)
    loop.rollout_config, loop.response_length = Namespace(full_determinism=False), 40
    loop.server_manager = Namespace(generate=AsyncMock(side_effect=answer))
    loop.process_multi_modal_info = AsyncMock(return_value={})
    loop.ct_build_initial_tokens = AsyncMock(return_value=[1, 2, 3])
    loop.ct_merge_assistant_token = AsyncMock(side_effect=merge)
    loop._get_mm_processor_kwargs = Mock(return_value={})
    loop._assert_mm_supported = loop.build_sglang_video_payload = Mock(return_value=None)
    return asked, asyncio.run(loop.run(sampling_params, raw_prompt=[], index=0, **fields))


def test_the_agent_loop_samples_within_the_budget():
    shared = {"temperature": 1.0}  # verl hands one dictionary to all responses of a prompt
    asked, output = run_loop(shared, response_budget=30)
    assert asked == [{"temperature": 1.0, "max_tokens": 30}] and len(output.response_ids) == 30
    assert shared == {"temperature": 1.0}
    asked, output = run_loop(shared)
    assert asked == [{"temperature": 1.0}] and len(output.response_ids) == 40


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "resume_path"])
def test_a_resumed_budget_goes_on(tmp_path, mode):
    steps = [[2048], [10], [10], [3000], [10], [10]]
    whole = trainer_of(tmp_path / "whole")
    expected = [update(whole, lengths)["training/response_budget"] for lengths in steps]

    first = trainer_of(tmp_path / "run")
    found = [update(first, lengths)["training/response_budget"] for lengths in steps[:2]]
    assert first.budget.counter == 1
    first._save_checkpoint()
    assert [call[0] for call in first.actor_rollout_wg.calls] == ["save"]
    folder = tmp_path / "run/global_step_2"
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text() == "2"
    how = [f"trainer.resume_mode={mode}", *([f"trainer.resume_from_path={folder}"] if mode == "resume_path" else [])]
    second = trainer_of(tmp_path / ("run" if mode == "auto" else "elsewhere"), *how)
    assert second.global_steps == 2 and second.actor_rollout_wg.calls == [("load", str(folder / "actor"))]
    found += [update(second, lengths)["training/response_budget"] for lengths in steps[2:]]
    assert found == expected and second.budget.state_dict() == whole.budget.state_dict()


def test_the_budget_is_saved_before_verl_names_the_checkpoint(tmp_path):
    trainer = trainer_of(tmp_path)
    update(trainer, [2048])
    trainer.actor_rollout_wg.save_checkpoint = Mock(side_effect=OSError("no space"))
    with pytest.raises(OSError, match="no space"):
        trainer._save_checkpoint()
    assert json.loads((tmp_path / "global_step_1/response_budget.json").read_text()) == {"length": 2560, "counter": 0}
    assert not Path(tmp_path, "latest_checkpointed_iteration.txt").exists()


def test_a_checkpoint_without_a_budget_starts_one(tmp_path, caplog):
    trainer = trainer_of(tmp_path)
    update(trainer, [2048])
    trainer._save_checkpoint()
    file = tmp_path / "global_step_1/response_budget.json"
    file.unlink()
    assert trainer_of(tmp_path).budget.length == 2048
    assert f"no {file}: the response budget starts at 2048" in caplog.text


# --- what is refused --------------------------------------------------------------------------------------------------


REFUSED = [
    ("distillation.enabled=False", "distillation.enabled must be True, got False"),
    (f"{LOSS}.loss_mode=k3", f"{LOSS}.loss_mode must be prune_opd, got k3"),
    ("actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
     "rollout.agent.default_agent_loop must be single_turn_agent, got tool_agent"),
    ("+trainer.v1.prune_opd.k=3",
     "trainer.v1.prune_opd must have settings of floor_hit_boundary, hit_ratio, initial, margin, maximum, minimum, "
     "patience, step, got k"),
    ("+trainer.v1.prune_opd.maximum=5000",
     "trainer.v1.prune_opd.maximum must be at most rollout.response_length = 4096, got 5000"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "words"), REFUSED)
def test_configurations_without_a_meaning(override, words):
    with pytest.raises(ValueError) as error:
        PruneTrainerSync(config_of(override))
    assert str(error.value).removeprefix("PruneTrainerSync: ") == words
