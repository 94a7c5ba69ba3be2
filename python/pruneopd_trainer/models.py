"""Models and tokenizers from local folders, and the student and teacher of a run."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .errors import TrainerError
from .folders import gguf_file, model_folder, smollm2_folder

if TYPE_CHECKING:
    from .config import TrainConfig

TINY = Path(__file__).parent / "tiny"
TINY_STUDENTS = ("low", "high", "bilingual")
REMOVED_LAYERS = {"drop1": 1, "drop4": 4, "drop10": 10}
"""How many of SmolLM2's layers the students of the preset smollm2 lack."""
CUT_PROMPTS = 12
"""Word problems on which it is measured which layers are needed least."""
DTYPES: dict[str, Any] = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}
SHOWN = 3
"""Differing tokens that an error tells of."""


class Pair(NamedTuple):
    """A student, its teacher, and what they have in common."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    """Without gradients, in eval mode."""
    tokenizer: PreTrainedTokenizerBase
    """The student's; the teacher's has the same tokens."""
    vocab_size: int
    """How many ids the tokenizers have; a head may be padded beyond."""
    end_ids: list[int]
    """The tokens that end a response, the tokenizer's own first."""


def load_pair(config: TrainConfig, student: Path | None = None) -> Pair:
    """Loads the models of a run: those of the preset, or those in the configuration's folders.

    The student's parameters are float32, whatever it computes in.

    Args:
        config: preset, pair, student, teacher and teacher_precision.
        student: A folder in place of the configuration's student, such as a checkpoint's.

    Raises:
        TrainerError: A model cannot be loaded, the preset has no such student, or the tokenizers differ.
    """
    student, teacher = student or config.student, config.teacher
    if student is None:
        known = TINY_STUDENTS if config.preset == "tiny" else tuple(REMOVED_LAYERS)
        if config.pair not in known:
            rule = f"be one of {', '.join(known)} with the preset {config.preset}"
            raise TrainerError(f"TrainConfig: pair must {rule}, got {config.pair!r}")
    if config.preset == "tiny":
        student, teacher = student or TINY / config.pair, teacher or TINY / "teacher"
    if student is not None:
        teacher = teacher or smollm2_folder()
        student_model, tokenizer = load_model(student, "float32"), load_tokenizer(student)
    else:
        smollm2, tokenizer = load_model(smollm2_folder(), "float32"), load_tokenizer(smollm2_folder())
        student_model = cut(smollm2, tokenizer, REMOVED_LAYERS[config.pair])
        if teacher is None:
            smollm2 = smollm2.bfloat16() if config.teacher_precision == "bfloat16" else smollm2
            return make_pair(student_model, smollm2, tokenizer, tokenizer)
    teacher_model = load_model(teacher, config.teacher_precision)
    return make_pair(student_model, teacher_model, tokenizer, load_tokenizer(teacher))


def make_pair(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> Pair:
    """Puts a student and a teacher together.

    Raises:
        TrainerError: The tokenizers differ, a model has no place for all of their tokens, or nothing ends a response.
    """
    vocab_size = same_tokenizer(student_tokenizer, teacher_tokenizer)
    for name, model in (("student", student), ("teacher", teacher)):
        modules: dict[str, Any] = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
        for part, module in modules.items():
            rows = len(module.weight)
            if rows < vocab_size:
                raise TrainerError(f"the {name}'s {part} must have a row for each of {vocab_size} tokens, got {rows}")
    end_ids = [student_tokenizer.eos_token_id, *configured_end_ids(student), *configured_end_ids(teacher)]
    end_ids = list(dict.fromkeys(end for end in end_ids if end is not None and end < vocab_size))
    if not end_ids:
        raise TrainerError(f"the tokenizer in {student_tokenizer.name_or_path} has no token that ends a response")
    return Pair(student.train(), teacher.eval().requires_grad_(False), student_tokenizer, vocab_size, end_ids)


def check_context(pair: Pair, prompt_length: int, response_length: int) -> None:
    """Raises TrainerError where prompt and response may have more tokens than a model has positions for."""
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and prompt_length + response_length > limit:
            rule = f"have at most {limit} tokens, the {name}'s max_position_embeddings"
            raise TrainerError(f"prompt and response must {rule}, got {prompt_length} and up to {response_length}")


def configured_end_ids(model: PreTrainedModel) -> list[int]:
    """The tokens at which the model's generation configuration stops: chat models often have several."""
    settings: Any = model.generation_config
    ends = settings.eos_token_id if settings is not None else None
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def load_model(folder: Path, precision: str) -> PreTrainedModel:
    """Loads a causal language model from a folder with a GGUF file or a transformers checkpoint; never downloads.

    It comes in eval mode and without dropout, so that in training mode it is still the model that sampled.

    Args:
        folder: Where the model lies.
        precision: Of its parameters: "float32", "bfloat16", or "auto": as the folder has it.

    Raises:
        TrainerError: The folder is missing, or the model is broken or lacks weights.
    """
    quiet_transformers()
    source = _source(folder)
    try:
        config: Any = AutoConfig.from_pretrained(folder, **source)
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            for name, value in part.to_dict().items():
                if "drop" in name and isinstance(value, float):
                    setattr(part, name, 0.0)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=DTYPES[precision],
            ignore_mismatched_sizes=True,  # to be reported below: transformers' own error does not name them
            output_loading_info=True,
            **source,
            **_unpacked(source),
        )
    except Exception as error:  # whatever the loader meets in a file that is not what it says
        raise _not_loadable("model", folder, error) from error
    model, report = loaded
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise TrainerError(
            f"the model in {folder} cannot be loaded: {name} must have shape {list(expected)}, got {list(found)}"
        )
    if missing := sorted(report["missing_keys"]):
        raise TrainerError(f"the model in {folder} cannot be loaded: {len(missing)} weights are missing: {missing[0]}")
    prepared: PreTrainedModel = model.eval()
    _make_savable(prepared)
    return prepared


def _make_savable(model: PreTrainedModel) -> None:
    """Of a generation configuration that transformers refuses to save, only the special tokens stay."""
    settings: Any = model.generation_config
    try:
        if settings is not None:
            settings.validate(strict=True)
    except ValueError:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(settings, name) for name in ids})


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that pads on the left, with its end token where it has no other to pad with; never downloads.

    Raises:
        TrainerError: The folder is missing or holds no tokenizer, or it has neither a padding token nor an end token.
    """
    quiet_transformers()
    source = _source(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **source)
    except Exception as error:  # as above
        raise _not_loadable("tokenizer", folder, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one where there are no files
        raise TrainerError(f"the model folder {folder} has no tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise TrainerError(f"the tokenizer in {folder} must have a padding token or an end token, got neither")
    tokenizer.padding_side = "left"  # responses of a batch then begin at the same position
    return tokenizer


def quiet_transformers() -> None:
    """Turns off what loaders print: what matters is raised as an error."""
    messages: Any = logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()


def _source(folder: Path) -> dict[str, Any]:
    """Arguments of `from_pretrained`: no network, no code from the folder (transformers would ask on the terminal)."""
    name = gguf_file(model_folder(folder))
    return {"local_files_only": True, "trust_remote_code": False, **({"gguf_file": name} if name else {})}


def _unpacked(source: dict[str, Any]) -> dict[str, Any]:
    """Has a GGUF file's weights unpacked, so that they can be trained and saved; older transformers do so anyway."""
    settings = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": settings(dequantize=True)} if "gguf_file" in source and settings else {}


def _not_loadable(what: str, folder: Path, error: Exception) -> TrainerError:
    return TrainerError(f"the {what} in {folder} cannot be loaded: {_reason(error)}")


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def same_tokenizer(student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> int:
    """Checks that every id is the same token to both.

    Returns:
        How many ids there are: `vocab_size` for the operators, since the heads may be padded to different sizes.

    Raises:
        TrainerError: Some ids differ.
    """
    student, teacher = (
        {index: token for token, index in tokenizer.get_vocab().items()}
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    )
    differing = sorted(index for index in student.keys() | teacher.keys() if student.get(index) != teacher.get(index))
    if differing:
        shown = ", ".join(
            f"{index} ({_shown(student.get(index))} and {_shown(teacher.get(index))})" for index in differing[:SHOWN]
        )
        more = ", ..." if len(differing) > SHOWN else ""
        raise TrainerError(
            f"the student and the teacher must have the same tokenizer, got {len(differing)} ids that differ: "
            f"{shown}{more}"
        )
    return max(student) + 1


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens of prompts: each as a user's turn of a chat if the tokenizer has a chat template, else as plain text.

    Returns:
        Token ids and their mask, both `[B, P]` int64, padded on the left; the mask is 0 at padding.

    Raises:
        TrainerError: A prompt has no tokens, or does not fit into the template.
    """
    try:
        if tokenizer.chat_template is None:
            encoded: Any = tokenizer(list(prompts), padding=True, return_tensors="pt")
        else:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            encoded = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
            )
    except Exception as error:  # a template is a program
        raise TrainerError(f"the prompts from {prompts[0]!r} on cannot be tokenized: {_reason(error)}") from error
    token_ids, mask = encoded["input_ids"].long(), encoded["attention_mask"].long()
    for prompt, count in zip(prompts, mask.sum(1).tolist(), strict=True):
        if count == 0:
            raise TrainerError(f"a prompt must have at least one token, got {prompt!r}")
    return token_ids, mask


def cut(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> PreTrainedModel:
    """A copy of a Llama-like model without the `count` consecutive layers that it needs least on word problems."""
    from .data import WordProblems  # here, since the demonstration loads models without reasoning-gym

    problems = WordProblems(seed=0)
    prompts = encode(tokenizer, [problems.held_out(index).prompt for index in range(CUT_PROMPTS)])
    [block] = least_needed_layers(model, *prompts, [count])
    return remove_layers(model, block)


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
    kept = [index for index in range(len(decoder.layers)) if index not in layers]
    decoder.layers = nn.ModuleList([decoder.layers[index] for index in kept])
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index  # its place in the KV cache
    student.config.num_hidden_layers = len(kept)
    if getattr(student.config, "layer_types", None) is not None:
        student.config.layer_types = [student.config.layer_types[index] for index in kept]
    return student
