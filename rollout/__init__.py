"""Generating: requests in, completions with log-probabilities and policy version out.

    types.py      Sampling, Request, Completion, and the Engine protocol
    native/       the engine on this project's own model: scheduler, sampler, engine
    vllm_plugin/, vllm_backend.py
                  the same network in vLLM, and the same draws
    sync.py       weights from a trainer to an engine, and checksums to prove it
    transport.py  the same over files
    broadcast.py  the same over a process group, NCCL or gloo
    canary.py     the proof: log-probabilities of trainer and engine, token by token
    service.py    the worker: an engine behind HTTP; serving/ are its rooms, wire.py its forms
    client.py     several workers as one engine

It knows the model, but nothing of rewards or of training.
"""
