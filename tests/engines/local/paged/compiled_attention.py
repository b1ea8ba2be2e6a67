"""Compile split-KV attention for two generations of GPUs. `test_split_attention.py` runs it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optimal_sampling.engines.local.paged import split_attention as module

TYPES = {
    **dict.fromkeys(("query", "keys", "values", "output"), "*bf16"),
    **dict.fromkeys(("starts", "used"), "*i32"),
    **dict.fromkeys(("partial", "tops", "sums"), "*fp32"),
    "scale": "fp32",
}
ALIGNED = [["tt.divisibility", 16]]
"""What Triton finds out of strides and pointers when it launches."""
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


def spilled(cubin):
    """Bytes of stack per thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def compile_for(generation, function, warps, stages=3, **constants):
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(i,): constants[name] for i, name in enumerate(names) if name in constants},
        attrs={
            (i,): ALIGNED for i, name in enumerate(names) if signature[name] in ("i32", "*bf16")
        },
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    stack = spilled(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    print(generation, function.__name__, constants, f"{stack} bytes of stack, {shared} shared")
    assert stack <= 64
    assert shared <= SHARED_MEMORY[generation]


def attend_for(generation, width, group, dim, queries):
    sizes = {"WIDTH": width, "GROUP": group, "DIM": dim, "QUERIES": queries}
    fixed = {"HEADS": 2 * group, "PADDED_DIM": dim, "KEYS": 64, "SPLITS": 4, "WINDOW": 0}
    stages = 3 if dim <= 128 else 2
    compile_for(generation, module._attend, module.warps_for(queries), stages, **sizes, **fixed)


if __name__ == "__main__":
    for generation in (80, 90):
        attend_for(generation, 1, 8, 128, 16)
        attend_for(generation, 5, 8, 128, 64)
        attend_for(generation, 17, 7, 128, 128)
        attend_for(generation, 5, 8, 256, 64)
        combine = {"HEADS": 16, "DIM": 128, "PADDED_DIM": 128, "SPLITS": 5, "PADDED_SPLITS": 8}
        compile_for(generation, module._combine, 2, **combine)
