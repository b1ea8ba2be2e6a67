"""Run folders -> a training set for `load_dataset` and TRL. No torch.

options        the options of `export`
reading        run folders -> one small entry per record, and the records again
decontaminate  prompts that overlap with questions of benchmarks
selection      filters and preferences
tokens         ids of prompts and completions; what TRL makes of their texts
conversations  a row -> messages, and what only the teacher was shown
rows           a record -> a row: text, messages, ids, prompts
soft_targets   the likeliest tokens of a record -> columns that other tools read
spans          the longest run of words that two texts share
judgement      what there is to know of the data before training
card           README.md
folder         Parquet files, and a folder that is there whole or not at all
hub            upload
job            all of it in turn
"""

from optimal_sampling.records.export.hub import push
from optimal_sampling.records.export.job import Report, Tools, export
from optimal_sampling.records.export.options import ExportOptions
from optimal_sampling.records.export.soft_targets import read_top_tokens

__all__ = ["ExportOptions", "Report", "Tools", "export", "push", "read_top_tokens"]
