"""The examples that need no model."""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from processes import ROOT, environment
from pruneopd_kernels import host

IDS = {"student_topk_ids": [[[4, 2], [7, 1], [5, 3]]], "teacher_topk_ids": [[[2, 4], [7, 0], [8, 9]]]}


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Return the port of a running host_server.py that fails if it imports torch."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('torch is not needed')\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    path = {"PYTHONPATH": f"{folder}:{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", ROOT / "examples" / "host_server.py", "--port", str(number)],
        env={**environment(), **path}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", number), 1):
            break
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    yield number
    process.terminate()
    process.communicate()


def post(port, content, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", "/", content if isinstance(content, bytes) else json.dumps(content), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


@pytest.mark.parametrize(
    "more",
    [
        {"w_drop": 0.25, "w_base": 0, "threshold": 0.4, "mask": [[1, 0, 1]], "drift_count": [3]},
        {"metric": "top_p", "token_ids": [[2, 0, 1]], "teacher_topk_logprobs": [[[-0.1, -3], [-0.01, -5], [-1, -2]]]},
    ],
)
def test_host_server_answers_as_host_does(port, more):
    dtypes = {"mask": bool, "drift_count": np.int32, "token_ids": np.int64, "teacher_topk_logprobs": np.float32}
    arrays = {name: np.array(value, dtypes[name]) for name, value in more.items() if name in dtypes}
    expected = host.reliability_from_topk(*map(np.array, IDS.values()), **{**more, **arrays})
    status, answer = post(port, {**IDS, **more})
    assert status == 200
    assert answer == {name: array.tolist() for name, array in expected._asdict().items()}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**IDS, "threshold": 2}, "reliability_from_topk: threshold must be in (0, 1], got 2"),
        ({**IDS, "k": 3}, "unexpected"),
        ({**IDS, "mask": [["false"] * 3]}, "mask must hold values of bool, got <U5"),
        ({**IDS, "w_base": 1e39}, "not JSON compliant"),
        (b"[" * 200_000, "recursion"),
    ],
)
def test_host_server_says_what_is_wrong(port, content, words):
    status, answer = post(port, content)
    assert status == 400 and words in answer["error"]
    assert post(port, IDS)[0] == 200  # and goes on


@pytest.mark.parametrize("length", ["-1", "1000000000000", "many"])
def test_host_server_reads_no_more_than_it_can_hold(port, length):
    status, answer = post(port, b"{}", **{"Content-Length": length})
    assert status == 400 and length in answer["error"]


def test_host_server_is_as_documented(port):
    page = (ROOT / "docs" / "host.md").read_text()
    posted, answer = re.search(r"curl localhost:8100 -d '(.*)'\n(.*)\n", page).groups()
    assert post(port, json.loads(posted)) == (200, json.loads(answer))
    length = len((ROOT / "examples" / "host_server.py").read_text().splitlines())
    assert f"a server of {length} lines" in page and length < 60
