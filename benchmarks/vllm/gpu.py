"""The engines of compare.py at the shapes of Qwen2.5-3B and 1.5B, on a GPU, without a download.

    python benchmarks/vllm/gpu.py            8 x 256 to 8 x 2048 (sequences x tokens)
    python benchmarks/vllm/gpu.py --tiny     the same script with small shapes, on whatever there is

Weights are random (vLLM's load_format=dummy), and both models' distributions almost uniform. So
times of a step are those of the real models, but how many drafts are accepted is not: here it is
nearly all of them, and the rows with drafts are a bound. Engines are opened one after the other;
wall-clock time. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from engines import ENGINES, Setup
from optimal_sampling.bench.architectures import ARCHITECTURES, Architecture
from rounds import measure, report

SHAPES = {"teacher": ARCHITECTURES["Qwen2.5-3B"], "student": ARCHITECTURES["Qwen2.5-1.5B"]}
TINY = {
    "teacher": Architecture("qwen2", 128, 2, 4, 2, 192, vocab=512, context=0),
    "student": Architecture("qwen2", 64, 1, 2, 2, 96, vocab=512, context=0),
}
WORKS = [(8, 256), (16, 512), (32, 512), (16, 1024), (8, 2048)]
ROWS = tuple(name for name in ENGINES if name not in ("local", "nested"))


def make_configs(root: Path, shapes: Mapping[str, Architecture], context: int) -> dict[str, str]:
    """Folders with a config each and no weights."""
    for role, shape in shapes.items():
        config = replace(shape, context=context).config()
        config.update({"architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16"})
        config.save_pretrained(root / role)
    return {role: str(root / role) for role in shapes}


def main() -> None:
    """Read the command line, measure, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes, two short works: whether the script runs"
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--drafts", type=int, default=4, help="draft tokens")
    parser.add_argument("--engines", nargs="+", choices=ROWS, default=list(ROWS))
    arguments = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available()
    if not gpu and not arguments.tiny:
        parser.error("there is no GPU here: --tiny tries the script, compare.py measures on a CPU")
    works = [(2, 8), (4, 16)] if arguments.tiny else WORKS
    shapes = TINY if arguments.tiny else SHAPES
    context = arguments.prompt + max(new for _, new in works) + arguments.drafts + 1
    measured = {"prompt": arguments.prompt, "drafts": arguments.drafts}
    shared = {
        **measured,
        "batch": max(batch for batch, _ in works),
        "vocab": shapes["teacher"].vocab,
        "context": context,
        "gpu": gpu,
        "dummy": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = make_configs(Path(folder), shapes, context)
        setups = [Setup(engine=name, **shared, **paths) for name in arguments.engines]
        times = measure(setups, works, arguments.repeats, at_once=False)
    device = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, 1 thread"
    print(
        f"{device}; prompt {arguments.prompt}, {arguments.drafts} drafts, random weights: "
        "acceptance means nothing"
    )
    report(times, works, ("wall",), {"device": device, **measured, "weights": "random"})


if __name__ == "__main__":
    main()
