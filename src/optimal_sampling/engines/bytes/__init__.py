"""A pair with different tokenizers: both models seen as models of bytes, mixed at every byte."""
