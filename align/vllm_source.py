"""Samples from vLLM in the trainer's process: a copy of the policy, pushed and proved each time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor

from align.proof import prove_push
from model import HybridForCausalLM
from rollout.canary import Canary
from rollout.sync import checksums, weights
from rollout.vllm_backend import VllmEngine


class VllmSource:
    """The engine, and the way to keep it at the trainer's policy.

    Args:
        policy: the live model, possibly with adapters, which are merged on the way.
        max_concurrent: responses decoded at once.
        max_tokens: longest prompt and response together.
        cache_bytes: of keys, values and states.
        autocast: type that the trainer multiplies in; the copy is held in it. None is fp32.
        canary: asked after every push.
    """

    def __init__(
        self,
        policy: HybridForCausalLM | PeftModel,
        *,
        max_concurrent: int,
        max_tokens: int,
        cache_bytes: int,
        autocast: torch.dtype | None = None,
        canary: Canary,
    ) -> None:
        self._prove = partial(
            prove_push, policy=policy, canary=canary, autocast=autocast, where="vllm"
        )
        plain = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        assert isinstance(plain, HybridForCausalLM), "adapters wrap the project's own model"
        self._policy, self._dtype = policy, autocast or torch.float32
        self.engine = VllmEngine(
            plain.config,
            max_slots=max_concurrent,
            max_tokens=max_tokens,
            cache_bytes=cache_bytes,
            dtype=self._dtype,
        )

    def refresh(self, version: int) -> None:
        """Pushes the policy as it is now, unless the engine holds this version, and proves it.

        Raises:
            ProofError: as `prove_push`.
        """
        if version == self.engine.policy_version:
            return
        self.engine.update_weights(self._sent(), version)
        self._prove(self.engine, version, self._sums)

    def _sums(self) -> tuple[dict[str, str], dict[str, str]]:
        return checksums(self._sent()), checksums(self.engine.weights())

    @torch.no_grad()
    def _sent(self) -> Iterator[tuple[str, Tensor]]:
        tied = self.engine.config.tie_word_embeddings
        for name, tensor in weights(self._policy):
            if not (tied and name == "lm_head.weight"):
                yield name, tensor.to(self._dtype)
