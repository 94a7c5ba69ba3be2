"""Overlap and weights over HTTP, for trainers and notebooks that have top-k arrays: NumPy alone, no torch.

    $ python examples/host_server.py --port 8100
    $ curl localhost:8100 -d '{"student_topk_ids": [[[4, 2], [7, 1]]], "teacher_topk_ids": [[[2, 4], [8, 9]]]}'
    {"overlap": [[1.0, 0.0]], "drift": [[false, true]], "drift_count": [[0, 1]], ..., "effective_length": [2]}

Posted are the arguments of `pruneopd_kernels.host.reliability_from_topk`, arrays as nested lists.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from pruneopd_kernels import host

DTYPES = {
    "student_topk_ids": np.int64,
    "teacher_topk_ids": np.int64,
    "mask": np.bool_,
    "teacher_topk_logprobs": np.float32,
    "token_ids": np.int64,
    "cu_seqlens": np.int32,
    "drift_count": np.int32,
}


class Handler(BaseHTTPRequestHandler):
    """Answers one POST with the fields of `ReliabilityFromTopk`, or with what is wrong with it."""

    def do_POST(self) -> None:
        try:
            posted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            arrays = {name: np.asarray(posted.pop(name), dtype) for name, dtype in DTYPES.items() if name in posted}
            out = host.reliability_from_topk(**arrays, **posted, num_threads=1)
            self.answer(200, {name: array.tolist() for name, array in out._asdict().items()})
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            self.answer(400, {"error": str(error)})

    def answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8100)
    ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler).serve_forever()
