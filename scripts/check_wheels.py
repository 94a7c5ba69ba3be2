"""Installs what `make wheels` has built into clean environments, and runs it: `make test-wheels`.

For each Python that is found: its wheel without torch, where the operators over NumPy arrays work; then for each torch
its wheel, the CUDA wheel beside it, and the pure wheel in its place. A torch that has been built for CUDA is gigabytes;
each environment is removed before the next one is made.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from pruneopd_kernels import __version__
from scripts.wheels import ROOT, Python, ask, find_pythons

FOLDER = ROOT / "build" / "wheels" / "clean"
HOST = """
import sys
import numpy as np
from pruneopd_kernels import host
logits = np.random.default_rng(0).standard_normal((2, 5, 100), dtype=np.float32)
assert host.reliability(logits, -logits, k=4, w_drop=0.25).effective_length.tolist() == [3, 3]
try:
    host.reliability(logits, logits, k=0)
except ValueError as error:
    assert str(error).startswith("reliability: k must "), error
assert "torch" not in sys.modules
"""
REFUSALS = """
import torch, pruneopd_kernels
logits = torch.randn(1, 2, 30)
try:
    torch.ops.pruneopd_cpp.reliability(logits, logits, k=0)
except RuntimeError as error:  # thrown in C++, through torch
    assert str(error).startswith("reliability: k must "), error
else:
    raise SystemExit("no error")
"""
REFERENCE = """
import torch, pruneopd_kernels as po
logits = torch.randn(2, 5, 100)
assert torch.equal(po.reliability(logits, -logits).rewards, po.reference.reliability(logits, -logits).rewards)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist", help="where the files are")
    parser.add_argument("--python", nargs="+", help="interpreters; by default one for each wheel")
    parser.add_argument(
        "--torch", nargs="*", default=["torch==2.11.0", "torch"], help="what pip is asked for, each in turn"
    )
    arguments = parser.parse_args()
    pythons = [ask(command) for command in arguments.python] if arguments.python else find_pythons()
    for python in pythons:
        check_host(python, arguments.wheels.resolve())
        for torch in arguments.torch:
            check_operators(python, torch, arguments.wheels.resolve())


def check_host(python: Python, wheels: Path) -> None:
    environment = clean(python, "numpy")
    install(environment, the_only(wheels, f"pruneopd_kernels-{__version__}-{python.tag}-{python.tag}-*.whl"))
    execute(environment, "-c", HOST)
    lines = usable(environment)
    assert "not usable" in lines["operators"] and lines["host"] == "usable", lines
    print(f"Python {python.version} without torch: the operators over NumPy arrays run")


def check_operators(python: Python, torch: str, wheels: Path) -> None:
    environment = clean(python, "numpy", torch)
    install(environment, the_only(wheels, f"pruneopd_kernels-{__version__}-{python.tag}-{python.tag}-*.whl"))
    execute(environment, "-c", REFUSALS)
    execute(environment, "-c", HOST)
    print(execute(environment, str(ROOT / "scripts" / "abi.py")), end="")
    lines = usable(environment)
    assert "takes cpp on the CPU" in lines["auto"] and lines["cpp"].startswith("usable"), lines
    assert "is missing" in lines["cuda"] and "pruneopd-kernels[cuda13]" in lines["cuda"], lines
    for wheel in wheels.glob("pruneopd_kernels_cuda13-*.whl"):
        install(environment, wheel)
        print(execute(environment, str(ROOT / "scripts" / "abi.py")), end="")
        assert "is missing" not in usable(environment)["cuda"]
    install(environment, the_only(wheels, f"pruneopd_kernels-{__version__}-py3-none-any.whl"))
    execute(environment, "-c", REFERENCE)
    lines = usable(environment)
    assert "takes reference on the CPU" in lines["auto"], lines
    print(f"Python {python.version}, torch {lines['torch']}: the pure wheel takes the reference")


def clean(python: Python, *requirements: str) -> Path:
    """An environment that has these packages and nothing else."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run([python.command, "-m", "venv", FOLDER], check=True)
    execute(FOLDER, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)
    return FOLDER


def install(environment: Path, wheel: Path) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--force-reinstall"]
    execute(environment, "-m", "pip", "install", *options, str(wheel))


def usable(environment: Path) -> dict[str, str]:
    """What `python -m pruneopd_kernels` says of each implementation."""
    first, *lines = execute(environment, "-m", "pruneopd_kernels").splitlines()
    assert __version__ in first, first
    return dict(line.split(maxsplit=1) for line in lines)


def execute(environment: Path, *arguments: str) -> str:
    """Run that environment's Python, away from this checkout."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(environment / "bin" / "python"), *arguments]
    done = subprocess.run(command, cwd=environment, env=variables, text=True, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{done.stderr}\ncheck_wheels: {' '.join(arguments[:3])} failed; its words stand above")
    return done.stdout


def the_only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"check_wheels: {folder} must have one {pattern}, got {len(found)}: make wheels")
    return found[0]


if __name__ == "__main__":
    main()
