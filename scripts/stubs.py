"""Write the type stubs of the functions that are derived from the operators' declarations.

    python -m scripts.stubs          # writes them
    python -m scripts.stubs --check  # fails if one is not up to date

Type checkers and editors read these files. Defaults are left out, as usual in stubs: they stand in the declarations.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from inspect import Parameter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pruneopd_kernels import checks, linear_opd_loss
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


def imported(module: str, names: Iterable[str]) -> str:
    """Return an import of these names, as ruff formats it."""
    names = sorted(names)
    line = f"from {module} import {', '.join(names)}\n"
    each = "".join(f"    {name},\n" for name in names)
    return line if len(line) <= 121 else f"from {module} import (\n{each})\n"


def stub(before: str, package: str, functions: Iterable[str], after: str = "", among: str = "") -> str:
    """Return a stub of functions; the types in their signatures are imported from the package at `package`."""
    body = "".join(functions)
    words = set(re.findall(r"\w+", body))
    types = imported(f"{package}checks", (name for name in words if name in checks.KINDS and hasattr(checks, name)))
    results = imported(f"{package}ops", words & {op.result.__name__ for op in OPERATORS.values() if op.result})
    impl = imported(f"{package}ops._operator", ["Impl"]) if "Impl" in words else ""
    return f"{HEAD}{before}\n{types}{among}{results}{impl}{after}{body}"


def host() -> str:
    before = "from typing import Any\n\nimport numpy as np\n"
    after = "\nArray = np.ndarray[Any, np.dtype[Any]]\nWHY_NOT: str | None\n\n"
    ops = [op for op in OPERATORS.values() if not op.saved]
    return stub(before, ".", [signature(op, "Array", result_of(op), "num_threads: int | None") for op in ops], after)


def reference() -> str:
    before, after = "from typing import Any\n\nfrom torch import Tensor\n", "\nCOMPUTE: dict[str, Any]\n\n"
    return stub(before, "..", [signature(op, "Tensor", result_of(op)) for op in OPERATORS.values()], after)


def parallel() -> str:
    before = "from torch import Tensor\nfrom torch.distributed import ProcessGroup\n"
    ops = [op for op in OPERATORS.values() if any(name.endswith("logits") for name in op.tensors)]
    among = "from ..linear.linear_opd_loss import LinearOpdLoss, Loss, Reduction\n"
    extra = "group: ProcessGroup | None"
    signatures = [signature(op, "Tensor", result_of(op), extra, without="") for op in ops]
    signatures.append(of_linear(linear_opd_loss, extra))
    return stub(before, "..", signatures, "\n", among)


def linear() -> str:
    from pruneopd_kernels import linear

    after = """from .linear_opd_loss import LinearOpdLoss as LinearOpdLoss
from .linear_opd_loss import Loss, Reduction

"""
    functions = [function for name, function in sorted(vars(linear).items()) if inspect.isfunction(function)]
    signatures = [of_linear(function) for function in functions]
    return stub("from torch import Tensor\n", "..", signatures, after)


def of_linear(function: Callable[..., Any], extra: str = "") -> str:
    declared = SimpleNamespace(name=function.__name__, signature=inspect.signature(function))
    return signature(declared, "Tensor", declared.signature.return_annotation, extra, without="")


def result_of(op: Operator) -> str:
    return op.result.__name__ if op.result else "Tensor"


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
