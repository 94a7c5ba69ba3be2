# Written by scripts/stubs.py from the declarations in pruneopd_kernels/ops.
# fmt: off
from torch import Tensor

from ..checks import Metric, RewardWeight, Tail
from ..ops import Reliability, SelectedLogprobs, TokenStats
from ..ops._operator import Impl
from .linear_opd_loss import LinearOpdLoss as LinearOpdLoss
from .linear_opd_loss import Loss, Reduction

def linear_opd_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | None = ...,
    teacher_weight: Tensor | None = ..., mask: Tensor | None = ..., *, student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ..., student_softcap: float | None = ..., teacher_softcap: float | None = ...,
    teacher_topk_ids: Tensor | None = ..., teacher_topk_logprobs: Tensor | None = ..., chunk_size: int | None = ...,
    loss: Loss = ..., reduction: Reduction = ..., scale: Tensor | None = ..., weight: Tensor | None = ...,
    tail: Tail = ..., skip_exhausted: bool = ..., token_ids: Tensor | None = ..., cu_seqlens: Tensor | None = ...,
    drift_count: Tensor | None = ..., k: int = ..., threshold: float = ..., w_drop: float = ...,
    w_base: float = ..., eps: float = ..., metric: Metric = ..., top_p: float = ...,
    reward_weight: RewardWeight = ..., student_temperature: float = ..., teacher_temperature: float = ...,
    vocab_size: int | None = ..., impl: Impl = ...,
) -> LinearOpdLoss: ...
def linear_reliability(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    mask: Tensor | None = ..., *, student_bias: Tensor | None = ..., teacher_bias: Tensor | None = ...,
    student_softcap: float | None = ..., teacher_softcap: float | None = ..., chunk_size: int | None = ...,
    token_ids: Tensor | None = ..., cu_seqlens: Tensor | None = ..., drift_count: Tensor | None = ..., k: int = ...,
    threshold: float = ..., w_drop: float = ..., w_base: float = ..., eps: float = ..., metric: Metric = ...,
    top_p: float = ..., reward_weight: RewardWeight = ..., student_temperature: float = ...,
    teacher_temperature: float = ..., vocab_size: int | None = ..., impl: Impl = ...,
) -> Reliability: ...
def linear_selected_logprobs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor | None = ..., *, bias: Tensor | None = ...,
    softcap: float | None = ..., chunk_size: int | None = ..., temperature: float = ...,
    vocab_size: int | None = ..., impl: Impl = ...,
) -> SelectedLogprobs: ...
def linear_token_stats(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    mask: Tensor | None = ..., *, student_bias: Tensor | None = ..., teacher_bias: Tensor | None = ...,
    student_softcap: float | None = ..., teacher_softcap: float | None = ..., chunk_size: int | None = ...,
    token_ids: Tensor | None = ..., k: int = ..., student_temperature: float = ...,
    teacher_temperature: float = ..., vocab_size: int | None = ..., impl: Impl = ...,
) -> TokenStats: ...
