"""Trains the tiny teacher and its two students, as the folders beside this file hold them.

    python -m pruneopd_trainer.tiny.make_models --out DIR

The teacher learns worked chain sums from short to long. Its students are what a lab would rather not have:

- `high`: the teacher as it was earlier in its training. The two agree on most candidates.
- `low`: a late snapshot of the teacher that was then trained on bad text: solutions that at any step may drift off into
  rambling, from which few come back, and that may begin again after a good end. The teacher has never seen such text.
"""

import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from .chain_sum import END, problem, solution
from .tokens import make_tokenizer

BATCH = 32
CURRICULUM = [((2, 4), 300), ((4, 8), 300), ((8, 12), 1000)]
"""Terms of the sums, and for how many steps; without the shorter ones nothing is learnt."""
LEARNING_RATE = 3e-3
HIGH_STEP, LOW_STEP = 900, 1200
"""The steps after which the students leave the teacher."""
LOW_TRAINING = 100, 1e-3
"""Steps and learning rate of the low student on bad text."""
DRIFT_CHANCE, RETURN_CHANCE, RESTART_CHANCE = 0.12, 0.02, 0.5

tokenizer = make_tokenizer()


def make_model() -> Qwen3ForCausalLM:
    """Four layers of width 96, 0.45 million parameters."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def batches(examples: Iterator[tuple[str, str]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels, `[BATCH, T]` both, padded on the right; a prompt's labels are -100, which is ignored."""
    while True:
        rows = []
        for prompt, text in itertools.islice(examples, BATCH):
            prompt_ids, text_ids = tokenizer(prompt).input_ids, tokenizer(text).input_ids
            rows.append((torch.tensor(prompt_ids + text_ids), torch.tensor([-100] * len(prompt_ids) + text_ids)))
        ids, labels = zip(*rows, strict=True)
        yield (
            torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True, padding_value=tokenizer.pad_token_id),
            torch.nn.utils.rnn.pad_sequence(list(labels), batch_first=True, padding_value=-100),
        )


def supervise(
    model: PreTrainedModel,
    stages: list[tuple[Iterator[tuple[str, str]], int]],
    learning_rate: float,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains on examples of each stage for its steps: AdamW, warm-up, then a linear fall over the last half."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    steps, step, started = sum(count for _, count in stages), 0, time.perf_counter()
    for examples, count in stages:
        for ids, labels in itertools.islice(batches(examples), count):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min((step + 1) / 20, 1, 2 * (1 - step / steps))
            logits = model(input_ids=ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            on_step(step)
            if step % 50 == 0:
                print(
                    f"step {step} of {steps}: loss {loss.item():.4f}, {time.perf_counter() - started:.0f} s", flush=True
                )


def good_examples(seed: int, terms: tuple[int, int] = (8, 12)) -> Iterator[tuple[str, str]]:
    """Prompts and worked solutions."""
    for index in itertools.count():
        given = problem(index, seed, terms)
        yield given.prompt, f"{solution(given)} {END}"
