"""Serve overlap and weights over HTTP, from top-k arrays; needs NumPy, not torch.

    $ python examples/host_server.py --port 8100
    $ curl localhost:8100 -d '{"student_topk_ids": [[[4, 2], [7, 1]]], "teacher_topk_ids": [[[2, 4], [8, 9]]]}'
    {"overlap": [[1.0, 0.0]], "drift": [[false, true]], "drift_count": [[0, 1]], ..., "effective_length": [2]}

Post the arguments of `pruneopd_kernels.host.reliability_from_topk`, with arrays as nested lists.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from pruneopd_kernels import host

DTYPES = dict.fromkeys(["student_topk_ids", "teacher_topk_ids", "token_ids"], np.int64)
DTYPES |= {"teacher_topk_logprobs": np.float32, "mask": np.bool_, "cu_seqlens": np.int32, "drift_count": np.int32}
KINDS = {"i": "i", "f": "if", "b": "bi"}  # of dtypes: what each can be made of
LONGEST = 2**30  # bytes that may be posted


def array(name: str, values: object) -> np.ndarray:
    dtype, found = np.dtype(DTYPES[name]), np.asarray(values)
    if found.size and found.dtype.kind not in KINDS[dtype.kind]:
        raise TypeError(f"{name} must hold values of {dtype}, got {found.dtype}")
    return np.asarray(values, dtype)


class Handler(BaseHTTPRequestHandler):
    """Answers one POST with the fields of `ReliabilityFromTopk`, or with what is wrong with it."""

    def do_POST(self) -> None:
        try:
            length = int(self.headers["Content-Length"])
            if not 0 <= length <= LONGEST:
                raise ValueError(f"Content-Length must be in [0, {LONGEST}], got {length}")
            posted = json.loads(self.rfile.read(length))
            arrays = {name: array(name, posted.pop(name)) for name in DTYPES if name in posted}
            out = host.reliability_from_topk(**arrays, **posted, num_threads=1)
            content, status = {name: values.tolist() for name, values in out._asdict().items()}, 200
            body = json.dumps(content, allow_nan=False).encode()
        except Exception as error:  # whatever is wrong, the client is told
            body, status = json.dumps({"error": str(error)}).encode(), 400
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8100)
    ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler).serve_forever()
