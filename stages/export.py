"""`align export`: a policy as one checkpoint folder in the layout another program reads, proved.

Full weights go through tensor by tensor and shard by shard, so that a model larger than memory can
be exported; an adapter is merged in memory first. What was written is opened again and must give
the log-probabilities of what it was made from.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from align.policy import adapter_chain, load_policy
from model import HybridConfig, HybridForCausalLM, Packed
from model.checkpoints import (
    PublicLayout,
    read_folder_config,
    stream_folder,
    stream_logprobs,
    write_folder,
)
from model.kernels.logprob.op import token_logprobs
from model.layouts import write_tensors
from stages.artifact import START, Artifact, Facts, Parent, find_artifact, package_versions, publish

To = Literal["transformers", "vllm", "text-01"]
LAYOUT_OF: dict[To, PublicLayout] = {
    "transformers": "transformers-disk",
    "vllm": "vllm",
    "text-01": "text-01",
}
# natural log, per token: the same weights in the same order of sums, so only rounding is left
VERIFY_BOUND = 1e-5
VERIFY_TOKENS = 64
# what stands beside the weights for whoever reads text
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "generation_config.json"),
)


def export_policy(
    policy: Path,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    to: To = "transformers",
    verify: bool = True,
) -> Artifact:
    """Writes a policy as full weights in public names, adapters merged, with its tokenizer.

    The copy is an artifact itself: its manifest names the policy it was made from, and carries that
    policy's data, licences and metrics on.

    Args:
        policy: an artifact, an adapter, or any checkpoint folder in one of the layouts.
        dtype: of the weights on disk.
        to: `transformers`: an ordinary `minimax` folder; `vllm`: as vLLM's own loader up to 0.23
            wants it; `text-01`: the published MiniMax-Text-01 and M1.
        verify: whether the folder is opened again and its log-probabilities compared.

    Raises:
        ValueError: the folder holds something already, `policy` is no policy, or the layout cannot
            hold it.
        RuntimeError: what was written gives other log-probabilities; nothing is left.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; choose a new folder")
    source = find_artifact(policy)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        expected = _write(policy, temporary, dtype, LAYOUT_OF[to], verify)
        for name in TOKENIZER_FILES:
            if (policy / name).exists():
                shutil.copyfile(policy / name, temporary / name)
        if expected is not None:
            _verify(temporary, expected)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        folder.rmdir()
    told = source.manifest if source else None
    facts = Facts(
        stage=told.stage if told else policy.name,
        kind="export",
        gives="policy",
        inputs={"dtype": str(dtype).removeprefix("torch."), "layout": to},
        parents={START: Parent(stage=told.stage, digest=told.digest)} if told else {},
        data=told.data if told else (),
        metrics=told.metrics if told else {},
        versions=package_versions(),
    )
    return publish(temporary, folder, facts)


def _write(
    policy: Path, folder: Path, dtype: torch.dtype, layout: PublicLayout, verify: bool
) -> Tensor | None:
    """Fills `folder`; gives the log-probabilities that it shall have, or None."""
    if len(adapter_chain(policy)) > 1:
        model, _ = load_policy(policy, dtype=dtype)
        config = model.config
        public = write_tensors(
            model.state_dict().items(), config=config, layout="transformers-disk"
        )
        write_folder(public, folder, config=config, layout=layout, dtype=dtype)
        return _logprobs(model.float()) if verify else None
    config, _ = read_folder_config(policy)
    write_folder(stream_folder(policy), folder, config=config, layout=layout, dtype=dtype)
    return stream_logprobs(policy, verify_tokens(config), dtype=dtype) if verify else None


def verify_tokens(config: HybridConfig) -> Tensor:
    """[64] tokens, the same for every model of a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (VERIFY_TOKENS,), generator=generator)


@torch.no_grad()
def _logprobs(model: HybridForCausalLM) -> Tensor:
    tokens = verify_tokens(model.config)
    hidden = model.model.run(Packed.from_sequences([tokens.tolist()])).hidden
    return token_logprobs(hidden[:-1], model.lm_head.weight, tokens[1:])[0]


def _verify(folder: Path, expected: Tensor) -> None:
    config, _ = read_folder_config(folder)
    found = stream_logprobs(folder, verify_tokens(config))
    apart = (found - expected).abs()
    # nan is no agreement
    if not bool((apart <= VERIFY_BOUND).all()):
        worst = int(apart.nan_to_num(nan=float("inf")).argmax())
        raise RuntimeError(
            f"export: opened again, the checkpoint gives token {worst + 1} of the check "
            f"{float(found[worst]):.6f} nats, the policy {float(expected[worst]):.6f}; bound "
            f"{VERIFY_BOUND:g}. Nothing was kept; report it"
        )
