"""Which implementation computes: what `auto` takes where, and why another one does not."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pruneopd_kernels
from implementations import DECLARED, OPERATORS, raw
from operators import example
from pruneopd_kernels.dispatch import cuda, implementations

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda:0"), torch.device("meta")
ADDS = "PRUNEOPD_CUDA_ARCHITECTURES={} while building adds it, or "
BUILT_FOR = ["sm_80", "sm_90", "sm_120", "sm_100", "compute_100"]


@pytest.fixture
def usable(monkeypatch):
    """Makes these implementations the usable ones, on GPUs of the given compute capability."""

    def make(*names, capability=(9, 0)):
        why_not = {name: None if name in names else "for this test" for name in implementations.WHY_NOT}
        monkeypatch.setattr(implementations, "WHY_NOT", why_not)
        monkeypatch.setattr(implementations, "AUTO", implementations._usable(why_not))
        monkeypatch.setattr(cuda, "why_not_on", lambda _: cuda._why_not_with_capability(capability, BUILT_FOR))

    return make


@pytest.mark.parametrize(("names", "on_cpu", "on_gpu"), [
    (["reference"], "reference", "reference"), (["reference", "cpp", "triton"], "cpp", "triton"),
    (["reference", "cpp", "cuda", "triton"], "cpp", "cuda"),
], ids=str)  # fmt: skip
def test_auto_takes_the_best_that_is_usable(usable, names, on_cpu, on_gpu):
    usable(*names)
    for device, expected in ((CPU, on_cpu), (GPU, on_gpu), (OTHER, "reference")):
        assert implementations.choose("op", "auto", device) == expected
        for impl in implementations.WHY_NOT:
            assert implementations.choose("op", impl, device) == impl  # usable or not: that one or an error


def test_auto_passes_over_the_library_on_a_gpu_that_it_has_no_code_for(usable):
    usable("reference", "cuda", "triton", capability=(7, 5))
    assert implementations.choose("op", "auto", GPU) == "triton"
    assert implementations.choose("op", "auto", GPU, real=False) == "cuda"  # the same results, and no device to ask
    usable("reference", "cuda", capability=(7, 5))
    assert implementations.choose("op", "auto", GPU) == "reference"
    with pytest.raises(RuntimeError, match=r"^op: impl='cuda' is not usable here: _cuda\.so has code for sm_80, "):
        implementations.require_usable("op", "cuda", GPU)


@pytest.mark.parametrize(("capability", "built_for", "words"), [
    ((9, 0), BUILT_FOR, None),
    ((8, 9), BUILT_FOR, None),  # runs what is compiled for 8.0
    ((11, 0), BUILT_FOR, None),  # the driver compiles compute_100
    ((12, 0), BUILT_FOR, None),
    ((7, 5), BUILT_FOR, "7.5; "),
    ((8, 6), ["sm_89", "sm_90", "compute_90"], f"8.6; {ADDS.format(86)}"),
    ((9, 0), ["sm_80", "sm_100", "compute_100"], f"9.0; {ADDS.format(90)}"),
], ids=str)  # fmt: skip
def test_code_for_a_gpu(capability, built_for, words):
    has = f"_cuda.so has code for {', '.join(built_for)} and the GPU is of compute capability "
    expected = words and f"{has}{words}impl='triton' computes there"
    assert cuda._why_not_with_capability(capability, built_for) == expected


def test_a_driver_for_the_library():
    with_driver = cuda._why_not_with_driver
    assert with_driver((13, 0), (13, 0)) is with_driver((12, 2), (12, 8)) is None
    assert with_driver((12, 8), (13, 0)) == (
        "the driver runs CUDA 12.8 and _cuda.so has been built with 13.0; update it, or build with an older toolkit"
    )
    assert with_driver(None, (13, 0)) == (
        "this machine has no working NVIDIA driver (libcuda.so.1); install one, where there is a GPU"
    )


def test_a_library_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "PATH", tmp_path / "_cuda.so")
    assert cuda._load() == (
        f"{tmp_path}/_cuda.so is missing; pip install 'pruneopd-kernels[cuda13]' brings it, and installing the package "
        "from its sources where nvcc (of a CUDA toolkit) is found builds it"
    )
    (tmp_path / "_cuda.so").write_bytes(b"no library")
    why = cuda._load()
    assert why.startswith(f"_cuda.so does not load in torch {torch.__version__} (") and "\n" not in why
    assert why.endswith("; it needs torch >= 2.11 or a new build")


def test_the_library_that_is_built(monkeypatch):
    """It loads in every torch, also in one without CUDA, where nothing runs it."""
    if not cuda.PATH.exists():
        pytest.skip("built without nvcc")
    assert cuda.toolkit() >= (12, 0)
    assert cuda.architectures()[-1].startswith("compute_")
    assert all(name.startswith("sm_") for name in cuda.architectures()[:-1])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda._load() == (
        f"torch {torch.__version__} has been built without CUDA; install one that has been built with it"
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "_driver_version", lambda: cuda.toolkit())
    assert cuda._load() is None


@pytest.mark.parametrize("op", OPERATORS)
def test_asked_for_on_tensors_of_the_cpu(op):
    elsewhere = "it computes on cuda and the tensors are on cpu; move them there or pass impl='auto'"
    for impl, function in itertools.product(("cuda", "triton"), (getattr(pruneopd_kernels, op), raw(op))):
        with pytest.raises(RuntimeError) as raised:
            function(**example(op), impl=impl)
        why = implementations.WHY_NOT[impl] or elsewhere
        assert str(raised.value) == f"{op}: impl='{impl}' is not usable here: {why}"


def test_asked_for_where_it_is_usable_and_the_tensors_are_elsewhere(usable):
    usable("reference", "cpp", "cuda", "triton")
    for impl, device in (("cuda", CPU), ("triton", CPU), ("cpp", GPU), ("cuda", OTHER)):
        words = f"it computes on {implementations.DEVICES[impl]} and the tensors are on {device}; move them there or "
        with pytest.raises(RuntimeError) as raised:
            implementations.require_usable("op", impl, device)
        assert str(raised.value) == f"op: impl={impl!r} is not usable here: {words}pass impl='auto'"
    for impl, device in (("cuda", GPU), ("triton", GPU), ("cpp", CPU), ("reference", OTHER), ("reference", GPU)):
        implementations.require_usable("op", impl, device)


@pytest.mark.parametrize("op", OPERATORS)
def test_tensors_on_different_devices(op):
    """On fake tensors, which need no GPU: the check is the same one, whatever impl is asked for."""
    arguments = example(op)
    names = [name for name in DECLARED[op].tensors if name in arguments]

    def on(device, name):
        return torch.empty(arguments[name].shape, dtype=arguments[name].dtype, device=device)

    with FakeTensorMode():
        fakes = arguments | {name: on("cuda:0", name) for name in names}
        result = raw(op)(**fakes, impl="cuda")
        assert all(x.device == GPU for x in ([result] if isinstance(result, torch.Tensor) else result))
        for name, device in itertools.product(names[1:], ("cpu", "cuda:1")):
            with pytest.raises(ValueError) as raised:
                raw(op)(**fakes | {name: on(device, name)}, impl="triton")
            assert str(raised.value) == f"{op}: {name} must be on cuda:0, got {device}"
