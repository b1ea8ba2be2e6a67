"""The local engine: two Transformers models in this process, on a CPU or a GPU.

    scheduler.py   who runs next (plain Python)
    loading.py     a folder or hub id -> a model that can be run this way, or a clear refusal
    run.py         one call of `generate`: the rounds, from logits to tokens
    forward.py     one ragged forward pass of one model over its rows
    attention.py   the attention function that Transformers models call in it
    kv_cache.py    keys and values of all rows
    shapes.py      padding under which float32 logits on a CPU do not depend on the batch
    engine.py      `LocalEngine`: the contract of engines/base.py on top of these
"""
