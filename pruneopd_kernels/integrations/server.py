"""Requests to a teacher's server over HTTP, with the standard library: a complete batch in time, or one error.

Nothing is returned before every answer has come and has been checked, so a failed batch can be asked again as it is.
`vllm.score` and `sglang.score` say what to ask and how to read the answers.
"""

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
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from .. import checks

T = TypeVar("T")

CONNECT_S = 10.0
"""Upper bound on the wait for a connection: a running server accepts at once."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""Between attempts: doubled each time, and shortened at random by up to a half, so that many trainers do not return at
the same moment."""
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that the next attempt may not meet; any other above 299 says that the request itself is wrong."""
SHOWN = 300
"""An error repeats this many characters of the server's own message."""
PROBE = "Tokenizers differ:  12345 + 67.89 != 3/4;\n\tdef f(x): return x**2  # naïve café, 東京, €5 <b>&amp;</b>\n\n"


class TeacherServerError(RuntimeError):
    """A teacher's answer did not come, or is not what was asked for; the text names the request."""


class BadAnswer(Exception):  # noqa: N818 (internal: `read_answer`, which knows the request's name, replaces it)
    """The rule that an answer breaks, and its actual value."""


@dataclass(frozen=True)
class Request(Generic[T]):
    """What to ask, and how to read the answer."""

    name: str
    payload: Mapping[str, Any]
    read: Callable[[Any], T]
    """Of the decoded JSON; raises BadAnswer."""


@dataclass(frozen=True)
class Server:
    """A teacher's server: its address, time limits and retries.

    Args:
        url: Such as `http://127.0.0.1:8000`, without the path of an API. Proxies are not used.
        api_key: Sent as a bearer token. None: none is sent.
        timeout_s: Time limit of a whole batch, including retries and waits. Only the look-up of the host's name can
            take longer, because it cannot be interrupted.
        attempt_timeout_s: Time limit of one attempt.
        attempts: How often a request is asked. It is repeated if there was no connection, no answer in time, no JSON,
            or an HTTP status that may pass (408, 425, 429, 500, 502, 503, 504). A wrong answer is an error at once.
        concurrency: The number of simultaneous requests.

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
        _check_url(self.url)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            checks.bad_value("Server", "api_key", "consist of printable ASCII characters", "others, too")
        for name in ("timeout_s", "attempt_timeout_s"):
            checks.number("Server", name, getattr(self, name), "be finite and > 0")
        for name in ("attempts", "concurrency"):
            checks.at_least("Server", name, getattr(self, name), 1)

    def ask(self, op: str, path: str, requests: Sequence[Request[T]]) -> list[T]:
        """Post the requests to a path such as `/v1/completions`; return what `read` makes of the answers, in order.

        `op` is the caller's name in errors.

        Raises:
            TeacherServerError: One of them failed; those under way were broken off.
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
                        future.result()  # raises the error of the first request that failed
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
        actual = f"one with some, of the host {parts.hostname}"
        checks.bad_value("Server", "url", "have no user, query or fragment", actual)


class _Batch:
    """The requests of one `ask`, which succeed or fail together."""

    def __init__(self, server: Server, op: str, path: str) -> None:
        self.server, self.op = server, op
        self.parts = urlsplit(server.url)
        self.path = self.parts.path.rstrip("/") + path
        self.deadline = time.monotonic() + server.timeout_s
        self.stopped = threading.Event()
        self.sockets: set[socket.socket] = set()
        self.lock = threading.Lock()

    def answer(self, request: Request[T]) -> T:
        """Ask until there is an answer, or until no attempt or no time is left."""
        server, name = self.server, f"{request.name} from {self.server.url}"
        lost, attempt = "nothing before its turn", 0
        while attempt < server.attempts and self._wait(attempt):
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
                raise _error(self.op, name, "be a success", _status(status, body))
            try:
                decoded = json.loads(body)
            except (ValueError, RecursionError):
                lost = f"no JSON but {body[:SHOWN]!r}"
                continue
            return read_answer(self.op, name, request.read, decoded)
        rule = f"come within {server.timeout_s:g} s in at most {server.attempts} attempts"
        raise _error(self.op, name, rule, f"{lost} after {attempt} of them")

    def break_off(self) -> None:
        """End the requests that are under way."""
        with self.lock:
            self.stopped.set()
            for connected in self.sockets:
                _shut(connected)

    def _wait(self, attempt: int) -> bool:
        """Wait before another attempt; return whether there is time for it."""
        if attempt:
            pause = min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1)
            self.stopped.wait(min(pause, max(self.deadline - time.monotonic(), 0)))
        return not self.stopped.is_set() and time.monotonic() < self.deadline

    def _post(self, payload: Mapping[str, Any]) -> tuple[int, bytes]:
        """Make one attempt; return status and body."""
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
            _left(end)  # a shut connection looks like the end of a body without a length
            return response.status, body
        except (OSError, http.client.HTTPException):
            _left(end)
            raise
        finally:
            connection.close()

    @contextlib.contextmanager
    def _watched(self, connected: socket.socket, end: float) -> Iterator[None]:
        """Shut the connection at the time limit, or when the batch is broken off."""
        # A socket's timeout limits each wait, not the answer: even its first line can come byte by byte.
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


def read_answer(op: str, name: str, read: Callable[[Any], T], answer: Any) -> T:
    """Return `read(answer)`; anything wrong with the answer raises an error that names the request."""
    try:
        return read(answer)
    except BadAnswer as bad:
        raise _error(op, name, *bad.args) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _error(op, name, "have the form that the server's documentation describes", repr(error)) from error


def _error(op: str, name: str, rule: str, actual: object) -> TeacherServerError:
    return TeacherServerError(f"{op}: the answer to {name} must {rule}, got {actual}")


def _shut(connected: socket.socket) -> None:
    """End what a thread is waiting for at this connection."""
    with contextlib.suppress(OSError):  # it has ended by itself
        connected.shutdown(socket.SHUT_RDWR)


def _left(end: float) -> float:
    """Return the seconds until `end`, or raise TimeoutError."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _status(status: int, body: bytes) -> str:
    """Return an HTTP status and the server's message."""
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
    """Check that the server's tokenizer and the student's give the same ids for a text.

    Ids mean nothing to a teacher with another tokenizer, and few of its answers would show that. Call this once, before
    training. Both vLLM and SGLang serve `/tokenize`.

    Args:
        server: The teacher's server.
        encode: The student's tokenizer without special tokens, such as
            `lambda text: tokenizer.encode(text, add_special_tokens=False)`.
        model: The model's name, if the server has several.
        text: What to compare; the default has digits, code, spaces and letters of several scripts.

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
