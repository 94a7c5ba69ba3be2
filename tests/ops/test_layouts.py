"""Tensors that lie anywhere in memory: axes, strides, empty ones, offsets beyond 32 bits."""

import itertools

import torch

from comparison import differing, same_bits
from implementations import (
    ALONG_RESPONSES,
    COMPILED,
    HOST,
    LOGITS,
    LOSSES,
    REFERENCE,
    each,
    every,
    leaf,
    named,
    of_one_process,
)
from operators import SLOWEST, each_position, example, of_positions

NOT_ALONG = [op for op in LOGITS if op not in ALONG_RESPONSES]


@each(NOT_ALONG, of_one_process)
def test_any_leading_axes(op, impl):
    arguments, upstream = example(op, (2, 3, 4), 40), torch.randn(2, 3, 4)
    arguments["mask"][1, 2, 3] = True
    whole = impl.run(op, upstream, **arguments)
    assert all(x.shape[:3] == (2, 3, 4) for x in whole.values())
    flat = impl.run(op, upstream.flatten(), **each_position(lambda x: x.flatten(0, 2), arguments))
    assert differing({name: x.unflatten(0, (2, 3, 4)) for name, x in flat.items()}, whole) == []
    one = impl.run(op, upstream[1, 2, 3], **each_position(lambda x: x[1, 2, 3], arguments))
    assert differing(one, {name: x[1, 2, 3] for name, x in whole.items()}) == []


def among_others(x):
    """In larger memory, at an odd offset, without the last of more positions, the first axis innermost of two."""
    wide = torch.full((x.shape[1] + 1, x.shape[0], *(x.shape[2:-1] if x.ndim > 2 else ()), x.shape[-1] + 9), -7)
    wide = wide.to(x.dtype) if x.ndim > 2 else torch.full((x.shape[1] + 1, x.shape[0], 3), -7).to(x.dtype)
    view = wide[:-1, :, 1 : x.shape[-1] + 1] if x.ndim > 2 else wide[:-1, :, 1]
    return view.transpose(0, 1).copy_(x)


def spread(x):
    """With a gap after each element."""
    return x[..., None].repeat_interleave(2, -1)[..., 1]


@each()
def test_strides(op, impl):
    """Rows at any address and of any distance, axes in another order, gaps: the bits of contiguous tensors."""
    for dtype in [torch.float16] if impl.slow else [torch.float32, torch.bfloat16, torch.float16]:
        arguments, upstream = example(op, (3, 5), 600, dtype=dtype), torch.randn(3, 5)
        expected = impl.run(op, upstream, **arguments)
        strided = each_position(among_others, arguments)
        assert not any(strided[name].is_contiguous() for name in of_positions(strided))
        assert differing(impl.run(op, among_others(upstream), **strided), expected) == []
        apart = {n: spread(x) for n, x in arguments.items() if isinstance(x, torch.Tensor) and "logits" not in n}
        assert differing(impl.run(op, spread(upstream), **arguments | apart), expected) == []
        gradient = expected.get("gradient", torch.zeros(1, dtype=dtype))
        assert gradient.dtype == dtype and all(x.is_contiguous() for x in expected.values())


@each()
def test_all_positions_are_one_in_memory(op, impl):
    """And an upstream of one number with strides of 0, as sum() and mean() hand it back."""
    arguments = example(op, (2, 3), 700, seed=3) | {"mask": torch.ones(2, 3)}
    expanded = each_position(lambda x: x[:1, :1].expand_as(x), arguments)
    copied = each_position(torch.Tensor.contiguous, expanded)
    one = torch.tensor(0.5).expand(2, 3)
    assert differing(impl.run(op, one, **expanded), impl.run(op, one.contiguous(), **copied)) == []


@each(LOGITS)
def test_a_vocabulary_of_one(op, impl):
    """Its only token is certain; the stride of an axis of size 1 means nothing."""
    arguments = example(op, (2, 3), 1, k=1)
    for name in [name for name in arguments if name.endswith("logits")]:
        arguments[name] = arguments[name].repeat(1, 1, 8)[..., ::8]
    result = impl.run(op, **arguments)
    assert all(x.isfinite().all() for x in result.values() if op in LOSSES)
    assert result.get("gradient", torch.zeros(1)).abs().max() < 1e-15


@each(implementations=lambda op: every(op)[1:])
def test_empty_and_small(op, impl):
    """The shapes and dtypes of the reference."""
    shapes = [(0, 6), (2, 0), (1, 1), (5, 1), *([] if op in ALONG_RESPONSES else [(0,), ()])]
    for shape, packed in itertools.product(shapes, {False, op in ALONG_RESPONSES}):
        arguments = example(op, shape, packed=packed)
        result, expected = impl.run(op, **arguments), REFERENCE.run(op, **arguments)
        assert [(x.shape, x.dtype) for x in result.values()] == [(x.shape, x.dtype) for x in expected.values()], shape


@each()
def test_outputs_are_new_and_inputs_are_left_as_they_are(op, impl):
    arguments = example(op)
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    copies, given = [x.clone() for x in tensors], {x.data_ptr() for x in tensors}
    result = impl.run(op, **arguments)
    assert same_bits(tensors, copies) and not given & {x.data_ptr() for x in result.values()}


# --- offsets beyond 32 bits ------------------------------------------------------------------------------------------

FAR = 2**31 + 4096


def untouched(path, elements, dtype):
    """A tensor on a sparse file: room for `elements` that costs what is written."""
    return torch.from_file(str(path), shared=True, size=elements, dtype=dtype)


def far_apart(x, path):
    """The same values, with 2**31 elements between the parts of the first axis."""
    storage = untouched(path, FAR + 2 * x[0].numel(), x.dtype)
    return storage.as_strided(x.shape, (FAR, *x.stride()[1:])).copy_(x)


def in_this_process(op):
    return [impl for impl in every(op) if impl not in SLOWEST]  # whose pickles have all of the memory


@each(implementations=in_this_process)
def test_strides_beyond_32_bits(op, impl, tmp_path):
    """Two responses lie 2**31 elements apart, in every tensor, and so do the gradients that come back."""
    arguments, upstream = example(op, (2, 3), 600, dtype=torch.float16), torch.randn(2, 3)
    arguments["mask"] = arguments["mask"].to(torch.int8)
    expected = impl.run(op, upstream, **arguments)
    far = {name: far_apart(arguments[name], tmp_path / name) for name in of_positions(arguments)}
    assert differing(impl.run(op, far_apart(upstream, tmp_path / "upstream"), **arguments | far), expected) == []


@each(LOGITS, lambda op: [*COMPILED, *([] if op in LOSSES else [HOST])])
def test_logits_of_more_than_2_to_the_31_elements(op, impl, tmp_path):
    """Only the valid positions are read, so only they take memory; a gradient would take all of it."""
    width, length, positions = 151936, 14200, torch.tensor([0, 7100, 14199])
    assert width * length > 2**31
    part = example(op, (1, 3), width, 4, dtype=torch.float16) | {"mask": torch.ones(1, 3, dtype=torch.bool)}
    logits = untouched(tmp_path / "logits", width * length, torch.float16).view(1, length, width)
    for n, t in enumerate(positions):
        logits[0, t] = part[leaf(op)][0, n]
    if "teacher_logits" in part:
        part["teacher_logits"] = part["student_logits"]  # the same memory
    spread = {name: logits if "logits" in name else part[name].new_zeros((1, length, *part[name].shape[2:]))
              .index_copy(1, positions, part[name]) for name in of_positions(part)}  # fmt: skip
    with torch.no_grad():
        result, expected = (named(impl.call(op, **part | x)) for x in (spread, {}))
    assert differing({name: x[:, positions] if x.dim() > 1 else x for name, x in result.items()}, expected) == []
