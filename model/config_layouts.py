"""The keys of config.json in every layout a checkpoint comes in, both directions.

Our keys are transformers' and our own beside them; Text-01 and M1 name some otherwise, and count
the kinds of layers; vLLM (up to 0.23) reads both spellings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from model.config import HybridConfig

Layout = Literal["native", "transformers-disk", "text-01", "vllm"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

# our key -> key of Text-01 and M1; every other key has one name everywhere
TEXT_01_KEYS: dict[str, str] = {
    "full_attn_alpha_factor": "layernorm_full_attention_alpha",
    "full_attn_beta_factor": "layernorm_full_attention_beta",
    "linear_attn_alpha_factor": "layernorm_linear_attention_alpha",
    "linear_attn_beta_factor": "layernorm_linear_attention_beta",
    "mlp_alpha_factor": "layernorm_mlp_alpha",
    "mlp_beta_factor": "layernorm_mlp_beta",
}
TEXT_01_KINDS: dict[str, int] = {"linear_attention": 0, "full_attention": 1}
# two spellings of the list of layer kinds
_KIND_LISTS = ("attn_type_list", "decoder_attention_types")
# keys of the published config that we do not have -> the only values that mean what we compute
_TEXT_01_FIXED: dict[str, tuple[Any, ...]] = {
    "shared_intermediate_size": (0, None),
    "rope_scaling": (None,),
}
# keys that say nothing of the numbers, only of the published code
_TEXT_01_FOREIGN = ("auto_map", "shared_moe_mode", "model_type", "architectures")


def read_config(values: Mapping[str, Any], *, layout: Layout) -> HybridConfig:
    """The config.json of a layout as our config.

    Args:
        values: parsed config.json.

    Raises:
        ValueError: if the layout is unknown, or if a key asks for what this model does not
            compute (a shared expert, scaled rotary positions).

    Example:
        >>> keys = {"num_hidden_layers": 2, "attn_type_list": [0, 1], "rope_theta": 1e7}
        >>> read_config(keys, layout="text-01").layer_types
        ['linear_attention', 'full_attention']
    """
    check_layout(layout)
    if layout != "text-01":
        known = {k: v for k, v in values.items() if k not in ("model_type", "architectures")}
        if layout == "vllm":
            known = {k: v for k, v in known.items() if k not in _vllm_aliases(values)}
        return HybridConfig(**known)
    for key, allowed in _TEXT_01_FIXED.items():
        if values.get(key) not in allowed:
            raise ValueError(
                f"config.json: {key} = {values[key]}, expected {allowed[0]}; "
                "this model computes nothing else"
            )
    given = {key: list(values[key]) for key in _KIND_LISTS if key in values}
    if not given or any(kinds != next(iter(given.values())) for kinds in given.values()):
        raise ValueError(
            f"config.json: {' and '.join(given) or _KIND_LISTS[0]} = "
            f"{list(given.values()) or 'missing'}, expected one list of 0 (lightning) and "
            "1 (softmax), one for each layer"
        )
    kinds = {number: kind for kind, number in TEXT_01_KINDS.items()}
    (key, numbers), ours = next(iter(given.items())), {v: k for k, v in TEXT_01_KEYS.items()}
    if wrong := sorted(set(numbers) - set(kinds)):
        raise ValueError(f"config.json: {key} holds {wrong}, expected only 0 and 1")
    foreign = {*_TEXT_01_FIXED, *_TEXT_01_FOREIGN, *_KIND_LISTS, "rope_theta", "postnorm"}
    config = HybridConfig(
        **{ours.get(k, k): value for k, value in values.items() if k not in foreign},
        layer_types=[kinds[number] for number in numbers],
        rope_parameters={"rope_type": "default", "rope_theta": values.get("rope_theta", 10_000.0)},
        # the published code reads a missing key as PreNorm
        postnorm=values.get("postnorm", False),
    )
    refuse_foreign(config, layout)
    return config


def write_config(config: HybridConfig, *, layout: Layout) -> dict[str, Any]:
    """Our config as the config.json of a layout.

    Raises:
        ValueError: if the layout is unknown or cannot say what this model computes.

    Example:
        >>> keys = write_config(HybridConfig(num_hidden_layers=8), layout="text-01")
        >>> keys["attn_type_list"], keys["postnorm"], keys["model_type"]
        ([0, 0, 0, 0, 0, 0, 0, 1], True, 'minimax_text_01')
    """
    check_layout(layout)
    refuse_foreign(config, layout)
    values: dict[str, Any] = json.loads(config.to_json_string())
    values |= {"model_type": "minimax", "architectures": ["MiniMaxForCausalLM"]}
    if layout == "vllm":
        untied = {"rotary_dim": _rotary_dim(config), "tie_word_embeddings": False}
        return {**values, **_vllm_aliases(values), **untied}
    if layout != "text-01":
        return values
    kinds = [TEXT_01_KINDS[kind] for kind in values.pop("layer_types")]
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    values = {TEXT_01_KEYS.get(key, key): value for key, value in values.items()}
    return {
        **values,
        "attn_type_list": kinds,
        "rotary_dim": _rotary_dim(config),
        "shared_intermediate_size": 0,
        "model_type": "minimax_text_01",
        "architectures": ["MiniMaxText01ForCausalLM"],
    }


def _vllm_aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    """The published names, which vLLM reads first, beside transformers' own."""
    kinds = [TEXT_01_KINDS[kind] for kind in values["layer_types"]]
    renamed = {theirs: values[ours] for ours, theirs in TEXT_01_KEYS.items()}
    theta = values["rope_parameters"]["rope_theta"]
    return {**renamed, "attn_type_list": kinds, "rope_theta": theta, "shared_intermediate_size": 0}


def _rotary_dim(config: HybridConfig) -> int | None:
    return config.head_dim if config.rotary_dim is None else config.rotary_dim


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}, expected one of {', '.join(LAYOUTS)}")


def refuse_foreign(config: HybridConfig, layout: str) -> None:
    """What the engines of the published layout compute otherwise must not be written for them."""
    if layout not in ("text-01", "vllm"):
        return
    heads, sliding = config.num_attention_heads, "sliding_attention" in config.layer_types
    rules = (
        # their slopes of other head counts follow another series
        ("num_attention_heads", heads, heads & (heads - 1) == 0, "a power of two"),
        ("layer_types", "sliding_attention", not sliding, f"only {', '.join(TEXT_01_KINDS)}"),
        ("sliding_window", config.sliding_window, config.sliding_window is None, "null"),
    )
    for key, value, good, expected in rules:
        if not good:
            raise ValueError(
                f"config.json: {key} = {value}, expected {expected}: layout {layout} computes "
                "something else; write transformers-disk instead"
            )
