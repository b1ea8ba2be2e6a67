"""The local engine: two Transformers models in this process, on a CPU or a GPU.

engine.py      `LocalEngine`: the contract of engines/base.py on top of these
run.py         one call of `generate`: requests in, rounds, completions out
scheduler.py   who runs next (plain Python)
drawing.py     a round's tensors: drafts, logits of both models, the tokens that follow
drafting.py    how many tokens to draft, and drafts looked up in the text (plain Python)
lane.py        one model with its cache, and the contexts that live in it
forward.py     one ragged forward pass of one model over its rows
attention.py   the attention function that Transformers models call in it
kv_cache.py    keys and values of all rows, in slots of equal length
paged/         the same on a GPU in half precision: pages, Flash Attention, CUDA graphs
overlap.py     two models' forward passes at the same time on one GPU
clock.py       seconds between points of a round's work, on a CPU or a GPU
transfer.py    from the host to the device without waiting for it
shapes.py      padding under which float32 logits on a CPU do not depend on the batch
norms.py       RMS norms in one call
loading.py     a folder or hub id -> a model that can be run this way, or a clear refusal
"""
