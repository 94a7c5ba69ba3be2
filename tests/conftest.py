import collections
import os
import signal
import tempfile

import hypothesis
import pytest
import torch

import cuda_emulated
import tiers

# A script's background job is started with SIGINT ignored, and so would be every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, so that a failure can be repeated; no limit on the time of one.
COMMON = {"deadline": None, "derandomize": True, "database": None}
hypothesis.settings.register_profile("few", max_examples=8, **COMMON)
hypothesis.settings.register_profile("many", max_examples=60, **COMMON)
# Other examples in every run; what fails is printed in a form that repeats it.
hypothesis.settings.register_profile("fuzz", deadline=None, database=None, print_blob=True)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run every combination and the tests marked thorough")
    parser.addoption("--fuzz", type=int, metavar="N", help="make N random calls in all, and run no other tests")
    parser.addoption("--require-gpu", action="store_true", help="a test that needs a GPU fails where it is skipped")


def pytest_configure(config):
    tiers.ALL = config.getoption("--all")
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers share the controller's folder
        # The key of torch.compile's cache does not contain what an operator returns: a graph of an earlier build would
        # be loaded. A folder of its own is removed when the controller exits.
        config.compiled_graphs = tempfile.TemporaryDirectory(prefix="pruneopd-inductor-", ignore_cleanup_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = config.compiled_graphs.name
    hypothesis.settings.load_profile("fuzz" if config.getoption("--fuzz") else "many" if tiers.ALL else "few")
    # Small tensors: waiting for another thread takes longer than computing, and pytest-xdist uses the processors.
    torch.set_num_threads(1)
    if config.getoption("--require-gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--require-gpu: torch sees no GPU")


def pytest_report_header(config):
    missing = []
    if not torch.cuda.is_available():
        missing.append("no GPU that torch sees: tests that need one are left out")
    if tiers.ALL and not cuda_emulated.has_ptx():
        missing.append("`make test-cuda` found no nvcc: tests of the compiled PTX are left out")
    return missing


def pytest_collection_modifyitems(config, items):
    without = [] if tiers.ALL else ["thorough"]
    without += [] if torch.cuda.is_available() else ["gpu"]
    left_out = {item for item in items if any(item.get_closest_marker(name) for name in without)}
    calls = config.getoption("--fuzz")
    if calls:
        left_out |= {item for item in items if not item.get_closest_marker("fuzz")}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    if calls:
        tiers.CALLS_PER_WEIGHT = calls / sum(tiers.weight(item.callspec.params["impl"]) for item in items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" and item.config.getoption("--fuzz"):
        report.user_properties.append(("random calls", (str(item.callspec.params["impl"]), tiers.counted)))
        tiers.counted = 0
    if report.skipped and item.get_closest_marker("gpu") and item.config.getoption("--require-gpu"):
        report.outcome, report.longrepr = "failed", f"--require-gpu: {call.excinfo.value}"
    return report


def pytest_terminal_summary(terminalreporter):
    calls = collections.Counter()
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, (impl, count) in report.user_properties:
            if name == "random calls":
                calls[impl] += count
    if calls:
        terminalreporter.write_line(f"{calls.total()} random calls within their budget: {dict(calls)}")


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
