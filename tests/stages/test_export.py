"""`align export`: every layout, there and back, proved after writing and kept only if right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from align.policy import load_policy, save_policy
from model import HybridForCausalLM, preset
from model.checkpoints import read_folder_config, stream_folder, stream_logprobs
from stages import export
from stages.artifact import Artifact
from tests.stages.fakes import TOKENIZER, align


@pytest.mark.parametrize("to", ["text-01", "vllm"])
def test_export_to_another_layout_and_back_is_the_policy(policy: Path, tmp_path: Path, to: str):
    there, back = tmp_path / "there", tmp_path / "back"
    for source, target, layout in ((policy, there, to), (there, back, "transformers")):
        result = align("export", str(source), str(target), "--to", layout)
        assert result.exit_code == 0, result.stderr
        assert Artifact.open(target).manifest.inputs == {"dtype": "float32", "layout": layout}
    assert read_folder_config(there)[1] == to
    first, last = (dict(stream_folder(folder)) for folder in (policy, back))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    text = "what is two?"
    ids = [AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (policy, back)]
    assert ids[0] == ids[1]
    load_policy(back)


@pytest.mark.parametrize("to", ["transformers", "text-01", "vllm"])
@pytest.mark.parametrize("rounded", [False, True])
def test_adapters_are_merged_into_every_layout(
    policy: Path, adapter: Path, tmp_path: Path, to: str, rounded: bool
):
    out = tmp_path / "out"
    dtype = torch.bfloat16 if rounded else torch.float32
    result = align("export", str(adapter), str(out), "--to", to, *["--bf16"] * rounded)
    assert result.exit_code == 0, result.stderr
    assert {tensor.dtype for _, tensor in stream_folder(out)} == {dtype}
    model, _ = load_policy(adapter, dtype=dtype)
    tokens = export.verify_tokens(model.config)
    expected = export._logprobs(model.float())
    assert (stream_logprobs(out, tokens) - expected).abs().max() <= 1e-5
    assert (stream_logprobs(policy, tokens) - expected).abs().max() > 1e-2


def test_what_readers_compute_otherwise_is_said(policy: Path, tmp_path: Path):
    said = align("export", str(policy), str(tmp_path / "a")).stderr
    assert "note: transformers ignores rotary_dim = 16" in said
    said = align("export", str(policy), str(tmp_path / "b"), "--to", "vllm").stderr
    assert said == "note: vLLM 0.23 adds 1e-5 in the lightning norm\n"


def test_wrong_export_is_found_and_not_kept(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(folder: Path) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream_folder(folder):
            is_victim = name.endswith("0.block_sparse_moe.experts.2.w3.weight")
            yield name, tensor.flip(0) if is_victim else tensor

    monkeypatch.setattr(export, "stream_folder", broken)
    result = align("export", str(policy), str(tmp_path / "out"), "--to", "text-01")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: export: opened again, the checkpoint gives token")
    assert list(tmp_path.iterdir()) == []
    unproved = align("export", str(policy), str(tmp_path / "out"), "--no-verify")
    assert unproved.exit_code == 0


def test_layout_that_cannot_hold_the_model_leaves_nothing(tmp_path: Path):
    torch.manual_seed(0)
    odd = preset("tiny", vocab_size=290, num_attention_heads=6, num_hidden_layers=1)
    save_policy(HybridForCausalLM(odd), TOKENIZER, tmp_path / "odd")
    result = align("export", str(tmp_path / "odd"), str(tmp_path / "out"), "--to", "vllm")
    assert result.exit_code == 2
    assert "num_attention_heads = 6, expected a power of two" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]
