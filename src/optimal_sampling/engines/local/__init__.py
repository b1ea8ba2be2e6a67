"""The local engine: two Transformers models in this process, on a CPU or a GPU.

engine.py     `LocalEngine`: the contract of engines/base.py
run.py        one call of `generate`: requests in, rounds, completions out
scheduler.py  which sequences run next (plain Python)
memory.py     which sequences fit into the KV memory (plain Python)
round.py      tensors of a round: drafts, logits of both models, the tokens drawn
drafting.py   how many tokens to draft, and drafts looked up in the text (plain Python)
runner.py     a model that can be run, and a model with its cache
cache.py      a model's KV cache
attention.py  the attention function that Transformers models call
slots/        KV memory in slots, with PyTorch's SDPA: any device, dtype and model
paged/        KV memory in pages, with Flash Attention and CUDA graphs: a GPU in half precision
streams.py    work queues of a GPU: copies, two models at once, seconds between points
shapes.py     padding under which float32 logits on a CPU do not depend on the batch
norms.py      RMS norms in one call
loading.py    a folder or hub id -> a model that can be run, or an error that says why not
"""
