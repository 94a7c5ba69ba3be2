"""Calls `patch_verl` on import, for verl's `external_lib` or `VERL_USE_EXTERNAL_MODULES`."""

from .patch import patch_verl

patch_verl()
