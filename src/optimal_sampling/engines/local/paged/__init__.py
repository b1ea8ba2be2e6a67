"""How the local engine runs on a GPU in half precision: one memory of pages per model, Flash Attention, CUDA graphs.

runs.py        which pages every row holds (plain Python)
cache.py       keys and values in those pages
kernels.py     Flash Attention over them: PyTorch's own, or the flash-attn package
layout.py      one ragged forward pass laid out as integers: positions, places, lengths
graphs.py      forward passes recorded as CUDA graphs, by shape
forward.py     `PagedRunner`: a `ModelRunner` on top of these

Elsewhere (a CPU, float32, models with capped scores or attention sinks) rows live in slots of equal length, see
kv_cache.py and attention.py one folder up.
"""
