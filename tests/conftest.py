import signal

import hypothesis
import pytest
import torch

# A script's background job is started with SIGINT ignored, and so would be every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, so that a failure can be repeated; no limit on the time of one.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40, database=None)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="a test that needs a GPU fails where it is skipped")


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
