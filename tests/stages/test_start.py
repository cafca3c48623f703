"""The first policy: a preset with random weights and a trained tokenizer, or one that stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.data.sources import DataConfig
from align.policy import load_policy
from model import Packed
from stages import start
from stages.artifact import file_digest
from stages.recipe import ModelConfig, TokenizerConfig
from stages.start import make_start


def preset_config(seed: int = 0) -> ModelConfig:
    rows = (DataConfig(task="copy", num_rows=300), DataConfig(task="constraints", num_rows=100))
    return ModelConfig(
        preset="tiny", tokenizer=TokenizerConfig(vocab_size=400, data=rows), seed=seed
    )


def test_a_preset_is_made_the_same_from_the_same_seed(tmp_path: Path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert make_start(preset_config(seed), tmp_path / name, tmp_path) == tmp_path / name
        files = sorted(path for path in (tmp_path / name).iterdir())
        found.append({path.name: file_digest(path) for path in files})
    assert found[0] == found[1]
    assert found[0]["model.safetensors"] != found[2]["model.safetensors"]
    model, tokenizer = load_policy(tmp_path / "a")
    assert model.config.vocab_size == len(tokenizer) == 400
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_every_token_that_can_be_sampled_has_a_finite_gradient(tmp_path: Path):
    make_start(preset_config(), tmp_path / "a", tmp_path)
    model, tokenizer = load_policy(tmp_path / "a")
    packed = Packed.from_sequences([list(range(380, 400))])
    model(packed=packed, targets=packed.tokens.roll(-1)).logprobs.sum().backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert torch.isfinite(norm)
    assert norm < 1e4
    assert tokenizer.pad_token_id in packed.tokens


def test_a_folder_or_a_shipped_base_is_used_where_it_stands(tmp_path: Path):
    temporary = tmp_path / "tmp"
    assert make_start(ModelConfig(path="given"), temporary, tmp_path) == tmp_path / "given"
    assert make_start(ModelConfig(base="tiny"), temporary, tmp_path).name == "tiny"
    assert not temporary.exists()


def test_an_unreachable_hub_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch):
    def unreachable(repo: str, revision: str) -> str:
        raise OSError("cannot find it\nand many more words")

    monkeypatch.setattr(start, "snapshot_download", unreachable)
    message = (
        r"^model\.hub = a/b@main: cannot be had \(cannot find it\); check the name and the "
        r"network, or download it and use model\.path$"
    )
    with pytest.raises(RuntimeError, match=message):
        make_start(ModelConfig(hub="a/b"), tmp_path, tmp_path)
