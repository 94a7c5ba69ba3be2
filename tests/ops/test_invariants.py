"""What does not depend on how a call is put: the vocabulary's order, masks, chunks, packing, scales."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch

import cases
import comparison
from comparison import EXACT, differing
from implementations import ALONG_RESPONSES, LOGITS, LOSSES, each, every, leaf, of_one_process, quick, temperature
from operators import each_position, example, examples, of_positions

seeds = st.integers(0, 2**31)
NEAR = {"rtol": 5e-6, "atol": 5e-6, "equal_nan": True}
OF_CANDIDATES = ("topk_ids", "advantages", "old_logprobs", "teacher_topk_ids", "teacher_topk_logprobs")


def assert_near(got, expected):
    assert list(got) == list(expected)
    for name in expected:
        exactly = name in EXACT
        torch.testing.assert_close(got[name], expected[name], **({"rtol": 0, "atol": 0} if exactly else NEAR))


# --- the vocabulary --------------------------------------------------------------------------------------------------


@pytest.mark.fuzz
@each(LOGITS)
def test_permuting_the_vocabulary_and_the_candidates(op, impl):
    @examples(impl, seed=seeds, width=st.integers(20, 1500))
    def holds(seed, width):
        rng = cases.generator(seed)
        arguments = example(op, (1, 2), width, seed=seed) | {"mask": None}
        permutation, order = torch.randperm(width, generator=rng), torch.randperm(8, generator=rng)

        def renamed(name, x):
            if name.endswith("logits"):
                return x[..., permutation]
            if name.endswith("ids"):
                x = torch.where(x < 0, x, permutation.argsort()[x.clamp(min=0)])
            return x[..., order] if op in LOSSES and name in OF_CANDIDATES else x

        before = impl.run(op, **arguments)
        after = impl.run(op, **arguments | {name: renamed(name, arguments[name]) for name in of_positions(arguments)})
        for name in after:
            if name.endswith("ids"):
                after[name] = permutation[after[name]]
            if name == "gradient":
                before[name] = before[name][..., permutation]
        assert_near(after, before)


@pytest.mark.fuzz
@each(LOGITS)
def test_scaling_logits_and_temperature_together(op, impl):
    """The gradient by logits that are so many times as large is as many times smaller."""

    @examples(impl, seed=seeds, factor=st.sampled_from([0.25, 2.0, 3.0, 1024.0]))
    def holds(seed, factor):
        arguments = example(op, (1, 2), 600, seed=seed) | {temperature(op): 0.75}
        if "teacher_logits" in arguments:
            arguments["teacher_temperature"] = 1.5
        before = impl.run(op, **arguments)
        scaled = {name: x * factor for name, x in arguments.items() if name.endswith(("logits", "temperature"))}
        after = impl.run(op, **arguments | scaled)
        if "gradient" in after:
            after["gradient"] = after["gradient"] * factor
        assert_near(after, before)


# --- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.fuzz
@each()
def test_masking_is_removing(op, impl):
    @examples(impl, count=0.5, seed=seeds)
    def holds(seed):
        arguments = example(op, (1, 9), 300, seed=seed)
        mask = arguments.pop("mask")
        upstream = torch.randn(1, 9, generator=cases.generator(seed))
        masked = impl.run(op, upstream, **arguments, mask=mask)
        removed = impl.run(op, upstream[:, mask[0]], **each_position(lambda x: x[:, mask[0]], arguments))
        masked = {name: x[:, mask[0]] if x.dim() > 1 else x for name, x in masked.items()}
        assert differing(masked, removed) == []


MASKS = [
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


def masks_of(valid):
    """Of each dtype: a high bit of an integer, which less than the dtype does not hold, or a subnormal; -0.0."""
    for dtype in MASKS:
        if dtype.is_floating_point:
            integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
            yield torch.where(valid, torch.ones(valid.shape, dtype=integers).view(dtype), torch.tensor(-0.0).to(dtype))
        else:
            high = torch.where(valid, 1 << (8 * dtype.itemsize - 2), 0)
            yield (-high if dtype.is_signed else high).to(dtype)


@each()
def test_masked_positions(op, impl):
    """Nothing of them is read, whatever is in them; what comes for them is 0, and the gradient too."""
    valid = torch.arange(12).view(2, 6) % 3 != 1
    arguments = example(op, (2, 6)) | {"mask": valid}
    expected = impl.run(op, **arguments)
    for x in (arguments[name] for name in of_positions(arguments) if name != "mask"):
        x[~valid] = torch.nan if x.is_floating_point() else True if x.dtype == torch.bool else 2**31 - 1
    for mask in masks_of(valid):
        assert differing(impl.run(op, **arguments | {"mask": mask}), expected) == [], mask.dtype
    for name, x in expected.items():
        if name.endswith("topk_ids"):
            assert torch.equal(x[~valid], torch.arange(x.shape[-1]).expand(4, x.shape[-1])), name
        elif x.dim() > 1 and name != "drift_count":
            assert not x[~valid].any(), name
    assert "gradient" not in expected or expected["gradient"][valid].any(-1).all()


@pytest.mark.fuzz
@each(ALONG_RESPONSES)
def test_chunks_with_the_carry_equal_the_whole(op, impl):
    @examples(impl, seed=seeds, cut=st.integers(0, 14))
    def holds(seed, cut):
        arguments = example(op, (3, 14), 90, seed=seed) | {"w_base": 0.0}
        whole = impl.run(op, **arguments)
        first = impl.run(op, **each_position(lambda x: x[:, :cut], arguments))
        carried = {"drift_count": first["drift_count"][:, -1]} if cut else {}  # a stride that is not 1
        second = impl.run(op, **each_position(lambda x: x[:, cut:], arguments) | carried)
        joined = {name: torch.cat([first[name], second[name]], 1) for name in whole if name != "effective_length"}
        joined["effective_length"] = first["effective_length"] + second["effective_length"]
        assert differing({name: joined[name] for name in whole}, whole) == []


@each(ALONG_RESPONSES)
def test_packed_with_empty_responses(op, impl):
    """Each response is what it is alone."""
    arguments = example(op, (1, 42), 90, packed=True)
    for starts in ([0, 0, 5, 5, 5, 42, 42], [0, 1, 2, 42]):
        carried = torch.arange(len(starts) - 1).int()
        cut = {"cu_seqlens": torch.tensor(starts, dtype=torch.int32), "drift_count": carried}
        packed = impl.run(op, **arguments | cut)
        for b, (begin, end) in enumerate(pairwise(starts)):
            alone = each_position(lambda x, part=slice(begin, end): x[part][None], arguments)
            alone = impl.run(op, **alone | {"cu_seqlens": None, "drift_count": carried[b : b + 1]})
            for name, x in alone.items():
                got = packed[name][b : b + 1] if name == "effective_length" else packed[name][begin:end][None]
                assert comparison.same_bits([got], [x]), (name, b)


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.fuzz
@each(LOSSES, of_one_process)
def test_a_row_s_gradient_sums_to_0(op, impl):
    """Adding a constant to a row changes no probability; what is left of the sum is rounding."""

    @examples(impl, count=0.5, seed=seeds, divisor=st.sampled_from([0.25, 1.0, 7.0]))
    def holds(seed, divisor):
        arguments = example(op, (1, 3), 700, seed=seed) | {"mask": None, temperature(op): divisor}
        arguments.pop("old_logprobs", None)  # with which a row may be clipped as a whole
        if op == "topk_forward_kl":
            arguments["tail"] = "generalised"  # the bucket divides by what is left of the mass, a difference
        gradient = impl.run(op, **arguments)["gradient"].double()
        size = gradient.abs().sum(-1)
        assert (gradient.sum(-1).abs() <= 16 * comparison.EPS * size).all() and size.all()


@each(LOSSES)
def test_nobody_asks_for_the_gradient_of_some(op, impl):
    """Where upstream is 0, of either sign, so is the gradient; beside them it is what it was. A NaN is seen."""
    arguments, upstream = example(op, (8, 1), 200) | {"mask": None}, torch.rand(8, 1) + 0.5
    arguments.pop("old_logprobs", None)  # with which a row may be clipped as a whole
    plain = impl.run(op, upstream, **arguments)["gradient"]
    upstream[::3, 0], upstream[2] = torch.tensor([0.0, -0.0, 0.0]), torch.nan
    arguments[leaf(op)][0, 0, 5] = torch.nan
    gradient = impl.run(op, upstream, **arguments)["gradient"]
    assert not gradient[::3].any() and gradient[2].isnan().all()
    assert torch.equal(gradient[1::3], plain[1::3]) and gradient[1::3].any(-1).all()


# --- determinism -----------------------------------------------------------------------------------------------------

# A row over three blocks or programs.
SPLIT = {"cuda-emulated": (5, 33001), "cuda-ptx": (5, 33001), "triton-interpreted": (5, 70003)}


@each()
def test_same_bits_from_run_to_run_and_in_any_batch(op, impl):
    """Few rows may be split over several threads, blocks or programs, many are not."""
    many, width = SPLIT.get(repr(impl), (64, 1033))
    for dtype in [torch.bfloat16] if impl.slow else [torch.float32, torch.bfloat16]:
        arguments, upstream = example(op, (many, 1), width, k=24, dtype=dtype), torch.randn(many, 1)
        if op in LOGITS:
            arguments[leaf(op)][1, 0, width // 2] = 60.0  # a peak that is summed apart
        whole = impl.run(op, upstream, **arguments)
        assert differing(impl.run(op, upstream, **arguments), whole) == []
        for part in (slice(0, 1), slice(1, 3), slice(many // 2, many)):
            some = {n: x[part] if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
            expected = {name: x[part].contiguous() for name, x in whole.items()}
            assert differing(impl.run(op, upstream[part], **some), expected) == [], part


@each(implementations=lambda op: [one for one in quick(op) if one.name in ("cpp", "host")])
def test_same_bits_from_any_number_of_threads(op, impl, two_threads):
    """And flushing of subnormals, as fast kernels like it, ends with the call, in every thread."""
    arguments, upstream, small = example(op, (7, 11), 2000, k=24), torch.randn(7, 11), torch.full((1 << 20,), 1e-40)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(impl.run(op, upstream, **arguments))
    assert [differing(results[0], result) for result in results[1:]] == [[]] * 3
    assert torch.equal(small * 1.0, small) and (small * 0.5 > 0).all()


@pytest.mark.parametrize("op", LOGITS)
def test_flushing_subnormals_changes_no_order(op):
    """Whoever has asked torch to flush them still gets the order by value."""
    student, teacher, _ = cases.make("subnormal", (cases.F32, cases.F32))
    arguments = example(op, (2, 3), cases.V)
    arguments |= {n: x for n, x in ((leaf(op), student), ("teacher_logits", teacher)) if n in arguments}
    arguments.pop("metric", None)
    expected = every(op)[0].run(op, **arguments)
    torch.set_flush_denormal(True)
    try:
        results = [impl.run(op, **arguments) for impl in quick(op) if impl.name in ("cpp", "host")]
    finally:
        torch.set_flush_denormal(False)
    for result in results:
        assert all(torch.equal(result[name], expected[name]) for name in result if name.endswith("topk_ids"))
