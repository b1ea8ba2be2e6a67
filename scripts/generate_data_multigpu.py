"""`optimal-sampling generate` with one worker per GPU, by the flags of older documents.

    python scripts/generate_data_multigpu.py --model_teacher ... --model_theta ... --dataset ... \
        --batch_size 128 --max_tokens 16384 --output_dir outputs/run --resume

`--workers N` gives another number of workers, `--data_slice` a part of the dataset.
"""

import sys

from optimal_sampling.cli import main

if __name__ == "__main__":
    given = sys.argv[1:]
    has_workers = any(argument.partition("=")[0] == "--workers" for argument in given)
    sys.exit(main(["generate", *([] if has_workers else ["--workers", "auto"]), *given]))
