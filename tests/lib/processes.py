"""Python in a process of its own, warnings as errors: for what an import does, and for what a crash would end."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pruneopd_kernels

PACKAGE = Path(pruneopd_kernels.__file__).parent  # the one under test, installed or not
ROOT = PACKAGE.parent
TESTS = Path(__file__).parents[1]
# What tests may import by name; pyproject.toml has the same list for pytest.
FOLDERS = [str(TESTS / name) for name in ("lib", "ops", "torch", "cuda", "triton", "distributed", "trainer", "tools")]


def copy_package(folder, *left_out, name="pruneopd_kernels"):
    """Copy the package under test into a folder."""
    shutil.copytree(PACKAGE, folder / name, ignore=shutil.ignore_patterns("__pycache__", *left_out))
    shutil.copy(ROOT / "pruneopd_autoload.py", folder)


def command(*arguments, code=None):
    return [sys.executable, "-W", "error", *(["-c", textwrap.dedent(code)] if code else []), *map(str, arguments)]


def environment(root=ROOT):
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *FOLDERS])}


def run(*arguments, code=None, root=ROOT, cwd=None):
    """What `python <arguments>` or `python -c <code> <arguments>` printed; an exit status other than 0 is a failure."""
    done = subprocess.run(command(*arguments, code=code), capture_output=True, text=True, timeout=300,
                          env=environment(root), cwd=cwd)  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.stderr == "", done.stderr
    return done.stdout
