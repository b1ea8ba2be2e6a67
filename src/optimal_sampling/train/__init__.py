"""From an exported dataset to a trained student: supervised fine-tuning with TRL.

    options      the flags of `optimal-sampling sft`
    launch       the torchrun command for several processes
    checkpoints  which checkpoints of a folder are complete
    data         the dataset, and what is checked in it before training
    trainer      TRL's SFTTrainer with our settings and callbacks
    progress     loss, rate and time left while it trains
    sft          one call: checks, training, the check of what was trained

TRL and torch are imported when training starts.
"""

from optimal_sampling.train.options import SftOptions, parse_sft

__all__ = ["SftOptions", "parse_sft"]
