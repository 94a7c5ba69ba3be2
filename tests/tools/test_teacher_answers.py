"""Answers of vLLM and SGLang, invented and recorded, become the operators' tensors."""

import doctest
import json
import math
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from pruneopd_kernels.integrations import sglang, vllm
from pruneopd_kernels.integrations.server import Server, TeacherServerError
from teacher_server import PROMPTS, RESPONSES, K, V, answering, completion, right, score


def test_vllm_answers_become_tensors():
    with answering(right, api_key="secret") as (server, asked):
        out = score(server, length=4)
    assert out.teacher_topk_ids.tolist() == [
        [[3, 4, 5], [4, 5, 6], [5, 6, 7], [-1, -1, -1]],
        [[8, 9, 10], [10, 11, 12], [-1, -1, -1], [-1, -1, -1]],
        [[-1, -1, -1]] * 4,
    ]
    # The last token of the first response and of the second are none of the candidates.
    assert out.teacher_token_logprobs.tolist() == [[-1, -1, -26, 0], [-2, -40, 0, 0], [0] * 4]
    assert out.teacher_topk_logprobs[0, 2].tolist() == [-1, -2, -3]
    assert out.teacher_topk_logprobs[0, 3].tolist() == [-math.inf] * 3
    assert out.mask.tolist() == [[True, True, True, False], [True, True, False, False], [False] * 4]
    assert [tensor.dtype for tensor in out] == [torch.int64, torch.float32, torch.float32, torch.bool]
    assert sorted(payload["prompt"] for payload in asked.payloads) == [[1, 2, 3, 4, 30], [7, 9, 9]]
    wanted = {"model": "teacher", "prompt_logprobs": 3, "max_tokens": 1, "temperature": 0.0}
    assert all(payload.items() >= wanted.items() for payload in asked.payloads)
    assert set(asked.paths) == {"/v1/completions"}
    assert all(headers["Authorization"] == "Bearer secret" for headers in asked.headers)
    assert "secret" not in repr(server)


def test_the_length_is_that_of_the_longest_response():
    with answering(right) as (server, asked):
        server = Server(f"{server.url}/teacher/")  # the path before the API is kept
        assert score(server).mask.shape == (3, 3)
        assert score(server, response_ids=[[], [], []]).teacher_topk_ids.shape == (3, 0, 3)
        assert score(server, prompt_ids=[], response_ids=[]).teacher_topk_ids.shape == (0, 0, 3)
        for of in (np.array, torch.tensor, iter):
            ids = {"prompt_ids": map(of, PROMPTS), "response_ids": [of(ids) if ids else ids for ids in RESPONSES]}
            assert all(map(torch.equal, score(server), score(server, **{key: list(x) for key, x in ids.items()})))
    assert set(asked.paths) == {"/teacher/v1/completions"}


Entry = namedtuple("Entry", ["logprob", "rank"])  # the fields of `vllm.logprobs.Logprob` that are read


def entry(logprob, rank):
    return Entry(logprob, rank)._asdict()


TIED = {"9": entry(-1.0, 1), "31": entry(-2.0, 2), "4": entry(-2.0, 3), "30": entry(-2.0, 4)}
NAN, INF = math.nan, math.inf
POSITIONS = {
    # vLLM's answer, the sampled token, k; the candidates' ids and log-probabilities, the token's log-probability
    "ties: the lower id first": (TIED, 9, 4, [9, 4, 30, 31], [-1, -2, -2, -2], -1),
    "the server chooses among those that tie for the last place": (TIED, 9, 2, [9, 31], [-1, -2], -1),
    "offline": (
        {9: Entry(-INF, 30), 3: Entry(-0.5, 1), 2: Entry(-INF, 2)}, 9, 2, [3, -1], [-0.5, -INF], -INF
    ),
    "JSON: -9999 is -inf and null is NaN": (
        {"9": entry(-9999.0, 30), "2": entry(-9999.0, 2), "3": entry(None, 1)}, 9, 2, [3, -1], [NAN, -INF], -INF
    ),
    "a sampled token without a value has rank 0": (
        {"9": entry(None, 0), "3": entry(-0.5, 1), "2": entry(-1.0, 2)}, 9, 2, [3, 2], [-0.5, -1], NAN
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", POSITIONS)
def test_a_position_of_vllm(case):
    position, token, k, ids, logprobs, token_logprob = POSITIONS[case]
    out = vllm.from_prompt_logprobs([[None, position]], [[0]], [[token]], vocab_size=V, k=k)
    assert out.teacher_topk_ids.tolist() == [[ids]]
    found = [*out.teacher_topk_logprobs[0, 0].tolist(), out.teacher_token_logprobs.item()]
    assert found == pytest.approx([*logprobs, token_logprob], abs=0, nan_ok=True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"response_ids": [[1], 7, []]}, "response_ids[1] must be a sequence of integers, got 7"),
        ({"prompt_ids": [[1], [7]]}, "response_ids must be as many as prompt_ids (2), got 3"),
        ({"prompt_ids": [[1], [], [3]]}, "prompt_ids[1] must have at least one token, got none"),
        ({"response_ids": [[1], [40], []]}, "response_ids[1] must have ids in [0, vocab_size = 40), got 40"),
        ({"length": 2}, "length must be at least the longest response's 3, got 2"),
    ],
)
def test_bad_arguments(changed, words):
    kind = TypeError if "sequence of integers" in words else ValueError
    with answering(right) as (server, asked), pytest.raises(kind) as raised:
        score(server, **changed)
    assert str(raised.value) == f"vllm.score: {words}"
    assert asked.payloads == []


@pytest.mark.parametrize("module", [vllm, sglang], ids=["vllm", "sglang"])
def test_docstrings(module):
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0 and found.attempted > 0


def generated(payload, times):
    """Answer as SGLang does: [log-probability, id, text] from `logprob_start_len` on, the first one null."""
    sequence, k, start = (payload[name] for name in ("input_ids", "top_logprobs_num", "logprob_start_len"))
    positions = completion(sequence, k)["choices"][0]["prompt_logprobs"]
    tokens, tops = [[None, sequence[start], None]], [None]
    for token, position in list(zip(sequence, positions, strict=True))[start + 1 :]:
        tokens.append([position[str(token)]["logprob"], token, None])
        best = sorted((value["rank"], value["logprob"], int(key)) for key, value in position.items())
        tops.append([[logprob, key, None] for _, logprob, key in best[:k]])
    return 200, {"text": "", "meta_info": {"input_token_logprobs": tokens, "input_top_logprobs": tops}}


def test_sglang_says_the_same():
    with answering(right) as (server, _):
        expected = score(server)
    with answering(generated) as (server, asked):
        out = sglang.score(server, PROMPTS, RESPONSES, vocab_size=V, k=K)
    assert all(map(torch.equal, out, expected))
    assert set(asked.paths) == {"/generate"}
    (first,) = (payload for payload in asked.payloads if payload["input_ids"] == [1, 2, 3, 4, 30])
    fields = {"return_logprob": True, "logprob_start_len": 1, "top_logprobs_num": 3, "return_text_in_logprobs": False}
    assert first.items() >= fields.items() and first["sampling_params"] == {"max_new_tokens": 0, "temperature": 0.0}


RECORDED = {  # in the form of sglang/srt/managers/tokenizer_manager.py; scored from token 1 of 5 on
    "prompt_tokens": 5,
    "input_token_logprobs": [[None, 6722, None], [-0.58203125, 315, None], [-3.53125, 9625, None], [-9.5, 374, None]],
    "input_top_logprobs": [
        None,
        [[-0.58203125, 315, None], [-2.140625, 3283, None], [-3.765625, 374, None]],
        [[-1.0390625, 279, None], [-3.53125, 9625, None], [-3.53125, 5616, None]],
        [[-2.09375, 13, None], [-2.34375, 58883, None], [-2.40625, 11, None]],
    ],
}
TOKENS, TOPS = RECORDED["input_token_logprobs"], RECORDED["input_top_logprobs"]


def test_a_recorded_answer_of_sglang():
    """bfloat16 logits tie, the last token is not a candidate, and the best k of more candidates are taken."""
    more = [[[-4.0, 1, None], *top, [-3.9, 2, None]] for top in TOPS[1:3]]
    for tops in (TOPS, [None, *more, TOPS[3]]):
        for prompt, response in (([785, 6722, 315], [9625, 374]), ([785, 6722, 315, 9625], [374])):
            answer = {**RECORDED, "input_top_logprobs": tops}
            out = sglang.from_meta_info([answer], [prompt], [response], vocab_size=151936, k=3)
            assert out.teacher_topk_ids.tolist() == [[[279, 5616, 9625], [13, 58883, 11]][-len(response) :]]
            assert out.teacher_token_logprobs.tolist() == [[-3.53125, -9.5][-len(response) :]]


COUNT = "have 4 input_token_logprobs and input_top_logprobs after the first, which is null, got"
WRONG = [
    ({"input_token_logprobs": TOKENS[1:]}, f"{COUNT} 3 and 4 in all"),
    ({"input_top_logprobs": [*TOPS[:3], [[-1.0, 9, None]] * 3]},
     "have whole numbers as ids, no two of them the same, got [9, 9, 9] at token 2 of the response"),
    ({"input_token_logprobs": [*TOKENS[:2], [-1.0, 77, None], TOKENS[3]]},
     "have the log-probability of token 1 of the response, 9625, got that of 77"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "words"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_answer_of_sglang(changed, words):
    response = [6722, 315, 9625, 374] if words.startswith(COUNT) else [315, 9625, 374]
    with pytest.raises(TeacherServerError) as raised:
        sglang.from_meta_info([{**RECORDED, **changed}], [[785]], [response], vocab_size=151936, k=3)
    name = f"request 0 of 1 (1 + {len(response)} tokens)"
    assert str(raised.value) == f"sglang.from_meta_info: the answer to {name} must {words}"


RECORDING = json.loads((Path(__file__).parents[1] / "data" / "vllm_prompt_logprobs.json").read_text())


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-3), ("bfloat16", 0.3)])
def test_recorded_answers_of_vllm(dtype, close):
    """The recorded answers agree with the model itself in float32."""
    cases = [case for case in RECORDING["cases"] if case["dtype"] == dtype]
    fields = ([case[name] for case in cases] for name in ("prompt_logprobs", "prompt", "response"))
    out = vllm.from_prompt_logprobs(*fields, vocab_size=RECORDING["vocab_size"], k=RECORDING["k"])
    for row, case in enumerate(cases):
        own, length = case["model"], len(case["response"])
        torch.testing.assert_close(out[2][row, :length], torch.tensor(own["token_logprobs"]), rtol=0, atol=close)
        if dtype == "float32":
            assert out.teacher_topk_ids[row, :length].tolist() == own["topk_ids"]
            torch.testing.assert_close(out[1][row, :length], torch.tensor(own["topk_logprobs"]), rtol=0, atol=close)
    if dtype == "bfloat16":  # logits tie, and here the server has put the greater id first
        position = len(cases[2]["response"]) - 2
        assert out.teacher_topk_ids[2, position].tolist() == [33, 34, 35, 37]
        assert out.teacher_topk_logprobs[2, position, 2] == out.teacher_topk_logprobs[2, position, 3]
