"""Every Triton program on a GPU: its numbers against PyTorch, its time against the unfused path.

    python benchmarks/gpu/kernels.py [--rows 1 32 160] [--only NAME]

Shapes are those of Qwen2.5-3B, the vocabulary 151,936. Each check is caught on its own; the exit
status is 1 where one failed. On a CPU: `TRITON_INTERPRET=1 ... --tiny`, where times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from mixture_check import RULES
from optimal_sampling.bench.architectures import ARCHITECTURES, Architecture
from optimal_sampling.config import MixtureConfig, ModelConfig
from optimal_sampling.distribution.arrays import keep_largest, keep_top_k
from optimal_sampling.distribution.gpu import launch
from optimal_sampling.distribution.mixture import Drawn, draw, make_pair, solve, trace_of
from optimal_sampling.distribution.noise import NoiseKeys, keys_tensor, noise_tensor
from optimal_sampling.engines.local import attention
from optimal_sampling.engines.local.layers import RMSNorm, fuse_norms
from optimal_sampling.engines.local.paged import layer_ops as ops
from optimal_sampling.engines.local.paged.attention_backends import choose_backend
from optimal_sampling.engines.local.paged.page_cache import Batch, lay_out
from optimal_sampling.engines.local.paged.page_manager import PAGE
from optimal_sampling.engines.local.paged.page_runner import PageRunner
from optimal_sampling.engines.local.paged.split_attention import split_attention, split_count
from optimal_sampling.types import TRACE_FIELDS

LAYERS, KEYS, POSITIONS = 4, 512, 4096
REPEATS_MS = 20
SORTED = 16
"""Rows that are also sorted on the CPU, which takes long."""
TINY = replace(ARCHITECTURES["tiny"], family="qwen2")
Result = tuple[str, Callable[[], object], Callable[[], object] | None]
"""What was compared, the fused function, the unfused one."""


@dataclass(frozen=True)
class Setting:
    """What the checks run on."""

    device: torch.device
    dtype: torch.dtype
    shape: Architecture

    def numbers(self, *sizes: int, spread: float = 1.0) -> Tensor:
        """Random, in the models' precision."""
        return (torch.randn(*sizes, device=self.device) * spread).to(self.dtype)

    def norm(self, size: int) -> RMSNorm:
        """With random weights."""
        return RMSNorm(1 + self.numbers(size, spread=0.2), 1e-6)

    @property
    def head_dim(self) -> int:
        """Of every head."""
        return self.shape.head_dim or self.shape.hidden // self.shape.heads


def microseconds(function: Callable[[], object], recorded: bool = True) -> float:
    """Of one call; from a CUDA graph where the function can be recorded."""
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        function()
        return 1e6 * (time.perf_counter() - begun)
    if recorded:
        return 1e3 * do_bench_cudagraph(function, rep=REPEATS_MS)
    return 1e3 * do_bench(function, warmup=5, rep=REPEATS_MS)


def close(found: Tensor, exact: Tensor, steps: float = 2.0) -> str:
    """The largest difference from float64 numbers. AssertionError beyond rounding steps."""
    step = torch.finfo(found.dtype).eps * steps
    torch.testing.assert_close(found.double(), exact, rtol=step, atol=step)
    return f"largest difference {(found.double() - exact).abs().max().item():.2g}"


# Layers


def check_add_rms_norm(setting: Setting, rows: int) -> Result:
    """The residual and its norm."""
    hidden = setting.shape.hidden
    norm = setting.norm(hidden)
    residual, x = setting.numbers(rows, hidden), setting.numbers(rows, hidden)
    total = residual + x
    exact = RMSNorm(norm.weight.double(), norm.eps)(total.double())
    found = ops.add_rms_norm_triton(residual, x, norm)
    rounded = close(residual, total.double(), 1.0)
    return (
        f"{close(found, exact)}; of the residual, {rounded}",
        lambda: ops.add_rms_norm_triton(residual, x, norm),
        lambda: norm(residual + x),
    )


def check_rotate_and_store(setting: Setting, rows: int, normed: bool = False) -> Result:
    """Rotary embedding and the write to the cache, against that of Transformers."""
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    shape, dim = setting.shape, setting.head_dim
    heads, kv_heads = shape.heads, shape.kv_heads
    qkv = setting.numbers(rows, (heads + 2 * kv_heads) * dim)
    angle = torch.randn(POSITIONS, dim // 2, device=setting.device).repeat(1, 2) * 9
    position = torch.randint(POSITIONS, (rows,), device=setting.device)
    rotary = ops.Rotary(angle.cos().to(setting.dtype), angle.sin().to(setting.dtype), position)
    places = torch.randperm(4 * rows, device=setting.device)[:rows]
    keys, values = (setting.numbers(4 * rows, kv_heads, dim) for _ in range(2))
    memory = ops.Memory(keys, values, places)
    exact = ops.Memory(keys.double(), values.double(), places)
    norms = ops.HeadNorms(setting.norm(dim), setting.norm(dim)) if normed else None
    exact_norms = ops.HeadNorms(*(_in_float64(norm) for norm in norms)) if norms else None
    query = ops.rotate_and_store_triton(qkv, rotary, memory, norms)
    wanted = ops.rotate_and_store_reference(
        qkv.double(),
        ops.Rotary(rotary.cos.double(), rotary.sin.double(), position),
        exact,
        exact_norms,
    )
    said = f"{close(query, wanted)}; of keys, {close(keys, exact.keys)}"
    assert torch.equal(values.double(), exact.values), "values of the cache differ"

    cosines, sines = rotary.cos[position], rotary.sin[position]

    def unfused() -> None:
        q, k, v = qkv.view(1, rows, -1, dim).split([heads, kv_heads, kv_heads], 2)
        if norms is not None:
            q, k = norms.query(q), norms.key(k)
        cos, sin = cosines[None], sines[None]
        _, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        keys.index_copy_(0, places, k[0].transpose(0, 1))
        values.index_copy_(0, places, v[0])

    return said, lambda: ops.rotate_and_store_triton(qkv, rotary, memory, norms), unfused


def _in_float64(norm: RMSNorm) -> RMSNorm:
    return RMSNorm(norm.weight.double(), norm.eps)


def check_rotate_with_head_norms(setting: Setting, rows: int) -> Result:
    """As in Qwen3."""
    return check_rotate_and_store(setting, rows, normed=True)


def check_silu_mul(setting: Setting, rows: int) -> Result:
    """The gate of the MLP."""
    gate_up = setting.numbers(rows, 2 * setting.shape.mlp, spread=3.0)
    gate, up = (half.contiguous() for half in gate_up.chunk(2, -1))
    found = ops.silu_mul_triton(gate_up)
    said = close(found, ops.silu_mul_reference(gate_up.double()))
    return said, lambda: ops.silu_mul_triton(gate_up), lambda: F.silu(gate) * up


def check_merged_products(setting: Setting, rows: int) -> Result:
    """q, k and v, gate and up: one matrix product each."""
    shape, dim = setting.shape, setting.head_dim
    sizes = [shape.heads * dim, shape.kv_heads * dim, shape.kv_heads * dim]
    spread = shape.hidden**-0.5
    qkv, gate_up = (
        setting.numbers(total, shape.hidden, spread=spread) for total in (sum(sizes), 2 * shape.mlp)
    )
    parts = [*qkv.split(sizes), *gate_up.chunk(2)]
    x = setting.numbers(rows, shape.hidden)
    merged = torch.cat([F.linear(x, qkv), F.linear(x, gate_up)], 1)
    apart = torch.cat([F.linear(x, part) for part in parts], 1)
    return (
        close(merged, apart.double(), 4.0),
        lambda: (F.linear(x, qkv), F.linear(x, gate_up)),
        lambda: [F.linear(x, part) for part in parts],
    )


def check_pass(setting: Setting, rows: int) -> Result:
    """A forward pass of LAYERS layers over pages with the attention that runs here."""
    shape = replace(setting.shape, layers=LAYERS)
    dtype = str(setting.dtype).removeprefix("torch.")
    model = shape.model(ModelConfig(device=setting.device.type, dtype=dtype), 0)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    fuse_norms(model)
    choice = choose_backend("auto", setting.device, setting.dtype, {setting.head_dim}, set())
    if choice.backend is None:
        return f"not run, as there are no pages here: {choice.note}", lambda: None, None
    runs, logits = [], []
    for fused in (False, True):
        runner = PageRunner(model, shape.vocab, 0, choice.backend, fused)
        cache = runner.open_cache((0,), (rows * KEYS // PAGE + 1) * PAGE, rows)
        cache.make_room([[KEYS - 8] for _ in range(rows)], 1)
        start = np.full(rows, KEYS - 10)
        numbers, sizes = lay_out(cache.manager, start, 1, (), ())
        ids = torch.arange(rows, device=setting.device)
        batch = Batch(sizes, ids, torch.from_numpy(numbers).to(setting.device))
        runs.append(lambda runner=runner, cache=cache, batch=batch: runner._run(cache, batch)[0])
        with torch.inference_mode():
            runs[-1]()  # makes the memory
            torch.manual_seed(1)
            for memory in cache.memories():
                memory.normal_()
            logits.append(runs[-1]().float())
    difference = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert difference < 0.05, f"logits differ by {difference:.3g} of the largest"
    return f"logits within {difference:.2g} of the largest", runs[1], runs[0]


# Mixture


def logits_of(setting: Setting, rows: int) -> tuple[Tensor, Tensor, NoiseKeys]:
    """Of two models that agree in part, and noise."""
    vocab = setting.shape.vocab
    student = torch.randn(rows, vocab, device=setting.device) * 3
    teacher = student + torch.randn(rows, vocab, device=setting.device) * 1.5
    position = torch.arange(rows, device=setting.device)
    keys = NoiseKeys(keys_tensor(range(rows)).to(setting.device), position)
    return student.to(setting.dtype), teacher.to(setting.dtype), keys


def in_pytorch(
    student: Tensor, teacher: Tensor, keys: NoiseKeys, mixture: MixtureConfig
) -> tuple[Tensor, Tensor]:
    """Tokens and trace without the programs."""
    solved = solve(make_pair(student, teacher, mixture), keys.position, mixture)
    token, log_q = draw(solved, keys)
    return token, trace_of(solved, token, log_q)


FREE = MixtureConfig(alpha_min=0.0)


def check_mixture(setting: Setting, rows: int, mixture: MixtureConfig = FREE) -> Result:
    """Tokens, alpha and the rest of the trace of a step."""
    student, teacher, keys = logits_of(setting, rows)
    found = Drawn(*launch.fused_step(student, teacher, keys, keys.position, mixture))
    token, trace = in_pytorch(student, teacher, keys, mixture)
    torch.testing.assert_close(found.trace, trace, rtol=1e-4, atol=1e-4, equal_nan=True)
    equal = int((found.token == token).sum())
    assert equal == rows, f"{rows - equal} of {rows} tokens differ"
    alpha = (found.trace[:, 0] - trace[:, 0]).abs().max().item()
    assert TRACE_FIELDS[0] == "alpha"
    return (
        f"all tokens equal, alpha within {alpha:.1g}",
        lambda: launch.fused_step(student, teacher, keys, keys.position, mixture),
        lambda: in_pytorch(student, teacher, keys, mixture),
    )


def check_mixture_sizes(setting: Setting, rows: int) -> Result:
    """Times of other cuts of the work, to choose SIZES by."""
    student, teacher, keys = logits_of(setting, rows)
    mixture = MixtureConfig()
    base = launch.SIZES
    cuts = [base, *(base._replace(passes=count) for count in (0, 1, 2))]
    cuts += [base._replace(stages=1), base._replace(piece=base.piece * 2)]
    cuts += [base._replace(block=base.block * 2)]

    def run(sizes: launch.Sizes) -> None:
        launch.fused_step(student, teacher, keys, keys.position, mixture, sizes)

    said = [f"{tuple(cut)} {microseconds(lambda c=cut: run(c)):.0f} us" for cut in cuts]
    return f"(piece, block, passes, stages): {', '.join(said)}", lambda: run(base), None


def check_draft(setting: Setting, rows: int) -> Result:
    """A draft."""
    student, _, keys = logits_of(setting, rows)
    vocab = student.shape[1]
    expected = (student.float() / 0.7 + noise_tensor(keys, vocab)).argmax(-1)
    equal = int((launch.fused_draft(student, keys, 0.7) == expected).sum())
    assert equal == rows, f"{rows - equal} of {rows} drafts differ"
    return (
        "all equal",
        lambda: launch.fused_draft(student, keys, 0.7),
        lambda: (student.float() / 0.7 + noise_tensor(keys, vocab)).argmax(-1),
    )


def check_top_k(setting: Setting, rows: int) -> Result:
    """Top-k without sorting, against sorting every row."""
    scores = logits_of(setting, rows)[0].float().log_softmax(-1)
    for top_k in (1, 50):
        found = keep_top_k(scores, top_k)[:SORTED].cpu()
        differ = int((found != keep_largest(scores[:SORTED].cpu(), top_k, 1.0)).sum())
        assert not differ, f"{differ} tokens differ at top-k {top_k}"

    def by_sorting() -> Tensor:
        order = scores.sort(stable=True, dim=-1, descending=True).indices
        return torch.zeros_like(scores).scatter_(-1, order[:, :50], 1.0)

    return "kept as by sorting", lambda: keep_top_k(scores, 50), by_sorting


def check_split_attention(setting: Setting, rows: int, width: int = 1) -> Result:
    """A few queries per row over KEYS keys, against PyTorch's operator where there is one."""
    shape, dim = setting.shape, setting.head_dim
    query = setting.numbers(rows * width, shape.heads, dim)
    keys, values = (setting.numbers(rows * KEYS, shape.kv_heads, dim) for _ in range(2))
    used = torch.randint(width, KEYS + 1, (rows,), dtype=torch.int32, device=setting.device)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=setting.device) * KEYS
    ends = torch.arange(rows + 1, dtype=torch.int32, device=setting.device) * width
    splits = split_count(rows, shape.kv_heads, KEYS)

    def fused() -> Tensor:
        return split_attention(query, keys, values, starts[:-1], used, dim**-0.5, None, splits)

    def operator() -> Tensor:
        arguments = (query, keys, values, ends, starts, width, KEYS, 0.0, width > 1, False)
        right = 0 if width > 1 else -1
        options = {"window_size_left": -1, "window_size_right": right, "seqused_k": used}
        found: Tensor = torch.ops.aten._flash_attention_forward(*arguments, **options)[0]
        return found

    if setting.device.type == "cpu":
        return "not compared: PyTorch's operator needs a GPU", fused, None
    return close(fused(), operator().double(), 4.0), fused, operator


CHECKS = {
    "add_rms_norm": check_add_rms_norm,
    "rotate_and_store": check_rotate_and_store,
    "rotate_with_head_norms": check_rotate_with_head_norms,
    "silu_mul": check_silu_mul,
    "merged_products": check_merged_products,
    "draft": check_draft,
    "mixture": check_mixture,
    **{f"mixture_{name}": partial(check_mixture, mixture=rule) for name, rule in RULES.items()},
    "top_k": check_top_k,
    "mixture_sizes": check_mixture_sizes,
    "split_attention": check_split_attention,
    "split_attention_5": partial(check_split_attention, width=5),
    "pass": check_pass,
}
UNRECORDED = {name for name in CHECKS if name.startswith("mixture")} | {"draft", "top_k"}
"""Their unfused path waits for the host, so it is no CUDA graph."""


def line(name: str, setting: Setting, rows: int) -> tuple[bool, str]:
    """Whether a check held, and what is printed."""
    try:
        said, fused, unfused = CHECKS[name](setting, rows)
        with torch.inference_mode():
            times = f"{microseconds(fused):8.1f} us"
            if unfused is not None:
                slow = microseconds(unfused, recorded=name not in UNRECORDED)
                times += f", unfused {slow:8.1f} us"
        return True, f"ok    {name:24} {rows:4} rows {times}; {said}"
    except Exception as error:  # the other checks are still to run
        where = traceback.extract_tb(error.__traceback__)[-1]
        lines = [text for text in str(error).splitlines() if text.strip()]
        reason = " ".join(lines[:3]) or type(error).__name__
        place = f"{where.filename.rsplit('/', 1)[-1]}:{where.lineno}"
        return False, f"FAIL  {name:24} {rows:4} rows {type(error).__name__} at {place}: {reason}"


def settings(tiny: bool) -> Setting:
    """Real shapes on a GPU, tiny ones anywhere."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if tiny:
        return Setting(device, torch.float32, TINY)
    return Setting(device, torch.bfloat16, ARCHITECTURES["Qwen2.5-3B"])


def lines(setting: Setting, names: list[str], rows: list[int]) -> Iterator[tuple[bool, str]]:
    """All checks at all numbers of rows."""
    for name in names:
        for count in rows:
            torch.manual_seed(0)
            yield line(name, setting, count)


def main() -> int:
    """Print a line per check; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 160])
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    setting = settings(options.tiny)
    cuda = setting.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else "no GPU"
    print(f"{name}, PyTorch {torch.__version__}, Triton {triton.__version__}", flush=True)
    begun, failed = time.perf_counter(), 0
    for held, text in lines(setting, options.only, options.rows):
        failed += not held
        print(text, flush=True)
    print(f"{failed} failed, {time.perf_counter() - begun:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
