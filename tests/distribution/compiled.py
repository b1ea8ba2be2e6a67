"""Compile every program of `gpu` for two generations of GPUs. `test_fused.py` runs it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optimal_sampling.distribution.gpu import launch, programs

TYPES = {
    "batch": programs.Batch("*bf16", "*bf16", "i32", "i32", "i32", "i32", "fp32"),
    "noise": programs.Noise("*i32", "i32", "*i64", "*i64"),
    "settings": programs.Settings._make(["fp32"] * len(programs.Settings._fields)),
    "outputs": programs.Outputs("*i64", "*fp32", "*i1", "*i1"),
    "position": "*i64",
    "measured": "*fp64",
    "solved": "*fp64",
    "mixed": "*fp64",
    "drafted": "*fp64",
    "tokens": "*i64",
    "pieces": "i32",
}
CONSTANTS = {
    "METHOD": "kl_symmetry",
    "HASHED": True,
    "WIDTH": 16,
    "PIECE": launch.SIZES.piece,
    "BLOCK": launch.SIZES.block,
}


def spilled(cubin: bytes) -> int:
    """Bytes of stack per thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def compile_for(generation: int, program: str, **constants: object) -> None:
    function = getattr(programs, program)
    names = function.arg_names
    known = {**CONSTANTS, **constants}
    source = ASTSource(
        fn=function,
        signature={name: TYPES.get(name, "constexpr") for name in names},
        constexprs={(i,): known[name] for i, name in enumerate(names) if name in known},
    )
    options = launch._SMALL if program in ("finish", "choose") else launch._LAUNCH
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    stack = spilled(compiled.asm["cubin"])
    print(generation, program, constants, f"{stack} bytes of stack")
    assert stack <= 64, (generation, program)


if __name__ == "__main__":
    for generation in (80, 90):
        for program in ("measure", "solve", "mix", "finish", "draft", "choose"):
            compile_for(generation, program)
    for method in ("reverse_kl_symmetry", "ess_balance", "schedule"):
        compile_for(90, "measure", METHOD=method)
        compile_for(90, "solve", METHOD=method)
