"""The local engine: two Transformers models in this process, on a CPU or a GPU.

engine.py     `LocalEngine`: the contract of engines/base.py
run.py        one call of `generate`: requests in, rounds, completions out
scheduler.py  which sequences run next (no tensors)
memory.py     which sequences fit into the KV memory (no tensors)
round.py      tensors of a round: drafts, logits of both models, the tokens drawn
emission.py   which of a round's tokens go into the texts (no tensors)
drafting.py   how many tokens to draft, and drafts looked up in the text (no tensors)
runner.py     a model that can be run, its KV cache, and both together
attention.py  the attention function that Transformers models call
slots/        KV memory in slots, with PyTorch's SDPA: any device, dtype and model
paged/        KV memory in pages, with Flash Attention and CUDA graphs: a GPU in half precision
layers.py     layers that replace a model's own, and padding: equal bits in every batch on a CPU
loading.py    a folder or hub id -> a model that can be run, or an error that says why not
model_check.py, shrinking.py  a small copy of a model, compared with its own forward pass
row_group.py, stock_runner.py a model with its own forward pass and cache
rotary.py     rotary factors that depend on a row's length
weights.py    whether weights were all there and all used; LoRA adapters
"""
