"""Stand in for `pruneopd`: a run without training, one step every PACE seconds.

It is told by environment variables: PACE; FAIL, "method step" of the step at which to end; WHAT, whether it
fails or leaves; JOURNAL, a file to which it appends what it was called with and when it began and ended.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import yaml

STEP = {
    "tokens_generated": 100, "tokens_kept": 100, "response_length_mean": 50.0, "effective_length_mean": 40.0,
    "overlap": 0.8, "peak_memory_mib": 500.0, "band_tokens": [100] + [0] * 15,
    "band_overlap": [0.8] + [None] * 15, "band_weight": [1.2] + [None] * 15,
}  # fmt: skip
EVALUATION = {"accuracy": 0.5, "accuracy_se": 0.05, "eval_overlap": 0.8, "eval_reverse_kl": 0.2}


def train(file, folder, options):
    config = yaml.safe_load(file.read_text())
    metrics_file = folder / "metrics.jsonl"
    if (folder / "config.yaml").exists() != (options == ["--resume"]):
        sys.exit("pruneopd: it must be --resume where there is a run, and only there")
    shutil.copy(file, folder / "config.yaml")
    done = len(metrics_file.read_text().splitlines()) if metrics_file.exists() else 0
    print("some words on standard output", flush=True)
    for step in range(done, config["steps"] + 1):
        if os.environ.get("FAIL") == f"{config['method']} {step}":
            sys.exit("pruneopd: the loss must be finite\n" if os.environ["WHAT"] == "fail" else 0)
        time.sleep(float(os.environ.get("PACE", 0)))
        budget = config["initial_length"] + 10 * step
        metrics = {"step": step, "method": config["method"], "time_s": step * 2.0}
        metrics |= {**STEP, "budget": budget} if step else {}
        metrics |= EVALUATION if step in (0, config["steps"]) else {}
        with metrics_file.open("a") as output:
            output.write(json.dumps(metrics) + "\n")
        if step:
            (folder / "checkpoints" / f"step-{step:06}").mkdir(parents=True)
            (folder / "checkpoints" / f"step-{step:06}" / "training.pt").touch()


def journal(**entry):
    if "JOURNAL" in os.environ:
        with open(os.environ["JOURNAL"], "a") as file:
            file.write(json.dumps({**entry, "time": time.time()}) + "\n")


def main(arguments):
    assert arguments[0] == "train" and arguments[1] == "--config" and arguments[3] == "--out", arguments
    file, folder, options = Path(arguments[2]), Path(arguments[4]), arguments[5:]
    name = f"{folder.parent.name} {folder.name}"
    journal(run=name, event="begin", options=options, threads=os.environ["OMP_NUM_THREADS"],
            wait=os.environ["OMP_WAIT_POLICY"], session=os.getsid(0))  # fmt: skip
    try:
        train(file, folder, options)
    except KeyboardInterrupt:
        time.sleep(0.1)
        (folder / "saved").touch()
        sys.exit(130)
    journal(run=name, event="end")


if __name__ == "__main__":
    main(sys.argv[1:])
