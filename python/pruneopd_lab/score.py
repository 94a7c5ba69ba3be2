"""`pruneopd score`: how far a teacher can be trusted along a student's responses, without training."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from pruneopd_kernels import PruneConfig
from pruneopd_kernels.linear import linear_token_stats
from pruneopd_trainer.atomic import replacing
from pruneopd_trainer.data import Line, read_lines
from pruneopd_trainer.errors import TrainerError
from pruneopd_trainer.models import Pair, check_context, encode, load_model, load_tokenizer, make_pair
from pruneopd_trainer.rollouts import Rollouts, sample, uniforms
from pruneopd_trainer.run_folder import make_folder
from pruneopd_trainer.scoring import follow

BANDS = 8
"""Equal bands of position, from 0 to the greatest length, by which results are told."""
MEASURES = ("overlap", "drift", "weight", "acceptance", "reverse_kl")
TITLES = ("overlap", "drift rate", "weight", "acceptance", "reverse KL")


class Row(NamedTuple):
    """A response that is wanted."""

    number: int  # among all that are wanted, from 0
    place: str  # file and line, for errors
    line: Line  # the prompt, and the response itself if it is given
    sample: int  # number among the responses to the prompt, from 0


class Scores(NamedTuple):
    """Of B responses of up to T tokens; 0 or False where masked."""

    mask: Tensor  # [B, T] bool: True at a response's tokens
    overlap: Tensor  # [B, T] float32 (eq. 6)
    drift: Tensor  # [B, T] bool (eq. 7, or eq. 16 with metric="top_p")
    weight: Tensor  # [B, T] float32 (eq. 10)
    acceptance: Tensor  # [B, T] bool: whether the token is in the teacher's nucleus (eq. 15)
    reverse_kl: Tensor  # [B, T] float32: KL(student || teacher), in nats
    effective_length: Tensor  # [B] int32 (eq. 12)


def score(
    student: Path,  # a model folder
    teacher: Path,  # another one, with the same tokenizer
    prompts: Path,  # JSONL: objects with "prompt" and perhaps "response", which is then scored instead of sampled ones
    *,
    out: Path | None = None,  # a folder for scores.jsonl: a line for each response, with lists along its tokens
    samples: int = 1,  # responses to each prompt that has none
    max_length: int = 256,  # the most tokens of a response; of a longer one that is given, the first ones are scored
    seed: int = 0,
    batch_size: int = 8,  # responses that are sampled and scored together
    config: PruneConfig | None = None,  # None: the paper's
) -> dict[str, Any]:
    """Sample responses of the student, score each of their tokens by the teacher, and print a table.

    Returns:
        What the table shows: means over all tokens or responses and, in lists, over the tokens of each of BANDS bands.

    Raises:
        TrainerError: A file or a model is not valid, scores.jsonl exists, or a model's logits are not finite.
    """
    least = {"samples": (samples, 1), "max_length": (max_length, 1), "batch_size": (batch_size, 1), "seed": (seed, 0)}
    for name, (value, allowed) in least.items():
        if value < allowed:
            raise TrainerError(f"score: {name} must be at least {allowed}, got {value}")
    rows = read_rows(prompts, samples)
    pair = load(student, teacher, rows[0].line.values["prompt"])
    results = Results(max_length)
    with open_scores(out) as file, Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("scoring", total=len(rows))
        for batch in batches(rows, batch_size):
            rollouts = responses(pair, batch, max_length, seed)
            scores = score_responses(pair, rollouts, config or PruneConfig())
            check_finite(scores, batch)
            results.add(scores)
            write(file, pair, batch, rollouts, scores)
            progress.advance(bar, len(batch))
    found = results.means()
    show(found)
    return found


def read_rows(prompts: Path, samples: int) -> list[Row]:
    """Return the responses that a file asks for: `samples` to each prompt, or the given one."""
    lines = read_lines(prompts, ("prompt", "response"))
    if not lines:
        raise TrainerError(f"{prompts} must have at least one prompt, got none")
    wanted = [(line, number) for line in lines for number in range(1 if "response" in line.values else samples)]
    return [Row(index, f"{prompts}, line {line.number}", line, number) for index, (line, number) in enumerate(wanted)]


def load(student: Path, teacher: Path, prompt: str) -> Pair:
    """Return both models as their folders have them, on the accelerator where there is one; tried out on a prompt."""
    models = load_model(student, "auto"), load_model(teacher, "auto")
    pair = make_pair(*models, load_tokenizer(student), load_tokenizer(teacher))
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    token_ids, _ = encode(pair.tokenizer, [prompt])
    for model in models:
        untyped: Any = model.eval()
        untyped.to(device)
        check_head(model, token_ids.to(device))
    return pair


def check_head(model: PreTrainedModel, token_ids: Tensor) -> None:
    """Check that logits are the head times the last hidden state, and its soft cap; ids are `[1, P]`."""
    untyped: Any = model
    with torch.no_grad():
        states = untyped.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
        expected = untyped(input_ids=token_ids, use_cache=False).logits
        logits = untyped.get_output_embeddings()(states)
        if (cap := soft_cap(model)) is not None:
            logits = cap * (logits / cap).tanh()
    if not torch.allclose(logits.float(), expected.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
        rule = "be the head times the last hidden state"
        raise TrainerError(f"the logits of the model in {model.name_or_path} must {rule}, got something else")


def soft_cap(model: PreTrainedModel) -> float | None:
    """Return the cap of the model's logits, as Gemma has one."""
    cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return cap


@torch.no_grad()
def score_responses(pair: Pair, rollouts: Rollouts, config: PruneConfig) -> Scores:
    """Score every token from hidden states, without the logits of all positions at once."""
    mask = rollouts.mask
    sides: dict[str, Any] = {"mask": mask, "token_ids": rollouts.response_ids, "vocab_size": pair.vocab_size}
    for side, model in (("student", pair.student), ("teacher", pair.teacher)):
        head: Any = model.get_output_embeddings()
        sides[f"{side}_hidden"] = hidden_states(model, rollouts)
        sides |= {f"{side}_weight": head.weight, f"{side}_bias": getattr(head, "bias", None)}
        sides[f"{side}_softcap"] = soft_cap(model)
    stats = linear_token_stats(**sides, k=min(config.k, pair.vocab_size))
    found, accepted = follow(stats, rollouts, config)
    return Scores(mask, found.overlap, found.drift, found.weight, accepted, stats.reverse_kl, found.effective_length)


def hidden_states(model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
    """Return `[B, T, H]`: the states from which the model predicts each token of the responses."""
    states: Tensor = model.base_model(**rollouts.inputs, use_cache=False).last_hidden_state
    return states[:, rollouts.prompt_length - 1 : -1]


def batches(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """The rows in order, up to `size` at a time, those with and those without a given response apart."""
    for _, group in groupby(rows, key=lambda row: "response" in row.line.values):
        alike = list(group)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def responses(pair: Pair, rows: Sequence[Row], max_length: int, seed: int) -> Rollouts:
    """Return the responses that are wanted: given by the file, or sampled."""
    device = pair.student.device
    prompts = [row.line.values["prompt"] for row in rows]
    prompt_ids, prompt_mask = (tensor.to(device) for tensor in encode(pair.tokenizer, prompts))
    if "response" not in rows[0].line.values:
        check_context(pair, prompt_ids.shape[1], max_length)
        numbers = uniforms([seed], [row.number for row in rows], max_length)
        how: Any = {"length": max_length, "end_ids": pair.end_ids, "vocab_size": pair.vocab_size}
        return sample(pair.student, prompt_ids, prompt_mask, uniforms=numbers, **how)
    texts = [row.line.values["response"] for row in rows]
    untyped: Any = pair.tokenizer
    given = [ids[:max_length] for ids in untyped(texts, add_special_tokens=False).input_ids]
    for row, ids in zip(rows, given, strict=True):
        if not ids:
            raise TrainerError(f"{row.place}: the response must have at least one token, got none")
    length = max(map(len, given))
    check_context(pair, prompt_ids.shape[1], length)
    end = pair.end_ids[0]
    response_ids = torch.tensor([ids + [end] * (length - len(ids)) for ids in given], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in given], device=device)
    return Rollouts(torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, mask], 1), prompt_ids.shape[1])


def check_finite(scores: Scores, rows: Sequence[Row]) -> None:
    """Raise TrainerError for the first response along which the divergence of the models is not finite."""
    broken = ~scores.reverse_kl.isfinite().all(1)
    if broken.any():
        raise TrainerError(f"{rows[int(broken.nonzero()[0])].place}: the models' logits must be finite, got others")


class Results:
    """Sums over responses, from which the table is computed."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.responses = self.first_drift = self.effective_length = 0
        self.bands = torch.zeros(len(MEASURES), BANDS, dtype=torch.float64)
        self.tokens = torch.zeros(BANDS, dtype=torch.float64)

    def add(self, scores: Scores) -> None:
        """Take in B responses."""
        band = torch.arange(scores.mask.shape[1]) * BANDS // self.max_length
        for name, sums in zip(MEASURES, self.bands, strict=True):
            sums.index_add_(0, band, getattr(scores, name).double().sum(0).cpu())
        self.tokens.index_add_(0, band, scores.mask.double().sum(0).cpu())
        self.responses += len(scores.mask)
        self.first_drift += int((scores.mask & (scores.drift.cumsum(1) == 0)).sum())
        self.effective_length += int(scores.effective_length.sum())

    def means(self) -> dict[str, Any]:
        """Means over tokens and responses; None over none."""
        tokens = self.tokens.sum()
        bands = zip(MEASURES, (self.bands / self.tokens).tolist(), strict=True)
        return {
            "responses": self.responses,
            "tokens": int(tokens),
            "max_length": self.max_length,
            "response_length_mean": float(tokens) / self.responses,
            "first_drift_mean": self.first_drift / self.responses,
            "effective_length_mean": self.effective_length / self.responses,
            **dict(zip(MEASURES, (self.bands.sum(1) / tokens).tolist(), strict=True)),
            "band_tokens": [int(count) for count in self.tokens],
            **{
                f"band_{name}": [value if count else None for value, count in zip(values, self.tokens, strict=True)]
                for name, values in bands
            },
        }


def show(found: dict[str, Any]) -> None:
    """Print a table by band of depth, and what there is one number of a response."""
    table = Table("position", "tokens", *TITLES)
    for column in table.columns[1:]:
        column.justify = "right"
    for band, count in enumerate(found["band_tokens"]):
        start, end = (-(-edge * found["max_length"] // BANDS) for edge in (band, band + 1))
        if count:
            table.add_row(
                f"{start}-{end - 1}", str(count), *(f"{found[f'band_{name}'][band]:.3f}" for name in MEASURES)
            )
    table.add_section()
    table.add_row("all", str(found["tokens"]), *(f"{found[name]:.3f}" for name in MEASURES))
    console = Console()
    console.print(table)
    console.print(
        f"{found['responses']} responses of {found['response_length_mean']:.1f} tokens: "
        f"{found['first_drift_mean']:.1f} before the first drift, "
        f"effective length {found['effective_length_mean']:.1f}",
        highlight=False,
    )


@contextmanager
def open_scores(out: Path | None) -> Iterator[TextIO | None]:
    """Yield a file that becomes out/scores.jsonl at the end; None if there is no folder."""
    if out is None:
        yield None
        return
    path = out / "scores.jsonl"
    make_folder(out)
    if os.path.exists(path):
        raise TrainerError(f"{path} cannot be written: {os.strerror(errno.EEXIST)}")
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
        yield file


def write(file: TextIO | None, pair: Pair, rows: Sequence[Row], rollouts: Rollouts, scores: Scores) -> None:
    """Write a line for each response, if there is a file."""
    if file is None:
        return
    for index, row in enumerate(rows):
        length = int(scores.mask[index].sum())
        token_ids = rollouts.response_ids[index, :length].tolist()
        record = {
            "line": row.line.number,
            "sample": row.sample,
            "prompt": row.line.values["prompt"],
            "response": pair.tokenizer.decode(token_ids, skip_special_tokens=True),
            "token_ids": token_ids,
            **{name: getattr(scores, name)[index, :length].tolist() for name in MEASURES},
            "effective_length": int(scores.effective_length[index]),
        }
        file.write(json.dumps(record) + "\n")
