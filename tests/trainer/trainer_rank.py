"""One of the processes that share the steps of a run: `python trainer_rank.py OUT METHOD`, ranks by the environment."""

import sys

import torch

from pruneopd_trainer.evaluate import evaluate
from test_trainer_loop import after, weights
from trainer_models import TOKENIZER  # noqa: F401

if __name__ == "__main__":
    torch.set_num_threads(1)
    out, method = sys.argv[1:]
    run, records = after(3, method=method, batch_size=12, micro_batch_size=4, eval_prompts=5, eval_samples=2)
    found = {"records": records, "weights": weights(run), "evaluation": evaluate(run), "rows": run.sample(1, 4).rows}
    torch.save(found, f"{out}/rank-{run.accelerator.process_index}.pt")
    if run.accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()
