"""The architecture for vLLM >= 0.31, which has none of its own since 0.24: `vllm serve CHECKPOINT`.

vLLM calls `register` through the entry point `vllm.general_plugins` in each of its processes; the
model is imported when a checkpoint asks for it.

    model.py     the network in vLLM's form, top to bottom
    layers.py    attention, lightning and experts, cut over tensor parallel ranks
    states.py    what vLLM has to know of a lightning layer's states
    loading.py   a stream of weights into the network, at the start and while it runs
    draws.py     the project's sampler in place of vLLM's, for `rollout.vllm_backend`
    published.py the config.json of MiniMax-Text-01 and M1
"""

# `MiniMaxForCausalLM` is what this project writes; the others are the published checkpoints.
ARCHITECTURES = ("MiniMaxForCausalLM", "MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM")


def register() -> None:
    """Names the model to vLLM, by a string: nothing of it is imported yet."""
    from vllm.model_executor.models import ModelRegistry

    from rollout.vllm_plugin.published import register_published

    register_published()
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, "rollout.vllm_plugin.model:HybridForVllm")
