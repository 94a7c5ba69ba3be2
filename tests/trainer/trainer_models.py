"""Small random models with the tiny tokenizer, and what the trainer's tests share."""

import json

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pruneopd_lab.tiny.tokenizer import make_tokenizer
from pruneopd_trainer.errors import TrainerError

TOKENIZER = make_tokenizer()


def random_model(seed, *, sharpness=4.0):
    """Return a model of one layer of width 32. Its head is scaled so that some tokens are likely."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id, "bos_token_id": None}
    config = Qwen3Config(vocab_size=len(TOKENIZER), num_key_value_heads=1, head_dim=16, max_position_embeddings=1024,
                         tie_word_embeddings=False, **sizes, **ids)  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness / 0.1)
    return model.eval()


def near(model, seed, distance):
    """Return another model whose logits differ from those of `model`, by `distance`."""
    other = random_model(seed)
    with torch.no_grad():
        for own, given in zip(other.parameters(), model.parameters(), strict=True):
            own.mul_(distance).add_(given, alpha=1 - distance)
    return other


def word_tokenizer(words, unknown=0, **special):
    """Return a tokenizer of these words; others become the unknown token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[unknown]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save(folder, model, tokenizer=TOKENIZER):
    """Write a model folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path, *lines):
    """Write JSON Lines; a string is written as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_lines(path):
    """Return the values of a file of JSON Lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def small_run(folder, steps):
    """Write a student, a teacher and `small.yaml`, which names both and has small values; return the folder."""
    teacher = random_model(1)
    models = {"teacher": save(folder / "teacher", teacher), "student": save(folder / "student", near(teacher, 2, 0.35))}
    values = {
        **{"k": 4, "w_drop": 0.1, "initial_length": 8, "minimum_length": 4, "maximum_length": 24, "length_step": 2},
        **{"margin": 2, "steps": steps, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 0.003},
        **{"eval_every": 2, "eval_prompts": 4, "save_every": 2},
        **{name: str(path) for name, path in models.items()},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(values))
    return folder


def records(out):
    """Return what a run has logged."""
    return read_lines(out / "metrics.jsonl")


def numbers(out):
    """Return the records without what is measured."""
    measured = {"time_s", "peak_memory_mib"}
    return [{key: value for key, value in record.items() if key not in measured} for record in records(out)]


def one_sentence(capsys, status):
    """Return the sentence with which the command line has ended, with status 1."""
    assert status == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pruneopd: ")]
    return line.removeprefix("pruneopd: ")


def refusal(function, *arguments, **options):
    """Return the one sentence of the TrainerError that a call raises."""
    with pytest.raises(TrainerError) as raised:
        function(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)
