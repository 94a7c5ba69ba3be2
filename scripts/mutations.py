"""The mutations that scripts/mutate.py applies: small mistakes, each of which the tests must notice.

A mutation replaces a text that its file has exactly once. One that no longer applies is an error: anchor it again, or
put another in its place.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """`old` in `file` becomes `new`."""

    file: str
    old: str
    new: str


MATH = "csrc/math"
PYTHON = "pruneopd_kernels"
MUTATIONS = [
    # Formulas in C++, of the CPU and of CUDA
    Mutation(f"{MATH}/drift.h", "student_size > teacher_size", "student_size < teacher_size"),
    Mutation(f"{MATH}/drift.h", "top_p - 1e-6 : INFINITY", "top_p + 1e-6 : INFINITY"),
    Mutation(f"{MATH}/drift.h", "bound(top_p < 1 ? top_p - 1e-6 : INFINITY)", "bound(top_p - 1e-6)"),
    Mutation(f"{MATH}/drift.h", "return accepted && !broken;", "return accepted;"),
    Mutation(f"{MATH}/scan.h", "return left > 0 ? left : 0.0;", "return left;"),
    Mutation(f"{MATH}/scan.h", "return reliability > eps;", "return reliability >= eps;"),
    Mutation(f"{MATH}/scan.h", "return reliability + w_base;", "return reliability;"),
    Mutation(f"{MATH}/scan.h", "drift_count > INT32_MAX ? INT32_MAX : static_cast<", "static_cast<"),
    Mutation(f"{MATH}/reward.h", "== teacher_logprob || student_logprob == -inf)", "== teacher_logprob)"),
    Mutation(f"{MATH}/reward.h", "return weight == 0 ? 0 : static_cast<float>", "return static_cast<float>"),
    Mutation(f"{MATH}/order.h", "if (bits == 0x80000000u) bits = 0;", ""),
    Mutation(f"{MATH}/softmax.h", "- p.log2_mass() + q.log2_mass());", "- p.log2_mass());"),
    Mutation(f"{MATH}/softmax.h", "shift = (reference - logit) / temperature;", "shift = reference - logit;"),
    # The CPU
    Mutation("csrc/cpu/row_pass.cpp", "rest == 0) return true;\n  const Padded<T,",
             "rest >= 0) return true;\n  const Padded<T,"),
    Mutation("csrc/cpu/row_pass.cpp", "      mass[i] *= factor;\n", ""),
    Mutation("csrc/cpu/candidates.h", "kept += candidate >= least;", "kept += candidate > least;"),
    Mutation("csrc/cpu/responses.h", "effective += valid[i] & is_effective(", "effective += is_effective("),
    Mutation("csrc/cpu/reliability.cpp", "reward_of(p[j], q[j], std::exp(", "reward_of(q[j], p[j], std::exp("),
    Mutation("csrc/cpu/reliability.cpp", "overlap < args.drift_rule.threshold", "overlap <= args.drift_rule.threshold"),
    # CUDA
    Mutation("csrc/cuda/scan.cuh", "[parity][warp] = drifts;\n    __syncthreads();", "[parity][warp] = drifts;"),
    Mutation("csrc/cuda/scan.cuh", "__popc(ballot & here_included)", "__popc(ballot)"),
    Mutation("csrc/cuda/selection.cuh", "? k - above : count", "? k - above - 1 : count"),
    # In the assembly that only nvcc compiles
    Mutation("csrc/cuda/ptx.cuh", '"cvt.rn.bf16x2.f32 %0, %1, %2;"', '"cvt.rn.bf16x2.f32 %0, %2, %1;"'),
    Mutation("csrc/cuda/ptx.cuh", '"max.NaN.f16x2 %0, %1, %2;"', '"min.NaN.f16x2 %0, %1, %2;"'),
    # Triton
    Mutation(f"{PYTHON}/triton/scan.py", "(left > eps)", "(left >= eps)"),
    Mutation(f"{PYTHON}/triton/scan.py", "tl.where(factor == 0, 0.0, reward)", "reward"),
    Mutation(f"{PYTHON}/triton/selection.py", "(n_equal <= room)", "(n_equal < room)"),
    # Formulas in Python
    Mutation(f"{PYTHON}/formulas.py", "MASS_TOLERANCE = 1e-6", "MASS_TOLERANCE = 0.0"),
    Mutation(f"{PYTHON}/formulas.py", "p * rows.logprobs.masked_fill(p == 0, 0.0)", "p * rows.logprobs"),
    Mutation(f"{PYTHON}/formulas.py", "1 - a.clip_low, 1 + a.clip_high", "1 - a.clip_high, 1 + a.clip_low"),
    Mutation(f"{PYTHON}/formulas.py", "torch.where(advantages < 0, -advantages * a.clip_dual, torch.inf)",
             "-advantages * a.clip_dual"),
    Mutation(f"{PYTHON}/formulas.py", "by_ratio = ~(unclipped < clipped)", "by_ratio = unclipped > clipped"),
    Mutation(f"{PYTHON}/formulas.py", "derivatives = slope[..., None] * p - q", "derivatives = -q"),
    Mutation(f"{PYTHON}/formulas.py", "return mask.abs().view(integers) != 0", "return mask != 0"),
    Mutation(f"{PYTHON}/ops/row_stats.py", "torch.where(gradient == 0, 0.0, gradient * coefficients)",
             "gradient * coefficients"),
    Mutation(f"{PYTHON}/ops/selected_logprobs.py", " | (a.logprobs == -torch.inf)", ""),
    Mutation(f"{PYTHON}/ops/opd_loss.py", "(-a.rewards).masked_fill(", "a.rewards.masked_fill("),
    # Everything around the operators
    Mutation(f"{PYTHON}/config.py", "threshold: float = 0.7", "threshold: float = 0.75"),
    Mutation(f"{PYTHON}/ops/topk_policy_loss.py", "clip_high: float = 0.2", "clip_high: float = 0.28"),
    Mutation(f"{PYTHON}/budget.py", "hits / total >= self.hit_ratio", "hits / total > self.hit_ratio"),
    Mutation(f"{PYTHON}/budget.py", "boundary = self.length - self.margin", "boundary = self.length"),
    Mutation(f"{PYTHON}/rewards.py", "taken_t = taken_t & ~found_in(slots_t, slots_s)", "taken_t = taken_t"),
    Mutation(f"{PYTHON}/parallel/_rows.py", "(entropies - self.log_shares)", "entropies"),
    Mutation(f"{PYTHON}/parallel/_rows.py", "clamp(min=0.0).masked_fill(p.", "masked_fill(p."),
    Mutation(f"{PYTHON}/parallel/_passes.py", "dist.all_reduce(hidden_gradient, group=self.slices.group)", "pass"),
    Mutation(f"{PYTHON}/parallel/_slice.py", "pad(topk_ids + slices.offset, ", "pad(topk_ids, "),
    Mutation(f"{PYTHON}/linear/_positions.py", "clamp(start, stop) - start)", "clamp(start, stop))"),
    Mutation(f"{PYTHON}/linear/linear_opd_loss.py", 'weighted(scale, fields["loss"])', 'scale * fields["loss"]'),
    Mutation(f"{PYTHON}/linear/_products.py", "dtype=sum_dtype(x.dtype)", "dtype=x.dtype"),
]  # fmt: skip
