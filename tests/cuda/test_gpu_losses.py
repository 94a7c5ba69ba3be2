"""What only a GPU can show of the losses: graphs, memory, sizes. The answers are in the tables of the other files."""

import loss_cases
import pytest
import torch

import comparison
import pruneopd_kernels
from implementations import LOSSES, ON_GPU, OnGpu, on_gpu

pytestmark = pytest.mark.gpu

every_loss = pytest.mark.parametrize("op", LOSSES)
every_impl = pytest.mark.parametrize("impl", [impl.name for impl in ON_GPU])


def example(op, **sizes):
    arguments = loss_cases.example(op, **sizes)
    return dict(zip(arguments, on_gpu(arguments.values()), strict=True))


def call(op, impl, student_logits, upstream=None, **arguments):
    """Outputs and gradient, all on the GPU."""
    student_logits = student_logits.detach().requires_grad_()
    result = getattr(pruneopd_kernels, op)(student_logits, impl=impl, **arguments)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    upstream = torch.ones_like(outputs[0]) if upstream is None else upstream
    (gradient,) = torch.autograd.grad(outputs[0], student_logits, upstream)
    return [*(x.detach() for x in outputs), gradient]


@every_loss
@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 40)], ids=str)
def test_full_width_within_the_budget(op, impl, dtype, shape):
    arguments = loss_cases.example(op, shape, 151936, m=16, dtype=dtype)
    student, mask = arguments.pop("student_logits"), arguments.pop("mask")
    first = [arguments.pop(name) for name in list(arguments) if name not in ("weight", "old_logprobs")]
    loss_cases.check(OnGpu(impl), op, torch.ones(shape), student, *first, mask=mask, **arguments)


@every_loss
@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_batch_around_a_row_changes_no_bit(op, impl, dtype):
    """Few rows are split over several blocks, many are not."""
    arguments = example(op, shape=(700, 1), width=151937, dtype=dtype)
    whole = call(op, impl, **arguments)
    assert comparison.same_bits(call(op, impl, **arguments), whole)
    for part in (slice(0, 1), slice(699, 700), slice(5, 7), slice(100, 117), slice(1, 65), slice(300, 600)):
        result = call(op, impl, **{name: x[part] for name, x in arguments.items()})
        assert comparison.same_bits(result, [x[part].contiguous() for x in whole]), part


@every_loss
@every_impl
@pytest.mark.parametrize("sizes", [{}, {"shape": (1, 1), "width": 151936}, {"shape": (300, 2)}], ids=str)
def test_a_graph_captures_both_passes(op, impl, sizes):
    inputs = [example(op, seed=seed, **sizes) for seed in (0, 1)]
    expected = [call(op, impl, **arguments) for arguments in inputs]
    arguments = example(op, seed=2, **sizes)
    student = arguments.pop("student_logits").requires_grad_()
    upstream = torch.ones(student.shape[:-1], device="cuda")

    def both():
        result = getattr(pruneopd_kernels, op)(student, impl=impl, **arguments)
        outputs = [result] if isinstance(result, torch.Tensor) else list(result)
        return [*outputs, *torch.autograd.grad(outputs[0], student, upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = both()
    for n in (0, 1, 1, 0):
        with torch.no_grad():
            student.copy_(inputs[n]["student_logits"])
        for name, tensor in arguments.items():
            tensor.copy_(inputs[n][name])
        graph.replay()
        torch.cuda.synchronize()
        assert comparison.same_bits([x.detach() for x in result], expected[n]), n


@every_loss
@every_impl
@pytest.mark.parametrize("rows", [1, 16, 500, 2048])
def test_memory_beyond_the_gradient(op, impl, rows):
    arguments = loss_cases.example(op, (1, 1), 64)
    width = 151936
    arguments = {
        name: x.cuda().expand(rows, *x.shape[1:]).contiguous() for name, x in arguments.items() if "logits" not in name
    }
    for name in ("student_logits", "teacher_logits") if op == "reverse_kl" else ("student_logits",):
        arguments[name] = torch.empty(rows, 1, width, dtype=torch.bfloat16, device="cuda").normal_()
    call(op, impl, **arguments)  # what is compiled and loaded once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call(op, impl, **arguments)
    peak = torch.cuda.max_memory_allocated() - before
    gradient = result[-1].numel() * result[-1].element_size()
    assert peak - gradient <= 3 * 2**20


@every_loss
@every_impl
def test_more_than_2_to_the_31_elements(op, impl):
    width, length = 151936, 14200
    assert width * length > 2**31
    arguments = loss_cases.example(op, (1, length), 64)
    arguments = {name: x.cuda() for name, x in arguments.items() if "logits" not in name}
    generator = torch.Generator("cuda").manual_seed(0)
    student = torch.empty(1, length, width, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    arguments["student_logits"] = student
    if op == "reverse_kl":
        arguments["teacher_logits"] = student.roll(1, 1)
    whole = call(op, impl, **arguments)
    for t in (0, 7077, 14134, length - 2):  # the one before the last begins beyond 2**31
        part = call(op, impl, **{name: x[:, t : t + 2] for name, x in arguments.items()})
        assert comparison.same_bits(part, [x[:, t : t + 2].contiguous() for x in whole]), t


@every_impl
def test_ids_are_never_addresses(impl):
    """They are not looked into before the launch: whatever they hold, nothing is read or written out of bounds."""
    for op, name in (("topk_policy_loss", "topk_ids"), ("topk_forward_kl", "teacher_topk_ids")):
        arguments = example(op, width=64)
        for value in (64, 2**31, 2**40, 2**63 - 1):
            arguments[name] = torch.full_like(arguments[name], value)
            loss, *_, gradient = call(op, impl, **arguments)
            valid = arguments["mask"] != 0
            assert loss[valid].isnan().all() and gradient[valid].isnan().all() and not gradient[~valid].any()
