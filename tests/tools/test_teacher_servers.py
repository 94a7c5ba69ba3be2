"""Batches whose server answers late, wrongly or not at all."""

import json
import math
import threading
import time

import pytest
import torch

import teacher_server
import tiers
from pruneopd_kernels.integrations import server as module
from pruneopd_kernels.integrations.server import Server, TeacherServerError, check_tokenizer
from teacher_server import K, answering, completion, right, score


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.02)


def to_second(behaviour, times=math.inf):
    """Apply a behaviour to the second request (it begins with token 7) this many times; answer rightly otherwise."""
    return lambda payload, time: behaviour if payload["prompt"][0] == 7 and time <= times else right(payload, time)


def failure(behave, **patience):
    """Return the error of a batch, its duration, and how often the second request came."""
    with answering(behave, **patience) as (server, asked):
        start = time.perf_counter()
        with pytest.raises(TeacherServerError) as raised:
            score(server)
        told = str(raised.value).removeprefix("vllm.score: the answer to ").replace(server.url, "URL")
        return told, time.perf_counter() - start, [payload["prompt"][0] for payload in asked.payloads].count(7)


def changed(change):
    """Return a right answer to the second request with a change to its last token."""
    answer = completion([7, 9, 9], K)
    change(answer["choices"][0]["prompt_logprobs"][2])
    return answer


NAME = "request 1 of 3 (1 + 2 tokens) from URL must"
WRONG = [
    (changed(lambda said: [said.pop(token) for token in ("10", "11", "12")]),
     "have a candidate at each token, got none at token 1 of the response"),
    (changed(lambda said: said.update({"50000": said.pop("12")})),
     "have ids in [0, vocab_size = 40), got 50000 at token 1 of the response: is it another tokenizer's?"),
    (completion([7, 9, 8], K),
     "have the log-probability of token 1 of the response, 9, got those of [8, 10, 11]: is it another tokenizer's?"),
    (completion([7, 9], K), "have prompt_logprobs of 3 tokens, got 2"),
    (changed(lambda said: said["12"].update(logprob=31.0)),
     "have log-probabilities, at most 0, got 31 at token 1 of the response: are they logits?"),
    ({"choices": [{"prompt_logprobs": None}]}, "have prompt_logprobs of 3 tokens, got none"),
    ({"object": "error"}, "have the form that the server's documentation describes, got KeyError('choices')"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "words"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_answer_is_an_error_at_once(answer, words):
    told, _, times = failure(to_second((200, answer)))
    assert (told, times) == (f"{NAME} {words}", 1)


NESTED = b"[" * 200_000
REFUSALS = [
    ({"error": {"message": "token id 39 is out\nof vocabulary", "code": 400}}, "token id 39 is out of vocabulary"),
    (NESTED, "[" * 300),
    ({"error": {"message": "prompt logprobs of 3, which is greater than max allowed: 2"}},
     "prompt logprobs of 3, which is greater than max allowed: 2; start the server with --max-logprobs 3 or more"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words"), REFUSALS, ids=range(len(REFUSALS)))
def test_a_refused_request_is_not_repeated(body, words):
    """The error has the server's message, regardless of its form; a busy server may use the same words."""
    told, _, times = failure(to_second((400, body)))
    assert (told, times) == (f"{NAME} be a success, got HTTP 400: {words}", 1)
    with answering(to_second((503, body), times=1)) as (server, _):
        assert score(server).mask.sum() == 5


SECOND = json.dumps(completion([7, 9, 9], K)).encode()
HALF = len(SECOND) // 2
CUT_OFF = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(SECOND), SECOND[:HALF])
PASSING = {
    "busy": ((503, b"<html>\nloading"), "HTTP 503: <html> loading"),
    "too many": ((429, {"message": "slow down"}), "HTTP 429: slow down"),
    "no JSON": ((200, b"<html>"), "no JSON but b'<html>'"),
    "nested": ((200, NESTED), f"no JSON but {NESTED[:300]}"),
    "cut off": (teacher_server.sends(CUT_OFF),
                f"IncompleteRead({HALF} bytes read, {len(SECOND) - HALF} more expected)"),
    "late": (teacher_server.hang, "nothing in time"),
}  # fmt: skip


@pytest.mark.parametrize("what", PASSING)
def test_what_may_pass_is_asked_again(what):
    """The second retry succeeds; if it does not come, the error says what came last."""
    behaviour, lost = PASSING[what]
    with answering(right) as (server, _):
        expected = score(server)
    with answering(to_second(behaviour, times=2), attempt_timeout_s=0.3) as (server, asked):
        assert all(map(torch.equal, expected, score(server)))
    assert sorted(payload["prompt"][0] for payload in asked.payloads) == [1, 7, 7, 7]
    told, _, times = failure(to_second(behaviour), attempts=2, attempt_timeout_s=0.3)
    assert (told, times) == (f"{NAME} come within 20 s in at most 2 attempts, got {lost} after 2 of them", 2)


SLOW = {"nothing": teacher_server.hang, **teacher_server.DRIPS}
LIMITS = {
    "batch": ({"timeout_s": 0.5, "attempts": 100}, 0.5, "within 0.5 s in at most 100 attempts, got nothing in time", 1),
    "attempt": ({"attempts": 2, "attempt_timeout_s": 0.3}, 0.6, "in at most 2 attempts, got nothing in time", 2),
}


def no_thread_is_left():
    return not [thread for thread in threading.enumerate() if thread.name.startswith("teacher_")]


@pytest.mark.parametrize(("what", "limit"), tiers.combinations(SLOW, LIMITS))
def test_time_limits(what, limit):
    """The limits hold for a whole answer, even if no single wait is long."""
    patience, least, words, attempts = LIMITS[limit]
    told, took, _ = failure(to_second(SLOW[what]), **patience)
    assert "request 1 of 3" in told and told.endswith(f"{words} after {attempts} of them")
    assert least <= took < 3 and no_thread_is_left()


def test_the_wait_for_a_busy_server_ends_with_the_time(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 60.0)
    told, took, _ = failure(lambda *_: (503, b""), timeout_s=0.5)
    assert told.endswith("got HTTP 503 after 1 of them") and took < 3


def test_one_failure_breaks_off_the_others():
    """Requests that hang or are queued do not delay the error."""
    told, took, _ = failure(
        lambda payload, _: teacher_server.hang if payload["prompt"][0] == 1 else (400, b"no"), concurrency=2
    )
    assert "request 1 of 3" in told and took < 3 and no_thread_is_left()
    responses = [[5]] * 50
    with answering(lambda *_: (400, b"no"), concurrency=1) as (server, asked), pytest.raises(TeacherServerError):
        score(server, prompt_ids=responses, response_ids=responses)
    assert len(asked.payloads) < 10


def test_no_more_requests_at_a_time_than_allowed():
    places, three = threading.Semaphore(3), threading.Barrier(3, timeout=5)

    def behave(payload, times):
        free = places.acquire(blocking=False)
        three.wait()
        time.sleep(0.05)  # a fourth would come meanwhile
        places.release()
        return right(payload, times) if free else (400, b"more than three at a time")

    with answering(behave, concurrency=3) as (server, _):
        assert score(server, prompt_ids=[[1]] * 9, response_ids=[[2]] * 9).mask.sum() == 9


BEGIN = "url must begin with http:// or https:// and name a host"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "localhost:8000"}, f"{BEGIN}, got 'localhost:8000'"),
        ({"url": "http://me:secret@b:x"}, f"{BEGIN}, got 'b:x'"),
        ({"url": "http://b?key=secret"}, "url must have no user, query or fragment, got one with some, of the host b"),
        ({"url": "http://b/ "}, "url must consist of printable ASCII characters without spaces, got 'http://b/ '"),
        ({"api_key": "secret\n"}, "api_key must consist of printable ASCII characters, got others, too"),
        ({"concurrency": 0}, "concurrency must be >= 1, got 0"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError) as raised:
        Server(**{"url": "http://localhost:8000", **settings})
    assert str(raised.value) == f"Server: {words}"


def test_a_tokenizer_is_compared():
    def bytes_of(text):
        return list(text.encode())

    with answering(lambda payload, _: (200, {"tokens": bytes_of(payload["prompt"])})) as (server, asked):
        check_tokenizer(server, bytes_of, model="teacher")
        for wrong, words in (([7], "(7), got 100 for token 3"), ([], "(3), got 4 tokens")):
            with pytest.raises(TeacherServerError) as raised:
                check_tokenizer(server, lambda text, last=wrong: bytes_of(text)[:3] + last, text="abcd")
            assert "from " + server.url in str(raised.value)
            assert str(raised.value).endswith(f"{words}: the tokenizers differ")
    assert set(asked.paths) == {"/tokenize"}
    assert asked.payloads[0] == {"prompt": module.PROBE, "add_special_tokens": False, "model": "teacher"}
    assert "model" not in asked.payloads[1]
