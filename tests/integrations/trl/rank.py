"""One of several processes that train: `torchrun rank.py <folder>`, which leaves what it saw there."""

import json
import sys
from pathlib import Path

import torch
from tiny_pair import PRUNED, UNPRUNED, VOCABULARY, config, model, prompts, stock, teacher_of, tokenizer, trainer

from pruneopd_kernels import PruneConfig, ResponseBudget
from pruneopd_kernels.integrations.trl import BudgetCallback, PruneDistillationTrainer

SETTINGS = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}


def logged(made, *names):
    made.train()
    return [[record.get(name) for name in names] for record in made.state.log_history if "grad_norm" in record]


def equality(folder):
    """The losses of both trainers."""
    names = "loss", "grad_norm", "entropy", "num_tokens"
    found = {"stock": logged(stock(folder, **SETTINGS), *names)}
    for loss in ("reverse_kl", "topk_policy", "divergence"):
        prune = PruneConfig(k=VOCABULARY, **UNPRUNED)
        found[loss] = logged(trainer(folder, given={"prune": prune, "loss": loss}, **SETTINGS), *names)
    return found


def budget(folder):
    """A budget whose hits are all on one process: the first, with a boundary that its longer responses reach."""
    settings = {"initial": 8, "minimum": 4, "maximum": 16, "step": 2, "margin": 0, "hit_ratio": 0.5, "patience": 1}
    made = trainer(folder, given={"prune": PruneConfig(k=8, w_drop=0.0), "budget": ResponseBudget(**settings)})
    rank = made.accelerator.process_index
    callback = next(cb for cb in made.callback_handler.callbacks if isinstance(cb, BudgetCallback))
    seen = []
    update = callback.budget.update

    def on_one_process(effective_lengths):
        lengths = torch.full_like(effective_lengths, 99 if rank == 0 else 0)
        seen.append(update(lengths))
        return seen[-1]

    callback.budget.update = on_one_process
    made.train()
    return {"lengths": seen, "sampled_up_to": made.max_completion_length}


def measures(folder):
    """Of one step, and what this process scored of it."""
    student = model(0)
    made = PruneDistillationTrainer(
        model=student, teacher_model=teacher_of(student), args=config(folder, max_steps=1), train_dataset=prompts(),
        processing_class=tokenizer(), prune=PRUNED,
    )  # fmt: skip
    kept, form = [], made._compute_loss

    def keep(*arguments):
        result = form(*arguments)
        kept.append(made._scored)
        return result

    made._compute_loss = keep
    found = logged(made, "prune/overlap", "prune/effective_length")
    ((scored, mask),) = kept
    return {
        "logged": found,
        "overlap": scored.overlap.sum().item(),
        "tokens": int(mask.sum()),
        "effective": scored.effective_length.tolist(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    folder = Path(sys.argv[1])
    found = {f.__name__: f(folder / f.__name__) for f in (equality, budget, measures)}
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
