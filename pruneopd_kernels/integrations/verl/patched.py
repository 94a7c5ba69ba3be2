"""Calls `patch_verl` when it is imported: for verl's `external_lib`, or for `VERL_USE_EXTERNAL_MODULES`."""

from .patch import patch_verl

patch_verl()
