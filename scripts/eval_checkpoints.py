#!/usr/bin/env python
"""`optimal-sampling evaluate` under the name it has in the documents this project comes from."""

import sys

from optimal_sampling.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
