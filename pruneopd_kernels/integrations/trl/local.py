"""`PruneDistillationTrainer`: TRL's trainer with a local teacher."""

from typing import Any, get_args

from torch import Tensor

from trl import DistillationTrainer

from ... import PruneConfig, ResponseBudget, checks
from .losses import Loss, PrunedLoss, with_loss
from .trainer import PruningTrainer

_NAME = "PruneDistillationTrainer"


class PruneDistillationTrainer(PruningTrainer, DistillationTrainer):
    """`trl.DistillationTrainer` with each token's loss weighted by reliability (Prune-OPD, arXiv:2605.07804, eq. 6-12).

    With L the weight of `reliability` at a position, the loss of a token is

        reverse_kl:   L * KL(student || teacher), in chunks of positions; TRL's own at beta=1
        topk_policy:  topk_policy_loss with the rewards L * r over the student's k candidates, also in chunks
        divergence:   L * TRL's own divergence, at any beta

    and the loss of a batch, as in TRL, their sum divided by the number of valid tokens. Everything else is as in TRL.
    `args.temperature` divides the logits of both models.

    Args:
        args: Those of `trl.DistillationTrainer`, in its order, and by name: model, teacher_model, args, train_dataset
            and so on.
        prune: The hyperparameters; None: the paper's. With `w_drop=0, w_base=0` every weight is 1.
        loss: `"reverse_kl"`, `"topk_policy"` or `"divergence"`.
        budget: The upper bound on the length of sampled responses, adapted after each step to their effective lengths
            in all processes. It replaces `args.max_completion_length`. Evaluation samples up to the maximum. None: the
            bound stays `args.max_completion_length`.
        kwargs: Likewise those of `trl.DistillationTrainer`.

    Raises:
        ValueError: `beta` is not 1 for a loss that has none; k exceeds the vocabulary; a budget is combined with tools,
            or with a length in `args.generation_kwargs`; `callbacks` has a `BudgetCallback`; or what TRL raises.
        TypeError: `prune` or `budget` is of another type.
    """

    def __init__(
        self,
        *args: Any,
        prune: PruneConfig | None = None,
        loss: Loss = "reverse_kl",
        budget: ResponseBudget | None = None,
        **kwargs: Any,
    ) -> None:
        checks.one_of(_NAME, "loss", loss, get_args(Loss))
        super().__init__(*args, prune=prune, budget=budget, **kwargs)
        self.loss: Loss = loss
        if loss != "divergence" and self.beta != 1:
            checks.bad_value(_NAME, "args.beta", f"be 1 when loss is {loss!r}", self.beta)
        if self.teacher_model is None:
            checks.bad_value(_NAME, "teacher_model", "be given", None)

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Tensor], num_items_in_batch: Any) -> Any:
        """Run TRL's method, which applies the models, scales, devices and images, with another loss at its end."""
        pruned = PrunedLoss(self.prune, self.loss, inputs["completion_ids"])
        method = with_loss(super()._compute_loss.__func__, pruned)
        result = method(self, unwrapped_student, inputs, num_items_in_batch)
        if pruned.scored is not None and pruned.mask is not None:
            self._scored = pruned.scored, pruned.mask
        return result
