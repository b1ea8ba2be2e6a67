"""KV memory in pages, with Flash Attention and CUDA graphs: a GPU in half precision.

page_manager.py        which pages every row holds (plain Python)
page_cache.py          keys and values in pages
attention_backends.py  Flash Attention over pages: PyTorch's own, or the flash-attn package
batch_layout.py        one ragged forward pass as integers: positions, places, lengths
cuda_graphs.py         forward passes recorded as CUDA graphs, by shape
page_runner.py         `PageRunner`: one ragged forward pass of one model over pages
"""
