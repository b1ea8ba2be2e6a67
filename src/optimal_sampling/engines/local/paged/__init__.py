"""KV memory in pages, with Flash Attention and CUDA graphs: a GPU in half precision."""
