"""The compiled operators for NVIDIA GPUs: `_cuda.so`, which registers `torch.ops.pruneopd_cuda.*`.

It lies in the package where the build made it, or in `pruneopd_kernels_cuda13`, a distribution of its own. Nothing here
initialises CUDA, which would cost memory and forbid a later fork.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from pathlib import Path

import torch

from .. import __version__
from ..ops._operator import NAMESPACE, compiled
from .cpp import load

_APART = f"{__package__.partition('.')[0]}_cuda13"


def _path() -> Path:
    within = Path(__file__).parents[1] / "_cuda.so"
    apart = None if within.exists() else importlib.util.find_spec(_APART)
    return Path(apart.origin).with_name("_cuda.so") if apart and apart.origin else within


PATH = _path()

_DEFINITIONS = torch.library.Library(f"{NAMESPACE}_cuda", "DEF")
for _op in compiled():
    _DEFINITIONS.define(_op.private_schema)


def _load() -> str | None:
    """Load the library; return why that fails or nothing here could run it and what would help, or None."""
    if PATH.parent.name == _APART and (version := importlib.import_module(_APART).__version__) != __version__:
        return (
            f"pruneopd-kernels is {__version__} and pruneopd-kernels-cuda13 {version}; "
            f"pip install 'pruneopd-kernels[cuda13]=={__version__}' makes them the same"
        )
    remedy = (
        "pip install 'pruneopd-kernels[cuda13]' brings it, and installing the package from its sources where nvcc (of "
        "a CUDA toolkit) is found builds it"
    )
    if (why_not := load(PATH, remedy)) is not None:
        return why_not
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has been built without CUDA; install one that has been built with it"
    return _why_not_with_driver(_driver_version(), toolkit())


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver of this machine runs. Asking it is allowed before CUDA is initialised."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except OSError:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _why_not_with_driver(driver: tuple[int, int] | None, built_by: tuple[int, int]) -> str | None:
    if driver is None:
        return "this machine has no working NVIDIA driver (libcuda.so.1); install one, where there is a GPU"
    if driver[0] < built_by[0]:  # within one major version, older drivers run newer builds
        words = "the driver runs CUDA {}.{} and {} has been built with {}.{}; update it, or build with an older toolkit"
        return words.format(*driver, PATH.name, *built_by)
    return None


def _build() -> list[str]:
    library = ctypes.CDLL(str(PATH))  # loaded already: the same one
    library.pruneopd_cuda_build.restype = ctypes.c_char_p
    return str(library.pruneopd_cuda_build().decode()).split()


def toolkit() -> tuple[int, int]:
    """The version of CUDA that the library has been built with."""
    major, minor = _build()[0].split(".")
    return int(major), int(minor)


def architectures() -> list[str]:
    """What the library has code for: `sm_80`, ..., and `compute_100` for what the driver compiles by itself."""
    return _build()[1:]


WHY_NOT = _load()


@functools.cache
def why_not_on(device: torch.device) -> str | None:
    """Why the library, which is usable here, does not run on this GPU, or None."""
    return _why_not_with_capability(torch.cuda.get_device_capability(device), architectures())


def _why_not_with_capability(capability: tuple[int, int], built_for: list[str]) -> str | None:
    for name in built_for:
        kind, number = name.split("_")
        major, minor = int(number[:-1]), int(number[-1])
        # Machine code runs on its own generation, from its own minor number on; what the driver compiles, on all later.
        if (kind == "compute" or major == capability[0]) and (major, minor) <= capability:
            return None
    has = f"{PATH.name} has code for {', '.join(built_for)} and the GPU is of compute capability {{}}.{{}}"
    what = "impl='triton' computes there"
    if capability >= (8, 0):
        what = "PRUNEOPD_CUDA_ARCHITECTURES={}{} while building adds it, or " + what
    return f"{has}; {what}".format(*capability, *capability)
