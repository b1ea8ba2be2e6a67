"""What a run leaves on the disk. No torch.

schema      the fields of a record
store       a file of records: append-only lines with checksums
ledger      counts: what is good, what failed, means
run_folder  `config.json` and the files of records
shards      several run folders -> one
files       atomic writes and locks
"""

from __future__ import annotations

from optimal_sampling.records.ledger import Ledger, Totals
from optimal_sampling.records.run_folder import RunFolder, load
from optimal_sampling.records.schema import SCHEMA_VERSION, Prompt, Record
from optimal_sampling.records.shards import merge

__all__ = ["SCHEMA_VERSION", "Ledger", "Prompt", "Record", "RunFolder", "Totals", "load", "merge"]
