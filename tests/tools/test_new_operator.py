"""docs/new_operator.md applied to a copy of the tree: the operator passes the suites, and no file is missing."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "new_operator.md").read_text()
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "runs", "site", "__pycache__", "_cuda.so", "*.egg-info")


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.suffix in (".py", ".pyi")
    }


@pytest.mark.thorough
def test_the_worked_example_works(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    before = files(copy)
    for name, text in re.findall(r'^```python3 title="(.*?)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL):
        (copy / name).write_text(text)
    (change,) = re.findall(r"^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    run(copy, "git", "apply", "-", input=change)
    run(copy, sys.executable, "-m", "scripts.stubs")
    suites = "tests/ops/test_values.py", "tests/ops/test_errors.py", "tests/tools/test_documentation.py"
    run(copy, sys.executable, "-m", "pytest", "-q", *suites, "-k", "entropy and (cpp or function or docstring or base)")
    after = files(copy)
    listed = re.search(r"## Files\n\n```text\n(.*?)```", PAGE, re.DOTALL)[1].split()
    assert sorted(name for name in after if after[name] != before.get(name)) == listed


def run(folder, *command, **options):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
