"""The engines of compare.py at the shapes of Qwen2.5-3B and 1.5B, on a GPU, in one call and without a download.

    python benchmarks/vllm/gpu.py            8 x 256, 16 x 512, 32 x 512, 16 x 1024, 8 x 2048 (sequences x new tokens)
    python benchmarks/vllm/gpu.py --tiny     the same script with small shapes, on whatever there is

Weights are random (vLLM's load_format=dummy), and both models' distributions almost uniform. So times of a step are
those of the real models, but how many drafts are accepted is not: here it is nearly all of them, and the rows with
drafts are a bound. Engines are opened one after the other; wall-clock time. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

from engines import ENGINES, Setup
from rounds import measure, report

SHAPES = {
    "teacher": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
    },
    "student": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
}
TINY = {
    "teacher": {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "student": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}
VOCAB = 151936
WORKS = [(8, 256), (16, 512), (32, 512), (16, 1024), (8, 2048)]
ROWS = tuple(name for name in ENGINES if name not in ("local", "nested"))


def make_configs(
    root: Path, shapes: dict[str, dict[str, int]], vocab: int, context: int
) -> dict[str, str]:
    """Folders with a config each and no weights."""
    import transformers

    paths = {}
    for role, sizes in shapes.items():
        config = transformers.Qwen2Config(
            vocab_size=vocab,
            num_key_value_heads=2,
            max_position_embeddings=context,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
            eos_token_id=0,
            bos_token_id=0,
            architectures=["Qwen2ForCausalLM"],
            dtype="bfloat16",
            **sizes,
        )
        paths[role] = str(root / role)
        config.save_pretrained(paths[role])
    return paths


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
    shapes, vocab = (TINY, 512) if arguments.tiny else (SHAPES, VOCAB)
    context = arguments.prompt + max(new for _, new in works) + arguments.drafts + 1
    batch = max(batch for batch, _ in works)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_configs(Path(folder), shapes, vocab, context)
        shared = {
            "batch": batch,
            "prompt": arguments.prompt,
            "drafts": arguments.drafts,
            "context": context,
        }
        setups = [
            Setup(engine=name, vocab=vocab, gpu=gpu, dummy=True, **shared, **paths)
            for name in arguments.engines
        ]
        times = measure(setups, works, arguments.repeats, at_once=False)
    device = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, 1 thread"
    print(
        f"{device}; prompt {arguments.prompt}, {arguments.drafts} drafts, random weights: acceptance means nothing"
    )
    setting = {
        "device": device,
        "prompt": arguments.prompt,
        "drafts": arguments.drafts,
        "weights": "random",
    }
    report(times, works, ("wall",), setting)


if __name__ == "__main__":
    main()
