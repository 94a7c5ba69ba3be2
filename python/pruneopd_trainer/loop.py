"""Algorithm 1 of Prune-OPD (arXiv:2605.07804): sample, score, weigh, learn, adapt the length."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pruneopd_kernels import topk_policy_loss

from .config import TrainConfig
from .data import Example, Task
from .errors import TrainerError, reason
from .methods import Advantages, LengthRule, advantages, group_advantages, kept_by_prune
from .metrics import Sums, peak_memory_mib
from .models import Pair, check_context, encode
from .rollouts import Rollouts, sample, uniforms
from .scoring import Scores, response_logits, score

SAMPLING, CHOOSING = 0, 1  # what a response's random numbers are for; the second kind chooses `random`'s positions


class Batch(NamedTuple):
    """The responses of this process in one step."""

    rows: list[int]  # their numbers among the responses of all processes
    examples: list[Example]
    rollouts: Rollouts
    group: Tensor | None  # [B]: group advantages, if the method needs them


class NotFiniteError(TrainerError):
    """Training has failed: a loss, a gradient or the student's logits are not finite."""


class Trainer:
    """Everything that a step needs and changes."""

    def __init__(self, config: TrainConfig, pair: Pair, task: Task, accelerator: Accelerator) -> None:
        """Move the models to their devices; `config.batch_size` must be a multiple of the number of processes."""
        self.config, self.pair, self.task = config, pair, task
        self.accelerator, self.device = accelerator, accelerator.device
        share = config.group_size * accelerator.num_processes
        if config.batch_size % share:
            rule = f"be a multiple of group_size x processes = {share}"
            raise TrainerError(f"TrainConfig: batch_size must {rule}, got {config.batch_size}")
        teacher: nn.Module = pair.teacher
        place = config.teacher_device or self.device
        try:
            if torch.device(place).type == "meta":
                raise RuntimeError("tensors have no values there")
            teacher.to(place)
        except (AssertionError, RuntimeError) as error:  # the device is unknown, absent or full
            raise TrainerError(f"the teacher cannot be on {place}: {reason(error)}") from error
        self.model = accelerator.prepare(pair.student)
        self.student = accelerator.unwrap_model(self.model)
        rates: Any = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.AdamW(self.student.parameters(), **rates)
        self.lengths = LengthRule(config, torch.distributed.group.WORLD if accelerator.num_processes > 1 else None)
        self.step, self.time_s = 0, 0.0  # done so far; the seconds are without evaluations and checkpoints
        # Some responses of the last step and what they were trained with, to be shown.
        self.last: tuple[Rollouts, Scores, Advantages, list[Example]] | None = None

    def train_step(self, status: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
        """Do one step and return its record; raise NotFiniteError before anything changes if the loss is not finite."""
        started = time.perf_counter()
        step, sums = self.step + 1, Sums(self.config.maximum_length)
        sampled, trained = self.lengths.sampled, self.lengths.trained
        status(f"step {step}: sampling up to {sampled} tokens")
        batch = self.sample(step, sampled)
        tokens = int(self.total(batch.rollouts.mask.sum()))
        status(f"step {step}: learning from {tokens} tokens")
        effective_lengths = self.accumulate(step, batch, tokens, sums)
        learning_rate = self.config.learning_rate * min(step / max(self.config.warmup_steps, 1), 1)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate
        grad_norm = float(self.accelerator.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm))
        measured = sums.means(self.total)
        loss = measured["loss"]
        if not (math.isfinite(grad_norm) and math.isfinite(loss)):
            self.optimizer.zero_grad()
            raise NotFiniteError(f"step {step}: loss and gradient norm must be finite, got {loss} and {grad_norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()

        hits = self.total(self.lengths.hits(effective_lengths).sum())
        budget = self.lengths.update(effective_lengths)
        self.step = step
        self.time_s += time.perf_counter() - started
        record = {"step": step, "method": self.config.method, "time_s": self.time_s, "tokens_generated": tokens}
        record |= {"budget": budget, "hit_ratio": float(hits) / self.config.batch_size, "trained_length": trained}
        last = {"grad_norm": grad_norm, "learning_rate": learning_rate, "peak_memory_mib": peak_memory_mib(self.device)}
        return record | measured | last

    @torch.no_grad()
    def require_finite_logits(self) -> None:
        """Raise NotFiniteError if the student can no longer compute its last responses: it is not worth saving."""
        if self.last is None:
            return
        with self.autocast():
            logits = response_logits(self.student, self.last[0])[..., : self.pair.vocab_size]
        broken = int(self.total((~logits.amax(-1).isfinite()).sum()))
        if broken:
            raise NotFiniteError(f"step {self.step}: the student's logits must be finite, got {broken} broken rows")

    def sample(self, step: int, length: int) -> Batch:
        """Sample responses of up to `length` tokens to this step's prompts (lines 2 and 3)."""
        config, size, rank = self.config, self.config.batch_size, self.accelerator.process_index
        share = size // self.accelerator.num_processes
        rows = list(range(rank * share, (rank + 1) * share))
        first = (step - 1) * (size // config.group_size)
        examples = [self.task.example(first + row // config.group_size) for row in rows]
        rollouts = self.respond(examples, uniforms([config.seed, step, SAMPLING], rows, length))
        group = None
        if config.method == "prune+grpo":
            grades = torch.tensor(self.grade(examples, rollouts), device=self.device)
            group = group_advantages(grades, config.group_size)
        return Batch(rows, examples, rollouts, group)

    def respond(self, examples: list[Example], uniforms: Tensor) -> Rollouts:
        """Sample the student's responses to examples, of up to as many tokens as each has random numbers."""
        prompt_ids, prompt_mask = encode(self.pair.tokenizer, [example.prompt for example in examples])
        check_context(self.pair, prompt_ids.shape[1], uniforms.shape[1])
        self.student.eval()
        with self.autocast():
            prompts = prompt_ids.to(self.device), prompt_mask.to(self.device)
            how: Any = {"temperature": self.config.temperature, "vocab_size": self.pair.vocab_size}
            length, end_ids = uniforms.shape[1], self.pair.end_ids
            rollouts = sample(self.student, *prompts, length=length, end_ids=end_ids, uniforms=uniforms, **how)
        self.student.train()
        return rollouts

    def grade(self, examples: list[Example], rollouts: Rollouts) -> list[float]:
        """Return the grade of each response."""
        texts = self.pair.tokenizer.batch_decode(responses(rollouts), skip_special_tokens=True)
        finished = self.finished(rollouts).tolist()
        return [self.task.grade(*graded) for graded in zip(examples, texts, finished, strict=True)]

    def finished(self, rollouts: Rollouts) -> Tensor:
        """Return which responses ended by themselves: `[B]` bool."""
        last = rollouts.mask.sum(1) - 1
        ends = torch.tensor(self.pair.end_ids, device=rollouts.token_ids.device)
        return torch.isin(rollouts.response_ids.gather(1, last[:, None])[:, 0], ends)

    def accumulate(self, step: int, batch: Batch, tokens: int, sums: Sums) -> Tensor:
        """Add up scores, advantages and the gradient of the loss (lines 4 to 10); return E, `[B]` in any order.

        The responses are taken in micro-batches of similar length. The loss is summed over their tokens and divided by
        the number of valid tokens of all processes, never by a sum of weights.
        """
        config, rollouts = self.config, batch.rollouts
        by_length = rollouts.mask.sum(1).argsort(descending=True, stable=True)
        parts = by_length.split(config.micro_batch_size)
        chosen = self.random_positions(step, batch, parts) if config.method == "random" else None
        effective_lengths = []
        for number, part in enumerate(parts):
            some = rollouts.take(part)
            kept = None if chosen is None else chosen[part, : some.mask.shape[1]]
            group = None if batch.group is None else batch.group[part]
            last = number == len(parts) - 1  # gradients are exchanged with the last micro-batch only
            with self.autocast(), nullcontext() if last else self.accelerator.no_sync(self.model):
                student = response_logits(self.model, some)
                scores = self.score(student, some)
                given = advantages(scores, config, kept, some.response_ids, group)
                if scores.loss is not None and group is None:  # found while scoring, for a weight of 1
                    losses = torch.where(given.weight != 0, given.weight * scores.loss, 0)
                else:
                    how: Any = {"student_temperature": config.temperature, "vocab_size": self.pair.vocab_size}
                    losses = topk_policy_loss(student, given.ids, given.values, some.mask, **how)
                # The gradients of the processes are averaged: this makes it their sum.
                self.accelerator.backward(losses.sum() / tokens * self.accelerator.num_processes)
            effective_lengths.append(scores.effective_length)
            sums.add(scores, given, losses.detach())
            if number == 0:
                self.last = some, scores._replace(loss=None), given, [batch.examples[row] for row in part.tolist()]
        return torch.cat(effective_lengths)

    def score(self, student_logits: Tensor, rollouts: Rollouts) -> Scores:
        """Return what both models say of the responses."""
        teacher = self.pair.teacher
        teacher_logits = response_logits(teacher, rollouts.to(teacher.device)).to(self.device)
        return score(student_logits, teacher_logits, rollouts, self.config, self.pair.vocab_size)

    @torch.no_grad()
    def random_positions(self, step: int, batch: Batch, parts: Sequence[Tensor]) -> Tensor:
        """Return the weights of positions for `random`: 1 where it keeps one, with the share that prune would keep.

        The share is that of the tokens which prune gives a weight, or of their reward mass. If some might have no
        weight, or for the mass, it takes a pass of both models. A share above 1 is the weight of every position.
        """
        mask, length, config = batch.rollouts.mask, self.lengths.trained, self.config
        if config.match == "tokens" and config.w_base > 0:
            kept, everything = kept_by_prune(mask, length).sum(), mask.sum()
        else:
            kept = everything = torch.zeros((), dtype=torch.float64, device=self.device)
            for part in parts:
                some = batch.rollouts.take(part)
                with self.autocast():
                    scores = self.score(response_logits(self.student, some), some)
                if config.match == "tokens":
                    amount, weight = some.mask.double(), scores.weight != 0
                else:
                    amount, weight = scores.rewards.double().abs().sum(-1), scores.weight
                kept = kept + (amount * weight * kept_by_prune(some.mask, length)).sum()
                everything = everything + amount.sum()
        share = self.total(kept) / self.total(everything)
        numbers = uniforms([self.config.seed, step, CHOOSING], batch.rows, mask.shape[1])
        return torch.where(mask & (numbers.to(self.device) < share), share.clamp(min=1), 0).float()

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the student's precision; its parameters stay in float32."""
        precision = self.config.precision
        enabled = precision == "bfloat16" or (precision == "auto" and computes_in_bfloat16(self.device))
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes."""
        summed: Tensor = self.accelerator.reduce(values.to(self.device), reduction="sum")
        return summed

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next steps depend on, except the student's weights."""
        parts = {"lengths": self.lengths.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {"step": self.step, "time_s": self.time_s, **parts, "random": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.step, self.time_s = state["step"], state["time_s"]
        self.lengths.load_state_dict(state["lengths"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])


def responses(rollouts: Rollouts) -> list[list[int]]:
    """Return the token ids of each response, without padding."""
    lengths = rollouts.mask.sum(1).tolist()
    return [ids[:length] for ids, length in zip(rollouts.response_ids.tolist(), lengths, strict=True)]


def computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether the processor multiplies bfloat16 matrices itself."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and on_cpu
