"""Train with your own models and prompts; `pruneopd train` also has options, presets, grades and curves."""

import argparse
import sys
from pathlib import Path

from .config import read_config
from .errors import TrainerError
from .train import train


def main() -> int:
    """Run the command and return the exit status: 1, after one sentence on stderr, if anything is wrong."""
    parser = argparse.ArgumentParser("pruneopd_trainer", description="Train a student with Prune-OPD.")
    parser.add_argument("--config", type=Path, required=True, help="YAML: student, teacher, data and other values")
    parser.add_argument("--out", type=Path, required=True, help="the run folder")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in it")
    options = parser.parse_args()
    try:
        _, finished = train(read_config(options.config), options.out, resume=options.resume)
    except TrainerError as problem:
        print(f"pruneopd_trainer: {problem}", file=sys.stderr)
        return 1
    return 0 if finished else 130


if __name__ == "__main__":
    sys.exit(main())
