"""The demonstration from beginning to end: load, cut, sample, score, show."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedModel

from pruneopd_kernels import PruneConfig
from pruneopd_trainer.folders import gguf_file
from pruneopd_trainer.models import encode, least_needed_layers, remove_layers
from pruneopd_trainer.rollouts import sample, uniforms

from . import pictures, report
from .models import load_teacher, round_weights
from .problems import DemoError
from .prompts import PROMPTS
from .scoring import CHUNK, score

BITS = 6
REMOVED = (1, 4, 10)
SCORING_STEPS = 2
"""How far scoring CHUNK positions moves the progress bar, where sampling one token for every prompt moves it by 1."""


class Student(NamedTuple):
    """A way to make a student from the teacher."""

    name: str
    change: str
    make: Callable[[PreTrainedModel], PreTrainedModel]


def make_students(teacher: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor) -> list[Student]:
    """The students, the closest to the teacher first: rounded weights, then 1, 4 and 10 layers removed."""
    layers = teacher.config.num_hidden_layers
    students = [Student(f"{BITS}-bit weights", f"all {layers} layers", partial(round_weights, bits=BITS))]
    counts = [count for count in REMOVED if count < layers]
    for block in least_needed_layers(teacher, prompt_ids, prompt_mask, counts):
        if len(block) == 1:
            name, change = "1 layer removed", f"layer {block[0]}"
        else:
            name, change = f"{len(block)} layers removed", f"layers {block[0]}-{block[-1]}"
        students.append(Student(name, change, partial(remove_layers, layers=block)))
    return students


def run(model_folder: Path, out: Path, *, length: int, w_drop: float, seed: int, started: float) -> None:
    """Runs the demonstration; prints the table, writes the pictures and `summary.json` to `out`."""
    try:
        config = PruneConfig(w_drop=w_drop)
    except ValueError as error:
        raise DemoError(str(error)) from error
    messages, results = Console(stderr=True), []
    with messages.status("loading the teacher"):
        teacher, tokenizer = load_teacher(model_folder)
        prompt_ids, prompt_mask = encode(tokenizer, PROMPTS)
        students = make_students(teacher, prompt_ids, prompt_mask)

    scoring_steps = SCORING_STEPS * -(-length // CHUNK)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=messages) as progress:
        bars = [progress.add_task(student.name, total=length + scoring_steps, start=False) for student in students]
        for student, bar in zip(students, bars, strict=True):
            progress.start_task(bar)
            model = student.make(teacher)
            rollouts = sample(
                model,
                prompt_ids,
                prompt_mask,
                length=length,
                end_ids=[tokenizer.eos_token_id],
                uniforms=uniforms([seed], range(len(PROMPTS)), length),
                on_token=partial(progress.advance, bar),
            )
            scores = score(model, teacher, rollouts, config, on_chunk=partial(progress.advance, bar, SCORING_STEPS))
            progress.update(bar, completed=length + scoring_steps)  # responses may all have ended early
            results.append(report.Result(student.name, student.change, rollouts, scores))

    written = pictures.draw(results, PROMPTS, tokenizer, config, length, out)
    model_name = (gguf_file(model_folder) or model_folder.name).removesuffix(".gguf")
    summary = report.summarise(results, config, length, seed, model_name, time.perf_counter() - started)
    written.append(report.write(summary, out))
    report.show(summary, written)
