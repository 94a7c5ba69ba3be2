"""The response budget in verl's synchronous trainer: how long responses may be, by how long they stayed reliable.

Importing this registers the trainer mode and the agent loop `prune_opd` with verl, which both have to be known in
each of its processes: name this module in `VERL_USE_EXTERNAL_MODULES`.

The budget lives in the trainer. It travels to the agent loops with each batch of prompts, and the effective lengths
come back with the metrics of the actor's update.
"""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import KVBatchMeta, register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tensordict_utils import assign_non_tensor

from ... import checks
from ...budget import ResponseBudget
from .loss import LOSS_MODE

MODE = AGENT = "prune_opd"
FIELD = "response_budget"  # of a prompt, in the batch that goes to the agent loops
LOOPS = ("single_turn_agent", AGENT)  # what `rollout.agent.default_agent_loop` may be
SETTINGS = inspect.signature(ResponseBudget).parameters.keys() - {"group"}
FILE = "response_budget.json"  # in the folder of a checkpoint

logger = logging.getLogger(__name__)


@register(AGENT)
class BudgetAgentLoop(SingleTurnAgentLoop):
    """verl's single-turn agent loop, which samples no more tokens than the prompt's budget.

    A prompt without one, as in validation, may have `rollout.response_length`.
    """

    async def run(
        self, sampling_params: dict[str, Any], *, response_budget: int | None = None, **kwargs: Any
    ) -> AgentLoopOutput:
        if response_budget is not None:
            sampling_params = {**sampling_params, "max_tokens": int(response_budget)}
        return await super().run(sampling_params, **kwargs)


@register_trainer(MODE)
class PruneTrainerSync(PPOTrainerSync):
    """verl's `PPOTrainerSync` with a `ResponseBudget`: `trainer.v1.trainer_mode=prune_opd`.

    The settings of the budget are those of `ResponseBudget`, in `trainer.v1.prune_opd`; `maximum` is
    `rollout.response_length` unless it is given. The budget makes a step after each update of the actor, before a
    checkpoint is saved, and its state is saved and loaded with verl's checkpoints. It is logged as
    `training/response_budget`: the one that the step's responses were sampled with. Where `ppo_epochs` is above 1, a
    response counts once in each epoch.

    Raises:
        ValueError: A setting is not allowed, the loss is another than `prune_opd`, or
            `rollout.agent.default_agent_loop` is another than `single_turn_agent`.
    """

    def __init__(self, config: DictConfig) -> None:
        name = type(self).__name__
        if not config.distillation.enabled:
            checks.bad_value(name, "distillation.enabled", "be True", False)
        loss_mode = config.distillation.distillation_loss.loss_mode
        if loss_mode != LOSS_MODE:
            checks.bad_value(name, "distillation.distillation_loss.loss_mode", f"be {LOSS_MODE}", loss_mode)
        rollout = config.actor_rollout_ref.rollout
        if rollout.agent.default_agent_loop not in LOOPS:
            checks.bad_value(
                name, "rollout.agent.default_agent_loop", f"be {LOOPS[0]}", rollout.agent.default_agent_loop
            )
        length = rollout.response_length
        settings = dict(config.trainer.v1.get(MODE) or {})
        if unknown := settings.keys() - SETTINGS:
            rule = f"have settings of {', '.join(sorted(SETTINGS))}"
            checks.bad_value(name, f"trainer.v1.{MODE}", rule, ", ".join(sorted(map(str, unknown))))
        self.budget = ResponseBudget(**{"maximum": length, **settings})
        if self.budget.maximum > length:
            rule = f"be at most rollout.response_length = {length}"
            checks.bad_value(name, f"trainer.v1.{MODE}.maximum", rule, self.budget.maximum)
        self.effective_lengths: list[int] = []
        super().__init__(config)

    def _build_replay_buffer(self) -> ReplayBuffer:
        self.trainer_mode = "sync"  # what verl asks of it from here on is whether it is synchronous
        return super()._build_replay_buffer()

    def on_init_end(self) -> None:
        super().on_init_end()
        # Of metrics that are lists verl's trainer keeps only the mean: what the workers return is seen before.
        update = self.actor_rollout_wg.update_actor

        def update_actor(batch: KVBatchMeta) -> TensorDict:
            output = update(batch)
            self.effective_lengths = output["metrics"]["distillation/effective_length"]
            return output

        self.actor_rollout_wg.update_actor = update_actor

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        if "agent_name" in batch:
            names = batch["agent_name"]
            found = [names] if isinstance(names, str) else sorted(set(names))
            checks.bad_value(type(self).__name__, "data", f"have no agent_name beside {AGENT}", ", ".join(found))
        assign_non_tensor(batch, agent_name=AGENT, **{FIELD: self.budget.length})
        return int(super()._submit_batch_to_rollout(batch))

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        metrics[f"training/{FIELD}"] = self.budget.length
        self.budget.update(self.effective_lengths)
        return batch

    def _save_checkpoint(self) -> None:
        # First, for verl's last act is to name this checkpoint as one that is complete.
        folder = Path(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(self.budget.state_dict()))
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps == 0:
            return
        trainer = self.config.trainer
        latest = Path(trainer.default_local_dir, f"global_step_{self.global_steps}")
        file = Path(trainer.resume_from_path if trainer.resume_mode == "resume_path" else latest, FILE)
        if file.exists():
            self.budget.load_state_dict(json.loads(file.read_text()))
        else:
            logger.warning("no %s: the response budget starts at %d", file, self.budget.length)
