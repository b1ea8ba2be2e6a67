"""What q* costs in vLLM: against each model alone, with drafts, the local engine, and one engine nested in another.

    python benchmarks/vllm/compare.py     random models on a CPU: 8 layers x 512 and 2 x 256, 32,000 tokens

All engines are in memory, each in a process of its own with one thread, and take turns. Wall-clock time is what a user
waits; CPU time is disturbed less by others on the machine. Prints tables and ends with one line of JSON.
For a GPU there is gpu.py.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

from engines import ENGINES, Setup
from rounds import measure, report

SIZES = {
    "teacher": {
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
    },
    "student": {
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 4,
    },
}
VOCAB, CONTEXT = 32000, 1024


def make_models(root: Path) -> dict[str, str]:
    """Random Qwen3 models whose distributions are flat, so that they overlap as those of a real pair do."""
    import torch
    import transformers

    paths = {}
    for seed, (role, sizes) in enumerate(SIZES.items()):
        torch.manual_seed(seed)
        config = transformers.Qwen3Config(
            vocab_size=VOCAB,
            num_key_value_heads=sizes["num_attention_heads"] // 2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            eos_token_id=0,
            bos_token_id=1,
            pad_token_id=1,
            dtype="float32",
            **sizes,
        )
        paths[role] = str(root / role)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(paths[role])
    return paths


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
    with tempfile.TemporaryDirectory() as folder:
        paths = make_models(Path(folder))
        shared = {
            "batch": max(arguments.batches),
            "prompt": arguments.prompt,
            "drafts": arguments.drafts,
        }
        setups = [
            Setup(engine=name, vocab=VOCAB, context=CONTEXT, gpu=False, **paths, **shared)
            for name in arguments.engines
        ]
        times = measure(setups, works, arguments.repeats, at_once=True)
    machine = f"{platform.machine()} CPU, 1 thread"
    print(
        f"{machine}; prompt {arguments.prompt}, {arguments.drafts} drafts, {arguments.repeats} repeats"
    )
    report(
        times,
        works,
        ("wall", "cpu"),
        {"device": machine, "prompt": arguments.prompt, "drafts": arguments.drafts},
    )


if __name__ == "__main__":
    main()
