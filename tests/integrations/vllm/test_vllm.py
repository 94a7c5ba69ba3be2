"""A real vLLM server on this machine's processor agrees with SmolLM2 itself."""

import json
import runpy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from vllm.logprobs import append_logprobs_for_next_position, create_prompt_logprobs

import pruneopd_kernels as po
from pruneopd_kernels.integrations import vllm
from pruneopd_kernels.integrations.server import Request, Server, TeacherServerError
from pruneopd_lab.prompts import PROMPTS
from pruneopd_lab.score import hidden_states
from pruneopd_lab.students import load_teacher, remove_layers, smollm2_folder
from pruneopd_trainer.loop import responses
from pruneopd_trainer.models import encode
from pruneopd_trainer.rollouts import sample, uniforms
from scripts.vllm_server import served as vllm_served

ROOT = Path(__file__).parents[3]
EXAMPLE = runpy.run_path(str(ROOT / "examples" / "vllm_teacher.py"))
K, LENGTH, COUNT = 16, 40, 4


class Served(NamedTuple):
    server: Server
    model: object
    tokenizer: object
    rollouts: object
    prompts: list
    responses: list
    log: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    model, tokenizer = load_teacher(smollm2_folder())
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    student = remove_layers(model, [15, 16, 17, 18])
    rollouts = sample(
        student, *encode(tokenizer, PROMPTS[:COUNT]), length=LENGTH, end_ids=[tokenizer.eos_token_id],
        uniforms=uniforms([0], range(COUNT), LENGTH),
    )  # fmt: skip
    prompts = zip(rollouts.token_ids, rollouts.attention_mask.bool(), strict=True)
    prompts = [ids[: rollouts.prompt_length][used[: rollouts.prompt_length]].tolist() for ids, used in prompts]
    with vllm_served(folder / "model", K, folder / "server.log") as url:
        server = Server(url, timeout_s=120, attempt_timeout_s=60)
        yield Served(server, model, tokenizer, rollouts, prompts, responses(rollouts), folder / "server.log")


def score(served, **changed):
    arguments = {"model": "teacher", "vocab_size": len(served.tokenizer), "k": K}
    return vllm.score(served.server, served.prompts, served.responses, **{**arguments, **changed})


def raw(served, payload):
    """Return the raw `prompt_logprobs` of the server's answer."""
    [answer] = served.server.ask("test", "/v1/completions", [Request("a request", payload, lambda answer: answer)])
    return answer["choices"][0]["prompt_logprobs"]


@torch.no_grad()
def local(served):
    logits = served.model.lm_head(hidden_states(served.model, served.rollouts))
    stats = po.token_stats(logits, logits, served.rollouts.mask, token_ids=served.rollouts.response_ids, k=K)
    return logits.log_softmax(-1), stats


def test_the_server_says_what_the_model_says(served):
    out, (logprobs, stats) = score(served), local(served)
    mask = served.rollouts.mask
    assert torch.equal(out.mask, mask)
    torch.testing.assert_close(
        out.teacher_token_logprobs[mask], stats.teacher_token_logprob[mask].float(), rtol=0, atol=2e-3
    )
    said, known = out.teacher_topk_ids[mask], stats.teacher_topk_ids[mask]
    of_model = logprobs[mask].gather(-1, said)
    torch.testing.assert_close(out.teacher_topk_logprobs[mask], of_model, rtol=0, atol=2e-3)
    # Another id than the model's own only where two are so close that rounding decides.
    differing = said != known
    assert differing.float().mean() < 0.01
    gap = (of_model - logprobs[mask].gather(-1, known))[differing].abs()
    assert (gap < 2e-3).all()

    sampled = served.rollouts.response_ids[mask][:, None]
    assert (said != sampled).all(-1).sum() > 5, "no token was outside the candidates: choose a worse student"
    both = po.reliability_from_topk(out.teacher_topk_ids, stats.teacher_topk_ids, mask)
    print(f"\n{int(mask.sum())} tokens, {differing.float().mean():.4f} of the ids differ, mean overlap "
          f"{both.overlap[mask].mean():.4f}, log-probabilities differ by "
          f"{(out.teacher_topk_logprobs[mask] - of_model).abs().max():.1e} at most")  # fmt: skip


@pytest.mark.parametrize("flat", [False, True])
def test_offline_containers(flat):
    """Both containers of `LLM.generate`, filled by vLLM's own function."""
    logprobs = create_prompt_logprobs(flat)
    append_logprobs_for_next_position(logprobs, [7, 5, 2], [-3.0, -0.5, -1.5], [None] * 3, rank=9, num_logprobs=2)
    append_logprobs_for_next_position(logprobs, [3, 5, 3], [-2.5, -0.1, -2.5], [None] * 3, rank=2, num_logprobs=2)
    out = vllm.from_prompt_logprobs([list(logprobs) if flat else logprobs], [[1]], [[7, 3]], vocab_size=10, k=2)
    assert out.teacher_topk_ids.tolist() == [[[5, 2], [5, 3]]]
    assert out.teacher_token_logprobs.tolist() == [[-3.0, -2.5]]


def test_what_the_server_refuses(served):
    """A k above its limit, an unknown name, unknown ids, a sequence without room for one more token."""
    refused = r"request 0 of .* must be a success, got HTTP 400"
    with pytest.raises(TeacherServerError, match=r"HTTP 400: .*max allowed: 16.*; start .* with --max-logprobs 17"):
        score(served, k=17)
    with pytest.raises(TeacherServerError, match="HTTP 404"):
        score(served, model="student")
    with pytest.raises(TeacherServerError, match=refused):
        vllm.score(served.server, [[1]], [[60000]], model="teacher", vocab_size=151936)
    with pytest.raises(TeacherServerError, match="is it another tokenizer's"):
        score(served, vocab_size=max(map(max, served.prompts + served.responses)) + 1)
    long = {"prompt_ids": [[1] * 1000], "model": "teacher", "vocab_size": 49152}
    with pytest.raises(TeacherServerError, match=refused):
        vllm.score(served.server, response_ids=[[2] * 24], **long)
    assert vllm.score(served.server, response_ids=[[2] * 23], **long).mask.sum() == 23


def test_ten_steps(served, capsys):
    model = served.log.with_name("model")
    losses = EXAMPLE["main"](["--url", served.server.url, "--model-dir", str(model), "--length", "24"])
    print(capsys.readouterr().out)
    assert len(losses) == 10
    assert sum(losses[-3:]) < sum(losses[:3])


def test_the_recording_is_of_this_server(served):
    """vLLM still answers what tests/data/vllm_prompt_logprobs.json holds."""
    recorded = json.loads((ROOT / "tests" / "data" / "vllm_prompt_logprobs.json").read_text())
    for case in (case for case in recorded["cases"] if case["dtype"] == "float32"):
        positions = raw(served, case["payload"])
        assert [position and list(position) for position in positions] == [
            position and list(position) for position in case["prompt_logprobs"]
        ]
