"""HybridConfig: a `minimax` config.json plus our keys, and the presets.

A folder written here opens in transformers' own `minimax`: our keys stand beside the known ones,
and each of them defaults to what transformers computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.models.minimax.configuration_minimax import MiniMaxConfig

LAYER_KINDS = ("linear_attention", "full_attention", "sliding_attention")


# our class -> the public class whose checkpoints it reads and writes
_PUBLIC_CLASSES = {"HybridForCausalLM": "MiniMaxForCausalLM", "HybridModel": "MiniMaxModel"}


class HybridConfig(MiniMaxConfig):
    """Shape and constants of a hybrid lightning/softmax/MoE model.

    Known keys are transformers' `MiniMaxConfig`; ours are below. `layer_types` defaults to the
    report's order: seven lightning layers, then one softmax layer.

    Raises:
        ValueError: if a key asks for something this model does not compute.

    Example:
        >>> HybridConfig(num_hidden_layers=8).layer_types[-2:]
        ['linear_attention', 'full_attention']
    """

    if TYPE_CHECKING:
        # filled in by __post_init__, so never null afterwards
        layer_types: list[str]
        head_dim: int
        rope_parameters: dict[str, Any]

    rotary_dim: int | None = None
    """Leading dimensions of each head that are rotated; null rotates all of head_dim."""
    postnorm: bool = True
    """True: the residual carries the normed activation (DeepNorm, the report); False: PreNorm."""
    lightning_norm_eps: float = 1e-6
    """Epsilon of the norm over all heads inside a lightning layer (vLLM 0.23 computes 1e-5)."""
    lm_head_fp32: bool = False
    """Whether the LM head multiplies in fp32 whatever the dtype of the weights, and autocast."""
    router_aux_scaling: str = "switch"
    """`switch`: E * sum f_i P_i, 2.0 at balance for top-2; `paper`: (1/E) * sum f_i m_i."""
    router_z_loss_coef: float = 0.0
    """Weight of the mean squared log-sum-exp of the router's logits."""
    expert_capacity_factor: float = 0.0
    """Training only: an expert takes factor * T * K / E tokens, the rest are dropped; 0 drops none.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = [
                "linear_attention" if (layer + 1) % 8 else "full_attention"
                for layer in range(self.num_hidden_layers)
            ]
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self._refuse_what_is_not_computed()

    def _refuse_what_is_not_computed(self) -> None:
        rope = self.rope_parameters or {}
        unknown = sorted(set(self.layer_types) - set(LAYER_KINDS))
        rotary = self.rotary_dim if self.rotary_dim is not None else self.head_dim
        rules = (
            ("layer_types", unknown or "known", not unknown, f"only {', '.join(LAYER_KINDS)}"),
            (
                "layer_types",
                f"{len(self.layer_types)} kinds",
                len(self.layer_types) == self.num_hidden_layers,
                f"one for each of num_hidden_layers = {self.num_hidden_layers}",
            ),
            (
                "sliding_window",
                self.sliding_window,
                self.sliding_window is not None or "sliding_attention" not in self.layer_types,
                "a number of tokens, because layer_types holds sliding_attention",
            ),
            ("hidden_act", self.hidden_act, self.hidden_act == "silu", "silu"),
            ("attention_dropout", self.attention_dropout, self.attention_dropout == 0, "0"),
            ("router_jitter_noise", self.router_jitter_noise, self.router_jitter_noise == 0, "0"),
            (
                "rope_parameters.rope_type",
                rope.get("rope_type", "default"),
                rope.get("rope_type", "default") == "default",
                "default",
            ),
            (
                "rotary_dim",
                self.rotary_dim,
                0 < rotary <= self.head_dim and rotary % 2 == 0,
                f"even, 2 to head_dim = {self.head_dim}",
            ),
            (
                "num_attention_heads",
                self.num_attention_heads,
                self.num_attention_heads % self.num_key_value_heads == 0,
                f"a multiple of num_key_value_heads = {self.num_key_value_heads}",
            ),
            (
                "num_experts_per_tok",
                self.num_experts_per_tok,
                1 <= self.num_experts_per_tok <= self.num_local_experts,
                f"1 to num_local_experts = {self.num_local_experts}",
            ),
            (
                "router_aux_scaling",
                self.router_aux_scaling,
                self.router_aux_scaling in ("switch", "paper"),
                "switch or paper",
            ),
            (
                "expert_capacity_factor",
                self.expert_capacity_factor,
                self.expert_capacity_factor >= 0,
                ">= 0; 0 drops no token",
            ),
        )
        for key, value, good, expected in rules:
            if not good:
                raise ValueError(f"config.json: {key} = {value}, expected {expected}")

    def to_dict(self) -> dict[str, Any]:
        """config.json as other programs know it: `architectures` names the public classes."""
        values = super().to_dict()
        if names := values.get("architectures"):
            values["architectures"] = [_PUBLIC_CLASSES.get(name, name) for name in names]
        return values

    def window(self, layer: int) -> int | None:
        """Tokens that softmax layer `layer` sees, itself included; None sees all.

        As in transformers' `minimax`, a sliding_window without any sliding_attention layer holds
        for every softmax layer.
        """
        named = "sliding_attention" in self.layer_types
        slides = self.layer_types[layer] == "sliding_attention" if named else True
        return self.sliding_window if slides else None


# The report's DeepNorm residual gain at 80 layers, (2N)^0.25 (PAPER section 4.2).
_DEEPNORM_80 = 3.5565588200778455

PRESETS: dict[str, dict[str, Any]] = {
    # 2.6M parameters: trains on two CPU cores in minutes.
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rotary_dim": 16,
        "num_local_experts": 4,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "router_aux_loss_coef": 0.01,
    },
    # about 100M parameters: one small GPU.
    "small": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 384,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rotary_dim": 32,
        "num_local_experts": 8,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "router_aux_loss_coef": 0.01,
    },
    # 1.9B parameters, 0.6B active: one large GPU; the size that benchmarks are quoted for.
    "base": {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rotary_dim": 64,
        "num_local_experts": 8,
        "max_position_embeddings": 1_048_576,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0},
        "router_aux_loss_coef": 0.01,
    },
    # 456B parameters, 45.9B active: the report's model (PAPER section 1.1).
    "minimax-text-01": {
        "vocab_size": 200_064,
        "hidden_size": 6144,
        "intermediate_size": 9216,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rotary_dim": 64,
        "num_local_experts": 32,
        "max_position_embeddings": 10_240_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0},
        "router_aux_loss_coef": 0.001,
        "linear_attn_alpha_factor": _DEEPNORM_80,
        "full_attn_alpha_factor": _DEEPNORM_80,
        "mlp_alpha_factor": _DEEPNORM_80,
        "bos_token_id": 200_019,
        "eos_token_id": 200_020,
    },
}


def preset(name: str, **changes: Any) -> HybridConfig:
    """A preset by name, with some of its keys changed.

    The small presets carry DeepNorm's alpha = (2N)^0.25 for their own depth N.

    Raises:
        ValueError: if no preset has this name.

    Example:
        >>> preset("tiny", num_hidden_layers=16).num_hidden_layers
        16
    """
    if name not in PRESETS:
        raise ValueError(f"preset = {name!r}, expected one of {', '.join(PRESETS)}")
    keys = {**PRESETS[name], **changes}
    alpha = (2 * keys["num_hidden_layers"]) ** 0.25
    gains = dict.fromkeys(
        ("linear_attn_alpha_factor", "full_attn_alpha_factor", "mlp_alpha_factor"), alpha
    )
    return HybridConfig(**{**gains, **keys})


class ParameterCount(NamedTuple):
    """How many numbers a model holds, and how many one token meets.

    Args:
        total: all parameters.
        active: those that one token meets: K of the E experts a layer, all the rest.
        embeddings: input embeddings and LM head, part of both; tied ones count once.
    """

    total: int
    active: int
    embeddings: int


def count_parameters(config: HybridConfig) -> ParameterCount:
    """Parameters of a model, from its shape alone.

    Source: MiniMax-01 report, section 2, whose 45.9B active parameters leave out both embeddings.

    Example:
        >>> total, active, embeddings = count_parameters(preset("minimax-text-01"))
        >>> round(total / 1e9, 2), round((active - embeddings) / 1e9, 2)
        (456.09, 45.94)
    """
    size, inner = config.hidden_size, config.intermediate_size
    width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    # qkv, gate and output projections, and the norm over all heads
    lightning = 5 * size * width + width
    softmax = 2 * size * width + 2 * size * kv_width
    expert = 3 * size * inner
    router_and_norms = config.num_local_experts * size + 2 * size
    layers = len(config.layer_types)
    lightning_layers = config.layer_types.count("linear_attention")
    embeddings = config.vocab_size * size * (1 if config.tie_word_embeddings else 2)
    shared = (
        embeddings
        + size
        + lightning_layers * lightning
        + (layers - lightning_layers) * softmax
        + layers * router_and_norms
    )
    return ParameterCount(
        total=shared + layers * config.num_local_experts * expert,
        active=shared + layers * config.num_experts_per_tok * expert,
        embeddings=embeddings,
    )


class Operations(NamedTuple):
    """Multiplications and additions of one forward pass, each counted as one.

    Args:
        weights: of products with weights; backward makes twice as many, half of them for the
            gradients of the weights.
        mixing: between tokens, in lightning and softmax attention; backward makes twice as many.
    """

    weights: int
    mixing: int

    @property
    def training(self) -> int:
        """Forward and backward with every weight trained; nothing computed again is counted."""
        return 3 * (self.weights + self.mixing)


# the block in which lightning attention is quadratic, as the fastest known kernels cut it
_LIGHTNING_BLOCK = 64


def count_operations(
    config: HybridConfig, lengths: Sequence[int], *, has_head: bool = True
) -> Operations:
    """Operations that a forward pass over packed sequences needs.

    A lightning head makes 4 D (D + B / 2) a token: the state read and written, and half a block of
    B = 64 tokens; a softmax head 4 D a pair of tokens that see each other. Router and head count,
    the embeddings' look-up, norms and activations do not.

    Args:
        lengths: tokens of each sequence.
        has_head: whether the LM head follows the trunk.

    Example:
        >>> at = [count_operations(preset("base"), [n]).training / n for n in (8192, 262_144)]
        >>> [f"{x / 1e9:.2f}" for x in at]
        ['3.88', '7.00']
    """
    size, width = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    expert = 3 * size * config.intermediate_size * config.num_experts_per_tok
    tokens = sum(lengths)
    weights, mixing = config.vocab_size * size if has_head else 0, 0
    for layer, kind in enumerate(config.layer_types):
        weights += expert + config.num_local_experts * size
        if kind == "linear_attention":
            weights += 5 * size * width
            mixing += 4 * width * tokens * (config.head_dim + _LIGHTNING_BLOCK // 2)
        else:
            weights += 2 * size * (width + kv_width)
            mixing += 4 * width * sum(_pairs(length, config.window(layer)) for length in lengths)
    return Operations(weights=2 * weights * tokens, mixing=mixing)


def _pairs(length: int, window: int | None) -> int:
    """Pairs of tokens of one sequence of which the later sees the earlier, or itself."""
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) // 2 + (length - seen) * seen
