"""Generating: requests in, completions with log-probabilities and policy version out.

    types.py    Sampling, Request, Completion, and the Engine protocol
    native/     the engine on this project's own model: scheduler, sampler, engine
    vllm_plugin/, vllm_backend.py
                the same network in vLLM, and the same draws
    sync.py     weights from a trainer to an engine, and checksums to prove it

It knows the model, but nothing of rewards or of training.
"""
