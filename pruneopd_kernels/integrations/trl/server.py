"""`PruneServerDistillationTrainer`: TRL's trainer with a teacher on a vLLM server."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from trl.experimental.server_distillation import ServerDistillationTrainer

from ... import PruneConfig, ResponseBudget, checks, reliability_from_topk, topk_forward_kl
from .trainer import PruningTrainer

_NAME = "PruneServerDistillationTrainer"


class PruneServerDistillationTrainer(PruningTrainer, ServerDistillationTrainer):
    """TRL's `ServerDistillationTrainer` with each token's loss weighted by reliability (arXiv:2605.07804, eq. 6-12).

    The server's top-k are compared with the student's. L then multiplies TRL's own loss at each position: the forward
    KL over the server's candidates, with or without a bucket for the tail (`args.loss_add_tail`). TRL forms the
    student's full logits, and they stay in memory. `args.temperature` divides the student's logits only, because vLLM
    answers at temperature 1.

    Args:
        args: Those of `ServerDistillationTrainer`, in its order, and by name; `args.beta` is 0 and `args.loss_top_k`
            is `prune.k`.
        prune: The hyperparameters; None: the paper's, with k=16. With `w_drop=0, w_base=0` every weight is 1.
        budget: As in `PruneDistillationTrainer`.
        kwargs: Likewise those of `ServerDistillationTrainer`.

    Raises:
        ValueError: beta or loss_top_k has another value; a budget is combined with a length in
            `args.generation_kwargs`; or what TRL raises.
        TypeError: As for `PruneDistillationTrainer`.
    """

    def __init__(
        self, *args: Any, prune: PruneConfig | None = None, budget: ResponseBudget | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, prune=prune, budget=budget, **kwargs)
        if self.beta != 0:
            checks.bad_value(_NAME, "args.beta", "be 0", self.beta)
        if self.loss_top_k != self.prune.k:
            checks.bad_value(_NAME, "args.loss_top_k", f"be prune.k = {self.prune.k}", self.loss_top_k)

    def _compute_server_forward_kl_loss(
        self, teacher_result: dict[str, Tensor], student_log_probs: Tensor, labels: Tensor
    ) -> Any:
        """Compute the weights, then TRL's loss."""
        mask, ids = labels != -100, teacher_result["topk_token_ids"]
        logprobs = teacher_result["topk_logprobs"]  # -inf where the server sent fewer candidates
        options = asdict(self.prune) | {"teacher_topk_logprobs": logprobs, "token_ids": labels}
        del options["k"], options["reward_weight"]  # the ids have k candidates; there are no rewards
        with torch.no_grad():
            both = topk_forward_kl(student_log_probs, ids, logprobs, mask).student_topk_ids, ids
            scored = reliability_from_topk(*both, mask, **options)
            rejected = reliability_from_topk(*both, mask, **options | {"metric": "top_p"}).drift
        self._scored = {**scored._asdict(), "accepted": mask & ~rejected}, mask
        return super()._compute_server_forward_kl_loss(teacher_result, student_log_probs, labels)

    def _reduce_divergence_loss(self, jsd: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Reduce as TRL does, after multiplying the divergences `[B, T, k or k + 1]` by their positions' weights."""
        assert self._scored is not None
        return super()._reduce_divergence_loss(jsd * self._scored[0]["weight"].unsqueeze(-1), *args, **kwargs)
