"""What only a GPU can show: streams, graphs, memory, sizes. The answers are in the tables of the other files."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_all_operators import LOGITS_OPERATORS, example, raw

import cases
import comparison
import pruneopd_kernels
from implementations import ON_GPU, OPERATORS, on_gpu
from processes import run
from pruneopd_kernels.dispatch import implementations

pytestmark = pytest.mark.gpu

every_operator = pytest.mark.parametrize("op", OPERATORS)
every_logits_operator = pytest.mark.parametrize("op", LOGITS_OPERATORS)
every_impl = pytest.mark.parametrize("impl", [impl.name for impl in ON_GPU])

EXACT = ["overlap", "drift", "drift_count", "reliability", "weight", "effective_length"]
EXACT += ["topk_ids", "student_topk_ids", "teacher_topk_ids"]
SECOND = 2 * 10**9  # of torch.cuda._sleep, which counts cycles: at least half a second on any GPU


def operator(op, impl):
    return functools.partial(getattr(pruneopd_kernels, op), impl=impl)


def gpu_example(op, layout="padded", device="cuda", **sizes):
    args, kwargs = example(op, layout, **sizes)
    return on_gpu(args, device), dict(zip(kwargs, on_gpu(kwargs.values(), device), strict=True))


def overwrite(args, kwargs, new_args, new_kwargs):
    for tensor, new in zip([*args, *kwargs.values()], [*new_args, *new_kwargs.values()], strict=True):
        if isinstance(tensor, torch.Tensor):
            tensor.copy_(new)


def on_cpu(result):
    return result._make(tensor.cpu() for tensor in result)


def logits(*shape, seed=0, dtype=torch.float32):
    """Random ones, of a student and of a teacher that resembles it, made where they are needed."""
    generator = torch.Generator("cuda").manual_seed(seed)
    student = torch.randn(*shape, device="cuda", generator=generator) * 4
    teacher = student + torch.randn(*shape, device="cuda", generator=generator)
    return student.to(dtype), teacher.to(dtype)


# --- the same answers as on the CPU, at full size --------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("k", [1, 16, 64, 256])
@pytest.mark.parametrize("rows", [(1, 1), (3, 40)], ids=str)
def test_what_is_exact_equals_the_cpu_s(impl, dtype, k, rows):
    student, teacher = logits(*rows, 151936, dtype=dtype)
    for op in LOGITS_OPERATORS:
        result = on_cpu(operator(op, impl)(student, teacher, k=k))
        expected = operator(op, "cpp")(student.cpu(), teacher.cpu(), k=k)
        assert set(comparison.differing(result, expected)) & set(EXACT) == set()
        for got, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


@every_impl
@pytest.mark.parametrize("w_drop", [0.01, 1 / 3, 1e-5, 0.7])
def test_long_responses(impl, w_drop):
    """Every bit along the response, in several blocks of a scan, with rounding that contraction would change."""
    drift = torch.rand(5, 12289) < 0.3
    mask = torch.rand(5, 12289) < 0.9
    expected = pruneopd_kernels.reliability_from_drift(drift, mask, w_drop=w_drop, impl="cpp")
    result = pruneopd_kernels.reliability_from_drift(drift.cuda(), mask.cuda(), w_drop=w_drop, impl=impl)
    assert comparison.differing(on_cpu(result), expected) == []

    ids = torch.randint(40, (2, 5, 4099, 16))
    expected = pruneopd_kernels.reliability_from_topk(ids[0], ids[1], w_drop=w_drop, impl="cpp")
    result = pruneopd_kernels.reliability_from_topk(*ids.cuda(), w_drop=w_drop, impl=impl)
    assert comparison.differing(on_cpu(result), expected) == []


@every_impl
def test_many_responses_most_of_them_empty(impl):
    count, positions = 20_000, 3000
    starts = torch.randint(positions + 1, (count + 1,)).sort().values.int()
    starts[0], starts[-1] = 0, positions
    carried = torch.randint(5, (count,), dtype=torch.int32)
    student, teacher = cases.randn(positions, 64, seed=1), cases.randn(positions, 64, seed=2)
    kwargs = {"cu_seqlens": starts, "drift_count": carried, "w_drop": 0.1}
    expected = pruneopd_kernels.reliability(student, teacher, impl="cpp", **kwargs)
    args, on_device = on_gpu([student, teacher]), dict(zip(kwargs, on_gpu(kwargs.values()), strict=True))
    result = on_cpu(pruneopd_kernels.reliability(*args, impl=impl, **on_device))
    assert set(comparison.differing(result, expected)) <= {"rewards"}


@every_logits_operator
@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_batch_around_a_row_changes_no_bit(op, impl, dtype):
    """Few rows are split over several blocks, many are not."""
    student, teacher = logits(700, 1, 151936, dtype=dtype)
    function = operator(op, impl)
    whole = function(student, teacher)
    assert comparison.differing(function(student, teacher), whole) == []
    for part in (slice(0, 1), slice(699, 700), slice(5, 7), slice(100, 117), slice(1, 65), slice(300, 600)):
        result = function(student[part], teacher[part])
        assert comparison.differing(result, result._make(x[part] for x in whole)) == [], part


# --- streams, devices, threads, graphs -------------------------------------------------------------------------------


@every_operator
@every_impl
def test_it_runs_on_the_current_stream(op, impl):
    """Behind what was put there before, here a wait and the tensors' values."""
    args, kwargs = gpu_example(op, seed=1, width=3000)
    expected = operator(op, impl)(*args, **kwargs)
    late_args, late_kwargs = gpu_example(op, seed=2, width=3000)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SECOND // 10)
        overwrite(late_args, late_kwargs, args, kwargs)
        result = operator(op, impl)(*late_args, **late_kwargs)
    stream.synchronize()
    assert comparison.differing(result, expected) == []


@every_operator
@every_impl
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_it_waits_for_nothing(op, impl):
    args, kwargs = gpu_example(op, width=3000)
    operator(op, impl)(*args, **kwargs)  # compiles, and leaves memory to the allocator
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(SECOND)
        result = operator(op, impl)(*args, **kwargs)
        assert not torch.cuda.current_stream().query(), "the GPU was done when the call returned"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert comparison.differing(result, operator(op, impl)(*args, **kwargs)) == []


@every_operator
@every_impl
def test_it_runs_where_the_tensors_are(op, impl):
    """On the last device, while the first is the current one."""
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    args, kwargs = gpu_example(op, device=last)
    expected = operator(op, "cpp")(*example(op)[0], **example(op)[1])
    with torch.cuda.device(0):
        result = operator(op, impl)(*args, **kwargs)
        assert torch.cuda.current_device() == 0
    assert all(x.device == last for x in result)
    assert set(comparison.differing(on_cpu(result), expected)) & set(EXACT) == set()


@every_impl
def test_threads_with_streams_of_their_own(impl):
    student, teacher = logits(4, 40, 30000)
    expected = operator("reliability", impl)(student, teacher)
    torch.cuda.synchronize()
    together = threading.Barrier(4)

    def call(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            together.wait()
            results = [operator("reliability", impl)(student, teacher) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return [comparison.differing(result, expected) for result in results]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(4))) == [[[]] * 20] * 4


@every_operator
@every_impl
@pytest.mark.parametrize("sizes", [(2, 6, 3000), (1, 1, 151936), (300, 2, 3000)], ids=str)
def test_a_graph_captures_it(op, impl, sizes):
    batch, length, width = sizes
    inputs = [gpu_example(op, seed=seed, batch=batch, length=length, width=width) for seed in (0, 1)]
    expected = [operator(op, impl)(*args, **kwargs) for args, kwargs in inputs]
    args, kwargs = gpu_example(op, seed=2, batch=batch, length=length, width=width)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        operator(op, impl)(*args, **kwargs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = operator(op, impl)(*args, **kwargs)
    for n in (0, 1, 1, 0):
        overwrite(args, kwargs, *inputs[n])
        graph.replay()
        torch.cuda.synchronize()
        assert comparison.differing(result, expected[n]) == [], n


def test_the_first_call_of_a_process_may_be_captured():
    run(
        code="""
        import torch, pruneopd_kernels
        student, teacher = torch.randn(2, 2, 3, 3000, device="cuda")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = pruneopd_kernels.reliability(student, teacher, impl="cuda")
        graph.replay()
        expected = pruneopd_kernels.reliability(student, teacher, impl="cuda")
        assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))
    """
    )


def test_importing_initialises_nothing():
    """So that a process may still fork, and its child use the GPU."""
    run(
        code="""
        import os, sys, warnings
        import torch, pruneopd_kernels
        pruneopd_kernels.reliability
        assert not torch.cuda.is_initialized() and "triton" not in sys.modules
        warnings.simplefilter("ignore")  # Python's own, about forking with threads
        pid = os.fork()
        if pid == 0:
            x = torch.randn(1, 2, 300, device="cuda")
            os._exit(0 if pruneopd_kernels.reliability(x, x).overlap.sum() == 2 else 1)
        assert os.waitpid(pid, 0)[1] == 0
    """
    )


# --- memory ----------------------------------------------------------------------------------------------------------


@every_logits_operator
@every_impl
@pytest.mark.parametrize("k", [16, 256])
@pytest.mark.parametrize("rows", [1, 16, 64, 500, 4096])
def test_memory_beyond_the_outputs(op, impl, k, rows):
    student, teacher = (torch.empty(rows, 1, 151936, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    function = operator(op, impl)
    function(student, teacher, k=k)  # what is compiled and loaded once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function(student, teacher, k=k)
    peak = torch.cuda.max_memory_allocated() - before
    outputs = torch.cuda.memory_allocated() - before  # as the allocator rounds them
    assert peak - outputs <= 2**20
    assert outputs <= sum(x.numel() * x.element_size() + 512 for x in result)


@every_logits_operator
@every_impl
def test_more_than_2_to_the_31_elements(op, impl):
    width, length = 151936, 14200
    assert width * length > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    values = torch.empty(1, length, width, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    function = operator(op, impl)
    kwargs = {"w_drop": 0.0} if op == "reliability" else {}
    whole = function(values, values, **kwargs)
    for t in (0, 7077, 14134, length - 2):  # the one before the last begins beyond 2**31
        part = function(values[:, t : t + 2], values[:, t : t + 2], **kwargs)
        along = {name for name in part._fields if getattr(whole, name).dim() == 1}  # E
        expected = part._make(x if x.dim() == 1 else x[:, t : t + 2] for x in whole)
        assert set(comparison.differing(part, expected)) <= along, t


@every_operator
@every_impl
def test_values_are_never_addresses(op, impl):
    """Device tensors are not looked into before the launch: whatever they hold, nothing is read out of bounds."""
    compiled = operator(op, impl)
    if op != "token_stats":
        args, kwargs = gpu_example(op, "packed", batch=2, length=8)
        for values in ((-(2**31), 2**31 - 1), (5, 3, 40), (2**31 - 1, -(2**31), 7), (0, 16, 0, 16), (7, 7, 7)):
            kwargs["cu_seqlens"] = torch.tensor(values, dtype=torch.int32, device="cuda")
            kwargs["drift_count"] = torch.full((len(values) - 1,), 2**31 - 1, dtype=torch.int32, device="cuda")
            assert all(x.shape[0] in (16, len(values) - 1) for x in compiled(*args, **kwargs))
            torch.cuda.synchronize()
    if op in LOGITS_OPERATORS:
        args, kwargs = gpu_example(op, width=64)
        for value in (64, -1, 2**40, -(2**63)):
            kwargs["token_ids"] = torch.full((2, 6), value, device="cuda")
            result = compiled(args[0], args[1], **kwargs)
            assert result.drift.all() if op == "reliability" else result.student_token_logprob.isnan().all()


# --- bad input -------------------------------------------------------------------------------------------------------


@every_operator
@every_impl
def test_tensors_on_different_devices(op, impl):
    args, kwargs = gpu_example(op)
    names = [argument.name for argument in raw(op).default._schema.arguments]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    for name in [name for name, value in arguments.items() if isinstance(value, torch.Tensor)][1:]:
        with pytest.raises(ValueError) as raised:
            getattr(pruneopd_kernels, op)(**(arguments | {name: arguments[name].cpu()}), impl=impl)
        assert str(raised.value) == f"{op}: {name} must be on cuda:0, got cpu"


@every_operator
def test_the_library_itself_looks_at_devices(op):
    """On the compiled operators, without the checks of Python."""
    args, kwargs = gpu_example(op)
    compiled = getattr(torch.ops.pruneopd_cuda, op)
    names = [argument.name for argument in compiled.default._schema.arguments]
    defaults = {argument.name: argument.default_value for argument in compiled.default._schema.arguments}
    arguments = defaults | dict(zip(names, args, strict=False)) | kwargs
    tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    compiled(**arguments)
    for name in tensors[1:]:
        with pytest.raises(RuntimeError) as raised:
            compiled(**(arguments | {name: arguments[name].cpu()}))
        assert str(raised.value).startswith(f"{op}: {name} must be on cuda:0, got cpu")
    with pytest.raises(RuntimeError) as raised:
        compiled(**(arguments | {tensors[0]: arguments[tensors[0]].cpu()}))
    assert str(raised.value).startswith(f"{op}: {tensors[0]} must be on cuda, got cpu")


# --- as operators of torch -------------------------------------------------------------------------------------------


@every_operator
def test_auto_takes_cuda_else_triton(op):
    expected = "triton" if torch.version.hip else "cuda"
    assert implementations.AUTO["cuda"][0] == expected
    args, kwargs = gpu_example(op, width=3000)
    result = getattr(pruneopd_kernels, op)(*args, **kwargs)
    assert comparison.differing(result, operator(op, expected)(*args, **kwargs)) == []


@every_operator
@every_impl
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_opcheck(op, impl, layout):
    args, kwargs = gpu_example(op, layout)
    torch.library.opcheck(raw(op).default, args, {**kwargs, "impl": impl})


@every_operator
@every_impl
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore")  # torch's own, on the settings of a GPU
def test_compiles_with_the_default_backend_between_other_operations(op, impl, mode):
    torch._dynamo.reset()

    def step(*args, **kwargs):
        result = operator(op, impl)(*args, **kwargs)
        return result, (result.overlap if op == "token_stats" else result.weight) * 2

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    for seed in (0, 1, 2):  # with reduce-overhead: warm up, capture, replay
        args, kwargs = gpu_example(op, seed=seed)
        result, doubled = compiled(*args, **kwargs)
        expected, expected_doubled = step(*args, **kwargs)
        assert comparison.differing(result, expected) == [] and torch.equal(doubled, expected_doubled)
