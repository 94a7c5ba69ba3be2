import signal

import hypothesis
import pytest
import torch

import tiers

# A script's background job is started with SIGINT ignored, and so would be every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, so that a failure can be repeated; no limit on the time of one.
COMMON = {"deadline": None, "derandomize": True, "database": None}
hypothesis.settings.register_profile("few", max_examples=8, **COMMON)
hypothesis.settings.register_profile("many", max_examples=60, **COMMON)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run every combination and the tests marked thorough")
    parser.addoption("--require-gpu", action="store_true", help="a test that needs a GPU fails where it is skipped")


def pytest_configure(config):
    tiers.ALL = config.getoption("--all")
    hypothesis.settings.load_profile("many" if tiers.ALL else "few")


def pytest_collection_modifyitems(config, items):
    if not tiers.ALL:
        thorough = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=thorough)
        items[:] = [item for item in items if item not in set(thorough)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and a torch that sees it")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and item.get_closest_marker("gpu") and item.config.getoption("--require-gpu"):
        report.outcome, report.longrepr = "failed", f"--require-gpu: {call.excinfo.value}"
    return report


@pytest.fixture(autouse=True)
def empty_outputs_are_filled():
    """In deterministic mode torch fills empty tensors with NaN or the greatest integer: what is not written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
