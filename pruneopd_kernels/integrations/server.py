"""A teacher's server, asked over HTTP with the standard library: a whole batch of answers in time, or one error.

Nothing is returned before every answer has come and has been found in order, so a batch that fails can be asked again
as it is. `vllm.score` and `sglang.score` say what is asked and how the answers are read.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar
from urllib.parse import urlsplit

from .. import checks

T = TypeVar("T")

CONNECT_S = 10.0
"""The most that one attempt waits for a connection: a server that is there accepts at once."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""Between attempts: doubled each time, and shortened at random by up to a half, so that many trainers do not return at
the same moment."""
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may be gone at the next attempt; any other above 299 says that the request itself is wrong."""
SHOWN = 300
"""Characters of a server's own words that an error repeats."""
PROBE = "Tokenizers differ:  12345 + 67.89 != 3/4;\n\tdef f(x): return x**2  # naïve café, 東京, €5 <b>&amp;</b>\n\n"


class TeacherServerError(RuntimeError):
    """A teacher's answer did not come, or is not what was asked for; the text names the request."""


class BadAnswer(Exception):  # noqa: N818 (never leaves this package: whoever knows the request's name raises in its place)
    """What an answer must be, and what it is."""

    def __init__(self, rule: str, actual: object) -> None:
        """The words of an error but for its beginning."""
        super().__init__(rule, actual)
        self.rule, self.actual = rule, actual


class Request(NamedTuple, Generic[T]):
    """What to ask, and how to read the answer."""

    name: str
    payload: Mapping[str, Any]
    read: Callable[[Any], T]
    """Of the decoded JSON; raises BadAnswer."""


@dataclass(frozen=True)
class Server:
    """Where a teacher's server is, and how patiently it is asked.

    Args:
        url: Such as `http://127.0.0.1:8000`, without the path of an API. It is reached directly, through no proxy.
        api_key: Sent as a bearer token. None: none is sent.
        timeout_s: The most that a whole batch may take, retries and waits included. Only the look-up of the host's name
            can take longer: nothing can break it off.
        attempt_timeout_s: How long one attempt waits for its answer, before it counts as lost.
        attempts: How often a request is asked: again where there was no connection, no answer in time, no JSON, or an
            HTTP status that may pass (408, 425, 429, 500, 502, 503, 504). An answer in which something is wrong is an
            error at once.
        concurrency: How many requests are under way at a time.

    Raises:
        ValueError: A value is not allowed.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 900.0
    attempt_timeout_s: float = 300.0
    attempts: int = 4
    concurrency: int = 32

    def __post_init__(self) -> None:
        """Checks the values."""
        _check_url(self.url)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            checks.bad_value("Server", "api_key", "consist of printable ASCII characters", "others, too")
        checks.positive("Server", "timeout_s", self.timeout_s)
        checks.positive("Server", "attempt_timeout_s", self.attempt_timeout_s)
        checks.at_least("Server", "attempts", self.attempts, 1)
        checks.at_least("Server", "concurrency", self.concurrency, 1)

    def ask(self, op: str, path: str, requests: Sequence[Request[T]]) -> list[T]:
        """Posts JSON to one path of the server, several requests at a time.

        Args:
            op: Who asks, for errors.
            path: Such as `/v1/completions`.
            requests: What to ask.

        Returns:
            What their `read` made of the answers, in the order of the requests.

        Raises:
            TeacherServerError: One of them failed; those that were still under way have been broken off.
        """
        if not requests:
            return []
        batch = _Batch(self, op, path)
        with ThreadPoolExecutor(min(self.concurrency, len(requests)), "teacher") as pool:
            futures = [pool.submit(batch.answer, request) for request in requests]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future.done():
                        future.result()  # raises what the first of the failed requests raised
                return [future.result() for future in futures]
            finally:
                batch.break_off()
                pool.shutdown(wait=False, cancel_futures=True)


def _check_url(url: str) -> None:
    shown = repr(url.rpartition("@")[2])  # without what may be a password
    try:
        parts = urlsplit(url)
        host, _ = (parts.hostname or "").encode("idna"), parts.port
    except ValueError:
        host = b""
    if not host or parts.scheme not in ("http", "https"):
        checks.bad_value("Server", "url", "begin with http:// or https:// and name a host", shown)
    if not (url.isascii() and url.isprintable() and " " not in url):
        checks.bad_value("Server", "url", "consist of printable ASCII characters without spaces", shown)
    if parts.username is not None or parts.query or parts.fragment:
        checks.bad_value(
            "Server", "url", "have no user, query or fragment", f"one with some, of the host {parts.hostname}"
        )


class _Batch:
    """The requests of one `ask`, which succeed or fail together."""

    def __init__(self, server: Server, op: str, path: str) -> None:
        """The time begins to run."""
        self.server, self.op = server, op
        self.parts = urlsplit(server.url)
        self.path = self.parts.path.rstrip("/") + path
        self.deadline = time.monotonic() + server.timeout_s
        self.stopped = threading.Event()
        self.sockets: set[socket.socket] = set()
        self.lock = threading.Lock()

    def answer(self, request: Request[T]) -> T:
        """Asks until there is an answer, the attempts are used up, or the time is."""
        lost, attempt = "nothing before its turn", 0
        while attempt < self.server.attempts and self._wait(attempt):
            attempt += 1
            try:
                status, body = self._post(request.payload)
            except TimeoutError:
                lost = "nothing in time"
                continue
            except (OSError, http.client.HTTPException) as error:
                lost = getattr(error, "strerror", None) or str(error) or type(error).__name__
                continue
            if status in BUSY:
                lost = _status(status, body)
                continue
            if not 200 <= status < 300:
                self._fail(request, "be a success", _status(status, body))
            try:
                decoded = json.loads(body)
            except (ValueError, RecursionError):
                lost = f"no JSON but {body[:SHOWN]!r}"
                continue
            return read_answer(self.op, f"{request.name} from {self.server.url}", request.read, decoded)
        server = self.server
        rule = f"come within {server.timeout_s:g} s in at most {server.attempts} attempts"
        self._fail(request, rule, f"{lost} after {attempt} of them")

    def break_off(self) -> None:
        """Ends what is still under way."""
        with self.lock:
            self.stopped.set()
            for connected in self.sockets:
                _shut(connected)

    def _wait(self, attempt: int) -> bool:
        """Whether there is time for one more attempt, after waiting for its turn."""
        if attempt:
            pause = min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1)
            self.stopped.wait(min(pause, max(self.deadline - time.monotonic(), 0)))
        return not self.stopped.is_set() and time.monotonic() < self.deadline

    def _post(self, payload: Mapping[str, Any]) -> tuple[int, bytes]:
        """One attempt: status and body."""
        end = min(self.deadline, time.monotonic() + self.server.attempt_timeout_s)
        kind = http.client.HTTPSConnection if self.parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.parts.netloc, timeout=min(CONNECT_S, _left(end)))
        headers = {"Content-Type": "application/json"}
        if self.server.api_key is not None:
            headers["Authorization"] = f"Bearer {self.server.api_key}"
        try:
            connection.connect()
            with self._watched(connection.sock, end):
                connection.request("POST", self.path, json.dumps(payload), headers)
                response = connection.getresponse()
                body = response.read()
            _left(end)  # being shut looks like the end of a body without a length
            return response.status, body
        except (OSError, http.client.HTTPException):
            _left(end)
            raise
        finally:
            connection.close()

    @contextlib.contextmanager
    def _watched(self, connected: socket.socket, end: float) -> Iterator[None]:
        """Shuts the connection when its time is over, or the batch is broken off."""
        # A limit on each wait is none on the answer: its first line alone can come byte by byte.
        alarm = threading.Timer(_left(end), _shut, [connected])
        alarm.daemon = True
        connected.settimeout(_left(end))
        with self.lock:
            if self.stopped.is_set():
                raise TimeoutError
            self.sockets.add(connected)
        alarm.start()
        try:
            yield
        finally:
            alarm.cancel()
            with self.lock:
                self.sockets.discard(connected)

    def _fail(self, request: Request[Any], rule: str, actual: object) -> NoReturn:
        raise _error(self.op, f"{request.name} from {self.server.url}", rule, actual)


def read_answer(op: str, name: str, read: Callable[[Any], T], answer: Any) -> T:
    """What `read` makes of an answer; whatever is wrong with it becomes an error that names the request."""
    try:
        return read(answer)
    except BadAnswer as bad:
        raise _error(op, name, bad.rule, bad.actual) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _error(op, name, "have the form that the server's documentation describes", repr(error)) from error


def _error(op: str, name: str, rule: str, actual: object) -> TeacherServerError:
    return TeacherServerError(f"{op}: the answer to {name} must {rule}, got {actual}")


def _shut(connected: socket.socket) -> None:
    """Ends what a thread is waiting for there."""
    with contextlib.suppress(OSError):  # it has ended by itself
        connected.shutdown(socket.SHUT_RDWR)


def _left(end: float) -> float:
    """Seconds until then."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _status(status: int, body: bytes) -> str:
    """An HTTP status and what the server says about it."""
    try:
        said = json.loads(body)
        error = said.get("error", said)
        words = str(error["message"] if isinstance(error, dict) else error)
    except (AttributeError, LookupError, RecursionError, ValueError):
        words = body.decode(errors="replace")
    return f"HTTP {status}: {' '.join(words.split())[:SHOWN]}".removesuffix(": ")


def check_tokenizer(
    server: Server, encode: Callable[[str], Sequence[int]], *, model: str | None = None, text: str = PROBE
) -> None:
    """Whether a server's tokenizer makes of a text the tokens that the student's makes of it.

    Ids mean nothing to a teacher with another tokenizer, and few of its answers would show that. Once, before training.
    Both vLLM and SGLang serve `/tokenize`.

    Args:
        server: The teacher's server.
        encode: The student's tokenizer, adding no special tokens, such as
            `lambda text: tokenizer.encode(text, add_special_tokens=False)`.
        model: The model's name, where a server has several.
        text: What is compared; the default has digits, code, spaces and letters of several scripts.

    Raises:
        TeacherServerError: The tokens differ, or there was no answer.

    Examples:
        >>> from pruneopd_kernels.integrations.server import Server, check_tokenizer
        >>> server = Server("http://127.0.0.1:8000", timeout_s=30)
        >>> check_tokenizer(server, tokenizer.encode)  # doctest: +SKIP
    """
    expected = list(encode(text))

    def compare(answer: Any) -> None:
        tokens = answer["tokens"]
        if tokens != expected:
            place = next((i for i, (a, b) in enumerate(zip(expected, tokens, strict=False)) if a != b), None)
            got = f"{len(tokens)} tokens" if place is None else f"{tokens[place]} for token {place}"
            wanted = f"{len(expected)}" if place is None else f"{expected[place]}"
            raise BadAnswer(f"be the student's tokens ({wanted})", f"{got}: the tokenizers differ")

    payload = {"prompt": text, "add_special_tokens": False, **({} if model is None else {"model": model})}
    server.ask("check_tokenizer", "/tokenize", [Request("a text", payload, compare)])
