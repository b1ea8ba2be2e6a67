"""KV memory in slots of equal length, with PyTorch's SDPA: any device, dtype and model."""
