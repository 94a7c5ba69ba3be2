"""The demonstration's end: a short training run of the reference trainer, on its tiny models."""

import shutil
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pruneopd_trainer.config import PRESETS
from pruneopd_trainer.report import report
from pruneopd_trainer.runs import RunFolder
from pruneopd_trainer.samples import show
from pruneopd_trainer.train import train

STEPS = 12


def train_briefly(out: Path, seed: int) -> None:
    """Trains the low student for a dozen steps and shows what became of it; a run in the folder is replaced."""
    console = Console()
    console.rule("a short training run")
    console.print(
        f"A model of half a million parameters that rambles, {STEPS} steps of Prune-OPD with a teacher that does not.\n"
        "Longer, and with your own models: pruneopd train"
    )
    shutil.rmtree(out, ignore_errors=True)
    config = replace(PRESETS["tiny"], steps=STEPS, eval_every=STEPS, eval_prompts=32, save_every=STEPS, seed=seed)
    last, samples, _ = train(config, out)
    report([out])
    show(samples[:1], console, config.w_base)
    first = RunFolder.open(out).records()[0]
    console.print(
        f"Accuracy on held-out sums went from {first['accuracy']:.0%} to {last['accuracy']:.0%} in "
        f"{last['time_s']:.0f} s of training, the overlap with the teacher from {first['eval_overlap']:.2f} to "
        f"{last['eval_overlap']:.2f},\nand the response budget M from {config.initial_length} to {last['budget']} "
        f"tokens. More in {out}: samples.html, figures/, metrics.jsonl."
    )
