"""What the kernels execute for a position: no order of a row, no width and no k is a cliff.

The counts are those of `python -m bench count`, of nvcc's PTX. They do not depend on the machine.
"""

import pytest

import cuda_emulated
from bench.count import executed

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not cuda_emulated.has_ptx(), reason="there is no nvcc: nothing is counted"),
]

# Rows, V and k of `reliability` in bfloat16 -> instructions of a position's threads / 32, in thousands, at most.
WANTED = {
    ("random", 151936, 16): 99,
    ("random", 151936, 64): 115,
    ("random", 151936, 256): 160,
    ("random", 32000, 16): 30,
    ("random", 32000, 100): 55,
    ("random", 32000, 128): 60,
    ("random", 32000, 256): 90,
    ("random", 50257, 16): 45,
    ("random", 50257, 256): 100,
    ("random", 16384, 64): 35,
    ("ascending", 151936, 16): 110,
    ("ascending", 151936, 64): 140,
    ("ascending", 151936, 256): 230,
    ("ten finite", 151936, 16): 110,
    ("constant", 151936, 16): 110,
    ("constant", 151936, 256): 230,
}
# Other rows may take what an ascending row takes, and short rows what wider ones take.
WANTED |= {("descending", V, k): most for (rows, V, k), most in WANTED.items() if rows == "ascending"}
WANTED |= {("masked", 151936, 16): 110, ("masked", 151936, 64): 140, ("ten finite", 151936, 64): 140}
WANTED |= {("random", 1000, 16): 30, ("random", 1000, 256): 90}


@pytest.mark.parametrize(("rows", "vocabulary", "k"), executed.CASES)
def test_no_row_takes_many_more_instructions_than_another(rows, vocabulary, k):
    row = executed.count(executed.Counted(rows=rows, vocabulary=vocabulary, k=k))
    assert row["of_threads"] <= 1000 * WANTED[rows, vocabulary, k]
    assert row["float64"] <= 1000, "float64 is slow on consumer GPUs"


def test_what_is_counted():
    """A wider row takes more; of equal rows each takes the same; nothing is left over from the call before."""
    narrow, wide, again = (executed.count(executed.Counted("row_stats", vocabulary=v)) for v in (8192, 16384, 8192))
    assert narrow == again
    assert wide["issued"] - narrow["issued"] > 8192 / 32
    assert narrow["issued"] >= narrow["of_threads"] > narrow["float64"] > 0
