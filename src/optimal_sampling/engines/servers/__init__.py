"""Two models behind servers that nobody may change: lists of likeliest tokens, mixed here.

model        what a served model answers
table_model  a served model that is a table of logits
"""
