"""Small random models with the tiny tokenizer, for the trainer's tests."""

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pruneopd_trainer.tiny.tokens import make_tokenizer

TOKENIZER = make_tokenizer()


def random_model(seed: int, *, vocabulary: int = len(TOKENIZER), sharpness: float = 4.0) -> Qwen3ForCausalLM:
    """One layer of width 32; its head is scaled so that it is not indifferent to what comes next."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            pad_token_id=TOKENIZER.pad_token_id,
            eos_token_id=TOKENIZER.eos_token_id,
            bos_token_id=None,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness / 0.1)
    return model.eval()


def near(model: Qwen3ForCausalLM, seed: int, distance: float) -> Qwen3ForCausalLM:
    """Another model whose logits differ from those of `model` a little, or a lot."""
    other = random_model(seed)
    with torch.no_grad():
        for own, given in zip(other.parameters(), model.parameters(), strict=True):
            own.mul_(distance).add_(given, alpha=1 - distance)
    return other


def save(model: Qwen3ForCausalLM, folder: Path) -> Path:
    """Writes a model folder."""
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder
