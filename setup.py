"""Builds the compiled part of the package, by CMakeLists.txt. Everything else about it is in pyproject.toml."""

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
TORCH_REQUIREMENT = "torch>=2.11"
# OFF: the reference and Triton alone. Opt-in: a missing compiler must fail loudly.
COMPILE = os.environ.get("PRUNEOPD_COMPILE", "ON")
# The library for NVIDIA GPUs. AUTO: if nvcc is found. Containers are often built on machines without a GPU, so that
# `pip install` does not ask for one. DRIVER: if there is an NVIDIA driver, too. The Makefile's default for development.
CUDA = os.environ.get("PRUNEOPD_CUDA", "AUTO")
NO_DRIVER = "there is no NVIDIA driver here, and PRUNEOPD_CUDA=ON builds them all the same"
OR_WITHOUT = "or set PRUNEOPD_COMPILE=OFF to go without the compiled operators"
NOT_ISOLATED = "building pruneopd-kernels without build isolation needs {}: pip install cmake ninja pybind11"


def find_torch() -> Path | None:
    """The folder of a torch that is new enough, found without importing it.

    A build in isolation does not see the packages of the environment that it builds for, but site still names their
    folder. Several gigabytes need not be downloaded where they already are.
    """
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or []) if spec else []
    folders += [f"{packages}/torch" for packages in site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(f"{site.getusersitepackages()}/torch")
    for folder in map(Path, folders):
        try:
            version = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
        except OSError:
            continue
        if version and (int(version[1]), int(version[2])) >= OLDEST_TORCH:
            return folder
    return None


def find_compiler() -> list[str]:
    """The command of a compiler that can do C++20, or one sentence that says what to install."""
    install = f"install g++ 11 or newer (on Debian and Ubuntu: apt install g++), name a compiler in CXX, {OR_WITHOUT}"
    named = shlex.split(os.environ.get("CXX", ""))
    command = named or next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])
    if not command or not shutil.which(command[0]):
        missing = f"CXX={named[0]} is not one" if named else "there is none on the PATH"
        raise PlatformError(f"building pruneopd-kernels needs a C++20 compiler, and {missing}: {install}")
    trial = "#include <concepts>\n#include <span>\n#include <thread>\nstd::jthread t; std::integral auto n = 1;\n"
    done = subprocess.run(
        [*command, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"], input=trial, text=True, capture_output=True
    )
    if done.returncode != 0:
        raise PlatformError(f"building pruneopd-kernels needs C++20, which {command[0]} cannot compile: {install}")
    return command


def find_tool(name: str, folder: str) -> str:
    """CMake or ninja: of its PyPI package, whose command need not be on the PATH, else the system's."""
    try:
        return str(Path(getattr(importlib.import_module(name), folder)) / name)
    except (ImportError, AttributeError):
        command = shutil.which(name)
    if command is None:
        raise PlatformError(NOT_ISOLATED.format(name))
    return command


def has_driver() -> bool:
    """Return whether the library of NVIDIA's driver can be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


class CMakeBuild(build_ext):
    """Configures once, then lets ninja rebuild what changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.in_source = self.inplace  # which setuptools changes while it builds
        if self.inplace:  # also an editable install, which would start from nothing in a temporary folder each time
            self.build_temp = str(ROOT / "build" / f"inplace-{sys.implementation.cache_tag}")

    def get_ext_filename(self, fullname: str) -> str:
        # The libraries for torch know nothing of Python, so their names have no Python ABI tag.
        filename = Path(super().get_ext_filename(fullname))
        name = filename.name.partition(".")[0]
        return str(filename.with_name(f"{name}.so") if name in ("_cpp", "_cuda") else filename)

    def build_extensions(self) -> None:
        torch = find_torch()
        if torch is None:
            raise PlatformError(
                f"building pruneopd-kernels without build isolation needs {TORCH_REQUIREMENT} in the environment: "
                "install torch first"
            )
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            raise PlatformError(
                "building pruneopd-kernels needs Python's headers, and Python.h is missing: install them "
                f"(on Debian and Ubuntu: apt install python3-dev), {OR_WITHOUT}"
            )
        build = Path(self.build_temp).resolve()
        if not (build / "build.ninja").exists():
            find_compiler()
        try:
            import pybind11
        except ImportError:
            raise PlatformError(NOT_ISOLATED.format("pybind11")) from None
        cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
        settings = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "PRUNEOPD_TORCH": torch,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PRUNEOPD_CUDA": CUDA.replace("DRIVER", "AUTO"),
            "PRUNEOPD_CUDA_ARCHITECTURES": os.environ.get("PRUNEOPD_CUDA_ARCHITECTURES", ""),
        }
        if "CUDA_HOME" in os.environ:
            settings["CUDAToolkit_ROOT"] = os.environ["CUDA_HOME"]
        build.mkdir(parents=True, exist_ok=True)
        first_time = not (build / "build.ninja").exists()
        configure = [cmake, "--log-level=WARNING", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        configure += [f"-D{name}={value}" for name, value in settings.items()]
        if subprocess.run(configure, stdout=subprocess.DEVNULL).returncode != 0:
            raise CompileError("CMake could not configure the build; its reason stands above")
        without_cuda = build / "without_cuda.txt"  # in cmake/cuda.cmake's words
        why_not = without_cuda.read_text() if without_cuda.exists() else ""
        if not why_not and CUDA == "DRIVER" and not has_driver():
            why_not = NO_DRIVER
        if why_not and first_time:
            print(f"pruneopd-kernels: building without kernels for NVIDIA GPUs: {why_not}", flush=True)
        extensions = [extension for extension in self.extensions if not (extension.optional and why_not)]
        targets = [extension.name.rpartition(".")[2] for extension in extensions]
        if subprocess.run([cmake, "--build", str(build), "--target", *targets]).returncode != 0:
            raise CompileError("the compiler's message stands above")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            if extension not in extensions:
                target.unlink(missing_ok=True)  # of an earlier build
                if self.in_source:
                    (ROOT / "pruneopd_kernels" / target.name).unlink(missing_ok=True)
                continue
            self.mkpath(str(target.parent))
            self.copy_file(str(build / target.name), str(target))  # what has not changed stays as it is


if COMPILE not in ("ON", "OFF"):
    raise PlatformError(f"building pruneopd-kernels: PRUNEOPD_COMPILE must be ON or OFF, got {COMPILE!r}")
if CUDA not in ("AUTO", "DRIVER", "ON", "OFF"):
    raise PlatformError(f"building pruneopd-kernels: PRUNEOPD_CUDA must be AUTO, DRIVER, ON or OFF, got {CUDA!r}")
compiled = [
    Extension("pruneopd_kernels._cpp", []),
    Extension("pruneopd_kernels._host", []),
    Extension("pruneopd_kernels._cuda", [], optional=True),  # if there is a CUDA toolkit
]
setup(
    ext_modules=compiled if COMPILE == "ON" else [],
    cmdclass={"build_ext": CMakeBuild},
    # A build requirement that depends on the environment: pip reads it from here before it builds in isolation.
    setup_requires=[TORCH_REQUIREMENT] if COMPILE == "ON" and not find_torch() else [],
)
