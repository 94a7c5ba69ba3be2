"""A teacher's server for tests: it answers as it is told, on loopback, in this process."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from types import SimpleNamespace

from pruneopd_kernels.integrations import vllm
from pruneopd_kernels.integrations.server import Server

PROMPTS = [[1, 2], [7], [3, 4, 5]]
RESPONSES = [[3, 4, 30], [9, 9], []]
K, V = 3, 40
"""A batch, of which the last response has no token and is not sent."""


def completion(sequence, k):
    """Return what vLLM would say of a sequence: the actual token comes first, regardless of its rank.

    In a vocabulary of V, token t + 1 is the most probable after t, and the rest follow in a circle.
    """
    positions = [None]
    for before, token in pairwise(sequence):
        ranked = [(before + 1 + place) % V for place in range(V)]
        best = [token, *ranked[:k]]
        places = {str(one): ranked.index(one) for one in best}
        positions.append({one: {"logprob": -1.0 - place, "rank": place + 1} for one, place in places.items()})
    return {"choices": [{"index": 0, "text": "", "prompt_logprobs": positions}]}


def right(payload, times):
    return 200, completion(payload["prompt"], payload["prompt_logprobs"])


def score(server, **changed):
    arguments = {"prompt_ids": PROMPTS, "response_ids": RESPONSES, "model": "teacher", "vocab_size": V, "k": K}
    return vllm.score(server, **{**arguments, **changed})


@contextlib.contextmanager
def answering(behave, **patience):
    """Yield a `Server` and what it was asked.

    `behave(payload, times)` returns (status, JSON or bytes), or a function of the handler. `times` says how often the
    same payload has come, this time included.
    """
    asked = SimpleNamespace(payloads=[], headers=[], paths=[])
    over, lock = threading.Event(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.payloads.append(payload)
                asked.headers.append(dict(self.headers))
                asked.paths.append(self.path)
                times = asked.payloads.count(payload)
            behaviour = behave(payload, times)
            if callable(behaviour):
                behaviour(self, over)
                return
            status, body = behaviour
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_):  # the client has closed the connection, as it should
            pass

    with Quiet(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{httpd.server_port}", **{"timeout_s": 20, **patience}), asked
        finally:
            over.set()
            httpd.shutdown()
            thread.join()


def hang(handler, over):
    """Say nothing until the test is over."""
    over.wait(30)


def sends(before, drop=b""):
    """Send these bytes; then hang up, or send `drop` every 20 ms, so that no single wait is long."""

    def behave(handler, over):
        handler.wfile.write(before)
        while drop and not over.wait(0.02):
            handler.wfile.write(drop)
        handler.close_connection = True

    return behave


DRIPS = {
    "body": sends(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" "),
    "body without a length": sends(b"HTTP/1.1 200 OK\r\n\r\n", b" "),
    "size of a chunk": sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "header": sends(b"HTTP/1.1 200 OK\r\nServer: ", b"a"),
    "to be continued": sends(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}
