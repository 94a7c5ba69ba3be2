"""What becomes of a batch when a teacher's server does not answer as it should."""

import json
import math
import threading
import time

import pytest
import torch

import teacher_server
from pruneopd_kernels.integrations import server as module
from pruneopd_kernels.integrations.server import Server, TeacherServerError, check_tokenizer
from teacher_server import K, answering, completion, right, score


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.02)


def of_one(payload, times, *, prompt, behaviour):
    """As told where a sequence begins with this token, else right."""
    return behaviour if payload["prompt"][0] == prompt else right(payload, times)


def failure(behave, **patience):
    """The error of a batch, how long it took, and what had been asked."""
    with answering(behave, **patience) as (server, asked):
        start = time.perf_counter()
        with pytest.raises(TeacherServerError) as raised:
            score(server)
        return str(raised.value).replace(server.url, "URL"), time.perf_counter() - start, asked


def without(answer, position, *tokens):
    for token in tokens:
        del answer["choices"][0]["prompt_logprobs"][position][str(token)]
    return answer


def with_logprob(answer, value):
    answer["choices"][0]["prompt_logprobs"][2]["12"]["logprob"] = value
    return answer


def with_foreign_id(answer):
    answer["choices"][0]["prompt_logprobs"][2]["50000"] = answer["choices"][0]["prompt_logprobs"][2].pop("12")
    return answer


FORM = "have the form that the server's documentation describes"
SECOND = completion([7, 9, 9], K)
WRONG = [
    (without(completion([7, 9, 9], K), 2, 11, 12), "have 3 candidates at each token, got 1 at token 1 of the response"),
    (completion([7, 9, 9], 2), "have 3 candidates at each token, got 2 at token 0 of the response"),
    (with_foreign_id(completion([7, 9, 9], K)),
     "have ids in [0, vocab_size = 40), got 50000 at token 1 of the response: is it another tokenizer's?"),
    (completion([7, 9, 8], K),
     "have the log-probability of token 1 of the response, 9, got those of [8, 10, 11]: is it another tokenizer's?"),
    (completion([7, 9], K), "have prompt_logprobs of 3 tokens, got 2"),
    (with_logprob(completion([7, 9, 9], K), 31.0),
     "have log-probabilities, at most 0, got 31 at token 1 of the response: are they logits?"),
    (with_logprob(completion([7, 9, 9], K), 10**400),
     f"{FORM}, got OverflowError('int too large to convert to float')"),
    ({"choices": [{"prompt_logprobs": None}]}, "have prompt_logprobs of 3 tokens, got none"),
    ({"choices": []}, f"{FORM}, got IndexError('list index out of range')"),
    ({"object": "error"}, f"{FORM}, got KeyError('choices')"),
    ([1], f"{FORM}, got TypeError('list indices must be integers or slices, not str')"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "words"), WRONG, ids=range(len(WRONG)))
def test_an_answer_in_which_something_is_wrong(answer, words):
    """An error at once: asking again would bring the same."""
    told, _, asked = failure(lambda *request: of_one(*request, prompt=7, behaviour=(200, answer)))
    assert told == f"vllm.score: the answer to request 1 of 3 (1 + 2 tokens) from URL must {words}"
    assert asked.times(next(payload for payload in asked.payloads if payload["prompt"][0] == 7)) == 1


def test_a_refused_request_is_not_repeated():
    body = {"error": {"message": "token id 39 is out\nof vocabulary", "type": "BadRequestError", "code": 400}}
    told, _, asked = failure(lambda *request: of_one(*request, prompt=7, behaviour=(400, body)))
    assert told == (
        "vllm.score: the answer to request 1 of 3 (1 + 2 tokens) from URL must be a success, "
        "got HTTP 400: token id 39 is out of vocabulary"
    )
    assert [payload["prompt"][0] for payload in asked.payloads].count(7) == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (None, "None"),
        (["x"], "['x']"),
        ({"detail": 1}, "{'detail': 1}"),
    ],
)
def test_an_error_in_odd_words_is_repeated(said, words):
    """And a server that is busy in odd words is asked again."""
    told, _, _ = failure(lambda *_: (400, {"error": {"message": said}}))
    assert told.endswith(f"must be a success, got HTTP 400: {words}")

    def behave(payload, times):
        return (503, {"error": {"message": said}}) if times == 1 else right(payload, times)

    with answering(behave) as (server, _):
        assert score(server).mask.sum() == 5


NESTED = b"[" * 200_000


def test_an_answer_nested_too_deeply():
    told, _, _ = failure(lambda *_: (400, NESTED))
    assert "got HTTP 400: [[[" in told
    told, _, _ = failure(lambda *_: (200, NESTED), attempts=1)
    assert "got no JSON but b'[[[" in told and told.endswith("after 1 of them")


def test_more_candidates_than_the_server_allows():
    body = {"error": {"message": "Requested prompt logprobs of 3, which is greater than max allowed: 2"}}
    told, _, _ = failure(lambda *_: (400, body))
    assert told.endswith(
        "got HTTP 400: Requested prompt logprobs of 3, which is greater than max allowed: 2; "
        "start the server with --max-logprobs 3 or more"
    )


PASSING = {
    "busy": (503, b"<html>\nloading"),
    "too many": (429, {"message": "slow down"}),
    "no JSON": (200, b"<html>"),
    "cut off": teacher_server.half(json.dumps(SECOND).encode()),
    "hung up": teacher_server.hang_up,
    "late": teacher_server.hang,
}


@pytest.mark.parametrize("what", PASSING)
def test_what_may_pass_is_asked_again(what):
    def behave(payload, times):
        if payload["prompt"][0] == 7 and times < 3:
            return PASSING[what]
        return right(payload, times)

    with answering(behave, attempt_timeout_s=0.3) as (server, asked):
        out = score(server)
    with answering(right) as (server, _):
        expected = score(server)
    assert all(map(torch.equal, out, expected))
    assert sorted(payload["prompt"][0] for payload in asked.payloads) == [1, 7, 7, 7]


LOST = {
    "busy": "HTTP 503: <html> loading after 2 of them",
    "too many": "HTTP 429: slow down after 2 of them",
    "no JSON": "no JSON but b'<html>' after 2 of them",
    "cut off": f"IncompleteRead({len(json.dumps(SECOND)) // 2} bytes read, "
    f"{len(json.dumps(SECOND)) - len(json.dumps(SECOND)) // 2} more expected) after 2 of them",
    "hung up": "Remote end closed connection without response after 2 of them",
    "late": "nothing in time after 2 of them",
}


@pytest.mark.parametrize("what", LOST)
def test_what_does_not_pass_is_an_error(what):
    told, _, asked = failure(
        lambda *request: of_one(*request, prompt=7, behaviour=PASSING[what]), attempts=2, attempt_timeout_s=0.3
    )
    assert told == (
        "vllm.score: the answer to request 1 of 3 (1 + 2 tokens) from URL must come within 20 s in at most 2 attempts, "
        f"got {LOST[what]}"
    )
    assert [payload["prompt"][0] for payload in asked.payloads].count(7) == 2


def test_no_server():
    with answering(right) as (server, _):
        url = server.url
    with pytest.raises(TeacherServerError) as raised:
        score(Server(url, timeout_s=10, attempts=3, concurrency=1))  # or any of the three may be the first to fail
    assert str(raised.value) == (
        f"vllm.score: the answer to request 0 of 3 (2 + 3 tokens) from {url} must come within 10 s in at most 3 "
        "attempts, got Connection refused after 3 of them"
    )


SLOW = {"nothing": teacher_server.hang, **teacher_server.DRIPS}


@pytest.mark.parametrize("what", SLOW)
def test_the_time_limit_holds_for_the_whole_batch(what):
    told, took, _ = failure(lambda *_: SLOW[what], timeout_s=0.5, attempts=100)
    assert "must come within 0.5 s in at most 100 attempts, got nothing in time after 1 of them" in told
    assert 0.5 <= took < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("teacher_")]


@pytest.mark.parametrize("what", SLOW)
def test_the_time_limit_holds_for_an_attempt(what):
    told, took, _ = failure(
        lambda *request: of_one(*request, prompt=7, behaviour=SLOW[what]), attempts=2, attempt_timeout_s=0.3
    )
    assert "request 1 of 3" in told and told.endswith("got nothing in time after 2 of them")
    assert 0.6 <= took < 3


def test_the_wait_for_a_busy_server_ends_with_the_time(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 60.0)
    told, took, _ = failure(lambda *_: (503, b""), timeout_s=0.5)
    assert told.endswith("got HTTP 503 after 1 of them") and took < 3


def test_one_failure_breaks_off_the_others():
    """Neither the request that hangs nor those that are waiting for their turn are waited for."""
    told, took, _ = failure(
        lambda payload, _: teacher_server.hang if payload["prompt"][0] == 1 else (400, b"no"), concurrency=2
    )
    assert "request 1 of 3" in told and took < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("teacher_")]

    responses = [[5]] * 50
    with answering(lambda *_: (400, b"no"), concurrency=1) as (server, asked), pytest.raises(TeacherServerError):
        score(server, prompt_ids=responses, response_ids=responses)
    assert len(asked.payloads) < 10


def test_a_failed_batch_can_be_asked_again():
    """Nothing of it is kept or lost: the second time all of it is asked, and all of it comes."""
    failed = threading.Event()

    def behave(payload, times):
        if payload["prompt"][0] == 7 and not failed.is_set():
            failed.set()
            return 400, b"no"
        return right(payload, times)

    with answering(behave) as (server, _):
        with pytest.raises(TeacherServerError):
            score(server)
        out = score(server)
    assert out.mask.sum() == 5


def test_no_more_requests_at_a_time_than_allowed():
    lock, running, most = threading.Lock(), [0], [0]

    def behave(payload, times):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        return right(payload, times)

    with answering(behave, concurrency=3) as (server, _):
        score(server, prompt_ids=[[1]] * 9, response_ids=[[2]] * 9)
    assert most[0] == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "localhost:8000"}, "url must begin with http:// or https:// and name a host, got 'localhost:8000'"),
        ({"url": "http:///v1"}, "url must begin with http:// or https:// and name a host, got 'http:///v1'"),
        ({"url": "http://localhost:port"},
         "url must begin with http:// or https:// and name a host, got 'http://localhost:port'"),
        ({"url": "http://a..b"}, "url must begin with http:// or https:// and name a host, got 'http://a..b'"),
        ({"url": "http://me:secret@b:x"}, "url must begin with http:// or https:// and name a host, got 'b:x'"),
        ({"url": "http://me:secret@b"}, "url must have no user, query or fragment, got one with some, of the host b"),
        ({"url": "http://b?key=secret"}, "url must have no user, query or fragment, got one with some, of the host b"),
        ({"url": "http://b/caf\u00e9"},
         "url must consist of printable ASCII characters without spaces, got 'http://b/caf\u00e9'"),
        ({"api_key": "secret\n"}, "api_key must consist of printable ASCII characters, got others, too"),
        ({"api_key": "s\u2026t"}, "api_key must consist of printable ASCII characters, got others, too"),
        ({"timeout_s": 0}, "timeout_s must be finite and > 0, got 0"),
        ({"attempt_timeout_s": math.inf}, "attempt_timeout_s must be finite and > 0, got inf"),
        ({"attempts": 0}, "attempts must be >= 1, got 0"),
        ({"concurrency": 0}, "concurrency must be >= 1, got 0"),
    ],
)  # fmt: skip
def test_bad_settings(settings, words):
    with pytest.raises(ValueError) as raised:
        Server(**{"url": "http://localhost:8000", **settings})
    assert str(raised.value) == f"Server: {words}"


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_compared():
    def bytes_of(text):
        return list(text.encode())

    with answering(lambda payload, _: (200, {"tokens": bytes_of(payload["prompt"])})) as (server, asked):
        check_tokenizer(server, bytes_of, model="teacher")
        with pytest.raises(TeacherServerError) as raised:
            check_tokenizer(server, lambda text: bytes_of(text)[:3] + [7], text="abcd")
        assert str(raised.value) == (
            f"check_tokenizer: the answer to a text from {server.url} must be the student's tokens (7), "
            "got 100 for token 3: the tokenizers differ"
        )
        with pytest.raises(TeacherServerError, match=r"tokens \(3\), got 4 tokens: the tokenizers differ$"):
            check_tokenizer(server, lambda text: bytes_of(text)[:3], text="abcd")
    assert set(asked.paths) == {"/tokenize"}
    assert asked.payloads[0] == {"prompt": module.PROBE, "add_special_tokens": False, "model": "teacher"}
    assert "model" not in asked.payloads[1]
