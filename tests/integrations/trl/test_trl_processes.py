"""Two processes under torchrun: the same loss as TRL's, one budget, means over both.

Each process runs this file as a script, which is what torchrun starts.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_pair import BUDGET, LOGGED, LOSSES, PRUNED, assert_same_steps, history, stock, trainer

from pruneopd_kernels import PruneConfig, ResponseBudget


def test_on_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("all checks passed") == 2


def check_losses(folder):
    """Without pruning each loss is that of TRL."""
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    expected = history(stock(folder, **settings), *LOGGED)
    for loss, prune in LOSSES.items():
        assert_same_steps(history(trainer(folder, given={"prune": prune, "loss": loss}, **settings), *LOGGED), expected)


def check_budget(folder):
    """Hits are counted over both: all on the first process, they are half of all, and M grows on both."""
    given = ResponseBudget(**{**BUDGET, "margin": 0, "hit_ratio": 0.5, "patience": 1})
    made = trainer(folder, given={"prune": PruneConfig(k=8, w_drop=0.0), "budget": given})
    seen, update = [], given.update

    def on_one_process(effective_lengths):
        seen.append(update(torch.full_like(effective_lengths, 99 if made.accelerator.process_index == 0 else 0)))
        return seen[-1]

    given.update = on_one_process
    made.train()
    assert seen == [10, 12] and made.max_completion_length == 12


def check_measures(folder):
    """Means are over both processes."""
    made = trainer(folder, given={"prune": PRUNED}, max_steps=1)
    kept, compute = [], made._compute_loss

    def keep(*arguments):
        result = compute(*arguments)
        kept.append(made._scored)
        return result

    made._compute_loss = keep
    (logged,) = history(made, "prune/overlap", "prune/effective_length")
    ((scored, mask),) = kept
    own = scored["overlap"].sum().item(), int(mask.sum()), scored["effective_length"].tolist()
    each = [None, None]
    torch.distributed.all_gather_object(each, own)
    (overlap, tokens, lengths), (other_overlap, other_tokens, other_lengths) = each
    assert lengths != other_lengths
    lengths += other_lengths
    assert logged == pytest.approx([(overlap + other_overlap) / (tokens + other_tokens), sum(lengths) / len(lengths)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for check in (check_losses, check_budget, check_measures):
        check(Path(sys.argv[1], check.__name__))
    print("all checks passed")
    torch.distributed.destroy_process_group()
