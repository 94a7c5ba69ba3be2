"""`linear_opd_loss`: what a pass computes, keeps and refuses, and how it goes with the rest of torch."""

import json
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hidden_states import LOSSES, OF_SERVERS, REDUCTIONS, STUDENT, H, V, at_once, from_server, problem, with_gradients
from processes import TESTS, run
from pruneopd_kernels import linear_opd_loss, linear_reliability, linear_selected_logprobs, reference
from pruneopd_kernels.linear._products import Head, head_of
from reads import counted
from test_linear import EXHAUSTING, OPTIONS, check_gradients, each_loss, each_pass
from tiers import combinations

each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


# --- products ---------------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts, of every matrix product, how many positions take part in it."""

    def __init__(self):
        super().__init__()
        self.logits, self.hidden_gradient, self.weight_gradient = 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            rows, inner, columns = left.shape[0], left.shape[1], right.shape[1]
            assert inner == right.shape[0]
            if V not in (rows, inner):
                assert columns == V
                self.logits += rows
            elif inner == V:
                self.hidden_gradient += rows
            else:
                self.weight_gradient += inner
        return function(*args, **(kwargs or {}))

    @property
    def counts(self):
        return self.logits, self.hidden_gradient, self.weight_gradient


def products(given, wanted=STUDENT, **options):
    """Of the forward and of the backward pass."""
    wanting, _ = given.wanting(*wanted)
    with Products() as forward:
        loss = linear_opd_loss(**wanting.arguments(**options)).loss.sum()
    with Products() as backward:
        if wanted:
            loss.backward()
    return forward.counts, backward.counts


@pytest.mark.parametrize(("loss", "chunk_size", "mask"), combinations(LOSSES, [1, 4, 100], ["holes", "none"]))
def test_products_are_those_that_each_reduction_needs(loss, chunk_size, mask):
    given = problem(mask=mask, bias=False)
    n = 21 if mask == "none" else int(given.mask.sum())
    options = {"loss": loss, "chunk_size": chunk_size}
    assert n == 21 or 0 < n < 21
    again = 2 * n if loss == "reverse_kl" else n  # the others have in a few floats what they need of the teacher
    for wanted in (STUDENT[:2], STUDENT[:1], STUDENT[1:2]):
        formed = tuple(n if name in wanted else 0 for name in STUDENT[:2])
        assert products(given, wanted, reduction="sum", **options) == ((2 * n, *formed), (0, 0, 0))
        assert products(given, wanted, reduction="none", **options) == ((2 * n, 0, 0), (again, *formed))
    for reduction in REDUCTIONS:
        assert products(given, (), reduction=reduction, **options) == ((2 * n, 0, 0), (0, 0, 0))
        with torch.no_grad(), Products() as without:
            linear_opd_loss(**given.wanting(*STUDENT[:2])[0].arguments(reduction=reduction, **options))
        assert without.counts == (2 * n, 0, 0)


@pytest.mark.parametrize(("reduction", "forward", "backward"), [
    ("sum", (21, 21, 21), (0, 0, 0)), ("none", (21, 0, 0), (21, 21, 21))
])  # fmt: skip
def test_products_that_are_saved(reduction, forward, backward):
    """A server saves the teacher's; a response that comes exhausted has none."""
    given, sent = from_server(problem(mask="none", bias=False))
    assert products(given, STUDENT[:2], reduction=reduction, loss=OF_SERVERS, **sent) == (forward, backward)
    options = {"skip_exhausted": True, "drift_count": torch.tensor([9, 2, 9], dtype=torch.int32), **EXHAUSTING}
    whole = problem(mask="none", bias=False)
    assert products(whole, STUDENT[:2], reduction=reduction, **options) == ((0, 0, 0), (0, 0, 0))


@pytest.mark.parametrize(("loss", "chunk_size"), combinations(LOSSES, [1, 3, 40]))
def test_exhausted_responses_cost_no_product_in_later_chunks(loss, chunk_size):
    """What is computed is what lies before the end of the chunk in which a response turns out to be exhausted."""
    given = problem(mask="none", bias=False, t=12)
    reliability = reference.reliability(*given.logits(), k=OPTIONS["k"], **EXHAUSTING).reliability
    counted = [int((row > 0).sum()) + 1 for row in reliability]
    assert all(count < 12 for count in counted)
    computed, at = 0, 0
    while at < 36:
        computed += min(chunk_size, 36 - at)
        at = min(at + chunk_size, 36)
        if counted[(at - 1) // 12] <= (at - 1) % 12 + 1:  # exhausted at the end of the chunk
            at = 12 * ((at - 1) // 12 + 1)
    assert (computed < 36) == (chunk_size < 40)
    options = {"loss": loss, "chunk_size": chunk_size, "skip_exhausted": True, **EXHAUSTING}
    forward, backward = products(given, STUDENT[:2], reduction="sum", **options)
    assert (forward, backward) == ((2 * computed, computed, computed), (0, 0, 0))
    forward, backward = products(given, STUDENT[:2], reduction="none", **options)
    # Then it is known exactly.
    again = sum(counted)
    assert (forward, backward) == ((2 * computed, 0, 0), ((2 if loss == "reverse_kl" else 1) * again, again, again))


# --- reads of logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "reduction", "impl", "chunk_size"),
    combinations([*LOSSES, "server"], REDUCTIONS, ["reference", "cpp"], [1, 4, 100]),
)
def test_logits_are_read_as_rarely_as_possible(loss, reduction, impl, chunk_size):
    given, n = problem(torch.float32), int(problem().mask.sum())
    given.teacher_weight = torch.cat([given.teacher_weight, torch.randn(7, given.teacher_weight.shape[1])])
    given.teacher_bias = torch.cat([given.teacher_bias, torch.randn(7)])
    options = {"loss": loss, "reduction": reduction, "impl": impl, "chunk_size": chunk_size, "vocab_size": V}
    if loss == "server":
        shape = (*given.mask.shape, OPTIONS["k"])
        sent = {"teacher_topk_ids": torch.arange(shape[-1]).expand(shape), "teacher_topk_logprobs": -torch.ones(shape)}
        given = replace(given, teacher_hidden=None, teacher_weight=None, teacher_bias=None)
        options |= {"loss": OF_SERVERS, **sent}
    with counted(V, V + 7) as rows:
        with_gradients(given, **options)
    assert rows == {"S": 2 * n, "W": n} | {"reverse_kl": {"T": 2 * n}, "server": {}}.get(loss, {"T": n})


def test_logits_are_read_once_without_a_gradient():
    given, ids, n = problem(), torch.zeros(3, 7, 1, dtype=torch.int64), int(problem().mask.sum())
    arguments = given.arguments()
    for function in (linear_reliability, linear_opd_loss):
        with counted(V, V) as rows:
            function(**arguments)
        assert rows == {"S": 2 * n}  # both are V wide
    hidden, weight, _ = (x.requires_grad_() for x in (given.student_hidden, given.student_weight, given.student_bias))
    with counted(V, None) as rows:
        out = linear_selected_logprobs(hidden, weight, ids, given.mask, impl="reference")
        assert rows == {"S": n}
        out.logprobs.sum().backward()
    assert rows == {"S": 2 * n, "W": n}


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_memory_beyond_inputs_outputs_and_gradients():
    """Logits of both sides and their gradient, for one chunk, and hardly anything else."""
    cases = [json.loads(line) for line in run(TESTS / "lib" / "memory_peaks.py", "linear").splitlines()]
    assert len(cases) == 7
    for case in cases:
        spare = (4 if case["dtype"] == "torch.float32" else 12) * 2**20
        most, least = 3 * case["chunk"], (3 if case["reduction"] == "sum" else 2) * case["chunk"]
        assert least - 2**20 <= case["extra"] <= most + spare, case


# --- more than one backward pass --------------------------------------------------------------------------------------


@each_loss
def test_reduction_none_goes_back_twice(loss):
    """The second time by three times as much."""
    wanting, leaves = problem().wanting(*STUDENT)
    out = linear_opd_loss(**wanting.arguments(loss=loss)).loss.sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    check_gradients(torch.autograd.grad(3 * out, leaves), [3 * gradient for gradient in first])


def test_reduction_sum_says_that_it_goes_back_once():
    wanting, leaves = problem().wanting(*STUDENT)
    out = linear_opd_loss(**wanting.arguments(reduction="sum")).loss
    torch.autograd.grad(out, leaves, retain_graph=True)
    with pytest.raises(RuntimeError) as raised:
        torch.autograd.grad(out, leaves)
    assert str(raised.value) == (
        "linear_opd_loss: reduction='sum' gives its gradients away in one backward pass; for a second one, as with "
        "retain_graph=True, use reduction='none'"
    )


@each_reduction
def test_only_the_loss_is_differentiable_and_only_once(reduction):
    wanting, _ = problem().wanting(*STUDENT, "teacher_hidden", "teacher_weight", "teacher_bias")
    out = linear_opd_loss(**wanting.arguments(reduction=reduction))
    assert [name for name in out._fields if getattr(out, name).requires_grad] == ["loss"]
    assert not any(x.requires_grad for x in linear_reliability(**wanting.arguments()))
    (gradient,) = torch.autograd.grad(out.loss.sum(), wanting.student_weight, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of a loss cannot be differentiated a second time"):
        gradient.sum().backward()


def test_a_teacher_that_changes_before_the_backward_pass_is_noticed():
    given = problem()
    wanting, _ = given.wanting(*STUDENT)
    out = linear_opd_loss(**wanting.arguments(loss="reverse_kl"))
    given.teacher_hidden.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.sum().backward()


# --- with the rest of torch -------------------------------------------------------------------------------------------


@each_pass
def test_teacher_from_inference_mode(loss, reduction):
    given, options = problem(), {"loss": loss, "reduction": reduction}
    expected, gradients = with_gradients(given, **options)
    with torch.inference_mode():
        teacher = {name: x.clone() for name, x in vars(given).items() if name.startswith("teacher_") and x is not None}
        inside = linear_opd_loss(**given.arguments(**options))
    out, got = with_gradients(replace(given, **teacher), **options)
    assert all(map(torch.equal, (out.loss, inside.loss, *got), (expected.loss, expected.loss, *gradients)))


@pytest.mark.parametrize(
    ("loss", "reduction", "dtypes"),
    combinations(LOSSES, REDUCTIONS, ["float32 float32", "bfloat16 float32", "bfloat16 bfloat16"]),
)
def test_autocast_rounds_the_operands_and_keeps_logits_in_float32(loss, reduction, dtypes):
    """Against float64 with the operands rounded: logits in bfloat16 would be off by 1e-2."""
    hidden, weight = (getattr(torch, dtype) for dtype in dtypes.split())
    given = problem(torch.float32)
    given.student_hidden, given.student_weight = given.student_hidden.to(hidden), given.student_weight.to(weight)
    value, scored, expected = at_once(given.to(torch.bfloat16).to(torch.float64), loss)
    wanting, leaves = given.wanting(*STUDENT)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_opd_loss(**wanting.arguments(loss=loss, reduction=reduction))
        scores = linear_reliability(**wanting.arguments())
    torch.testing.assert_close(out.loss.double(), value.sum() if reduction == "sum" else value, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.topk_ids, scored.topk_ids)
    torch.testing.assert_close(scores.rewards.double(), scored.rewards, rtol=1e-5, atol=1e-5)
    for one, other, leaf in zip(torch.autograd.grad(out.loss.sum(), leaves), expected, leaves, strict=True):
        assert one.dtype == leaf.dtype
        unit = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one.double(), other, rtol=2 * unit, atol=2 * unit + 1e-5)


def test_products_of_half_precision_on_a_gpu_are_well_formed():
    """Fake tensors know what CUDA's products take and return, without a GPU."""
    with FakeTensorMode():
        hidden = torch.empty(5, H, device="cuda", dtype=torch.bfloat16)
        for dtype in (torch.float32, torch.bfloat16):
            weight, bias = (torch.empty(*shape, device="cuda", dtype=dtype) for shape in ((V, H), (V,)))
            head = head_of(weight, bias, None, torch.bfloat16)
            assert (head.weight.dtype, head.dtype) == (torch.bfloat16, torch.float32)
            head.logits(hidden, torch.empty(5, V, device="cuda"))
            operand = torch.empty(5, V, device="cuda", dtype=torch.bfloat16)
            assert head.hidden_gradient(operand).dtype == torch.float32


@pytest.fixture
def _products_of_a_gpu(monkeypatch):
    """The way of a GPU, whose products of half-precision operands make a float32 matrix."""
    mm, addmm = torch.mm, torch.addmm

    def wide(function):
        def product(*tensors, out_dtype=None, out=None):
            made = function(*(tensors if out_dtype is None else (x.to(out_dtype) for x in tensors)))
            return made if out is None else out.copy_(made)

        return product

    monkeypatch.setattr(torch, "mm", wide(mm))
    monkeypatch.setattr(torch, "addmm", wide(addmm))
    monkeypatch.setattr(Head, "_is_tiled", lambda head, like: False)


@pytest.mark.usefixtures("_products_of_a_gpu")
def test_on_a_gpu_the_gradient_is_rounded_into_the_memory_of_the_logits():
    head = head_of(torch.randn(V, H), None, None, torch.bfloat16)
    gradient, logits = torch.randn(5, V), torch.randn(5, V)
    operand = head.operand(gradient, logits)
    assert torch.equal(operand, gradient.bfloat16())
    assert operand.data_ptr() == logits.data_ptr()


@pytest.mark.usefixtures("_products_of_a_gpu")
@each_pass
def test_on_a_gpu_a_small_scale_does_not_vanish_in_half_precision(loss, reduction):
    """The gradient by the logits is rounded to float16, relative to the largest scale."""
    given, scale = problem(torch.float16), 1e-9 * torch.rand(3, 7)
    given.student_softcap = 5.0
    _, _, expected = at_once(given.to(torch.float64), loss, 2.0**30 * scale)
    wanting, leaves = given.wanting(*STUDENT)
    scales = {"scale": scale} if reduction == "sum" else {}
    out = linear_opd_loss(**wanting.arguments(loss=loss, reduction=reduction, **scales)).loss
    total = out if scales else (scale * out).sum()
    for one, exact in zip(torch.autograd.grad(2.0**30 * total, leaves), expected, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=0, atol=4e-3 * exact.abs().max().item())


def test_autocast_leaves_float64_alone():
    expected = linear_opd_loss(**problem().arguments()).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_opd_loss(**problem().arguments()).loss, expected)


@pytest.mark.gpu
@each_loss
@each_reduction
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(loss, reduction, autocast, dtype):
    """As good as on the CPU, against float64 with the operands rounded."""
    given = problem(dtype, b=4, t=20, v=304)
    rounded = given.to(torch.bfloat16) if autocast else given
    _, _, expected = at_once(rounded.to(torch.float64), loss)
    on_gpu = replace(given, **{name: x.cuda() for name, x in vars(given).items() if x is not None})
    wanting, leaves = on_gpu.wanting(*STUDENT)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        out = linear_opd_loss(**wanting.arguments(loss=loss, reduction=reduction, chunk_size=7, impl="auto"))
    got = torch.autograd.grad(out.loss.sum(), leaves)
    unit = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=float(8 * unit * other.abs().max()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it, from itself
@each_reduction
def test_under_compile_the_call_breaks_the_graph_and_is_right(reduction):
    given = problem()

    def step(hidden, weight):
        wanting = replace(given, student_hidden=torch.tanh(hidden), student_weight=weight)
        return linear_opd_loss(**wanting.arguments(reduction=reduction)).loss.sum() * 2

    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    leaves = given.wanting(*STUDENT[:2])[1]
    expected = torch.autograd.grad(step(*leaves), leaves)
    torch.compiler.reset()
    check_gradients(torch.autograd.grad(torch.compile(step, backend=backend)(*leaves), leaves), expected)
    assert "tanh" in " ".join(targets) and "pruneopd" not in " ".join(targets)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, backend=backend, fullgraph=True)(*leaves)
