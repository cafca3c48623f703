"""The architecture above its blocks: HybridModel, HybridForCausalLM.

Inside, every layer sees packed tokens only ([T, ...], model/packed.py). The two classes that
transformers, TRL and PEFT know take padded or packed calls and pass them through model/door.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.generic import ModelOutput

from model.attention import SoftmaxAttention
from model.block import Block
from model.cache import DecodeCache
from model.checkpointing import Checkpointing
from model.config import HybridConfig
from model.door import check_form, check_hints, open_door, own_labels
from model.kernels.logprob.op import head_logits, token_logprobs
from model.lightning import LightningAttention
from model.moe import Experts, Router, balance_loss, router_losses
from model.norm import RMSNorm
from model.packed import Packed
from model.rotary import rotary_angles
from model.row import Row
from model.step import DecodeStep, Step


class Hidden(NamedTuple):
    """What the trunk gives: hidden [T, C] after the last norm, router logits [T, E] a layer."""

    hidden: Tensor
    router_logits: tuple[Tensor, ...]


@dataclass
class PackedOutput(ModelOutput):
    """What a packed call of `HybridForCausalLM` gives.

    Args:
        logprobs: [T] fp32, natural log-probability of each target; None without targets.
        entropy: [T] fp32 in nats, no gradient; None unless asked for.
        hidden: [T, C], of a row cut over ranks this rank's part.
        aux_loss: the router's losses with their coefficients, a mean over the T tokens; None if
            every coefficient is 0.
        router_logits: [T, E] fp32, one a layer, of the same tokens as hidden.
    """

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    hidden: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class HybridPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of both classes."""

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    # transformers writes its decay tables into checkpoints; ours are derived, never stored
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$"
    ]
    # recurrent: generation methods that roll the cache back are refused by transformers
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal init; with DeepNorm, branch outputs are scaled by beta = (8N)^-0.25."""
        super()._init_weights(module)
        std = self.config.initializer_range
        deep = self.config.postnorm and self.config.mlp_alpha_factor != 1
        branch = std * (8 * self.config.num_hidden_layers) ** -0.25 if deep else std
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=branch)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, LightningAttention):
            init.normal_(module.out_proj.weight, mean=0.0, std=branch)
        elif isinstance(module, SoftmaxAttention):
            init.normal_(module.o_proj.weight, mean=0.0, std=branch)


class HybridModel(HybridPreTrainedModel):
    """The trunk: embeddings, blocks, last norm.

    Example:
        >>> from model.config import preset
        >>> trunk = HybridModel(preset("tiny", num_hidden_layers=2))
        >>> trunk.run(Packed.from_sequences([[1, 2, 3], [4]])).hidden.shape
        torch.Size([4, 128])
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        # no padding_idx: a row pinned to zero stays zero through every lightning layer, and once it
        # is sampled their norms multiply its gradient to infinity
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_dim = config.rotary_dim if config.rotary_dim is not None else config.head_dim
        self.rotary_base = float(config.rope_parameters["rope_theta"])
        # transformers' switch; the same as checkpointing = "full"
        self.gradient_checkpointing = False
        self.checkpointing: Checkpointing = "none"
        self.row = Row()
        self.post_init()

    def run(
        self,
        packed: Packed,
        *,
        cache: DecodeCache | None = None,
        slots: Sequence[int] = (),
        embeddings: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> Hidden:
        """Packed tokens through every layer.

        Args:
            cache: continued in place: sequence i of `packed` follows what slots[i] holds.
            embeddings: [T, C] in place of the tokens' own.
            experts: [T, layers, K] integers, where each token goes in each layer whatever the
                router would choose; -1 leaves it to the router. The router still weighs them.

        Raises:
            ValueError: if a sequence does not start where its slot ends.
        """
        step = None if cache is None else cache.begin(slots, packed)
        out = self._through(packed, step, embeddings, experts)
        if step is not None:
            step.end()
        return out

    def decode(self, packed: Packed, step: DecodeStep) -> Hidden:
        """One token of each of S sequences, whose cache is written in place; waits for nothing."""
        return self._through(packed, step)

    def _through(
        self,
        packed: Packed,
        step: Step | None,
        embeddings: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> Hidden:
        x = self.embed_tokens(packed.tokens) if embeddings is None else embeddings
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = rotary_angles(packed.positions, self.rotary_dim, self.rotary_base, wide)
        checkpointing = "full" if self.gradient_checkpointing else self.checkpointing
        if step is not None or not (self.training and torch.is_grad_enabled()):
            checkpointing = "none"
        router_logits = []
        for number, layer in enumerate(self.layers):
            recorded = None if experts is None else experts[:, number]
            x, logits = layer(x, packed, angles, step, checkpointing, recorded=recorded)
            router_logits.append(logits)
        return Hidden(self.norm(x), tuple(router_logits))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DecodeCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
    ) -> MoeModelOutputWithPast:
        """A call in transformers' form; [B, L] in, [B, L, C] out.

        `cu_seq_lens_k`, `max_length_*` and `seq_idx` say again what `cu_seq_lens_q` says.

        Raises:
            ValueError: if the input is missing or given twice, or asks for what is not computed.
        """
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_attentions or output_hidden_states or return_dict is False:
            raise ValueError(
                "output_attentions, output_hidden_states and return_dict=False are not computed; "
                "leave them out"
            )
        if input_ids is None:
            if inputs_embeds is None:
                raise ValueError("give exactly one of input_ids and inputs_embeds")
            input_ids = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.int64)
        check_hints(cu_seq_lens_q, position_ids, cu_seq_lens_k, seq_idx)
        cache = past_key_values
        if use_cache and cache is None:
            cache = self.new_cache(input_ids.shape[0])
        past = None if cache is None else cache.lengths
        door = open_door(input_ids, attention_mask, position_ids, cu_seq_lens_q, past=past)
        embeddings = None if inputs_embeds is None else door.unpad(inputs_embeds)
        slots = door.members if cache is not None else ()
        out = self.run(door.packed, cache=cache, slots=slots, embeddings=embeddings)
        wanted = output_router_logits
        wanted = self.config.output_router_logits if wanted is None else wanted
        # [T, E] -> [B * L, E], zeros at padding: what transformers' balance loss reads
        flat = tuple(door.repad(logits).flatten(0, 1) for logits in out.router_logits)
        # transformers annotates FloatTensor, which no torch function returns
        return MoeModelOutputWithPast(
            last_hidden_state=door.repad(out.hidden),  # type: ignore[arg-type]
            past_key_values=cache,
            router_logits=flat if wanted else None,  # type: ignore[arg-type]
        )

    def new_cache(self, batch: int) -> DecodeCache:
        """An empty cache that grows, one slot a batch row."""
        cache = DecodeCache(
            self.config,
            num_slots=batch,
            num_pages=batch,
            dtype=self.dtype,
            device=self.device,
            grows=True,
        )
        cache.free_slots = []
        return cache


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """The language model: trunk and LM head.

    Two ways in: `model(packed=..., targets=...)`, and transformers' padded or packed keywords.

    Example:
        >>> from model.config import preset
        >>> lm = HybridForCausalLM(preset("tiny", num_hidden_layers=2))
        >>> packed = Packed.from_sequences([[1, 2, 3], [4, 5]])
        >>> lm(packed=packed, targets=torch.tensor([2, 3, 0, 5, 0])).logprobs.shape
        torch.Size([5])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., C] -> [.., V] fp32."""
        return head_logits(hidden, self.lm_head.weight, head_fp32=self.config.lm_head_fp32)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DecodeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        packed: Packed | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
        experts: Tensor | None = None,
    ) -> MoeCausalLMOutputWithPast | PackedOutput:
        """With `packed`, the second form of `_forward_packed`; else transformers' own contract.

        Args:
            labels: [B, L] int64, -100 where no loss; shifted here. The loss is their mean, or
                their sum over num_items_in_batch, plus the balance loss if router logits are on.
            logits_to_keep: last positions of each row to compute logits for; 0 computes all.

        Returns: logits [B, L, V] fp32, loss, aux_loss (unweighted), past_key_values.
        """
        check_form(
            packed,
            padded=(input_ids, inputs_embeds),
            only_padded=(attention_mask, position_ids, past_key_values, labels, cu_seq_lens_q),
            only_packed=(targets is not None, experts is not None, temperature != 1, with_entropy),
        )
        if packed is not None:
            return self._forward_packed(packed, targets, temperature, with_entropy, experts)
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
            use_cache=use_cache, output_router_logits=output_router_logits,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states,
            return_dict=return_dict, cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q, max_length_k=max_length_k, seq_idx=seq_idx,
        )  # fmt: skip
        if labels is not None:
            labels = own_labels(labels, attention_mask, position_ids, cu_seq_lens_q)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return self._padded_output(out, keep, labels, num_items_in_batch, real=attention_mask)

    def _padded_output(
        self,
        out: MoeModelOutputWithPast,
        keep: slice | Tensor,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        *,
        real: Tensor | None,
    ) -> MoeCausalLMOutputWithPast:
        hidden: Tensor = out.last_hidden_state  # type: ignore[assignment]
        logits = self.logits(hidden[:, keep, :])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.vocab_size, num_items_in_batch=num_items_in_batch
            )
        if out.router_logits is not None:
            rows = slice(None) if real is None else real[:, -hidden.shape[1] :].flatten().bool()
            aux_loss = balance_loss(
                [layer[rows] for layer in out.router_logits],
                self.config.num_experts_per_tok,
                self.config.router_aux_scaling,
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            past_key_values=out.past_key_values,
            router_logits=out.router_logits,
        )

    def _forward_packed(
        self,
        packed: Packed,
        targets: Tensor | None,
        temperature: float,
        with_entropy: bool,
        experts: Tensor | None,
    ) -> PackedOutput:
        row = self.model.row
        own = row.own(packed)
        experts = None if experts is None else row.part(experts, own)
        hidden, router_logits = self.model.run(own, experts=experts)
        logprobs = entropy = None
        if targets is not None:
            logprobs, entropy = token_logprobs(
                hidden,
                self.lm_head.weight,
                row.part(targets, own),
                temperature=temperature,
                head_fp32=self.config.lm_head_fp32,
                with_entropy=with_entropy,
            )
            logprobs = row.whole(logprobs, own)
            entropy = None if entropy is None else row.whole(entropy, own)
        return PackedOutput(
            logprobs=logprobs,
            entropy=entropy,
            hidden=hidden,
            aux_loss=router_losses(self.config, router_logits, row),
            router_logits=router_logits,
        )
