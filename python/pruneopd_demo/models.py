"""The teacher, and a student made from it by rounding weights; others are made by removing layers."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruneopd_trainer.models import load_model, load_tokenizer

from .problems import DemoError


class Teacher(NamedTuple):
    """A causal language model in float32 and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_teacher(folder: Path) -> Teacher:
    """Loads a model and its tokenizer from a folder with a GGUF file or a transformers checkpoint; never downloads."""
    model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    if tokenizer.chat_template is None or not hasattr(model.base_model, "layers"):
        raise DemoError(f"the model in {folder} is not a Llama-like model with a chat template")
    return Teacher(model.requires_grad_(False), tokenizer)


@torch.no_grad()
def round_weights(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A copy whose layers' matrices are rounded to `bits` bits: symmetric, one scale for each row."""
    student = copy.deepcopy(model)
    decoder: Any = student.base_model
    for weight in decoder.layers.parameters():
        if weight.ndim == 2:
            step = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
            weight.copy_((weight / step.clamp_min(1e-12)).round() * step)
    return student
