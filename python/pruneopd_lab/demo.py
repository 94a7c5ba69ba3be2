"""`pruneopd demo`: `pruneopd score` over four students of a real model, with pictures, and a short training run."""

import itertools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from pruneopd_kernels import PruneConfig, ResponseBudget, reliability
from pruneopd_trainer.config import PRESETS
from pruneopd_trainer.errors import TrainerError
from pruneopd_trainer.models import Pair, encode, gguf_file, make_pair, model_folder
from pruneopd_trainer.rollouts import Rollouts, sample, uniforms
from pruneopd_trainer.run_folder import RunFolder, make_folder

from . import demo_pictures, samples
from .prompts import PROMPTS
from .report import report
from .run import train
from .score import Scores, hidden_states, score_responses
from .students import least_needed_layers, load_teacher, remove_layers, round_weights, smollm2_folder

BITS, REMOVED = 6, (1, 4, 10)
COMPARED = 32
"""Positions of each response that eager PyTorch scores too."""
TOLERANCE = 1e-3
"""Nats that float32 explains: rewards subtract log-probabilities of tens of nats."""
QUARTERS = 4
STEPS, REPLAYED = 12, 100
"""Of the training run, and of the budget."""


class Result(NamedTuple):
    """A student with its responses and their scores."""

    name: str
    change: str
    rollouts: Rollouts
    scores: Scores


def demo(model_dir: Path | None, out: Path, length: int, w_drop: float, seed: int, training: bool) -> None:
    """Score the students of a teacher, print a table, write pictures and summary.json, and train a tiny model."""
    started = time.perf_counter()
    folder = smollm2_folder() if model_dir is None else model_folder(model_dir)
    try:
        config = PruneConfig(w_drop=w_drop)
    except ValueError as error:
        raise TrainerError(str(error)) from error
    make_folder(out)
    console, messages, results = Console(highlight=False), Console(stderr=True), []
    if not console.is_terminal:
        console.width = 120
    with messages.status("loading the teacher"):
        teacher, tokenizer = load_teacher(folder)
        prompts = encode(tokenizer, PROMPTS)
        students = make_students(teacher, *prompts)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=messages) as progress:
        for name, change, make in students:
            pair = make_pair(make(teacher).eval(), teacher, tokenizer, tokenizer)
            advance = partial(progress.advance, progress.add_task(name, total=length))
            numbers = uniforms([seed], range(len(PROMPTS)), length)
            rollouts = sample(pair.student, *prompts, length=length, end_ids=pair.end_ids, uniforms=numbers,
                              vocab_size=pair.vocab_size, on_token=advance)  # fmt: skip
            results.append(Result(name, change, rollouts, score_responses(pair, rollouts, config)))
        speed = compare_with_eager(pair, rollouts, config)

    found = [summary(result, length) for result in results]
    table = Table(title=f"{len(PROMPTS)} responses of at most {length} tokens from each student, scored against "
                  f"{(gguf_file(folder) or folder.name).removesuffix('.gguf')}; w_drop = {w_drop:g}")  # fmt: skip
    table.add_column("student", no_wrap=True)
    for name in found[0]:
        table.add_column(name.replace("_", "\n").replace(" ", "\n"), justify="right")
    for result, values in zip(results, found, strict=True):
        table.add_row(f"{result.name}\n[dim]{result.change}[/dim]", *(f"{value:.3g}" for value in values.values()))
    console.print(table)
    pictures = demo_pictures.draw(results, PROMPTS, tokenizer, config, out)
    rows = {result.name: values for result, values in zip(results, found, strict=True)}
    record = {"config": asdict(config), "length": length, "seed": seed, "students": rows, "scoring": speed}
    (out / "summary.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(
        "Means are over tokens, lengths over responses. Budget M: where ResponseBudget settles with these responses\n"
        "as every batch. Tokens saved: the share of all tokens beyond M, which it would not have sampled.\n\n"
        f"Scoring {speed['positions']} tokens took the operators {speed['operators_s']:.2f} s and eager PyTorch "
        f"{speed['eager_s']:.2f} s: [bold]{speed['eager_s'] / speed['operators_s']:.1f} times faster[/bold]. "
        "Both agree.\n"
        f"The run took {time.perf_counter() - started:.0f} s and wrote\n  "
        + "\n  ".join(map(str, [*pictures, out / "summary.json"]))
    )
    if training:
        train_briefly(out / "training", seed, console)


def make_students(
    teacher: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor
) -> list[tuple[str, str, Callable[[PreTrainedModel], PreTrainedModel]]]:
    """Return name, change and maker of each student: rounded weights, then 1, 4 and 10 layers removed."""
    layers = teacher.config.num_hidden_layers
    students: list[Any] = [(f"{BITS}-bit weights", f"all {layers} layers", partial(round_weights, bits=BITS))]
    for block in least_needed_layers(teacher, prompt_ids, prompt_mask, [n for n in REMOVED if n < layers]):
        one = len(block) == 1
        name, change = (
            ("1 layer", f"layer {block[0]}") if one else (f"{len(block)} layers", f"layers {block[0]}-{block[-1]}")
        )
        students.append((f"{name} removed", change, partial(remove_layers, layers=block)))
    return students


def summary(result: Result, length: int) -> dict[str, float]:
    """Return the numbers of one student, by the table's headings."""
    scores = result.scores
    mask, lengths = scores.mask, scores.mask.sum(1)
    edges = [round(length * quarter / QUARTERS) for quarter in range(QUARTERS + 1)]

    def mean(values: Tensor, first: int = 0, last: int = length) -> float:
        return values[:, first:last][mask[:, first:last]].double().mean().item()

    by_depth = {f"weight {a + 1}-{b}": mean(scores.weight, a, b) for a, b in itertools.pairwise(edges)}
    budget, saved = settled_budget(scores.effective_length, lengths, length)
    return {
        "overlap": mean(scores.overlap),
        "drift_rate": mean(scores.drift),
        "length": lengths.double().mean().item(),
        "effective_length": scores.effective_length.double().mean().item(),
        **by_depth,
        "budget_M": budget,
        "tokens_saved": saved,
    }


def settled_budget(effective_lengths: Tensor, lengths: Tensor, longest: int) -> tuple[float, float]:
    """Replay Algorithm 1's rule for M with these responses as every batch: mean M and share of tokens beyond it.

    A response cut at M keeps the effective length min(E, M), because E counts from the front. M moves between the
    longest length and a quarter of it, in steps of a twentieth; the means are over the second half of the replay.
    """
    step = max(1, longest // 20)
    budget = ResponseBudget(initial=longest, minimum=max(1, longest // 4), maximum=longest, step=step, margin=step)
    found = [longest, *(budget.update(effective_lengths.clamp_max(budget.length)) for _ in range(REPLAYED))]
    settled = torch.tensor(found[REPLAYED // 2 :])
    beyond = (lengths[None, :] - settled[:, None]).clamp_min(0).sum(1)
    return settled.double().mean().item(), (beyond / lengths.sum()).double().mean().item()


@torch.no_grad()
def compare_with_eager(pair: Pair, rollouts: Rollouts, config: PruneConfig) -> dict[str, float]:
    """Time the operators and eager PyTorch on the same logits, and check that overlap and rewards agree.

    If a row's k-th largest logit equals the next one, `torch.topk` takes either: such rows are not compared.
    """
    models: list[Any] = [pair.student, pair.teacher]
    states = (hidden_states(model, rollouts)[:, :COMPARED] for model in models)
    logits = [model.get_output_embeddings()(state) for model, state in zip(models, states, strict=True)]
    plain = asdict(config) | {"w_drop": 0.0, "w_base": 0.0}  # weight 1 everywhere, so no difference is carried on
    times: list[float] = []
    answers: list[Any] = []
    for method in (partial(reliability, **plain), partial(eager_reliability, k=config.k)):
        method(*(side[:1, :1] for side in logits))  # the first call pays for loading and warming up
        start = time.perf_counter()
        answers.append(method(*logits))
        times.append(time.perf_counter() - start)
    tops = [side.topk(min(config.k + 1, side.shape[-1])).values for side in logits]
    tied = torch.stack([top[..., -1] == top[..., -2] for top in tops]).any(0)
    compared = rollouts.mask[:, :COMPARED] & ~tied
    (scored, (overlap, reward)) = answers
    for name, ours, theirs in (("overlap", scored.overlap, overlap), ("rewards", scored.rewards.sum(-1), reward)):
        difference = (ours - theirs)[compared].abs()
        if not (difference <= TOLERANCE).all():  # NaN is no agreement either
            raise TrainerError(f"the operators and eager PyTorch disagree: {name} by {difference.max():.2g}")
    return {"positions": overlap.numel(), "operators_s": times[0], "eager_s": times[1]}


def eager_reliability(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return overlap and summed rewards, as one would write eq. 6 and the rewards of eq. 11 in plain PyTorch."""
    student_ids, teacher_ids = student.topk(k).indices, teacher.topk(k).indices
    overlap = (student_ids[..., :, None] == teacher_ids[..., None, :]).any(-1).float().mean(-1)
    logp, logq = (side.log_softmax(-1).gather(-1, student_ids) for side in (student, teacher))
    return overlap, (logp.softmax(-1) * (logq - logp)).sum(-1)


def train_briefly(out: Path, seed: int, console: Console) -> None:
    """Train the low student for a dozen steps and show the result; a run in the folder is replaced."""
    console.rule("a short training run")
    console.print(
        f"A model of half a million parameters that rambles, {STEPS} steps of Prune-OPD with a teacher that does not.\n"
        "Longer, and with your own models: pruneopd train"
    )
    shutil.rmtree(out, ignore_errors=True)
    config = replace(PRESETS["tiny"], steps=STEPS, eval_every=STEPS, eval_prompts=32, save_every=STEPS, seed=seed)
    last, shown, _ = train(config, out)
    report([out])
    samples.show(shown[:1], console, config.w_base)
    first = RunFolder.open(out).records()[0]
    console.print(
        f"Accuracy on held-out sums went from {first['accuracy']:.0%} to {last['accuracy']:.0%} in "
        f"{last['time_s']:.0f} s of training, the overlap with the teacher from {first['eval_overlap']:.2f} to "
        f"{last['eval_overlap']:.2f},\nand the response budget M from {config.initial_length} to {last['budget']} "
        f"tokens. More in {out}: samples.html, figures/, metrics.jsonl."
    )
