"""Distil on-policy from a teacher server: the student samples, vLLM scores, the student learns.

`make example-vllm` sets up what it needs, serves SmolLM2-135M-Instruct on this machine's processor, and distils it for
ten steps into the same model without one of its layers. It needs a server such as

    vllm serve <folder> --served-model-name teacher --max-logprobs 16
"""

import argparse
import time
from itertools import pairwise

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pruneopd_kernels import linear_opd_loss
from pruneopd_kernels.integrations import vllm
from pruneopd_kernels.integrations.server import Server, check_tokenizer

QUESTIONS = [
    "Explain step by step how a bicycle stays upright while it is moving.",
    "Tell a story about a lighthouse keeper who finds a letter in a bottle.",
    "How do I cook a vegetable soup from scratch? Give every step.",
    "Describe the journey of a drop of water from the ocean to a mountain and back.",
    "Write a detailed plan for someone who wants to learn the guitar in a year.",
    "What happens inside a star from its birth to its death?",
]


def without_layer(model, index):
    del model.model.layers[index]
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place  # in the KV cache
    model.config.num_hidden_layers -= 1
    return model


def distil(student, token_ids, attention_mask, mask, teacher):
    """KL(teacher || student) over the teacher's candidates and the rest, weighted by reliability, mean over tokens."""
    states = student.base_model(token_ids, attention_mask=attention_mask).last_hidden_state
    return linear_opd_loss(
        states[:, -mask.shape[1] - 1 : -1],
        student.lm_head.weight,
        mask=mask,
        teacher_topk_ids=teacher.teacher_topk_ids,
        teacher_topk_logprobs=teacher.teacher_topk_logprobs,
        k=teacher.teacher_topk_ids.shape[-1],
        loss="topk_forward_kl",
        reduction="sum",
        scale=1 / mask.sum().clamp(min=1),
        chunk_size=128,
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", required=True, help="the model, a transformers checkpoint")
    parser.add_argument("--url", required=True, help="a server that knows the model as 'teacher'")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--length", type=int, default=48, help="the most tokens a response may have")
    parser.add_argument("--k", type=int, default=16, help="the teacher's candidates a token")
    parser.add_argument("--lr", type=float, default=2e-5)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.model_dir, dtype=torch.float32)
    student = without_layer(model, model.config.num_hidden_layers // 2)
    server = Server(options.url, timeout_s=300, attempt_timeout_s=120)
    check_tokenizer(server, lambda text: tokenizer.encode(text, add_special_tokens=False), model="teacher")
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    how = {"add_generation_prompt": True, "padding": True, "return_dict": True, "return_tensors": "pt"}
    prompts = tokenizer.apply_chat_template(chats, **how)
    prompt_mask, start = prompts["attention_mask"].bool(), prompts["input_ids"].shape[1]

    losses = []
    print("step    loss  overlap  drift  sampling  teacher  student")
    for step in range(options.steps):
        times = [time.perf_counter()]
        token_ids = student.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=options.length)
        ended = (token_ids[:, start:] == tokenizer.eos_token_id).int()
        mask = ended.cumsum(1) - ended == 0  # True up to and including the token that ends the response
        times.append(time.perf_counter())
        asked = [ids[used].tolist() for ids, used in zip(token_ids[:, :start], prompt_mask, strict=True)]
        answered = [ids[used].tolist() for ids, used in zip(token_ids[:, start:], mask, strict=True)]
        teacher = vllm.score(  # or raises, before anything has been learnt
            server, asked, answered, model="teacher", vocab_size=len(tokenizer), k=options.k, length=mask.shape[1]
        )
        times.append(time.perf_counter())
        out = distil(student, token_ids, torch.cat([prompt_mask, mask], 1).long(), mask, teacher)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        times.append(time.perf_counter())
        losses.append(out.loss.item())
        seconds = " ".join(f"{after - before:6.2f} s" for before, after in pairwise(times))
        overlap, drift = out.overlap[mask].mean(), out.drift[mask].float().mean()
        print(f"{step:4}  {losses[-1]:.4f}  {overlap:7.3f}  {drift:5.3f}  {seconds}", flush=True)
    return losses


if __name__ == "__main__":
    main()
