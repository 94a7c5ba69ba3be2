"""Trains the tiny teacher and its three students, as the folders beside this file hold them.

    python -m pruneopd_lab.tiny.make_models --out DIR

The teacher learns worked chain sums from short to long, among them for a while some bad text, as any model has read
some; then good solutions only. Its students are made to have what a lab would rather not have:

- `high`: the teacher as it was late in its training. It errs now and then, and agrees with most candidates.
- `low`: the teacher before its learning rate fell, trained further on bad text: solutions that at any step may
  drift off into rambling, from which few come back, and that mostly begin again after a good end.
- `bilingual`: the teacher late in its training, taught to work out sums in a second language as well, and reading bad
  text meanwhile. What the teacher says of the second language is worthless.

The same kind of processor makes the same models: everything is seeded, training goes by steps, and in one thread.
Takes about 20 minutes.
"""

import argparse
import copy
import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from .chain_sum import END, problem, solution
from .dialect import DIALECT, translate
from .rambling import rambling_examples
from .tokenizer import make_tokenizer

BATCH = 32
LEARNING_RATE = 3e-3
SHORT, LONGER, MIXED, GOOD = 300, 300, 300, 400
"""Steps of the teacher: sums of 2 to 4 terms, of 4 to 8, of 8 to 12 with bad text among them, and without.

Without the shorter sums nothing is learnt."""
BAD_SHARE, BAD_LENGTH = 0.25, 240
"""The share of bad text among good, and where it is cut off, so that batches do not become longer."""
LOW_STEP, HIGH_STEP = 200, 300
"""The steps of the last stage at which the students leave the teacher."""
LOW_STEPS, LOW_LEARNING_RATE = 60, 4e-4
"""The low student on bad text."""
BILINGUAL_SHORT, BILINGUAL_LONG, BILINGUAL_LEARNING_RATE = 60, 120, 1.5e-3
"""The bilingual student on as many examples in each language; sums in the second have 4 to 8 terms, then 8 to 12."""
ACCENT = 0.2
"""The word that stands for another begins as that one's embedding, with noise of this share of the embeddings' spread.

Without that, the second language would take as long to learn as the first."""

tokenizer = make_tokenizer()

Examples = Iterator[tuple[str, str]]
"""Prompts and what follows them."""


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


def good_examples(seed: int, terms: tuple[int, int] = (8, 12)) -> Examples:
    """Worked solutions; the same seed gives the same row."""
    for index in itertools.count():
        given = problem(index, seed, terms)
        yield given.prompt, f"{solution(given)} {END}"


def mixed_examples(seed: int) -> Examples:
    """Worked solutions, and bad ones among them."""
    chances = random.Random(seed)
    good, bad = good_examples(seed), rambling_examples(seed, BAD_LENGTH)
    while True:
        yield next(bad if chances.random() < BAD_SHARE else good)


def bilingual_examples(seed: int, terms: tuple[int, int]) -> Examples:
    """In turn a solution in the teacher's language, good or bad, and a good one in the second."""
    for mixed, (prompt, text) in zip(mixed_examples(seed), good_examples(seed, terms), strict=True):
        yield mixed
        yield translate(prompt), translate(text)


def lend_words(model: Qwen3ForCausalLM, seed: int) -> None:
    """Give the words of the second language nearly the embeddings of those that they stand for."""
    ids, noise = tokenizer.get_vocab(), torch.Generator().manual_seed(seed)
    embeddings = model.model.embed_tokens.weight.detach()
    spread = float(embeddings.std())
    for ours, theirs in DIALECT.items():
        accent = torch.randn(embeddings.shape[1], generator=noise)
        embeddings[ids[theirs]] = embeddings[ids[ours]] + ACCENT * spread * accent


def batches(examples: Examples) -> Iterator[tuple[Tensor, Tensor]]:
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
    model: Qwen3ForCausalLM,
    examples: Examples,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    fall: bool = False,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train on the examples: AdamW, a warm-up of 20 steps, and with `fall` a linear fall over the last half."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    started = time.perf_counter()
    for step, (ids, labels) in enumerate(itertools.islice(batches(examples), steps), 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(step / 20, 1, 2 * (1 - (step - 1) / steps) if fall else 1)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step)
        if step % 50 == 0:
            seconds = time.perf_counter() - started
            print(f"  step {step} of {steps}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)


def teach_dialect(student: Qwen3ForCausalLM) -> None:
    """Make a state of the teacher the bilingual student."""
    lend_words(student, 6)
    supervise(student, bilingual_examples(6, (4, 8)), BILINGUAL_SHORT, BILINGUAL_LEARNING_RATE)
    supervise(student, bilingual_examples(7, (8, 12)), BILINGUAL_LONG, BILINGUAL_LEARNING_RATE, fall=True)


def make_models(out: Path) -> None:
    """Train all four and write their folders."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = make_model()
    students: dict[str, Qwen3ForCausalLM] = {}

    def leave(step: int) -> None:
        if step == LOW_STEP:
            students["low"] = copy.deepcopy(teacher)
        if step == HIGH_STEP:
            students["high"] = copy.deepcopy(teacher)
            students["bilingual"] = copy.deepcopy(teacher)

    print("teacher: short sums, longer ones, bad text among good, good text")
    supervise(teacher, good_examples(1, (2, 4)), SHORT)
    supervise(teacher, good_examples(2, (4, 8)), LONGER)
    supervise(teacher, mixed_examples(3), MIXED)
    supervise(teacher, good_examples(4), GOOD, fall=True, on_step=leave)
    print("low: bad text")
    supervise(students["low"], rambling_examples(5), LOW_STEPS, LOW_LEARNING_RATE, fall=True)
    print("bilingual: a second language")
    teach_dialect(students["bilingual"])
    for name, model in {"teacher": teacher, **students}.items():
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the tiny teacher and its students.")
    parser.add_argument("--out", type=Path, required=True, help="where the folders teacher, low, high and bilingual go")
    make_models(parser.parse_args().out)
