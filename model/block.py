"""One layer of the network: attention of its kind, then experts, each joined to the residual."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor, nn

from model.attention import SoftmaxAttention
from model.checkpointing import Checkpointing, computed_again, kept_on_host
from model.config import HybridConfig
from model.kernels.norm.op import join
from model.lightning import LightningAttention
from model.moe import MoE
from model.norm import ResidualNorm
from model.packed import Packed
from model.step import Step

# of rotary: cosines and sines, [T, 1, R] fp32 (fp64 for a model in fp64) each
Angles = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Attention of the layer's kind, then experts, joined by DeepNorm's alpha and beta.

    PostNorm:  n = norm(x);  x = alpha * n + beta * branch(n)   (the residual carries the norm)
    PreNorm:   x = alpha * x + beta * branch(norm(x))

    Source: MiniMax-01 report, section 4.2; forward as in the released model code.
    """

    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__()
        lightning = config.layer_types[layer] == "linear_attention"
        self.self_attn = (LightningAttention if lightning else SoftmaxAttention)(config, layer)
        self.mlp = MoE(config)
        attn_gain = (
            (config.linear_attn_alpha_factor, config.linear_attn_beta_factor)
            if lightning
            else (config.full_attn_alpha_factor, config.full_attn_beta_factor)
        )
        size, eps, postnorm = config.hidden_size, config.rms_norm_eps, config.postnorm
        self.input_layernorm = ResidualNorm(size, eps, postnorm=postnorm)
        self.post_attention_layernorm = ResidualNorm(size, eps, postnorm=postnorm, gain=attn_gain)
        self.mlp_gain = (config.mlp_alpha_factor, config.mlp_beta_factor)

    def forward(
        self,
        x: Tensor,
        packed: Packed,
        angles: Angles,
        cache: Step | None = None,
        checkpointing: Checkpointing = "none",
        *,
        recorded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[T, C] -> [T, C] and router logits [T, E]; `recorded` as in `MoE.forward`."""
        if checkpointing == "none":
            return self.feed(*self.attend(x, packed, angles, cache), recorded)
        if checkpointing == "selective":
            halfway = computed_again(self.attend, x, packed, angles, keeps=True)
            return computed_again(self.feed, *halfway, recorded, True)
        with kept_on_host() if checkpointing == "host" else nullcontext():
            return computed_again(self._both, x, packed, angles, recorded)

    def _both(
        self, x: Tensor, packed: Packed, angles: Angles, recorded: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.feed(*self.attend(x, packed, angles), recorded, True)

    def attend(
        self, x: Tensor, packed: Packed, angles: Angles, cache: Step | None = None
    ) -> tuple[Tensor, Tensor]:
        """The first half: [T, C] -> the residual and its norm, [T, C] each."""
        residual, normed = self.input_layernorm(x)
        if isinstance(self.self_attn, LightningAttention):
            branch = self.self_attn(normed, packed, cache)
        else:
            branch = self.self_attn(normed, packed, angles, cache)
        residual, normed = self.post_attention_layernorm(residual, branch)
        return residual, normed

    def feed(
        self,
        residual: Tensor,
        normed: Tensor,
        recorded: Tensor | None = None,
        in_pieces: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The second half: what `attend` gave -> [T, C] and router logits [T, E]."""
        branch, router_logits = self.mlp(normed, recorded, in_pieces)
        return join(residual, branch, self.mlp_gain), router_logits
