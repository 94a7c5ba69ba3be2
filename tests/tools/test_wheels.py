"""The published files that need no compiler. `make wheels` builds all, `make test-wheels` installs them."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import processes
import pruneopd_kernels

ROOT = Path(__file__).parents[2]
VERSION = pruneopd_kernels.__version__
WRITTEN = [  # what can be read from the package is; these cannot
    ("pyproject.toml", r'^cuda13 = \["pruneopd-kernels-cuda13==(.*)"\]$'),
    ("python/pyproject.toml", r'^version = "(.*)"$'),
    ("python/pyproject.toml", r'"pruneopd-kernels==(.*)"'),
    ("CITATION.cff", r"^version: (.*)$"),
    ("CHANGELOG.md", r"^## \[(\d[^\]]*)\]"),
    ("packaging/hub/build.toml", r"^version = (\d+)$"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return a folder with the sources of a wheel, without compiled files."""
    folder = tmp_path_factory.mktemp("sources")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "pruneopd_kernels", folder / "pruneopd_kernels", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def setup(sources, *command, **variables):
    command = [sys.executable, "setup.py", "--quiet", *map(str, command)]
    return subprocess.run(command, cwd=sources, env=os.environ | variables, text=True, capture_output=True)


def test_every_file_names_the_same_version():
    for path, pattern in WRITTEN:
        (found,) = re.findall(pattern, (ROOT / path).read_text(), re.MULTILINE)[:1]
        assert found == (VERSION if "." in found else VERSION.partition(".")[0]), path


def contents(wheel, distribution):
    """Return the file names and the metadata."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{distribution}-{VERSION}.dist-info/METADATA").decode()
        return set(archive.namelist()), Parser().parsestr(metadata)


def files_of(folder, *packages):
    return {file.relative_to(folder).as_posix() for package in packages for file in (folder / package).rglob("*.py")}


@pytest.mark.thorough
def test_the_pure_wheel_is_for_everyone_and_has_the_kernels_alone(sources, tmp_path):
    done = setup(sources, "bdist_wheel", "--dist-dir", tmp_path, PRUNEOPD_COMPILE="OFF", PATH="")
    assert done.returncode == 0, done.stderr
    names, metadata = contents(tmp_path / f"pruneopd_kernels-{VERSION}-py3-none-any.whl", "pruneopd_kernels")
    assert {name for name in names if name.endswith(".py")} == files_of(ROOT, "pruneopd_kernels")
    assert "pruneopd_kernels/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".safetensors"))]
    assert metadata["Requires-Python"] == ">=3.10" and "cuda13" in metadata.get_all("Provides-Extra")
    assert {"numpy", "torch>=2.11"} <= set(metadata.get_all("Requires-Dist"))


@pytest.mark.thorough
def test_the_trainer_s_wheel_has_its_models(tmp_path):
    shutil.copytree(ROOT / "python", tmp_path / "python", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "./python"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    names, _ = contents(tmp_path / f"pruneopd_trainer-{VERSION}-py3-none-any.whl", "pruneopd_trainer")
    sources = ROOT / "python"
    assert {name for name in names if name.endswith(".py")} == files_of(sources, "pruneopd_trainer", "pruneopd_lab")
    assert names >= {file.relative_to(sources).as_posix() for file in sources.rglob("*.safetensors")} != set()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CXX": "no-such-compiler"}, "needs a C++20 compiler, and CXX=no-such-compiler is not one: install g++ 11"),
        ({"PRUNEOPD_CUDA": "on"}, "PRUNEOPD_CUDA must be AUTO, DRIVER, ON or OFF, got 'on'"),
    ],
)
def test_an_installation_from_sources_says_what_is_missing(sources, variables, words):
    done = setup(sources, "build_ext", **variables)
    assert done.returncode != 0 and words in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.thorough
def test_the_cuda_library_is_found_in_its_own_distribution(sources, tmp_path):
    shutil.copytree(sources / "pruneopd_kernels", tmp_path / "pruneopd_kernels")
    apart = tmp_path / "pruneopd_kernels_cuda13"
    apart.mkdir()
    (apart / "_cuda.so").write_bytes(b"no library")
    another = f"pruneopd-kernels is {VERSION} and pruneopd-kernels-cuda13 0.0.9; pip install"
    for version, words in ((VERSION, "_cuda.so does not load"), ("0.0.9", another)):
        (apart / "__init__.py").write_text(f"__version__ = {version!r}\n")
        out = processes.run("-m", "pruneopd_kernels", root=tmp_path, cwd=tmp_path)
        (line,) = [line for line in out.splitlines() if line.startswith("  cuda ")]
        assert words in line
