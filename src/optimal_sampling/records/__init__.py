"""What is on disk: the schema of a record, the append-only files, the run folder, shards. No torch here."""

from __future__ import annotations

from optimal_sampling.records.ledger import Ledger, Totals
from optimal_sampling.records.run_folder import RunFolder, load
from optimal_sampling.records.schema import SCHEMA_VERSION, Prompt, Record
from optimal_sampling.records.shards import merge

__all__ = ["SCHEMA_VERSION", "Ledger", "Prompt", "Record", "RunFolder", "Totals", "load", "merge"]
