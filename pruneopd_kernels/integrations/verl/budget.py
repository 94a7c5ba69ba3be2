"""The response budget in verl's synchronous trainer: the length of responses follows how long they stay reliable.

Importing this module registers the trainer mode and the agent loop `prune_opd` with verl. Each of verl's processes
needs both, so name the module in `VERL_USE_EXTERNAL_MODULES`.

The trainer holds the budget. Each batch of prompts carries it to the agent loops, and the metrics of the actor's update
carry the effective lengths back.
"""

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

from ... import ResponseBudget, checks
from .loss import LOSS_MODE

MODE = AGENT = "prune_opd"
FIELD = "response_budget"  # of a prompt, in the batch that goes to the agent loops
LOOPS = ("single_turn_agent", AGENT)  # what `rollout.agent.default_agent_loop` may be
SETTINGS = inspect.signature(ResponseBudget).parameters.keys() - {"group"}
FILE = "response_budget.json"  # in the folder of a checkpoint

logger = logging.getLogger(__name__)


@register(AGENT)
class BudgetAgentLoop(SingleTurnAgentLoop):
    """verl's single-turn agent loop, which samples at most as many tokens as the prompt's budget.

    For a prompt without a budget, as in validation, the bound is `rollout.response_length`.
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

    `trainer.v1.prune_opd` has the settings of `ResponseBudget`; the default of `maximum` is `rollout.response_length`.
    The budget makes a step after each update of the actor, before a checkpoint is saved. verl's checkpoints include its
    state. `training/response_budget` is the budget with which the step's responses were sampled. If `ppo_epochs` is
    above 1, a response counts once in each epoch.

    Raises:
        ValueError: A setting is not allowed, the loss is not `prune_opd`, or `rollout.agent.default_agent_loop` is not
            `single_turn_agent`.
    """

    def __init__(self, config: DictConfig) -> None:
        def refuse(argument: str, rule: str, actual: object) -> None:
            checks.bad_value(type(self).__name__, argument, rule, actual)

        rollout, loss_mode = config.actor_rollout_ref.rollout, config.distillation.distillation_loss.loss_mode
        if not config.distillation.enabled:
            refuse("distillation.enabled", "be True", False)
        if loss_mode != LOSS_MODE:
            refuse("distillation.distillation_loss.loss_mode", f"be {LOSS_MODE}", loss_mode)
        if rollout.agent.default_agent_loop not in LOOPS:
            refuse("rollout.agent.default_agent_loop", f"be {LOOPS[0]}", rollout.agent.default_agent_loop)
        settings = dict(config.trainer.v1.get(MODE) or {})
        if unknown := settings.keys() - SETTINGS:
            rule = f"have settings of {', '.join(sorted(SETTINGS))}"
            refuse(f"trainer.v1.{MODE}", rule, ", ".join(sorted(map(str, unknown))))
        self.budget = ResponseBudget(**{"maximum": rollout.response_length, **settings})
        if self.budget.maximum > rollout.response_length:
            rule = f"be at most rollout.response_length = {rollout.response_length}"
            refuse(f"trainer.v1.{MODE}.maximum", rule, self.budget.maximum)
        self.effective_lengths: list[int] = []
        super().__init__(config)

    def _build_replay_buffer(self) -> ReplayBuffer:
        self.trainer_mode = "sync"  # from here on verl only asks whether it is synchronous
        return super()._build_replay_buffer()

    def on_init_end(self) -> None:
        super().on_init_end()
        # verl's trainer replaces metrics that are lists by their means, so intercept what the workers return.
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
        # First, because verl's last step is to mark the checkpoint as complete.
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
