"""`python -m optimal_sampling` is `optimal-sampling`."""

from __future__ import annotations

import sys

from optimal_sampling.cli import main

if __name__ == "__main__":
    sys.exit(main())
