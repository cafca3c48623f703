"""The published checkpoints' config.json for programs that know neither it nor its remote code."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig

PUBLISHED_TYPES = ("minimax_text_01", "minimax_m1")


class PublishedConfig(PretrainedConfig):
    """The keys as they stand; `model.config_layouts.read_config` knows what they mean."""

    model_type = PUBLISHED_TYPES[0]


class PublishedM1Config(PublishedConfig):
    model_type = PUBLISHED_TYPES[1]


def register_published() -> None:
    """Lets `AutoConfig` open them, with the remote code or without it."""
    for config in (PublishedConfig, PublishedM1Config):
        AutoConfig.register(config.model_type, config, exist_ok=True)
