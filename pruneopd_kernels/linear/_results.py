"""`linear_opd_loss` with everything that its passes find, which the trainers of `integrations` log."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ._declaration import from_hidden_states
from .linear_opd_loss import check, linear_opd_loss
from .linear_opd_loss import results as compute

__all__ = ["check", "compute", "linear_opd_results"]


@from_hidden_states("reliability")
@functools.wraps(linear_opd_loss, assigned=("__doc__", "__name__"), updated=())
def linear_opd_results(**arguments: Any) -> dict[str, Tensor]: ...
