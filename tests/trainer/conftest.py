"""Skip these modules if the trainer's own requirements are not installed, as on a GPU machine."""

from importlib.util import find_spec

import pytest

MISSING = [name for name in ("accelerate", "reasoning_gym", "rich", "transformers", "tyro") if find_spec(name) is None]


class Skipped(pytest.Module):
    def collect(self):
        pytest.skip(f"the trainer needs {', '.join(MISSING)}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return Skipped.from_parent(parent, path=module_path) if MISSING else None
