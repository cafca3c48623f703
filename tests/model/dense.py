"""A plain reading of the architecture: one sequence, one token after the other, in float64.

Slow and short on purpose, and written from the formulas, not from `model/`: the tests hold the
real model against it where transformers has no answer (half rotary, PreNorm, sliding window,
dropped tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from model import HybridConfig


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def slopes(config: HybridConfig, layer: int) -> Tensor:
    """[H]: 2^(-8h/H), h = 1..H, weakened towards the last layer."""
    heads = torch.arange(1, config.num_attention_heads + 1, dtype=torch.float64)
    factor = 1 - layer / (config.num_hidden_layers - 1 + 1e-5) + 1e-5
    return 2.0 ** (-8.0 * heads / config.num_attention_heads) * factor


def rotate(x: Tensor, *, rotary_dim: int, theta: float) -> Tensor:
    """[L, heads, D]: the first rotary_dim channels turn in pairs (i, i + rotary_dim/2)."""
    half = rotary_dim // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[0], dtype=torch.float64)[:, None, None] * frequencies
    first, second, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    turned = first * angles.cos() - second * angles.sin()
    other = second * angles.cos() + first * angles.sin()
    return torch.cat((turned, other, rest), dim=-1)


def softmax_attention(
    config: HybridConfig, w: Mapping[str, Tensor], x: Tensor, *, window: int | None
) -> Tensor:
    length, dim = x.shape[0], config.head_dim
    q = (x @ w["q_proj.weight"].T).view(length, -1, dim)
    k = (x @ w["k_proj.weight"].T).view(length, -1, dim)
    v = (x @ w["v_proj.weight"].T).view(length, -1, dim)
    theta = config.rope_parameters["rope_theta"]
    turning = dim if config.rotary_dim is None else config.rotary_dim
    q = rotate(q, rotary_dim=turning, theta=theta)
    k = rotate(k, rotary_dim=turning, theta=theta)
    group = q.shape[1] // k.shape[1]
    rows = []
    for t in range(length):
        start = 0 if window is None else max(0, t - window + 1)
        heads = []
        for head in range(q.shape[1]):
            scores = k[start : t + 1, head // group] @ q[t, head] / dim**0.5
            heads.append(scores.softmax(0) @ v[start : t + 1, head // group])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w["o_proj.weight"].T


def lightning_attention(
    config: HybridConfig, w: Mapping[str, Tensor], x: Tensor, *, layer: int
) -> Tensor:
    length, heads, dim = x.shape[0], config.num_attention_heads, config.head_dim
    qkv = silu(x @ w["qkv_proj.weight"].T).view(length, heads, 3 * dim)
    q, k, v = qkv.split(dim, dim=-1)
    decay = torch.exp(-slopes(config, layer))[:, None, None]
    state = torch.zeros(heads, dim, dim, dtype=torch.float64)
    rows = []
    for t in range(length):
        state = decay * state + k[t, :, :, None] * v[t, :, None, :]
        rows.append((q[t, :, None, :] @ state).reshape(-1))
    out = rms_norm(torch.stack(rows), w["norm.weight"], config.lightning_norm_eps)
    return (torch.sigmoid(x @ w["output_gate.weight"].T) * out) @ w["out_proj.weight"].T


def experts(
    config: HybridConfig, w: Mapping[str, Tensor], x: Tensor, *, capacity: int | None
) -> Tensor:
    """Top-k of the router's softmax, renormalised; a full expert leaves later tokens out."""
    out, load = torch.zeros_like(x), [0] * config.num_local_experts
    best, chosen = (x @ w["gate.weight"].T).softmax(-1).topk(config.num_experts_per_tok)
    best = best / best.sum(-1, keepdim=True)
    for t in range(x.shape[0]):
        for share, expert in zip(best[t], chosen[t].tolist(), strict=True):
            load[expert] += 1
            if capacity is not None and load[expert] > capacity:
                continue
            gate, up = (w["experts.gate_up_proj"][expert] @ x[t]).chunk(2)
            out[t] += share * (w["experts.down_proj"][expert] @ (silu(gate) * up))
    return out


def dense_logits(
    config: HybridConfig,
    weights: Mapping[str, Tensor],
    tokens: Sequence[int],
    *,
    capacity: int | None = None,
) -> Tensor:
    """[L, V] fp64: the logits of one sequence alone."""
    weights = {name: value.double() for name, value in weights.items()}

    def under(prefix: str) -> dict[str, Tensor]:
        return {n[len(prefix) :]: value for n, value in weights.items() if n.startswith(prefix)}

    x = weights["model.embed_tokens.weight"][list(tokens)]
    for layer, kind in enumerate(config.layer_types):
        w = under(f"model.layers.{layer}.")
        attention = under(f"model.layers.{layer}.self_attn.")
        mlp = under(f"model.layers.{layer}.mlp.")
        name = "linear" if kind == "linear_attention" else "full"
        alpha = getattr(config, f"{name}_attn_alpha_factor")
        beta = getattr(config, f"{name}_attn_beta_factor")
        normed = rms_norm(x, w["input_layernorm.weight"], config.rms_norm_eps)
        if kind == "linear_attention":
            mixed = lightning_attention(config, attention, normed, layer=layer)
        else:
            mixed = softmax_attention(config, attention, normed, window=config.window(layer))
        x = (normed if config.postnorm else x) * alpha + mixed * beta
        normed = rms_norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
        residual = normed if config.postnorm else x
        fed = experts(config, mlp, normed, capacity=capacity)
        x = residual * config.mlp_alpha_factor + fed * config.mlp_beta_factor
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return x @ head.T
