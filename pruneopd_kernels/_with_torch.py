"""Fills `torch.ops.pruneopd` as soon as both torch and this package are imported, without importing torch for it."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register() -> None:
    if sys.modules.get("torch") is not None:
        import_module(f"{__package__}.ops")
    else:
        sys.meta_path.insert(0, _AfterTorch())


class _AfterTorch(MetaPathFinder):
    """Finds torch as the other finders do, and registers the operators at the end of its import.

    Without it `import pruneopd_kernels, torch`, the order that import sorters make, would leave `torch.ops.pruneopd`
    empty. It steps aside once torch is imported, not when it is found: many packages only ask whether torch is there.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                import_module(f"{__package__}.ops")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
