"""An engine whose workers are engines.

engine          `FleetEngine`: the contract of engines/base.py
driver          requests to workers, completions back
supervision     what the driver knows of a worker, and how long it waits
suspects        which request ends its worker
worker          what a worker and its launcher have to do, of any kind
process_worker  workers that are processes on this machine
ray_worker      workers that are Ray actors, and what a cluster has room for
ray_host        what runs on a machine of the cluster: a process_worker, watched
ray_cluster     the connection to Ray, or a local cluster
log_file        what they print
placement       their GPUs, threads and memory
channel         their sockets
messages        what is said, as bytes
worker_main     the worker's process
serving         the worker's engine
"""

from __future__ import annotations

from optimal_sampling.engines.fleet.engine import FleetEngine, open_fleet

__all__ = ["FleetEngine", "open_fleet"]
