"""A teacher's server for tests: it answers as it is told, on loopback, in this process."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

from pruneopd_kernels.integrations import vllm
from pruneopd_kernels.integrations.server import Server

PROMPTS = [[1, 2], [7], [3, 4, 5]]
RESPONSES = [[3, 4, 30], [9, 9], []]
K, V = 3, 40
"""A batch, of which the last response has no token and is not sent."""


def completion(sequence, k):
    """What vLLM would say of a sequence: the actual token comes first, whatever its rank.

    In a vocabulary of V, token t + 1 is the most probable after t, and the rest follow in a circle.
    """
    positions = [None]
    for before, token in pairwise(sequence):
        ranked = [(before + 1 + place) % V for place in range(V)]
        entries = {str(token): {"logprob": -1.0 - ranked.index(token), "rank": ranked.index(token) + 1}}
        for place, other in enumerate(ranked[:k]):
            entries[str(other)] = {"logprob": -1.0 - place, "rank": place + 1, "decoded_token": f"<{other}>"}
        positions.append(entries)
    return {"choices": [{"index": 0, "text": "", "prompt_logprobs": positions}]}


def right(payload, times):
    return 200, completion(payload["prompt"], payload["prompt_logprobs"])


def score(server, **changed):
    arguments = {"prompt_ids": PROMPTS, "response_ids": RESPONSES, "model": "teacher", "vocab_size": V, "k": K}
    return vllm.score(server, **{**arguments, **changed})


class Asked:
    """The requests that came, in order, and one count a sequence."""

    def __init__(self):
        self.payloads, self.headers, self.paths = [], [], []
        self.lock = threading.Lock()

    def times(self, payload):
        return sum(before == payload for before in self.payloads)


@contextlib.contextmanager
def answering(behave, **patience):
    """`(Server, Asked)`; `behave(payload, times)` returns (status, JSON or bytes), or a function of the handler.

    `times` says how often these same words have come, this time included.
    """
    asked = Asked()
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with asked.lock:
                asked.payloads.append(payload)
                asked.headers.append(dict(self.headers))
                asked.paths.append(self.path)
                times = asked.times(payload)
            behaviour = behave(payload, times)
            if callable(behaviour):
                behaviour(self, over)
                return
            status, body = behaviour
            send(self, status, body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_):  # the client has broken the connection, as it should
            pass

    httpd = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{httpd.server_port}", **{"timeout_s": 20, **patience}), asked
    finally:
        over.set()
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def send(handler, status, body, length=None):
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def hang(handler, over):
    """Says nothing until the test is over."""
    over.wait(30)


def hang_up(handler, over):
    handler.close_connection = True


def half(body):
    """Sends one half of what it has promised."""

    def behave(handler, over):
        send(handler, 200, body[: len(body) // 2], len(body))
        handler.close_connection = True

    return behave


def drip(before, drop):
    """Sends these bytes, and then others now and then for ten seconds: no single wait is long."""

    def behave(handler, over):
        handler.wfile.write(before)
        for _ in range(500):
            if over.wait(0.02):
                return
            handler.wfile.write(drop)
            handler.wfile.flush()

    return behave


DRIPS = {
    "body": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" "),
    "body without a length": drip(b"HTTP/1.1 200 OK\r\n\r\n", b" "),
    "size of a chunk": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "header": drip(b"HTTP/1.1 200 OK\r\nServer: ", b"a"),
    "to be continued": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}
