"""What only a GPU can show: streams, graphs, memory, sizes. The answers are in the tables of the other files."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import cases
import operators
from comparison import EXACT, differing, same_bits
from implementations import ALONG_RESPONSES, DECLARED, LOGITS, LOSSES, ON_GPU, Implementation, compiled_alone, on_gpu
from processes import run
from pruneopd_kernels.dispatch import implementations

pytestmark = pytest.mark.gpu

every_operator = pytest.mark.parametrize("op", DECLARED)
every_logits_operator = pytest.mark.parametrize("op", LOGITS)
every_impl = pytest.mark.parametrize("impl", [impl.name for impl in ON_GPU])
SECOND = 2 * 10**9  # of torch.cuda._sleep, which counts cycles: at least half a second on any GPU


def computing(op, impl):
    """Outputs, and of a loss the gradient, all where the tensors are."""
    return functools.partial(Implementation(impl).run, op)


def example(op, *args, device="cuda", **kwargs):
    return on_gpu(operators.example(op, *args, **kwargs), device)


def on_cpu(result):
    return {name: tensor.cpu() for name, tensor in result.items()}


def overwrite(arguments, new):
    with torch.no_grad():
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor):
                x.copy_(new[name])


def part_of(arguments, part):
    return {name: x[part] if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


# --- the same answers as on the CPU, at full size --------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("w_drop", [0.01, 1 / 3, 1e-5, 0.7])
def test_long_responses(impl, w_drop):
    """Every bit along the response, in several blocks of a scan, with rounding that contraction would change."""
    drift = {"drift": torch.rand(5, 12289) < 0.3, "mask": torch.rand(5, 12289) < 0.9}
    student, teacher = torch.rand(2, 5, 4099, 40).argsort(-1)[..., :16]
    ids = {"student_topk_ids": student, "teacher_topk_ids": teacher}
    for op, arguments in (("reliability_from_drift", drift), ("reliability_from_topk", ids)):
        expected = Implementation("cpp").run(op, **arguments, w_drop=w_drop)
        assert differing(on_cpu(computing(op, impl)(**on_gpu(arguments), w_drop=w_drop)), expected) == []


@every_impl
def test_many_responses_most_of_them_empty(impl):
    count, positions = 20_000, 3000
    starts = torch.randint(positions + 1, (count + 1,)).sort().values.int()
    starts[0], starts[-1] = 0, positions
    arguments = {
        "student_logits": cases.randn(positions, 64, seed=1),
        "teacher_logits": cases.randn(positions, 64, seed=2),
        "cu_seqlens": starts,
        "drift_count": torch.randint(5, (count,), dtype=torch.int32),
        "w_drop": 0.1,
    }
    expected = Implementation("cpp").run("reliability", **arguments)
    result = on_cpu(computing("reliability", impl)(**on_gpu(arguments)))
    assert set(differing(result, expected)) <= {"rewards"}


@every_logits_operator
@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_batch_around_a_row_changes_no_bit(op, impl, dtype):
    """Few rows are split over several blocks, many are not."""
    arguments, call = example(op, (700, 1), 151937, dtype=dtype), computing(op, impl)
    whole = call(**arguments)
    assert differing(call(**arguments), whole) == []
    for part in (slice(0, 1), slice(699, 700), slice(5, 7), slice(100, 117), slice(1, 65), slice(300, 600)):
        expected = {name: x[part].contiguous() for name, x in whole.items()}
        assert differing(call(**part_of(arguments, part)), expected) == [], part


# --- streams, devices, threads, graphs -------------------------------------------------------------------------------


@every_operator
@every_impl
def test_it_runs_on_the_current_stream(op, impl):
    """Behind what was put there before, here a wait and the tensors' values."""
    arguments, late = (example(op, width=3000, seed=seed) for seed in (1, 2))
    expected = computing(op, impl)(**arguments)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SECOND // 10)
        overwrite(late, arguments)
        result = computing(op, impl)(**late)
    stream.synchronize()
    assert differing(result, expected) == []


@every_operator
@every_impl
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_it_waits_for_nothing(op, impl):
    arguments, call = example(op, width=3000), computing(op, impl)
    upstream = torch.ones(2, 6, device="cuda") if op in LOSSES else None
    call(upstream, **arguments)  # compiles, and leaves memory to the allocator
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(SECOND)
        result = call(upstream, **arguments)
        assert not torch.cuda.current_stream().query(), "the GPU was done when the call returned"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert differing(result, call(upstream, **arguments)) == []


@every_operator
@every_impl
def test_it_runs_where_the_tensors_are(op, impl):
    """On the last device, while the first is the current one."""
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    expected = Implementation("cpp").run(op, **operators.example(op))
    with torch.cuda.device(0):
        result = computing(op, impl)(**example(op, device=last))
        assert torch.cuda.current_device() == 0
    assert all(x.device == last for x in result.values())
    assert set(differing(on_cpu(result), expected)) & EXACT == set()


@every_impl
def test_threads_with_streams_of_their_own(impl):
    arguments, call = example("reliability", (4, 40), 30000), computing("reliability", impl)
    expected = call(**arguments)
    torch.cuda.synchronize()
    together = threading.Barrier(4)

    def call_often(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            together.wait()
            results = [call(**arguments) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return [differing(result, expected) for result in results]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call_often, range(4))) == [[[]] * 20] * 4


@every_operator
@every_impl
@pytest.mark.parametrize("sizes", [((2, 6), 3000), ((1, 1), 151936), ((300, 2), 3000)], ids=str)
def test_a_graph_captures_it(op, impl, sizes):
    """Of a loss both passes."""
    inputs, call = [example(op, *sizes, seed=seed) for seed in (0, 1)], computing(op, impl)
    upstream = torch.ones(sizes[0], device="cuda") if op in LOSSES else None
    expected = [call(upstream, **arguments) for arguments in inputs]
    arguments = example(op, *sizes, seed=2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(upstream, **arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(upstream, **arguments)
    for n in (0, 1, 1, 0):
        overwrite(arguments, inputs[n])
        graph.replay()
        torch.cuda.synchronize()
        assert differing(result, expected[n]) == [], n


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
@pytest.mark.parametrize("rows", [1, 16, 64, 500, 2048])
def test_memory_beyond_the_outputs(op, impl, k, rows):
    arguments, call = example(op, (rows, 1), 512, k), computing(op, impl)
    for name in [name for name in arguments if name.endswith("logits")]:
        arguments[name] = torch.empty(rows, 1, 151936, dtype=torch.bfloat16, device="cuda").normal_()
    call(**arguments)  # what is compiled and loaded once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call(**arguments)
    peak = torch.cuda.max_memory_allocated() - before
    outputs = torch.cuda.memory_allocated() - before  # as the allocator rounds them
    assert peak - outputs <= (3 if op in LOSSES else 1) * 2**20  # of a loss, also what is saved
    assert outputs <= sum(x.numel() * x.element_size() + 512 for x in result.values()) + 2**20 * (op in LOSSES)


@every_logits_operator
@every_impl
def test_more_than_2_to_the_31_elements(op, impl):
    width, length = 151936, 14200
    assert width * length > 2**31
    arguments = example(op, (1, length), 64)
    arguments = {name: x for name, x in arguments.items() if "logits" not in name and name != "drift_count"}
    generator = torch.Generator("cuda").manual_seed(0)
    student = torch.empty(1, length, width, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    given = {"student_logits": student, "teacher_logits": student.roll(1, 1) if op in LOSSES else student}
    arguments |= operators.of_op(op, given) | ({"w_drop": 0.0} if op in ALONG_RESPONSES else {})
    whole = computing(op, impl)(**arguments)
    for t in (0, 7077, 14134, length - 2):  # the one before the last begins beyond 2**31
        part = computing(op, impl)(**operators.each_position(lambda x, t=t: x[:, t : t + 2], arguments))
        names = [name for name in part if part[name].dim() > 1 and name != "drift_count"]
        assert same_bits([part[n] for n in names], [whole[n][:, t : t + 2].contiguous() for n in names]), t


@every_operator
@every_impl
def test_values_are_never_addresses(op, impl):
    """Device tensors are not looked into before the launch: whatever they hold, nothing is read out of bounds."""
    call = computing(op, impl)
    if op in ALONG_RESPONSES:
        arguments = example(op, (2, 8), packed=True)
        for values in ((-(2**31), 2**31 - 1), (5, 3, 40), (2**31 - 1, -(2**31), 7), (0, 16, 0, 16), (7, 7, 7)):
            arguments["cu_seqlens"] = torch.tensor(values, dtype=torch.int32, device="cuda")
            arguments["drift_count"] = torch.full((len(values) - 1,), 2**31 - 1, dtype=torch.int32, device="cuda")
            assert all(x.shape[0] in (16, len(values) - 1) for x in call(**arguments).values())
            torch.cuda.synchronize()
    arguments = example(op, width=64)
    valid = arguments["mask"] != 0
    for name in [name for name in arguments if name.endswith("ids") and op in LOGITS]:
        for value in (64, 2**31, 2**40, 2**63 - 1, *((-1, -(2**63)) if op not in LOSSES else ())):
            result = call(**arguments | {name: torch.full_like(arguments[name], value)})
            if op in LOSSES:
                assert result["loss"][valid].isnan().all() and result["gradient"][valid].isnan().all()
            elif op == "reliability":
                assert result["drift"][valid].all()
            else:
                assert result["student_token_logprob"][valid].isnan().all()


# --- bad input -------------------------------------------------------------------------------------------------------


@every_operator
def test_the_library_itself_looks_at_devices(op):
    """On the compiled operators, without the checks of Python."""
    arguments = example(op)
    tensors = [name for name in DECLARED[op].tensors if name in arguments]
    compiled_alone(op, "cuda", **arguments)
    for name in tensors:
        with pytest.raises(RuntimeError) as raised:
            compiled_alone(op, "cuda", **arguments | {name: arguments[name].cpu()})
        device = "cuda" if name == tensors[0] else "cuda:0"
        assert str(raised.value).startswith(f"{op}: {name} must be on {device}, got cpu")


# --- as operators of torch -------------------------------------------------------------------------------------------


@every_operator
def test_auto_takes_cuda_else_triton(op):
    expected = "triton" if torch.version.hip else "cuda"
    assert implementations.AUTO["cuda"][0] == expected
    arguments = example(op, width=3000)
    assert differing(computing(op, "auto")(**arguments), computing(op, expected)(**arguments)) == []


@every_operator
@every_impl
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore")  # torch's own, on the settings of a GPU
def test_compiles_with_the_default_backend_between_other_operations(op, impl, mode):
    torch._dynamo.reset()

    def step(**arguments):
        outputs = getattr(torch.ops.pruneopd, op)(**arguments, impl=impl)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        return outputs, next(x for x in outputs if x.is_floating_point()) * 2

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    for seed in (0, 1, 2):  # with reduce-overhead: warm up, capture, replay
        arguments = example(op, seed=seed)
        (outputs, doubled), (expected, twice) = compiled(**arguments), step(**arguments)
        assert same_bits(outputs, expected) and torch.equal(doubled, twice)
