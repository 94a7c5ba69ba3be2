import hypothesis
import pytest
import torch

# The same examples in every run, so that a failure can be repeated; no limit on the time of one.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40, database=None)
hypothesis.settings.load_profile("tests")


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
