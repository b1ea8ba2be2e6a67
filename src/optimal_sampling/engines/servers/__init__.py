"""Two models behind servers that nobody may change: lists of likeliest tokens, mixed here.

What is drawn:
    model           what a served model answers
    table_model     a served model that is a table of logits
    union  bounds   two lists as one, and how far q of it may be from the exact q
    mixing          lists -> a token of q and its diagnostics
    row  drafting   a completion, in rounds that ask both servers; how long drafts are
    engine          `ServersEngine`

How servers are asked:
    access          addresses, API key, deadlines
    dialect         what a kind of server is asked: vllm_api, llama_api; replies reads them strictly
    pool  connection  limit   HTTP: one attempt, and how many at once
    replica         one server: attempts, and whether it still is what it was at the start
    replicas        several servers of a model: retries, load balancing, fail-over
    probe  scoring  what a server offers; the fastest way to score a draft
    statistics      what is counted

Servers:
    fake_server     tables of logits over HTTP
    launch  server_process    the command `servers`
"""
