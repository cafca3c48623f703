from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from align.data.batch import Batch
from align.lora import LoraConfig, apply_lora
from align.policy import adapter_chain, load_policy, save_policy, weights_digest
from model import HybridForCausalLM
from model.memory import ALIGNMENT
from tests.align import small
from tests.align.test_lora import shake
from tests.helpers import assert_close

BATCH = Batch.from_examples(small.examples(4))


def logprobs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(packed=BATCH.packed, targets=BATCH.targets).logprobs


def adapt(start: Path, folder: Path) -> Tensor:
    """Saves an adapter on `start` and returns what the adapted policy computes."""
    model, tokenizer = load_policy(start)
    adapted = apply_lora(model, LoraConfig(rank=2), seed=0)
    shake(adapted)
    save_policy(adapted, tokenizer, folder, base=start)
    return logprobs(adapted)


def test_full_weights_round_trip(tmp_path: Path) -> None:
    small.start(tmp_path / "a")
    model, tokenizer = load_policy(tmp_path / "a")
    assert torch.equal(logprobs(model), logprobs(small.model()))
    assert tokenizer.get_vocab() == small.tokenizer().get_vocab()
    assert not model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not (tmp_path / "a" / "base.json").exists()


def test_weights_lie_where_every_process_would_put_them(tmp_path: Path) -> None:
    policy = small.start(tmp_path / "a")
    mapped = HybridForCausalLM.from_pretrained(policy)
    assert any(weight.data_ptr() % ALIGNMENT for weight in mapped.parameters())
    model, _ = load_policy(policy)
    assert not any(weight.data_ptr() % ALIGNMENT for weight in model.parameters())


def test_chain_of_adapters_is_merged(tmp_path: Path) -> None:
    raw = small.start(tmp_path / "raw" / "artifact")
    sft, dpo = tmp_path / "sft" / "artifact", tmp_path / "dpo" / "artifact"
    after_sft = adapt(raw, sft)
    after_dpo = adapt(sft, dpo)
    assert json.loads((dpo / "base.json").read_text())["path"] == "../../sft/artifact"
    assert not list(dpo.glob("model*.safetensors"))
    assert adapter_chain(dpo) == (raw, sft, dpo)
    assert_close("sft", logprobs(load_policy(sft)[0]), after_sft, 1e-5)
    assert_close("dpo", logprobs(load_policy(dpo)[0]), after_dpo, 1e-5)
    opened, _ = load_policy(dpo)
    assert type(opened) is type(small.model())
    assert (after_dpo - after_sft).abs().max() > 1e-2


def test_a_run_folder_may_be_moved_and_a_temporary_artifact_renamed(tmp_path: Path) -> None:
    raw = small.start(tmp_path / "run" / "raw" / "artifact")
    stage = tmp_path / "run" / "sft"
    expected = adapt(raw, stage / ".artifact-temporary")
    os.replace(stage / ".artifact-temporary", stage / "artifact")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    opened, _ = load_policy(tmp_path / "elsewhere" / "sft" / "artifact")
    assert_close("moved", logprobs(opened), expected, 1e-5)


def test_bf16_chain_is_added_up_in_fp32(tmp_path: Path) -> None:
    raw = small.start(tmp_path / "raw")
    adapt(raw, tmp_path / "sft")
    wide, _ = load_policy(tmp_path / "sft")
    narrow, _ = load_policy(tmp_path / "sft", dtype=torch.bfloat16)
    for ours, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_retrained_base_is_refused(tmp_path: Path) -> None:
    raw = small.start(tmp_path / "raw")
    adapt(raw, tmp_path / "sft")
    before = weights_digest(tmp_path / "sft")
    save_policy(small.model(seed=1), small.tokenizer(), raw)
    assert weights_digest(tmp_path / "sft") != before
    with pytest.raises(ValueError, match=r"base\.json: trained on a base with digest .* now has"):
        load_policy(tmp_path / "sft")


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder, expected a policy artifact"):
        load_policy(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no config\.json, .* found nothing"):
        load_policy(tmp_path / "empty")
    raw = small.start(tmp_path / "raw")
    (raw / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors or model\.safetensors\.index"):
        load_policy(raw)
    small.start(raw)
    adapt(raw, tmp_path / "sft")
    (raw / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"raw: no tokenizer_config\.json"):
        load_policy(raw)
    (tmp_path / "sft" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"sft: no adapter_model\.safetensors"):
        load_policy(tmp_path / "sft")
    shutil.rmtree(raw)
    with pytest.raises(ValueError, match=r"base\.json: base .*raw does not exist; put it back"):
        load_policy(tmp_path / "sft")


def test_broken_pointers_are_refused(tmp_path: Path) -> None:
    raw = small.start(tmp_path / "raw")
    adapt(raw, tmp_path / "sft")
    pointer = tmp_path / "sft" / "base.json"
    pointer.write_text("{")
    with pytest.raises(ValueError, match=r'base\.json: expected \{"path": \.\.\., "digest"'):
        load_policy(tmp_path / "sft")
    pointer.write_text('{"path": ".", "digest": ""}')
    with pytest.raises(ValueError, match="the chain of bases comes back to"):
        load_policy(tmp_path / "sft")


def test_adapter_needs_its_base(tmp_path: Path) -> None:
    adapted = apply_lora(small.model(), LoraConfig(rank=2), seed=0)
    with pytest.raises(ValueError, match="an adapter needs base"):
        save_policy(adapted, small.tokenizer(), tmp_path / "sft")
