"""The teacher, and students made from it: with rounded weights, or with layers removed as depth pruning does."""

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .problems import DemoError, gguf_file


class Teacher(NamedTuple):
    """A causal language model in float32 and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_teacher(folder: Path) -> Teacher:
    """Loads a model and its tokenizer from a folder with a GGUF file or a transformers checkpoint; never downloads."""
    messages: Any = logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    source = {"gguf_file": name} if (name := gguf_file(folder)) else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **source)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **source)
    except Exception as error:  # whatever the loader meets in a file that is not what it says
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DemoError(f"the model in {folder} cannot be loaded: {reason}") from error
    if tokenizer.chat_template is None or not hasattr(model.base_model, "layers"):
        raise DemoError(f"the model in {folder} is not a Llama-like model with a chat template")
    tokenizer.padding_side = "left"  # responses of a batch then begin at the same position
    return Teacher(model.eval().requires_grad_(False), tokenizer)


@torch.no_grad()
def least_needed_layers(
    model: PreTrainedModel, token_ids: Tensor, attention_mask: Tensor, counts: Sequence[int]
) -> list[range]:
    """For each count the block of so many consecutive layers that turns the hidden state least.

    Measured as 1 - cosine between the block's input and its output, mean over tokens, as in "The Unreasonable
    Ineffectiveness of the Deeper Layers" (arXiv:2403.17887).

    Args:
        model: The model to be cut.
        token_ids: `[B, P]`: the text on which it is measured.
        attention_mask: `[B, P]`, 0 at padding.
        counts: How many layers to remove, each less than the model has.
    """
    states = model(input_ids=token_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
    states = [state[attention_mask.bool()] for state in states]
    blocks = []
    for count in counts:
        pairs = zip(states, states[count:], strict=False)
        turns = torch.stack([1 - torch.cosine_similarity(before, after, dim=-1).mean() for before, after in pairs])
        first = int(turns.argmin())
        blocks.append(range(first, first + count))
    return blocks


def remove_layers(model: PreTrainedModel, layers: Collection[int]) -> PreTrainedModel:
    """A copy of a Llama-like model without the given layers (counted from 0)."""
    student = copy.deepcopy(model)
    decoder: Any = student.base_model
    kept = [layer for index, layer in enumerate(decoder.layers) if index not in layers]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index  # its place in the KV cache
    decoder.layers = nn.ModuleList(kept)
    student.config.num_hidden_layers = len(kept)
    return student


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
