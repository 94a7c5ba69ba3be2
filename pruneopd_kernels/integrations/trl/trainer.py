"""What both trainers add to those of TRL: the hyperparameters, the budget and the logged statistics."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ... import PruneConfig, ResponseBudget, checks
from .budget import BudgetCallback
from .measures import means_of, totals_of

if TYPE_CHECKING:
    from trl import DistillationTrainer as Base
else:
    Base = object

LENGTHS = ("max_new_tokens", "max_tokens", "max_length")
"""Settings of `args.generation_kwargs` that would override the budget: transformers' names and vLLM's."""


class PruningTrainer(Base):
    """Precedes a trainer of TRL in a class's bases; that class sets `_scored` when it computes a loss."""

    _name = "Prune-OPD"
    _tag_names: ClassVar[list[str]] = ["trl", "distillation", "prune-opd"]
    _paper: ClassVar[dict[str, str]] = {
        "title": "Prune-OPD: Efficient and Reliable On-Policy Distillation for Long-Horizon Reasoning",
        "id": "2605.07804",
        "citation": """\
@article{yang2026pruneopd,
    title  = {{Prune-OPD: Efficient and Reliable On-Policy Distillation for Long-Horizon Reasoning}},
    author = {Zhicheng Yang and Zhijiang Guo and Yifan Song and Minrui Xu and Yongxin Wang and Yiwei Wang and \
Xiaodan Liang and Jing Tang},
    year   = 2026,
    eprint = {2605.07804},
    archivePrefix = {arXiv},
}""",
    }

    _scored: tuple[dict[str, Tensor], Tensor] | None = None  # results of the last loss by name, and their mask

    def __init__(
        self, *args: Any, prune: PruneConfig | None = None, budget: ResponseBudget | None = None, **kwargs: Any
    ) -> None:
        name = type(self).__name__
        for argument, value, expected in (("prune", prune, PruneConfig), ("budget", budget, ResponseBudget)):
            if value is not None and not isinstance(value, expected):
                checks.bad_type(name, argument, f"be a {expected.__name__}", f"a {type(value).__name__}")
        super().__init__(*args, **kwargs)
        if self._budget_callback() is not None:
            checks.bad_value(name, "callbacks", "have no BudgetCallback, which budget makes", "one")
        self.prune = PruneConfig() if prune is None else prune
        checks.number_of_candidates(name, self.prune.k, self.model.config.get_text_config().vocab_size)
        if budget is not None:
            if self.tools:
                # A tool's answer counts towards the length, but says nothing about how far the student is reliable.
                checks.bad_value(name, "budget", "be None when tools are given", f"{len(self.tools)} tools")
            for length in LENGTHS:
                if length in (self.args.generation_kwargs or {}):
                    rule = f"not have {length} when a budget is given"
                    checks.bad_value(name, "args.generation_kwargs", rule, self.args.generation_kwargs[length])
            self.add_callback(BudgetCallback.of(budget))
            self._sample_up_to(budget.length)

    @property
    def budget(self) -> ResponseBudget | None:
        """The current response budget."""
        callback = self._budget_callback()
        return None if callback is None else callback.budget

    def _budget_callback(self) -> BudgetCallback | None:
        """Look the callback up: transformers may replace it when it restores callbacks."""
        found = (callback for callback in self.callback_handler.callbacks if isinstance(callback, BudgetCallback))
        return next(found, None)

    def _sample_up_to(self, length: int) -> None:
        """Set `max_completion_length` and every copy of it in TRL."""
        self.max_completion_length = length
        self.generation_config.max_new_tokens = length
        self.generation_kwargs["max_new_tokens"] = length
        if self.use_vllm:
            self.vllm_generation.max_completion_length = length

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """Generate as TRL does, up to M tokens, or in an evaluation up to the maximum."""
        callback = self._budget_callback()
        if callback is None:
            return super()._generate_and_score_completions(inputs)
        callback.use = self._sample_up_to
        self._sample_up_to(callback.budget.length if self.model.training else callback.budget.maximum)
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._sample_up_to(callback.budget.length)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute TRL's loss and log the statistics as TRL logs the entropy: one mean per micro-batch."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._scored is None:
            raise RuntimeError(f"{type(self).__name__}: TRL formed its loss without calling what weighs it")
        (scored, mask), self._scored = self._scored, None
        mode = "train" if self.model.training else "eval"
        callback = self._budget_callback()
        longest = self.max_completion_length if callback is None else callback.budget.maximum
        totals = totals_of(scored, mask, longest)
        reduced = self.accelerator.reduce(torch.stack([*totals.values()]), "sum").cpu()
        measures = means_of(dict(zip(totals, reduced, strict=True)))
        if callback is not None and mode == "train":
            callback.effective_lengths.append(scored["effective_length"])
            measures["budget"] = callback.budget.length
        for name, value in measures.items():
            self._metrics[mode][f"prune/{name}"].append(value)
        return loss
