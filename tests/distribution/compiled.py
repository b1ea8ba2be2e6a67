"""Compile every program of the fused kernel for two generations of GPUs. `test_fused.py` runs it, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optimal_sampling.distribution import fused, kernel

POINTERS = {
    "student": "bf16", "teacher": "bf16", "noise": "i32", "keys": "i64", "position": "i64", "measured": "fp64",
    "solved": "fp64", "mixed": "fp64", "drafted": "fp64", "tokens": "i64", "trace": "fp32", "bad_student": "i1",
    "bad_teacher": "i1", "log_p": "fp32",
}  # fmt: skip
COUNTS = ("student_stride", "teacher_stride", "noise_stride", "vocab", "pieces")
CONSTANTS = {
    "METHOD": "kl_symmetry", "MIRROR": False, "FORCE": True, "HASHED": True, "COLUMNS": kernel.MEASURED,
    "MEASURED": kernel.MEASURED, "SOLVED": kernel.SOLVED, "MIXED": kernel.MIXED, "DRAFTED": kernel.DRAFTED,
    "FIELDS": 11, "WIDTH": 16, "PIECE": fused.PIECE, "BLOCK": fused.BLOCK,
}  # fmt: skip


def type_of(name: str, program: str) -> str:
    if name in CONSTANTS:
        return "constexpr"
    if name in POINTERS and (name, program) != ("tokens", "solve"):
        return "*" + POINTERS[name]
    return "i32" if name in COUNTS else "fp32"


def spilled(cubin: bytes) -> int:
    """Bytes of stack per thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    return int(re.search(r"STACK:(\d+)", told.stdout)[1])


def compile_for(generation: int, program: str, **constants: object) -> None:
    function = getattr(kernel, program)
    names = function.arg_names
    known = {**CONSTANTS, **constants}
    source = ASTSource(
        fn=function,
        signature={name: type_of(name, program) for name in names},
        constexprs={(i,): known[name] for i, name in enumerate(names) if name in CONSTANTS},
    )
    options = fused._SMALL if program in ("finish", "choose") else fused._LAUNCH
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
