"""A student and a teacher of 96 tokens, a tokenizer and prompts for them, and trainers that need no network."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pruneopd_kernels import PruneConfig
from pruneopd_kernels.integrations.trl import PruneDistillationTrainer
from trl import DistillationConfig, DistillationTrainer

VOCABULARY = 96
UNPRUNED = {"w_drop": 0.0, "w_base": 0.0}
PRUNED = PruneConfig(k=8, threshold=0.7, w_drop=0.1, w_base=0.5)
BUDGET = {"initial": 8, "minimum": 4, "maximum": 16, "step": 2, "margin": 2}
# Without pruning each loss is that of TRL.
LOSSES = {
    "reverse_kl": PruneConfig(**UNPRUNED),
    "topk_policy": PruneConfig(k=VOCABULARY, **UNPRUNED),
    "divergence": PruneConfig(**UNPRUNED),
}
LOGGED = ("loss", "grad_norm", "entropy", "num_tokens")
SETTINGS = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 4,
    "max_completion_length": 20, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "max_grad_norm": 0.5,
    "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def model(seed):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3, bos_token_id=None,
        eos_token_id=1, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def teacher_of(student, noise=0.05):
    """Return a teacher close to the student: some positions drift and some do not."""
    teacher = Qwen3ForCausalLM(student.config)
    teacher.load_state_dict(student.state_dict())
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return teacher


def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="w2", padding_side="left"
    )


def prompts(count=64):
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 9, (count,), generator=random).tolist()
    rows = [torch.randint(2, VOCABULARY, (length,), generator=random).tolist() for length in lengths]
    return Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in rows]})


def trainer(folder, cls=PruneDistillationTrainer, config=DistillationConfig, student=None, given=None, **settings):
    """Return a trainer; `given` goes to its class, `settings` to its configuration."""
    student = student or model(0)
    if config is DistillationConfig:
        given = {"teacher_model": teacher_of(student), **(given or {})}
    return cls(
        model=student,
        args=config(output_dir=str(folder), **{**SETTINGS, **settings}),
        train_dataset=prompts(),
        **{"processing_class": tokenizer(), **(given or {})},
    )


def history(made, *names):
    """Train, and return the values that were logged at each step."""
    made.train()
    return [tuple(record[name] for name in names) for record in made.state.log_history if "grad_norm" in record]


def stock(folder, **settings):
    return trainer(folder, DistillationTrainer, **settings)


def assert_same_steps(got, expected):
    """Two steps; the second follows an update of AdamW, which moves a parameter by the sign of its gradient."""
    assert len(got) == len(expected) == 2
    for ours, theirs, close in zip(got, expected, (1e-5, 5e-5), strict=True):
        assert ours == pytest.approx(theirs, rel=close, abs=close), (ours, theirs)
