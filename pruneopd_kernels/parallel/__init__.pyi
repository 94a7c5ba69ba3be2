# Written by scripts/stubs.py from the declarations in pruneopd_kernels/ops.
# fmt: off
from torch import Tensor
from torch.distributed import ProcessGroup

from ..checks import Metric, PolicyLoss, RewardWeight, Tail
from ..linear.linear_opd_loss import LinearOpdLoss, Loss, Reduction
from ..ops import OpdLoss, Reliability, SelectedLogprobs, TokenStats, TopkForwardKl
from ..ops._operator import Impl

def reliability(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = ..., *, token_ids: Tensor | None = ...,
    cu_seqlens: Tensor | None = ..., drift_count: Tensor | None = ..., k: int = ..., threshold: float = ...,
    w_drop: float = ..., w_base: float = ..., eps: float = ..., metric: Metric = ..., top_p: float = ...,
    reward_weight: RewardWeight = ..., student_temperature: float = ..., teacher_temperature: float = ...,
    vocab_size: int | None = ..., impl: Impl = ..., group: ProcessGroup | None = ...,
) -> Reliability: ...
def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = ..., *, weight: Tensor | None = ...,
    student_temperature: float = ..., teacher_temperature: float = ..., vocab_size: int | None = ...,
    impl: Impl = ..., group: ProcessGroup | None = ...,
) -> Tensor: ...
def opd_loss(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = ..., *, token_ids: Tensor | None = ...,
    weight: Tensor | None = ..., cu_seqlens: Tensor | None = ..., drift_count: Tensor | None = ...,
    loss: PolicyLoss = ..., entropies: bool = ..., k: int = ..., threshold: float = ..., w_drop: float = ...,
    w_base: float = ..., eps: float = ..., metric: Metric = ..., top_p: float = ...,
    reward_weight: RewardWeight = ..., student_temperature: float = ..., teacher_temperature: float = ...,
    vocab_size: int | None = ..., impl: Impl = ..., group: ProcessGroup | None = ...,
) -> OpdLoss: ...
def selected_logprobs(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None = ..., *, temperature: float = ...,
    vocab_size: int | None = ..., impl: Impl = ..., group: ProcessGroup | None = ...,
) -> SelectedLogprobs: ...
def token_stats(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = ..., *, token_ids: Tensor | None = ...,
    k: int = ..., student_temperature: float = ..., teacher_temperature: float = ..., vocab_size: int | None = ...,
    impl: Impl = ..., group: ProcessGroup | None = ...,
) -> TokenStats: ...
def topk_forward_kl(
    student_logits: Tensor, teacher_topk_ids: Tensor, teacher_topk_logprobs: Tensor, mask: Tensor | None = ..., *,
    tail: Tail = ..., logprob_min: float | None = ..., student_temperature: float = ...,
    vocab_size: int | None = ..., impl: Impl = ..., group: ProcessGroup | None = ...,
) -> TopkForwardKl: ...
def topk_policy_loss(
    student_logits: Tensor, topk_ids: Tensor, advantages: Tensor, mask: Tensor | None = ..., *,
    old_logprobs: Tensor | None = ..., clip_low: float = ..., clip_high: float = ..., clip_dual: float = ...,
    student_temperature: float = ..., vocab_size: int | None = ..., impl: Impl = ...,
    group: ProcessGroup | None = ...,
) -> Tensor: ...
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
    vocab_size: int | None = ..., impl: Impl = ..., group: ProcessGroup | None = ...,
) -> LinearOpdLoss: ...
