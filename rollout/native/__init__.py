"""The engine on this project's own model.

engine.py      NativeEngine: what a caller sees; one turn
scheduler.py   who runs next: slots, pages, pauses
sequence.py    a request on its way, and each of its samples
prefix.py      prompts that begin alike
turn.py        the device's part: prefill, first tokens, decode
batch.py       a decode batch whose tensors stay where they are
padded.py      a piece of a prompt padded to a bucket, likewise
graphs.py      both as CUDA graphs
sampler.py     from logits to tokens
int8.py        rounded experts
"""
