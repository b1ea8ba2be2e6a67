#!/usr/bin/env python
"""`optimal-sampling generate` with one process per GPU.

Give the i-th of n processes the option `--data-slice i::n`.
"""

import sys

from optimal_sampling.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
