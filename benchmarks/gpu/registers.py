"""Registers, stack, shared memory and occupancy of every Triton program on an H100. Needs no GPU.

    python benchmarks/gpu/registers.py [--check]

`--check` also compiles for sm_80 and for the other alpha methods, and fails where a program keeps
more than SPILLED bytes of a thread in memory, or fits no multiprocessor. It is one of the tests.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optimal_sampling.distribution.gpu import launch, programs
from optimal_sampling.engines.local.paged import layer_ops, layer_programs, split_attention

SPILLED = 64
"""Bytes of stack per thread, of which some are not spills."""
REGISTERS, WARPS, BLOCKS = 65_536, 64, 32
SHARED = {80: 164 * 1024, 90: 228 * 1024}
"""Of one multiprocessor: CUDA C++ Programming Guide, compute capabilities 8.0 and 9.0."""
TYPES = {
    "batch": programs.Batch("*bf16", "*bf16", "i32", "i32", "i32", "i32", "fp32", ()),
    "noise": programs.Noise("*i32", "i32", "*i64", "*i64"),
    "settings": programs.Settings._make(["fp32"] * len(programs.Settings._fields)),
    "outputs": programs.Outputs("*i64", "*fp32", "*i1", "*i1"),
    "position": "*i64",
    "work": programs.Work("*fp64", "*fp64", "*fp64"),
    "measured": "*fp64",
    "solved": "*fp64",
    "mixed": "*fp64",
    "drafted": "*fp64",
    "tokens": "*i64",
    "pieces": "i32",
    "surveyed": "*fp64",
    "count": "i32",
    "support": "*fp64",
    "log_min_p": "fp32",
}
ALIGNED = {"student_stride", "teacher_stride", "vocab", "stride"}
CONSTANTS = {
    "METHOD": "kl_symmetry",
    "HASHED": True,
    "GREEDY": False,
    "PASS": 2,
    "PASSES": launch.SIZES.passes,
    "WIDTH": 32,
    "PIECE": launch.SIZES.piece,
    "BLOCK": launch.SIZES.block,
    "STAGES": launch.SIZES.stages,
}
MIXTURE = {
    "measure": launch._LAUNCH,
    "refine": launch._LAUNCH,
    "solve": launch._LAUNCH,
    "mix": launch._LAUNCH,
    "finish": launch._SMALL,
    "draft": launch._LAUNCH,
    "choose": launch._SMALL,
    "survey": launch._LAUNCH,
    "restrict": launch._SMALL,
}
WITHIN_A_SUPPORT = {**TYPES, "batch": TYPES["batch"]._replace(support=("*fp64",))}
LAYER_TYPES = {
    **dict.fromkeys(("residual", "x", "weight", "out", "qkv", "cos", "sin", "gate_up"), "*bf16"),
    **dict.fromkeys(("q_weight", "k_weight", "keys", "values", "query"), "*bf16"),
    "index": "*i64",
    "position": "*i64",
    "positions": "i32",
    "eps": "fp32",
}
LAYER_SIZES = {
    "add_rms_norm": {"SIZE": 2048, "BLOCK": 2048, "ADD": True},
    "rotate_and_store": {"HEADS": 16, "KV_HEADS": 2, "HALF": 64, "BLOCK": 64, "NORM": True},
    "silu_mul": {"SIZE": 11_008, "BLOCK": layer_ops.SILU_BLOCK},
}
"""Of Qwen2.5-3B, with the head norms of Qwen3."""
ATTENTION_TYPES = {
    "inputs": split_attention.Inputs("*bf16", "*bf16", "*bf16", "*i32", "*i32"),
    "parts": split_attention.Parts("*fp32", "*fp32", "*fp32"),
    "scale": "fp32",
    "strides": split_attention.Strides._make(["i32"] * len(split_attention.Strides._fields)),
    **dict.fromkeys(("partial", "tops", "sums"), "*fp32"),
    "output": "*bf16",
}
ALIGNED |= set(split_attention.Strides._fields)
ATTENTION_SIZES = (
    {"WIDTH": 1, "GROUP": 8, "DIM": 128, "QUERIES": 16},
    {"WIDTH": 5, "GROUP": 8, "DIM": 128, "QUERIES": 64},
    {"WIDTH": 17, "GROUP": 7, "DIM": 128, "QUERIES": 128},
    {"WIDTH": 5, "GROUP": 8, "DIM": 256, "QUERIES": 64},
)
COMBINE_SIZES = {"HEADS": 16, "DIM": 128, "PADDED_DIM": 128, "SPLITS": 5, "PADDED_SPLITS": 8}
METHODS = ("reverse_kl_symmetry", "ess_balance", "schedule")


@dataclass(frozen=True)
class Usage:
    """Of one compiled program."""

    registers: int
    stack: int
    """Bytes per thread: what was spilled, and arrays."""
    shared: int
    """Bytes per block."""
    warps: int
    generation: int

    @property
    def blocks(self) -> int:
        """Most blocks at once on one multiprocessor."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // per_warp // self.warps
        by_memory = SHARED[self.generation] // (self.shared + 1024)
        return min(BLOCKS, WARPS // self.warps, by_registers, by_memory)

    def __str__(self) -> str:
        occupancy = self.blocks * self.warps / WARPS
        return (
            f"{self.registers:3} registers x {32 * self.warps:3} threads, stack {self.stack:3} B, "
            f"shared {self.shared:6} B, {self.blocks:2} blocks per SM, occupancy {occupancy:4.0%}"
        )


def compiled(
    function: object,
    types: dict[str, object],
    constants: dict[str, object],
    options: dict[str, object],
    generation: int = 90,
) -> Usage:
    """Compile a program for a generation of GPUs."""
    names = function.arg_names
    fixed = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=fixed,
        attrs={path: [["tt.divisibility", 16]] for path in _aligned(names, types)},
    )
    made = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    resources = _resources(made.asm["cubin"], made.metadata.shared)
    return Usage(**resources, warps=options["num_warps"], generation=generation)


def _aligned(names: list[str], types: dict[str, object]) -> Iterator[tuple[int, ...]]:
    """Paths of arguments that are multiples of 16 at real shapes, which Triton makes use of."""
    for i, name in enumerate(names):
        kind = types.get(name, "")
        if isinstance(kind, str) and kind.startswith("*"):
            yield (i,)
        for j, field in enumerate(getattr(kind, "_fields", ())):
            if kind[j] == ("*fp64",):
                yield i, j, 0
            elif str(kind[j]).startswith("*") or field in ALIGNED:
                yield i, j


def _resources(cubin: bytes, dynamic: int) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "SHARED")}
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "shared": found["SHARED"] + dynamic,
    }


def mixture_usage(generation: int, **constants: object) -> Iterator[tuple[str, Usage]]:
    """Of the programs of the mixture; with constants, of those that read the alpha method."""
    for name, options in MIXTURE.items():
        if constants and name not in ("measure", "solve"):
            continue
        known = {**CONSTANTS, **constants}
        yield name, compiled(getattr(programs, name), TYPES, known, options, generation)


def support_usage() -> Iterator[tuple[str, Usage]]:
    """Of the programs that read both models, within a support; greedy where they draw."""
    for name in ("measure", "refine", "solve", "mix", "finish"):
        known = CONSTANTS | {"GREEDY": True}
        function = getattr(programs, name)
        yield name, compiled(function, WITHIN_A_SUPPORT, known, MIXTURE[name])


def attention_usage(generation: int) -> Iterator[tuple[str, Usage]]:
    """Of split-KV attention: of as many tokens per row, and of its parts together."""
    for sizes in ATTENTION_SIZES:
        dim, group = sizes["DIM"], sizes["GROUP"]
        more = {"HEADS": 2 * group, "PADDED_DIM": dim, "KEYS": 64, "SPLITS": 4, "WINDOW": 0}
        stages = split_attention.stages_for(dim)
        options = {"num_warps": split_attention.warps_for(sizes["QUERIES"]), "num_stages": stages}
        usage = compiled(
            split_attention._attend, ATTENTION_TYPES, sizes | more, options, generation
        )
        yield f"attend, width {sizes['WIDTH']}, head {dim}", usage
    options = {"num_warps": 2}
    function = split_attention._combine
    yield "combine", compiled(function, ATTENTION_TYPES, COMBINE_SIZES, options, generation)


def every_usage(check: bool) -> Iterator[tuple[str, Usage]]:
    """Title and usage of all programs."""
    yield from mixture_usage(90)
    for name, sizes in LAYER_SIZES.items():
        options = {"num_warps": layer_ops.LAUNCH[name]}
        yield name, compiled(getattr(layer_programs, name), LAYER_TYPES, sizes, options)
    yield from attention_usage(90)
    if check:
        for name, usage in (*mixture_usage(80), *attention_usage(80)):
            yield f"{name}, sm_80", usage
        for name, usage in support_usage():
            yield f"{name}, within a support", usage
        for method in METHODS:
            for name, usage in mixture_usage(90, METHOD=method):
                yield f"{name}, {method}", usage


def main() -> int:
    """Print a line per program. 1 where one spills or does not fit, with --check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    print(f"Triton {triton.__version__}, sm_90 where nothing else is said")
    failed = []
    for title, usage in every_usage(check):
        print(f"{title:33} {usage}", flush=True)
        if usage.stack > SPILLED or not usage.blocks:
            failed.append(title)
    if failed:
        print(f"more than {SPILLED} bytes of stack, or too large: {', '.join(failed)}")
    return 1 if check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
