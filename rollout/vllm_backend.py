"""The Engine protocol on vLLM, in this process: its scheduler and pages, our network and sampler.

The engine starts from a config alone and holds no policy until the first push. A push copies into
the weights in place; prompts that were cached under the old weights are forgotten with it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model import HybridConfig
from model.config_layouts import write_config
from model.layouts import HEAD, tensor_names
from rollout.sync import half_updated
from rollout.types import Completion, Finish, Request

if TYPE_CHECKING:
    from rollout.vllm_plugin.draws import Draws, Odds

# of a request and its sampling; whatever else they come to have must stand at its default
HONOURED = frozenset(
    (
        *("request_id", "prompt", "sampling", "num_samples", "max_new_tokens", "temperature"),
        *("top_p", "top_k", "min_p", "seed", "stop_token_ids"),
    )
)
NEVER_PUSHED = "engine: it holds no weights yet; call update_weights first"


class VllmEngine:
    """Samples by vLLM. Implements `rollout.types.Engine`.

    Args:
        config: of the policy; its weights come by `update_weights`.
        max_slots: sequences decoded at once.
        max_tokens: longest prompt and response together.
        cache_bytes: of keys, values and states.
        prefill_tokens: most tokens per forward; a longer prompt goes in pieces.
        dtype: that weights are held and multiplied in; states are fp32.
        seed: of vLLM's own random numbers, which decide nothing here.

    Raises:
        RuntimeError: if vLLM is not installed.
        ValueError: if vLLM cannot run this config.
    """

    def __init__(
        self,
        config: HybridConfig,
        *,
        max_slots: int,
        max_tokens: int,
        cache_bytes: int = 2**30,
        prefill_tokens: int = 16384,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        # read when vLLM is imported: one process, so that weights are handed over, not sent
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            raise RuntimeError(
                "vllm is not installed; run pip install -e '.[vllm]' in the project's folder"
            ) from error
        from rollout.vllm_plugin import register
        from rollout.vllm_plugin.draws import Draws

        register()
        self.config, self.max_tokens, self.policy_version = config, max_tokens, -1
        self._fault = NEVER_PUSHED
        self._folder = tempfile.TemporaryDirectory(prefix="hybrid-align-")
        values = write_config(config, layout="transformers-disk")
        (Path(self._folder.name) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        self._llm: Any = LLM(
            model=self._folder.name,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_tokens,
            max_num_seqs=max_slots,
            max_num_batched_tokens=prefill_tokens,
            kv_cache_memory_bytes=cache_bytes,
            logits_processors=[Draws],
            enable_prefix_caching=True,
            async_scheduling=False,
            seed=seed,
        )

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All samples of all requests, in the order of the requests, then of the samples.

        Raises:
            ValueError: if a request can never fit, or holds a token outside the vocabulary.
            RuntimeError: if the engine is closed, or holds no whole set of weights.
        """
        if self._fault:
            raise RuntimeError(self._fault)
        for request in requests:
            self._check(request)
        keys = [(i, s) for i, request in enumerate(requests) for s in range(request.num_samples)]
        done = self._llm.generate(
            [{"prompt_token_ids": list(requests[i].prompt)} for i, _ in keys],
            [_params(requests[i], (i, sample)) for i, sample in keys],
            use_tqdm=False,
        )
        odds = self._draws().collect()
        return [
            self._completion(requests[key[0]], key, output.outputs[0], odds[key])
            for key, output in zip(keys, done, strict=True)
        ]

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces every weight in place by name; every later completion carries `version`.

        Raises:
            ValueError: naming the first tensor that is unexpected, misshapen or missing. Weights
                already copied stay, so the engine refuses to generate until a whole update.
        """
        self._fault = half_updated(version)
        wanted = dict.fromkeys(tensor_names(self.config, "native"))

        def counted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in stream:
                yield name, tensor
                wanted.pop(name, None)

        self._llm.apply_model(lambda network: network.load_weights(counted()))
        if wanted:
            raise ValueError(
                f"{len(wanted)} weights are missing from the stream, first {next(iter(wanted))!r}; "
                "stream all of them"
            )
        # what was prefilled under the old weights is no prefix of the new policy
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("engine: vLLM did not forget its cached prompts; make a new engine")
        self.policy_version = version
        self._fault = ""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """What the engine holds, by the model's plain names: what a push is proved by."""
        (held,) = self._llm.apply_model(lambda network: dict(network.held_weights()))
        for name, tensor in held.items():
            if name != HEAD or not self.config.tie_word_embeddings:
                yield name, tensor

    def close(self) -> None:
        """Ends the engine and frees its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            self._folder.cleanup()
        self._fault = "engine: it is closed; make a new one"

    def _check(self, request: Request) -> None:
        prompt, vocabulary = request.prompt, self.config.vocab_size
        longest = len(prompt) + request.sampling.max_new_tokens
        if not prompt or longest > self.max_tokens:
            raise ValueError(
                f"request {request.request_id!r}: {len(prompt)} + {longest - len(prompt)} tokens, "
                f"expected 1 or more of the prompt and {self.max_tokens} together at most; shorten "
                "it or raise max_tokens"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            bad = next(token for token in prompt if not 0 <= token < vocabulary)
            raise ValueError(
                f"request {request.request_id!r}: token {bad} is outside the model's vocabulary of "
                f"{vocabulary}; render it with the model's own tokenizer"
            )

        for part in (request, request.sampling):
            for field in fields(part):
                value = getattr(part, field.name)
                if field.name not in HONOURED and value != field.default:
                    raise ValueError(
                        f"request {request.request_id!r}: {field.name} = {value!r}, expected "
                        f"{field.default!r}: vLLM does not do it here; use the native engine"
                    )

    def _draws(self) -> Draws:
        from rollout.vllm_plugin.draws import Draws

        def find(worker: Any) -> Draws:
            known = worker.model_runner.input_batch.logitsprocs.non_argmax_invariant
            return next(processor for processor in known if isinstance(processor, Draws))

        (draws,) = self._llm.collective_rpc(find)
        assert isinstance(draws, Draws), "asked for when the engine was made"
        return draws

    def _completion(
        self, request: Request, key: tuple[int, int], output: Any, odds: dict[int, Odds]
    ) -> Completion:
        tokens = tuple(output.token_ids)
        ends: dict[str, Finish] = {"stop": "stop", "length": "length"}
        of_tokens = [odds[place] for place in range(len(tokens))]
        return Completion(
            request_id=request.request_id,
            sample=key[1],
            prompt=request.prompt,
            tokens=tokens,
            logprobs=tuple(one.logprob for one in of_tokens),
            filtered_logprobs=tuple(one.filtered_logprob for one in of_tokens),
            kept_mass=tuple(one.kept_mass for one in of_tokens),
            finish=ends[output.finish_reason],
            policy_version=self.policy_version,
        )


def _params(request: Request, key: tuple[int, int]) -> Any:
    """vLLM's own settings: greedy, because the token is drawn before it looks."""
    from vllm import SamplingParams

    from rollout.vllm_plugin.draws import EXTRA, Ask

    sampling = request.sampling
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=0.0,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,
        detokenize=False,
        extra_args={EXTRA: Ask(key, sampling, key[1])},
    )
