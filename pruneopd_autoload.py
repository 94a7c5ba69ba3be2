"""Registers the operators at the end of `import torch`, if `pruneopd_kernels` has been imported before it.

torch calls the entry points of the group `torch.backends` for this. This module stands outside of the package, because
importing it must not import the package.
"""

import sys


def register() -> None:
    if "pruneopd_kernels" in sys.modules:
        import pruneopd_kernels.dispatch.registration  # noqa: F401
