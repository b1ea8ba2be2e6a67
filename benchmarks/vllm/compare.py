"""What q* costs in vLLM, beside each model alone, drafts, the local and a nested engine.

    python benchmarks/vllm/compare.py     random models on a CPU: 8 x 512 and 2 x 256

All engines are in memory, each in a process of its own with one thread, and take turns. Wall-clock
time is what a user waits; CPU time is disturbed less by others on the machine. Prints tables and
ends with one line of JSON. For a GPU there is gpu.py.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

from engines import ENGINES, Setup
from optimal_sampling.bench.architectures import Architecture
from optimal_sampling.config import ModelConfig
from rounds import measure, report

VOCAB, CONTEXT = 32_000, 1024
SHAPES = {
    "teacher": Architecture("qwen3", 512, 8, 8, 4, 1536, VOCAB, CONTEXT, tied=False, head_dim=64),
    "student": Architecture("qwen3", 256, 2, 4, 2, 768, VOCAB, CONTEXT, tied=False, head_dim=64),
}


def make_models(root: Path) -> dict[str, str]:
    """Random models of flat distributions, which overlap as those of a real pair do."""
    models = ModelConfig(device="cpu", dtype="float32")
    for seed, (role, shape) in enumerate(SHAPES.items()):
        shape.model(models, seed).save_pretrained(root / role)
    return {role: str(root / role) for role in SHAPES}


def main() -> None:
    """Read the command line, measure, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens drawn per sequence")
    parser.add_argument(
        "--repeats", type=int, default=5, help="turns of each engine; nested has one, of 8 tokens"
    )
    parser.add_argument("--drafts", type=int, default=5, help="draft tokens")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    arguments = parser.parse_args()
    works = [(batch, arguments.new) for batch in arguments.batches]
    measured = {"prompt": arguments.prompt, "drafts": arguments.drafts}
    shared = {**measured, "batch": max(arguments.batches), "vocab": VOCAB, "context": CONTEXT}
    with tempfile.TemporaryDirectory() as folder:
        paths = make_models(Path(folder))
        setups = [Setup(engine=e, gpu=False, **paths, **shared) for e in arguments.engines]
        times = measure(setups, works, arguments.repeats, at_once=True)
    machine = f"{platform.machine()} CPU, 1 thread"
    print(
        f"{machine}; prompt {arguments.prompt}, {arguments.drafts} drafts, "
        f"{arguments.repeats} repeats"
    )
    report(times, works, ("wall", "cpu"), {"device": machine, **measured})


if __name__ == "__main__":
    main()
