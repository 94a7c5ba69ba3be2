"""Write the type stubs of the functions that are derived from the operators' declarations.

    python -m scripts.stubs          # writes them
    python -m scripts.stubs --check  # fails if one is not up to date

Type checkers and editors read these files. Defaults are left out, as usual in stubs: they stand in the declarations.
"""

import inspect
import sys
import textwrap
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pruneopd_kernels.ops import OPERATORS, Operator

PACKAGE = Path(__file__).parents[1] / "pruneopd_kernels"
HEAD = "# Written by scripts/stubs.py from the declarations in pruneopd_kernels/ops.\n# fmt: off\n"


def signature(op: Any, tensor: str, result: str, extra: str = "", without: str = "impl") -> str:
    """Return one function of a stub; `tensor` takes the place of Tensor, `extra` is one more keyword argument."""
    words, keyword_only = [], False
    for name, parameter in op.signature.parameters.items():
        if name == without:
            continue
        if parameter.kind is Parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            words.append("*")
        default = "" if parameter.default is Parameter.empty else " = ..."
        words.append(f"{name}: {parameter.annotation.replace('Tensor', tensor)}{default}")
    words += [f"{extra} = ..."] if extra else []
    # Only between arguments may a line break.
    body = textwrap.fill(", ".join(words).replace(" ", "\0").replace(",\0", ", "), 112, break_on_hyphens=False)
    return f"def {op.name}(\n{textwrap.indent(body.replace(chr(0), ' '), '    ')},\n) -> {result}: ...\n"


def host() -> str:
    imports = """from typing import Any

import numpy as np

from .checks import Metric, RewardWeight
from .ops import Reliability, ReliabilityFromDrift, ReliabilityFromTopk, TokenStats

Array = np.ndarray[Any, np.dtype[Any]]
WHY_NOT: str | None

"""
    ops = [op for op in OPERATORS.values() if not op.saved]
    extra = "num_threads: int | None"
    return HEAD + imports + "".join(signature(op, "Array", result_of(op), extra) for op in ops)


def reference() -> str:
    imports = f"""from typing import Any

from torch import Tensor

from ..checks import Metric, RewardWeight
from ..ops import {results()}

COMPUTE: dict[str, Any]

"""
    return HEAD + imports + "".join(signature(op, "Tensor", result_of(op)) for op in OPERATORS.values())


def parallel() -> str:
    imports = f"""from torch import Tensor
from torch.distributed import ProcessGroup

from ..checks import Metric, RewardWeight
from ..ops import {results(lambda op: "student_logits" in op.tensors)}
from ..ops._operator import Impl

"""
    ops = [op for op in OPERATORS.values() if "student_logits" in op.tensors]
    extra = "group: ProcessGroup | None"
    return HEAD + imports + "".join(signature(op, "Tensor", result_of(op), extra, without="") for op in ops)


def linear() -> str:
    from pruneopd_kernels import linear

    imports = """from torch import Tensor

from ..checks import Metric, RewardWeight
from ..ops import Reliability, TokenStats
from ..ops._operator import Impl
from .linear_opd_loss import LinearOpdLoss as LinearOpdLoss
from .linear_opd_loss import Loss, Reduction

"""
    functions = (linear.linear_opd_loss, linear.linear_reliability, linear.linear_token_stats)
    declared = [SimpleNamespace(name=f.__name__, signature=inspect.signature(f)) for f in functions]
    return (
        HEAD + imports + "".join(signature(op, "Tensor", op.signature.return_annotation, without="") for op in declared)
    )


def result_of(op: Operator) -> str:
    return op.result.__name__ if op.result else "Tensor"


def results(has: Callable[[Operator], bool] = lambda op: True) -> str:
    return ", ".join(sorted(op.result.__name__ for op in OPERATORS.values() if op.result and has(op)))


STUBS = {
    "host.pyi": host,
    "linear/__init__.pyi": linear,
    "parallel/__init__.pyi": parallel,
    "reference/__init__.pyi": reference,
}


def main() -> int:
    for name, render in STUBS.items():
        path, text = PACKAGE / name, render()
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"{path.relative_to(PACKAGE.parent)} is out of date; python -m scripts.stubs writes it")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
