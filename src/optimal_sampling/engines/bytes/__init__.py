"""A pair with different tokenizers: both models seen as models of bytes, mixed at every byte.

trie      the tokens of a vocabulary by their bytes
byte_view a model of tokens as a model of bytes
laws      logits -> what a view reads
mixing    one symbol per row from two laws
utf8      which bytes may follow
text      the student's tokens of a text
options   options of tokens that bytes do not have
row       a request in progress
contexts  one model over rows of KV memory
drafting  laws made ahead
run       one `generate` call
engine    the contract of engines/base.py
"""
