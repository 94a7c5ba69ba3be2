"""The response budget as a callback of transformers' Trainer, which saves it in every checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ... import ResponseBudget

_SETTINGS = [field.name for field in fields(ResponseBudget) if field.init and field.name != "group"]


class BudgetCallback(TrainerCallback, ExportableState):
    """Updates a `ResponseBudget` at the end of each step, and saves it in every checkpoint.

    The trainers of this package make one from their argument `budget`. A resumed run continues with the checkpoint's M
    and counter. With `restore_callback_states_from_checkpoint` it continues with the checkpoint's settings too.

    Args:
        settings: Those of `ResponseBudget`, except its group.

    Attributes:
        budget: The `ResponseBudget`. If it has no group and there are several processes, all of them share it.
        effective_lengths: E of the step's responses so far, a tensor per micro-batch; the trainer appends them.
        use: Called with each new M; set by the trainer.
    """

    def __init__(self, **settings: Any) -> None:
        self.budget = ResponseBudget(**settings)
        self.effective_lengths: list[Tensor] = []
        self.use: Callable[[int], object] = lambda length: None

    @classmethod
    def of(cls, budget: ResponseBudget) -> BudgetCallback:
        """Return a callback that updates this very budget."""
        callback = cls()
        callback.budget = budget
        return callback

    def state(self) -> dict[str, Any]:
        """Return what `trainer_state.json` keeps; transformers makes a callback of `args` and sets `attributes`."""
        settings = {name: getattr(self.budget, name) for name in _SETTINGS}
        return {"args": settings, "attributes": {"saved": self.saved}}

    @property
    def saved(self) -> dict[str, int]:
        """M and the counter, as in `ResponseBudget.state_dict`; can be set."""
        return self.budget.state_dict()

    @saved.setter
    def saved(self, state: dict[str, int]) -> None:
        self.budget.load_state_dict(state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Continue with the checkpoint's budget; a new run finds its own state here."""
        # If the checkpoint was saved without a budget there is none, and transformers would fail at the next save.
        self.saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]["saved"]
        if self.budget.group is None and args.world_size > 1:
            self.budget.group = torch.distributed.group.WORLD

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what an interrupted step has left."""
        self.effective_lengths.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Apply the step's effective lengths: before the Trainer logs, evaluates and saves."""
        if not self.effective_lengths:
            raise RuntimeError(
                "BudgetCallback: the step has no effective lengths; only this package's trainers give any"
            )
        self.use(self.budget.update(torch.cat(self.effective_lengths)))
