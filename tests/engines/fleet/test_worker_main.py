"""The process of a worker."""

import subprocess
import sys

WATCH = """
import os, time
from types import SimpleNamespace
from optimal_sampling.engines.fleet.worker_main import _watch

class End:
    def send(self, event):
        time.sleep(2.5)
        os._exit(7)

_watch(End(), SimpleNamespace(progress=1), os.getppid(), beat=0.1, stuck=1.5)
"""


def test_a_driver_that_reads_nothing_ends_no_worker():
    """Guards: a whole fleet that ends because its driver was paused (Ctrl-Z) for 20 minutes."""
    done = subprocess.run([sys.executable, "-c", WATCH], capture_output=True, timeout=60)
    assert done.returncode == 7, done.stderr.decode()


ORPHAN = """
from types import SimpleNamespace
from optimal_sampling.engines.fleet.worker_main import _watch

_watch(None, SimpleNamespace(progress=None), parent=-1, beat=0.1)
"""


def test_a_worker_whose_parent_has_gone_ends():
    """Guards: a worker that lives on because another process holds the driver's socket open."""
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, b"")
