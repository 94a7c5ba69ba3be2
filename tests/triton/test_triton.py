"""The Triton kernels without a GPU: in the interpreter against the gold, and compiled ahead for several.

The interpreter takes some 60 ms for a position, so it gets every case of the tables once, in one dtype after the other,
and the other tests with few examples. With a GPU all of them run compiled, as any implementation does.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cases
import comparison
import processes
import test_reliability
import test_reliability_from_drift
import test_reliability_from_topk
import test_token_stats
from interpreted import INTERPRETED

BF16, F16, F32 = cases.BF16, cases.F16, cases.F32
IN_TURN = [(name, cases.SAME_DTYPES[i % 3]) for i, name in enumerate(cases.CASES)]
MIXED = [("ties", (F32, BF16)), ("minus_inf_some", (F16, F32)), ("wider_teacher", (BF16, F16))]
SUBNORMAL = [("subnormal", (F32, F32)), ("subnormal", (F16, F16)), ("subnormal_bf16", (BF16, BF16))]


@pytest.mark.parametrize(("name", "dtypes"), dict.fromkeys([*IN_TURN, *MIXED, *SUBNORMAL]), ids=cases.case_id)
def test_table_of_token_stats(name, dtypes):
    test_token_stats.test_table(INTERPRETED, name, dtypes)


FEWER = [
    (name, dtypes, *test_reliability.VARIANTS[i % len(test_reliability.VARIANTS)])
    for i, (name, dtypes) in enumerate([*IN_TURN, *MIXED])
    if not name.startswith("width_")
]


@pytest.mark.parametrize(("name", "dtypes", "metric", "reward_weight"), FEWER, ids=cases.case_id)
def test_table_of_reliability(name, dtypes, metric, reward_weight):
    test_reliability.test_table(INTERPRETED, name, dtypes, metric, reward_weight)


@pytest.mark.parametrize(("dtype", "k"), [(torch.bfloat16, 16), (torch.float32, 256)], ids=str)
def test_full_width(dtype, k):
    test_token_stats.test_full_width(INTERPRETED, dtype, k)


OTHERS = [
    (test_token_stats.test_what_is_left_beside_a_peak_is_not_rounded_away, {"offset": -450.0}),
    (test_token_stats.test_what_is_left_beside_a_peak_is_not_rounded_away, {"offset": 30.0}),
    (test_token_stats.test_masked_positions, {}),
    (test_token_stats.test_token_ids_that_are_not_tokens, {}),
    (test_reliability.test_drift_by_acceptance, {"dtype": torch.bfloat16}),
    (test_reliability.test_token_ids_are_read_where_valid_only, {}),
    (test_reliability.test_rewards_where_the_weight_is_zero, {}),
    (test_reliability.test_no_mass_to_renormalise, {}),
    (test_reliability.test_mass_that_underflows_is_renormalised, {}),
    (test_reliability.test_with_everything, {"metric": "overlap"}),
    (test_reliability.test_with_everything, {"metric": "top_p"}),
    (test_reliability.test_packed_equals_padded, {"metric": "top_p"}),
    (test_reliability.test_short_and_single_responses, {"shape": (5, 1)}),
    (test_reliability.test_empty, {"shape": (3, 0, 40)}),
    (test_reliability.test_empty, {"shape": (0, 5, 40)}),
    (test_reliability.test_empty, {"shape": (0, 40)}),
    (test_reliability.test_a_column_of_logits_needs_no_stride, {}),
    (test_reliability_from_topk.test_against_gold, {}),
    (test_reliability_from_topk.test_int32_and_int64_ids_mix, {}),
    (test_reliability_from_topk.test_overlap_counts_student_slots, {}),
    (test_reliability_from_topk.test_nucleus, {}),
    (test_reliability_from_topk.test_nucleus_reaches_its_bound_with_room_for_rounding, {}),
    (test_reliability_from_topk.test_packed_with_empty_responses, {}),
    (test_reliability_from_topk.test_empty, {"shape": (3, 0, 4)}),
    (test_reliability_from_topk.test_empty, {"shape": (0, 4)}),
    (test_reliability_from_topk.test_strides, {}),
    (test_reliability_from_drift.test_against_gold, {}),
    (test_reliability_from_drift.test_chunks_with_the_carry_equal_the_whole, {}),
    (test_reliability_from_drift.test_packed_equals_padded, {}),
    (test_reliability_from_drift.test_every_count_up_to_many_is_rounded_as_defined, {"w_drop": 1 / 49}),
    (test_reliability_from_drift.test_effective_length_counts_the_unrounded_reliability, {}),
    (test_reliability_from_drift.test_extreme_scalars, {}),
    (test_reliability_from_drift.test_large_counts_carried_in, {}),
    *((test_reliability_from_drift.test_mask_dtypes, {"dtype": x}) for x in test_reliability_from_drift.MASKS.values()),
    (test_reliability_from_drift.test_mask_values_that_are_not_one, {}),
    (test_reliability_from_drift.test_strides, {}),
    (test_reliability_from_drift.test_empty_padded, {"shape": (3, 0)}),
    (test_reliability_from_drift.test_empty_packed, {"batch": 0}),
]


@pytest.mark.parametrize(("test", "arguments"), OTHERS, ids=lambda value: getattr(value, "__name__", None))
def test_as_every_implementation(test, arguments):
    test(INTERPRETED, **arguments)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_strides_and_leading_axes():
    """Three axes that no two can stand for, rows that begin anywhere, other tensors with any strides."""
    student, teacher = (cases.randn(3, 2, 2, 77, seed=seed)[..., 3:-4] for seed in (1, 2))
    student = student.transpose(0, 1).contiguous().transpose(0, 1)
    mask, token_ids = torch.rand(2, 2, 3).permute(2, 0, 1) < 0.7, torch.randint(70, (2, 3, 2)).transpose(0, 1)
    result = INTERPRETED.token_stats(student, teacher, mask, token_ids=token_ids, k=5)
    flat = [x.reshape(12, *x.shape[3:]).contiguous() for x in (student, teacher, mask, token_ids)]
    plain = INTERPRETED.token_stats(*flat[:3], token_ids=flat[3], k=5)
    assert comparison.differing(result, plain._make(x.view(3, 2, 2, *x.shape[1:]) for x in plain)) == []
    two_axes = (x.flatten(1, 2)[:, ::3] for x in (student.contiguous(), teacher))
    padded = INTERPRETED.reliability(*two_axes, mask.reshape(3, 4)[:, ::3], k=5)
    assert torch.equal(padded.topk_ids, plain.student_topk_ids.view(3, 4, 5)[:, ::3])


# --- one position a program, or one segment of it --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_same_bits_whether_rows_are_split_or_not(dtype):
    """Three segments, the last one partial; of many positions each has a program, a single one is split."""
    student, teacher = (cases.randn(1, 5, 70003, seed=seed).to(dtype) for seed in (3, 4))
    student[0, 1, 40000] = 60.0  # a peak that is summed apart
    teacher[0, 1, 3], teacher[0, 3, 69999] = 50.0, float("nan")
    for op in ("token_stats", "reliability"):
        whole = getattr(INTERPRETED, op)(student, teacher)
        assert comparison.differing(whole, getattr(INTERPRETED, op)(student, teacher)) == []
        for n in (1, 3):
            alone = getattr(INTERPRETED, op)(student[:, n : n + 1], teacher[:, n : n + 1])
            expected = [x[:, n : n + 1] if x.dim() > 1 else None for x in whole]
            names = {"drift_count", "reliability", "weight", "effective_length", "rewards"}  # depend on what is before
            for name, got, want in zip(whole._fields, alone, expected, strict=True):
                assert name in names or comparison.same_bits([got], [want]), name


# --- memory ----------------------------------------------------------------------------------------------------------


def test_strides_beyond_32_bits(tmp_path):
    out = processes.run(
        code=f"""
        import interpreted
        kernels = interpreted.InThisProcess()
        import torch
        far = 2**31 + 4096
        def far_apart(x, name):
            size = far + 2 * x[0].numel()
            memory = torch.from_file({str(tmp_path)!r} + "/" + name, shared=True, size=size, dtype=x.dtype)
            return memory.as_strided(x.shape, (far, *x.stride()[1:])).copy_(x)
        student, teacher = (torch.randn(2, 2, 600).half() for _ in range(2))
        mask, token_ids = torch.tensor([[1, 0], [1, 1]], dtype=torch.int8), torch.randint(600, (2, 2))
        plain = kernels.token_stats(student, teacher, mask, token_ids=token_ids)
        logits = far_apart(student, "s"), far_apart(teacher, "t")
        result = kernels.token_stats(*logits, far_apart(mask, "m"), token_ids=far_apart(token_ids, "i"))
        print([torch.equal(x, y) for x, y in zip(plain, result, strict=True)])
    """
    )
    assert eval(out) == [True] * 15


def test_nothing_else_is_read():
    """Beside the rows, beyond vocab_size and at masked positions lie pages that must not be touched."""
    out = processes.run(
        code="""
        import interpreted
        kernels = interpreted.InThisProcess()
        import faulthandler; faulthandler.enable()
        import guarded_reads, torch
        guarded_reads.COMPILED = [kernels]
        guarded_reads.call_losses = lambda *args, **kwargs: None  # which test_triton_losses.py has a test of
        for width, dtype in [(7, torch.float32), (513, torch.bfloat16), (4096, torch.float16)]:
            for at_end in (True, False):
                rows = [guarded_reads.between_guards(torch.randn(1, 2, width).to(dtype), at_end) for _ in range(2)]
                guarded_reads.call_all(*rows, k=min(16, width))
        nan = guarded_reads.between_guards(torch.full((1, 2, 1037), torch.nan), True)
        guarded_reads.call_all(nan, nan, k=16)
        guarded_reads.beyond_vocab_size()
        guarded_reads.masked_positions()
        print("nothing")
    """
    )
    assert out == "nothing\n"


# --- compiled ahead --------------------------------------------------------------------------------------------------


def compiled_ahead(target):
    script = Path(__file__).with_name("triton_ahead.py")
    done = subprocess.run([sys.executable, str(script), target], capture_output=True, text=True,
                          env=processes.environment(), timeout=1200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
# What a thread loads of a block of one row or of two, and what it stores of a gradient.
LOADS = {(2, 2): {"LDG.E.128": 8}, (4, 4): {"LDG.E.128": 16}, (2, 4): {"LDG.E.64": 8, "LDG.E.128": 8}}
LOADS |= {(2,): {"LDG.E.128": 4}, (4,): {"LDG.E.128": 8}}
STORES = {(2,): {"STG.E.128": 4}, (4,): {"STG.E.128": 8}, (2, 2): {"STG.E.128": 4}, (4, 4): {"STG.E.128": 8}}
STORES |= {(2, 4): {"STG.E.64": 8}}
# Instructions for an element of a row, or of a pair of rows.
INSTRUCTIONS = {"reliability": 13.5, "token_stats": 18, "reverse_kl": 15.5, "topk_policy_loss": 7, "topk_forward_kl": 7}
INSTRUCTIONS |= {"logprobs_backward": 7, "reverse_kl_backward": 18}
# Values that wait outside of the loop, for the registers are just enough.
SPILLS = {("token_stats_kernel", "fused"): 20, ("forward_kernel", "fused"): 30}


@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_compiles_without_spills_and_loads_16_bytes_at_a_time(target):
    """In its loop a thread takes 32 elements of either row, with one ex2 each and one for each row's reference.

    A backward pass needs an exponential of the student's only, and its references are known.
    """
    kernels = compiled_ahead(target)
    assert {kernel["pass"] for kernel in kernels} == {None, "fused", "merge", "exact"}
    for kernel in kernels:
        allowed = SPILLS.get((kernel["kernel"], kernel["pass"]), 0)
        assert kernel["loop_spills"] == 0 and kernel["spills"] <= allowed, kernel
        widths = tuple(sorted(WIDTH[dtype] for dtype in kernel["dtypes"]))
        is_backward = kernel["op"].endswith("_backward")
        if kernel["kernel"].startswith("segments") or kernel["pass"] == "fused" or is_backward:
            assert kernel["loop_ex2"] == (32 if is_backward else 33 * len(widths)), kernel
            assert kernel["loop_loads"] == LOADS[widths], kernel
            assert kernel["loop"] / 32 < INSTRUCTIONS[kernel["op"]], kernel
        if is_backward:
            assert kernel["loop_stores"] == STORES[widths], kernel


def test_compiles_for_amd():
    kernels = compiled_ahead("gfx942")
    assert {kernel["pass"] for kernel in kernels} == {None, "fused", "merge", "exact"}
