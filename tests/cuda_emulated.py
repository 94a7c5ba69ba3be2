"""The CUDA operators, their own source run on the CPU by the emulator: called as those of `pruneopd_kernels.host`."""

import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch

from pruneopd_kernels import host, schemas

BUILT = Path(__file__).parents[1] / "build" / "tests-cuda"


def _load():
    """The compiled module, or why there is none."""
    sys.path.insert(0, str(BUILT))
    try:
        return import_module("_cuda_emulated"), None
    except ImportError as error:
        return None, f"{error}; make test-cuda builds it in {BUILT}"
    finally:
        sys.path.remove(str(BUILT))


MODULE, WHY_NOT = _load()


def call(op, *args, **kwargs):
    """`call("token_stats", student_logits, teacher_logits, k=4)` with NumPy arrays."""
    with mock.patch.multiple(host, _HOST=MODULE, WHY_NOT=WHY_NOT):
        return getattr(host, op)(*args, **kwargs)


def call_private(op, *args, **kwargs):
    """A loss with what it saves, or a backward pass, as in `schemas.private_schemas`; with NumPy arrays.

    `call_private("topk_policy_loss", student_logits, topk_ids, advantages)` is `loss, coefficients, state`.
    """
    assert MODULE is not None, WHY_NOT
    schema = getattr(torch.ops.pruneopd, f"_{op}").default._schema
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.name != "impl"}
    return getattr(MODULE, op)(**defaults | dict(zip(defaults, args, strict=False)) | kwargs, num_threads=0)


def use(multiprocessors, seed=None):
    """How many the device has, which splits few rows over several blocks; threads and blocks in order or shuffled."""
    MODULE.set_emulator(shuffled=seed is not None, seed=seed or 0, multiprocessors=multiprocessors)


BACKWARD = {op: "logprobs_backward" for op in schemas.SAVED} | {"reverse_kl": "reverse_kl_backward"}
