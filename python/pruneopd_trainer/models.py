"""Models and tokenizers from local folders, and the student and teacher of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .errors import TrainerError, reason

if TYPE_CHECKING:
    from .config import TrainConfig

DTYPES: dict[str, Any] = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}
SHOWN = 3  # differing tokens that an error names


class Pair(NamedTuple):
    """A student, its teacher, and what they have in common."""

    student: PreTrainedModel
    teacher: PreTrainedModel  # in eval mode, without gradients
    tokenizer: PreTrainedTokenizerBase  # the student's; the teacher's has the same tokens
    vocab_size: int  # ids of the tokenizers; a head may be padded beyond
    end_ids: list[int]  # tokens that end a response, the tokenizer's own first


def load_pair(config: TrainConfig, student: Path | None = None) -> Pair:
    """Load the models in the configuration's folders, or the student of a checkpoint; its parameters are float32."""
    student, teacher = student or config.student, config.teacher
    if student is None or teacher is None:
        name = "student" if student is None else "teacher"
        raise TrainerError(f"TrainConfig: {name} must be a model folder, got None")
    models = load_model(student, "float32"), load_model(teacher, config.teacher_precision)
    return make_pair(*models, load_tokenizer(student), load_tokenizer(teacher))


def make_pair(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> Pair:
    """Combine a student and a teacher, which must have the same tokenizer and rows for all of its tokens."""
    vocab_size = same_tokenizer(student_tokenizer, teacher_tokenizer)
    for name, model in (("student", student), ("teacher", teacher)):
        modules: dict[str, Any] = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
        for part, module in modules.items():
            if (rows := len(module.weight)) < vocab_size:
                raise TrainerError(f"the {name}'s {part} must have a row for each of {vocab_size} tokens, got {rows}")
    end_ids = [student_tokenizer.eos_token_id]
    for model in (student, teacher):  # chat models often stop at several tokens
        settings: Any = model.generation_config
        ends = settings.eos_token_id if settings is not None else None
        end_ids += ends if isinstance(ends, list) else [ends]
    end_ids = list(dict.fromkeys(end for end in end_ids if end is not None and end < vocab_size))
    if not end_ids:
        raise TrainerError(f"the tokenizer in {student_tokenizer.name_or_path} has no token that ends a response")
    return Pair(student.train(), teacher.eval().requires_grad_(False), student_tokenizer, vocab_size, end_ids)


def check_context(pair: Pair, prompt_length: int, response_length: int) -> None:
    """Raise TrainerError if prompt and response may have more tokens than a model has positions."""
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and prompt_length + response_length > limit:
            rule = f"have at most {limit} tokens, the {name}'s max_position_embeddings"
            raise TrainerError(f"prompt and response must {rule}, got {prompt_length} and up to {response_length}")


def load_model(folder: Path, precision: str) -> PreTrainedModel:
    """Load a causal language model from a folder with a GGUF file or a transformers checkpoint; never downloads.

    It comes in eval mode and without dropout, so that in training mode it is still the model that sampled. The
    precision of its parameters is "float32", "bfloat16", or "auto": as saved.
    """
    source = _source(folder)
    try:
        if (settings := folder / "generation_config.json").is_file():
            json.loads(settings.read_text())  # transformers takes a broken one for none
        config: Any = transformers.AutoConfig.from_pretrained(folder, **source)
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            for name, value in part.to_dict().items():
                if "drop" in name and isinstance(value, float):
                    setattr(part, name, 0.0)
        gguf = getattr(transformers, "GgufConfig", None) if "gguf_file" in source else None
        # Unpack a GGUF file's weights, so that they can be trained and saved; older transformers do so anyway.
        unpacked = {"quantization_config": gguf(dequantize=True)} if gguf else {}
        # Mismatched sizes are reported below: transformers' own error does not name them.
        how = {"dtype": DTYPES[precision], "ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, **how, **source, **unpacked)
    except Exception as error:  # whatever the loader meets in a broken file
        raise TrainerError(f"the model in {folder} cannot be loaded: {reason(error)}") from error
    model, report = loaded
    mismatched, missing = sorted(report["mismatched_keys"]), sorted(report["missing_keys"])
    broken = [f"{name} must have shape {list(right)}, got {list(found)}" for name, found, right in mismatched]
    broken += [f"{len(missing)} weights are missing: {name}" for name in missing]
    if broken:
        raise TrainerError(f"the model in {folder} cannot be loaded: {broken[0]}")
    generation = model.generation_config
    try:
        if generation is not None:
            generation.validate(strict=True)
    except ValueError:  # transformers would refuse to save it: keep the special tokens only
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = transformers.GenerationConfig(**{name: getattr(generation, name) for name in ids})
    prepared: PreTrainedModel = model.eval()
    return prepared


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the left, with its end token if it has no padding token; never downloads."""
    source = _source(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, **source)
    except Exception as error:  # as above
        raise TrainerError(f"the tokenizer in {folder} cannot be loaded: {reason(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one if there are no files
        raise TrainerError(f"the model folder {folder} has no tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise TrainerError(f"the tokenizer in {folder} must have a padding token or an end token, got neither")
    tokenizer.padding_side = "left"  # responses of a batch then begin at the same position
    return tokenizer


def _source(folder: Path) -> dict[str, Any]:
    """Return arguments of `from_pretrained`: no network, no code from the folder, and a GGUF file's name."""
    messages: Any = logging
    messages.set_verbosity_error()  # what matters is raised as an error
    messages.disable_progress_bar()
    name = gguf_file(model_folder(folder))
    return {"local_files_only": True, "trust_remote_code": False, **({"gguf_file": name} if name else {})}


def model_folder(folder: Path) -> Path:
    """Return the folder if it looks like a model's; raise TrainerError if not."""
    if not os.path.isdir(folder):  # False for a name that no folder can have
        raise TrainerError(f"the model folder {folder} is not there")
    if gguf_file(folder) is None and not (folder / "config.json").is_file():
        raise TrainerError(f"the model folder {folder} has neither a .gguf file nor a config.json")
    return folder


def gguf_file(folder: Path) -> str | None:
    """Return the name of the first .gguf file in the folder, None if there is none."""
    return min((path.name for path in folder.glob("*.gguf")), default=None)


def same_tokenizer(student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> int:
    """Check that every id is the same token to both, and return `vocab_size`: how many ids there are."""
    student, teacher = (
        {index: token for token, index in tokenizer.get_vocab().items()}
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    )

    def shown(index: int) -> str:
        tokens = (vocabulary.get(index) for vocabulary in (student, teacher))
        return f"{index} ({' and '.join('no token' if token is None else repr(token) for token in tokens)})"

    differing = sorted(index for index in student.keys() | teacher.keys() if student.get(index) != teacher.get(index))
    if differing:
        rule = f"must have the same tokenizer, got {len(differing)} ids that differ"
        some = ", ".join(map(shown, differing[:SHOWN])) + (", ..." if len(differing) > SHOWN else "")
        raise TrainerError(f"the student and the teacher {rule}: {some}")
    return max(student) + 1


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokenize prompts: each as a user's turn of a chat if the tokenizer has a chat template, else as plain text.

    Returns token ids and their mask, both `[B, P]` int64, padded on the left; the mask is 0 at padding.
    """
    try:
        if tokenizer.chat_template is None:
            encoded: Any = tokenizer(list(prompts), padding=True, return_tensors="pt")
        else:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            how: Any = {"padding": True, "return_dict": True, "return_tensors": "pt"}
            encoded = tokenizer.apply_chat_template(chats, add_generation_prompt=True, **how)
    except Exception as error:  # a template is a program
        raise TrainerError(f"the prompts from {prompts[0]!r} on cannot be tokenized: {reason(error)}") from error
    token_ids, mask = encoded["input_ids"].long(), encoded["attention_mask"].long()
    for prompt, count in zip(prompts, mask.sum(1).tolist(), strict=True):
        if count == 0:
            raise TrainerError(f"a prompt must have at least one token, got {prompt!r}")
    return token_ids, mask
