"""The response budget as a callback of transformers' Trainer, which saves it in every checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ...budget import ResponseBudget

_SETTINGS = ("initial", "minimum", "maximum", "step", "margin", "hit_ratio", "patience", "floor_hit_boundary")


class BudgetCallback(TrainerCallback, ExportableState):
    """Updates a `ResponseBudget` at the end of each step, and carries it from checkpoint to checkpoint.

    The trainers of this package make one from their argument `budget`. A run that is resumed continues with the
    checkpoint's M and its counter, whatever `restore_callback_states_from_checkpoint`; with that, the settings are the
    checkpoint's, too.

    Args:
        settings: Those of `ResponseBudget` but for its group.

    Attributes:
        budget: The `ResponseBudget`. With several processes its group is that of all of them, if it has none.
        effective_lengths: E of the step's responses so far, a tensor a micro-batch; the trainer appends them.
        use: What is to be done with a new M; the trainer's.
    """

    def __init__(self, **settings: Any) -> None:
        self.budget = ResponseBudget(**settings)
        self.effective_lengths: list[Tensor] = []
        self.use: Callable[[int], None] = _ignore

    @classmethod
    def of(cls, budget: ResponseBudget) -> BudgetCallback:
        """The callback that updates this very budget."""
        callback = cls()
        callback.budget = budget
        return callback

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps: from `args` transformers makes a new one, and sets its `attributes`."""
        return {
            "args": {name: getattr(self.budget, name) for name in _SETTINGS},
            "attributes": {"saved": self.budget.state_dict()},
        }

    @property
    def saved(self) -> dict[str, int]:
        """M and the counter, as `ResponseBudget.state_dict` has them; can be set."""
        return self.budget.state_dict()

    @saved.setter
    def saved(self, state: dict[str, int]) -> None:
        self.budget.load_state_dict(state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue with what the checkpoint holds; a new run finds here what it starts with."""
        # A checkpoint that was saved without a budget has none, and transformers then fails when it saves the next.
        kept: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        self.saved = kept.setdefault(type(self).__name__, self.state())["attributes"]["saved"]
        if self.budget.group is None and args.world_size > 1:
            self.budget.group = torch.distributed.group.WORLD

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what an interrupted step has left."""
        self.effective_lengths.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Apply the step's effective lengths: before the Trainer logs, evaluates and saves."""
        if not self.effective_lengths:
            raise RuntimeError(
                "BudgetCallback: the step has no effective lengths; only this package's trainers give any"
            )
        self.use(self.budget.update(torch.cat(self.effective_lengths)))


def _ignore(length: int) -> None:
    """Until a trainer says what to do with it."""
