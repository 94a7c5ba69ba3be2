"""The mutations still apply; scripts/mutate.py parses a test's failure."""

import pytest

from scripts import mutate
from scripts.mutations import MUTATIONS, Mutation


def test_every_mutation_applies():
    assert len({*map(mutate.title, MUTATIONS)}) == len(MUTATIONS) >= 30
    for mutation in MUTATIONS:
        assert mutation.new != mutation.old and mutation.new in mutate.mutated(mutation)


def test_a_mutation_needs_its_text_once_and_is_undone(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("x < 1\ny < 1\n")
    with mutate.applied(Mutation("a.py", "x <", "x <="), tmp_path):
        assert file.read_text() == "x <= 1\ny < 1\n"
    assert file.read_text() == "x < 1\ny < 1\n"
    for old, found in ((" < 1", 2), ("x < 2", 0)):
        with pytest.raises(mutate.InvalidMutationError, match=f"must have this once, has it {found} times"):
            mutate.mutated(Mutation("a.py", old, ""), tmp_path)


def test_the_first_failure_is_named():
    output = "..F\nFAILED tests/ops/test_gold.py::test_a - assert 1 == 2\nmake: *** [test-python] Error 1\n"
    assert mutate.first_failure(output, "test-python") == "tests/ops/test_gold.py::test_a"
    assert mutate.first_failure("a race\n", "test-cuda") == "test-cuda: a race"
    with pytest.raises(mutate.InvalidMutationError):
        mutate.first_failure("no tests ran in 0.1s\n", "test-python")
