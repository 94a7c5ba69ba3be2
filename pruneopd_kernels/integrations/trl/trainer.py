"""What both trainers add to TRL's: the hyperparameters, the budget, and what is logged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ... import checks
from ...budget import ResponseBudget
from ...config import PruneConfig
from .budget import BudgetCallback
from .measures import means_of, sums_of

if TYPE_CHECKING:
    from trl import DistillationTrainer as Base
else:
    Base = object

LENGTHS = ("max_new_tokens", "max_tokens", "max_length")
"""What of `args.generation_kwargs` would outdo the budget: transformers' names and vLLM's."""


class PruningTrainer(Base):
    """Comes before a trainer of TRL's in a class's bases, and leaves it to set `_scored` when it forms a loss."""

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

    _scored: tuple[Any, Any] | None = None  # the last loss's results by position, and their mask

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
        if budget is not None:
            self._check_budget()
            self.add_callback(BudgetCallback.of(budget))
            self._sample_up_to(budget.length)

    @property
    def budget(self) -> ResponseBudget | None:
        """The response budget, as it is now."""
        callback = self._budget_callback()
        return None if callback is None else callback.budget

    def _check_budget(self) -> None:
        name = type(self).__name__
        if self.tools:
            # A tool's answer counts towards the length, and has no say in how far the student is reliable.
            checks.bad_value(name, "budget", "be None when tools are given", f"{len(self.tools)} tools")
        for length in LENGTHS:
            if length in (self.args.generation_kwargs or {}):
                rule = f"not have {length} when a budget is given"
                checks.bad_value(name, "args.generation_kwargs", rule, self.args.generation_kwargs[length])

    def _budget_callback(self) -> BudgetCallback | None:
        """Looked up, because transformers may put another in its place where it restores callbacks."""
        found = (callback for callback in self.callback_handler.callbacks if isinstance(callback, BudgetCallback))
        return next(found, None)

    def _sample_up_to(self, length: int) -> None:
        """Set `max_completion_length` and every copy of it that TRL has made."""
        self.max_completion_length = length
        self.generation_config.max_new_tokens = length
        self.generation_kwargs["max_new_tokens"] = length
        if self.use_vllm:
            self.vllm_generation.max_completion_length = length

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """TRL's, up to M tokens, or in an evaluation up to the maximum."""
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
        """TRL's, which forms the loss; then what is logged, as TRL logs the entropy: a mean a micro-batch."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._scored is None:
            raise RuntimeError(f"{type(self).__name__}: TRL formed its loss without calling what weighs it")
        (scored, mask), self._scored = self._scored, None
        mode = "train" if self.model.training else "eval"
        callback = self._budget_callback()
        longest = self.max_completion_length if callback is None else callback.budget.maximum
        measures = means_of(self.accelerator.reduce(sums_of(scored, mask, longest), "sum"))
        if callback is not None and mode == "train":
            callback.effective_lengths.append(scored.effective_length)
            measures["budget"] = callback.budget.length
        for name, value in measures.items():
            self._metrics[mode][f"prune/{name}"].append(value)
        return loss
