"""The command `pruneopd`: train, compare, report, eval, score."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from .errors import TrainerError
from .folders import require_packages

BEFORE_IMPORTS = {
    # Threads that wait for each other sleep instead of spinning: ten times faster where other programs run too.
    "OMP_WAIT_POLICY": "passive",
    # The loader's own progress bar, which would run through this program's.
    "TQDM_DISABLE": "1",
    # No warning of tokenizers about processes that are started later.
    "TOKENIZERS_PARALLELISM": "false",
}
PACKAGES = (
    "accelerate",
    "matplotlib",
    "math_verify",
    "reasoning_gym",
    "rich",
    "tensorboard",
    "transformers",
    "tyro",
    "yaml",
)

Options = TypeVar("Options")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 1, after one sentence on stderr, where something is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for name, value in BEFORE_IMPORTS.items():
        os.environ.setdefault(name, value)
    try:
        if not given or given[0] in ("-h", "--help"):
            print(usage())
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


def usage() -> str:
    """What `pruneopd --help` says."""
    lines = [f"  pruneopd {name:8} {summary(command)}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: pruneopd COMMAND [OPTIONS], with --help for a command's options", "", *lines])


def summary(command: Callable[..., int]) -> str:
    """The first line of a command's docstring."""
    return (command.__doc__ or "").splitlines()[0]


def train_command(given: list[str]) -> int:
    """Train a student on its own responses, scored by a teacher."""
    import tyro

    from .config import TrainConfig

    @dataclass
    class TrainOptions:
        config: tyro.conf.OmitArgPrefixes[TrainConfig]
        out: Path | None = None
        """The run folder [runs/<preset>-<pair>-<method>-<seed>]."""
        resume: bool = False
        """Continue the run in the folder from its newest checkpoint."""
        file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
        """A YAML file with values of any options, such as a run folder's config.yaml."""

    options = parse("train", TrainOptions, given, TrainOptions(base_config(given)))
    config, out = options.config, options.out or default_folder(options.config)

    from rich.console import Console

    from .samples import show
    from .train import train

    record, samples, finished = train(config, out, resume=options.resume)
    if not record:
        print(f"{out}: nothing is left to do")
    if samples:
        show(samples[:2], Console(), config.w_base)
        accuracy = record.get("accuracy")
        result = f"reverse KL {record['eval_reverse_kl']:.4f}" if accuracy is None else f"accuracy {accuracy:.3f}"
        print(f"step {record['step']}: {result}, {record['time_s']:.0f} s of training; the run is in {out}")
    if finished:
        return 0
    print(f"pruneopd: interrupted after step {record['step']}; continue with --resume --out {out}", file=sys.stderr)
    return 130


def compare_command(given: list[str]) -> int:
    """Train by several methods and seeds from the same start, and report."""
    import tyro

    from .config import TrainConfig

    @dataclass
    class CompareOptions:
        config: tyro.conf.OmitArgPrefixes[TrainConfig]
        methods: str = "opd,truncate,random,random:match=mass,prune,prefix"
        """Methods, with values of their own after colons: prune:w_drop=0.05."""
        seeds: str = "0,1,2"
        out: Path | None = None
        """Where the runs' folders go [runs/compare-<preset>-<pair>]."""
        jobs: int | None = None
        """Runs side by side, which share the processor's cores [2 where there is no GPU, else 1]."""
        file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
        """A YAML file with values of any options."""

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
        folders: tyro.conf.Positional[tuple[Path, ...]]
        """Run folders, or folders that hold some."""
        out: Path | None = None
        """Where figures and table go [the folder, where there is one]."""

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
        folder: tyro.conf.Positional[Path]
        """The run folder."""
        prompts: int | None = None
        """Held-out prompts [as in the run]."""
        samples: int | None = None
        """Responses to each [as in the run]."""

    options = parse("eval", EvalOptions, given)

    from .train import evaluate_run

    for name, value in evaluate_run(options.folder, options.prompts, options.samples).items():
        print(f"{name:17} {'-' if value is None else format(value, '.4g')}")
    return 0


def score_command(given: list[str]) -> int:
    """Score a student's responses by a teacher: overlap, drift, reliability."""
    from .score import score_from_command_line

    return score_from_command_line(given)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "compare": compare_command,
    "report": report_command,
    "eval": eval_command,
    "score": score_command,
}


def base_config(given: Sequence[str]) -> Any:
    """What the command line starts from: a YAML file's values, else the preset's; a resumed run's own."""
    from .config import PRESETS, read_config

    file, preset, out = (value_of(given, f"--{name}") for name in ("config", "preset", "out"))
    if "--resume" in given and file is None and out is not None:
        return read_config(Path(out) / "config.yaml")
    if file is not None:
        return read_config(Path(file))
    return PRESETS.get(preset or "tiny", PRESETS["tiny"])


def value_of(given: Sequence[str], option: str) -> str | None:
    """The value that is given to an option, as `--option value` or `--option=value`."""
    found = None
    for word, following in zip(given, [*given, None][1:], strict=True):
        if word == option:
            found = following
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def default_folder(config: Any) -> Path:
    """Where a run goes that was not told where."""
    return Path("runs") / f"{config.preset}-{config.pair}-{config.method}-{config.seed}"


def numbers(option: str, text: str) -> list[int]:
    """Integers between commas."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise TrainerError(f"--{option} must be integers between commas, got {text!r}")
    return [int(number) for number in text.split(",")]


def parse(command: str, kind: type[Options], given: list[str], default: Options | None = None) -> Options:
    """The options of a command by tyro; what is wrong with them becomes one sentence."""
    import tyro

    messages = io.StringIO()
    start: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(messages):
            cli: Any = tyro.cli
            parsed: Options = cli(
                kind, args=given, prog=f"pruneopd {command}", description=summary(COMMANDS[command]), **start
            )
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise TrainerError(f"{command}: {sentence(messages.getvalue())}") from None
    return parsed


def sentence(box: str) -> str:
    """The first paragraph of the box that tyro draws around an error, below its title, on one line."""
    lines: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip("│ ")
        if text.strip("-─╰╯"):
            lines.append(text)
        elif lines:
            break
    return " ".join(lines)
