"""vLLM opens every layout, the published one without its remote code, and cuts it over ranks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from model import HybridForCausalLM, preset
from model.checkpoints import stream_folder, write_folder
from rollout.native.engine import NativeEngine
from rollout.types import Request, Sampling

pytest.importorskip("vllm", reason="vllm is not installed here; run make test-vllm")
pytestmark = pytest.mark.vllm

VOCABULARY = 200


@pytest.mark.parametrize(
    ("layout", "ranks"), [("text-01", 1), ("vllm", 1), ("transformers-disk", 2)]
)
def test_vllm_opens_the_layout(
    tmp_path: Path, layout: str, ranks: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # otherwise vLLM wants a memory node for each rank
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM, SamplingParams

    torch.manual_seed(0)
    config = preset(
        "tiny",
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        postnorm=layout == "vllm",
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = HybridForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / layout).mkdir()
    write_folder(
        stream_folder(tmp_path / "ours"),
        tmp_path / layout,
        config=config,
        layout=layout,
        shard_bytes=100_000,
    )
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(VOCABULARY) for _ in range(n)) for n in (1, 40, 130)]
    sampling = Sampling(max_new_tokens=24, temperature=0.0)
    requests = [Request(str(len(prompt)), prompt, sampling) for prompt in prompts]
    expected = NativeEngine(model, max_slots=4, max_cache_tokens=1024).generate(requests)
    llm = LLM(
        model=str(tmp_path / layout),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=2**27,
        tensor_parallel_size=ranks,
    )
    params = SamplingParams(
        max_tokens=24, temperature=0, logprobs=0, ignore_eos=True, detokenize=False
    )
    found = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    for one, output in zip(expected, found, strict=True):
        answer = output.outputs[0]
        assert tuple(answer.token_ids) == one.tokens
        pairs = zip(answer.logprobs, answer.token_ids, one.logprobs, strict=True)
        assert max(abs(odds[token].logprob - own) for odds, token, own in pairs) <= 1e-5
