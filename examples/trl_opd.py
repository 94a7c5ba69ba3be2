"""Run Prune-OPD in TRL's trainer, on the tiny models of the reference trainer, in some minutes and without a network.

The student rambles where the teacher does not, so responses drift early. Needs `pip install "pruneopd-kernels[trl]"`;
replace models and prompts with your own.
"""

import argparse
import random
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer

from pruneopd_kernels import PruneConfig, ResponseBudget
from pruneopd_kernels.integrations.trl import PruneDistillationTrainer
from trl import DistillationConfig

TINY = Path(__file__).parents[1] / "python" / "pruneopd_lab" / "tiny"  # in a checkout
SHOWN = ("loss", "prune/overlap", "prune/drift_rate", "prune/effective_length", "prune/budget")


def chain_sums(count: int) -> Dataset:
    """Prompts such as `4 + 17 - 9 =`, with partial sums from 0 to 99, which the models have learnt to work out."""
    draw, prompts = random.Random(0), []
    for _ in range(count):
        total = draw.randint(1, 50)
        words = [str(total)]
        for _ in range(draw.randint(7, 11)):
            term = draw.choice([t for t in range(-30, 31) if t and 0 <= total + t <= 99])
            total += term
            words += ["-" if term < 0 else "+", str(abs(term))]
        prompts.append(" ".join([*words, "="]))
    return Dataset.from_dict({"prompt": prompts})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output-dir", default="build/trl_opd")
    options = parser.parse_args(arguments)

    trainer = PruneDistillationTrainer(
        model=str(TINY / "low"),
        teacher_model=str(TINY / "teacher"),
        prune=PruneConfig(k=16, w_drop=0.01, w_base=0.5),
        budget=ResponseBudget(initial=85, minimum=40, maximum=512, step=8, margin=10),
        args=DistillationConfig(
            output_dir=options.output_dir,
            per_device_train_batch_size=16,
            max_steps=options.steps,
            learning_rate=1.5e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
        ),
        train_dataset=chain_sums(1000),
        processing_class=AutoTokenizer.from_pretrained(TINY / "low"),
    )
    trainer.train()

    print("step  " + "  ".join(f"{name.removeprefix('prune/'):>16}" for name in SHOWN))
    for record in trainer.state.log_history:
        if "grad_norm" in record:
            print(f"{record['step']:4}  " + "  ".join(f"{record[name]:16.3f}" for name in SHOWN))


if __name__ == "__main__":
    main()
