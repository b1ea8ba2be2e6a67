"""What a run leaves on the disk. No torch.

schema      the fields of a record
store       a file of records: append-only lines with checksums, locks, atomic writes
run_folder  `config.json`, the files of records, and counts: what is good, what failed, means
verdicts    what graders said about the records
shards      several run folders -> one
"""

from __future__ import annotations

from optimal_sampling.records.run_folder import RunFolder, load
from optimal_sampling.records.schema import Record
from optimal_sampling.records.shards import end_of_shards, merge
from optimal_sampling.records.verdicts import Graded, Verdict, graded_records, load_verdicts

__all__ = [
    "Graded",
    "Record",
    "RunFolder",
    "Verdict",
    "end_of_shards",
    "graded_records",
    "load",
    "load_verdicts",
    "merge",
]
