"""The Python examples of the documents this project comes from run as they are written there.

Only the models are replaced by the shipped pair, and a named "cuda" by "cpu" where there is no GPU.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot

from optimal_sampling import EnhancedCoordinatorConfig, EnhancedDualVLLMCoordinator
from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer, random_tables
from optimal_sampling_hf import OptimalSamplingModel, SamplingOutput

MODEL = """
model = OptimalSamplingModel(
    model_theta_path="Qwen/Qwen2.5-1.5B-Instruct",
    model_t_path="Qwen/Qwen2.5-3B-Instruct",
    dtype=torch.bfloat16,  # Use bfloat16 for speed
    device="cuda"
)
"""

QUICK_START = """
import torch
from optimal_sampling_hf import OptimalSamplingModel

# Initialize model
model = OptimalSamplingModel(
    model_theta_path="Qwen/Qwen2.5-1.5B-Instruct",  # Base model
    model_t_path="Qwen/Qwen2.5-3B-Instruct",        # Teacher model
    alpha_method="kl_symmetry",
    dtype=torch.bfloat16,
    device="cuda"
)

# Generate
outputs = model.generate(
    prompts=["What is 2+2?", "Explain quantum computing"],
    max_new_tokens=100,
    temperature=0.8
)

# Access results
for text in outputs.generated_texts:
    print(text)
"""

SAVED = (
    MODEL
    + """
# With detailed diagnostics
outputs = model.generate(
    prompts=["Your question here"],
    max_new_tokens=200,
    temperature=0.8,
    save_logits=True,          # Save logits for analysis
    save_q_star_probs=True,    # Save q* distribution
)

# Access diagnostics
print(f"Average α: {outputs.diagnostics['alpha_mean']:.3f}")
print(f"ESS ratio: {outputs.diagnostics['ess_ratio_mean']:.3f}")
"""
)

PLOT = (
    MODEL
    + """
outputs = model.generate(prompts=["What is 2+2?", "Explain quantum computing"], max_new_tokens=20)
# Track alpha evolution
for i, alpha_hist in enumerate(outputs.alpha_values):
    plt.plot(alpha_hist, label=f"Example {i}")
plt.xlabel("Generation Step")
plt.ylabel("Alpha (Teacher Weight)")
plt.legend()
plt.show()
"""
)

SMALL_MODELS = (
    MODEL
    + """
prompts = ["What is 2+2?"] * 3
outputs = model.generate(
    prompts=prompts,
    max_new_tokens=512,
    batch_size=16,  # Larger batch for small models
)
"""
)

LARGE_MODELS = """
from transformers import BitsAndBytesConfig

# Use 4-bit quantization
model = OptimalSamplingModel(
    model_theta_path="Qwen/Qwen2.5-7B-Instruct",
    model_t_path="Qwen/Qwen2.5-14B-Instruct",
    dtype=torch.bfloat16,
    load_in_4bit=True,  # 4-bit quantization
    bnb_4bit_compute_dtype=torch.bfloat16,
)
prompts = ["What is 2+2?"] * 3
outputs = model.generate(
    prompts=prompts,
    max_new_tokens=512,
    batch_size=4,  # Smaller batch for large models
)
"""

ALPHA_METHODS = """
from optimal_sampling_hf import OptimalSamplingModel

# KL Symmetry (recommended)
model_kl = OptimalSamplingModel(
    model_theta_path="Qwen/Qwen2.5-1.5B-Instruct",
    model_t_path="Qwen/Qwen2.5-3B-Instruct",
    alpha_method="kl_symmetry"
)

# Fixed alpha
model_fixed = OptimalSamplingModel(
    model_theta_path="Qwen/Qwen2.5-1.5B-Instruct",
    model_t_path="Qwen/Qwen2.5-3B-Instruct",
    alpha_method="fixed",
    fixed_alpha=0.5  # 50% mix
)

# Entropy-based
model_entropy = OptimalSamplingModel(
    model_theta_path="Qwen/Qwen2.5-1.5B-Instruct",
    model_t_path="Qwen/Qwen2.5-3B-Instruct",
    alpha_method="entropy"
)
outputs = [each.generate(["What is 2+2?"], max_new_tokens=9) for each in (model_kl, model_fixed, model_entropy)][1]
"""

BATCH = """
import torch
from optimal_sampling_hf import OptimalSamplingModel

model = OptimalSamplingModel(
    model_theta_path="Qwen/Qwen2.5-1.5B-Instruct",
    model_t_path="Qwen/Qwen2.5-3B-Instruct",
    alpha_method="kl_symmetry",
    dtype=torch.bfloat16
)

# Process multiple prompts
prompts = [f"Question {i}: What is the capital of France?" for i in range(10)]

outputs = model.generate(
    prompts=prompts,
    max_new_tokens=50,
    temperature=0.8
)

# Save to file
import json
with open("outputs.jsonl", "w") as f:
    for i, text in enumerate(outputs.generated_texts):
        data = {
            "prompt": prompts[i],
            "output": text,
            "alpha_mean": float(outputs.alpha_values[i].mean())
        }
        f.write(json.dumps(data) + "\\n")
"""

DIAGNOSTICS = (
    MODEL
    + """
outputs = model.generate(
    prompts=["Explain machine learning"],
    max_new_tokens=200,
    temperature=0.8,
    return_diagnostics=True
)

# Analyze diagnostics
print(f"Average α: {outputs.alpha_values.mean():.3f}")
print(f"α range: [{outputs.alpha_values.min():.3f}, {outputs.alpha_values.max():.3f}]")
print(f"ESS ratio: {outputs.ess_ratios.mean():.3f}")

if outputs.diagnostics:
    kl_theta = outputs.diagnostics["kl_theta"].mean()
    kl_t = outputs.diagnostics["kl_t"].mean()
    print(f"KL(q||π_θ): {kl_theta:.4f}")
    print(f"KL(q||π_t): {kl_t:.4f}")
"""
)

DUAL_PROMPTS = (
    MODEL
    + """
# Teacher sees instruction-formatted prompt
# Base sees natural language prompt
outputs = model.generate(
    prompts=["Question: What is AI?\\nAnswer:"],  # For base model
    prompts_t=["<|im_start|>user\\nWhat is AI?<|im_end|>\\n<|im_start|>assistant\\n"],  # For teacher
    max_new_tokens=100
)
"""
)

SUPPORT = """
model = OptimalSamplingModel(
    model_theta_path="Qwen/Qwen2.5-1.5B-Instruct",
    model_t_path="Qwen/Qwen2.5-3B-Instruct",
    alpha_method="kl_symmetry",
    constraint_to_target=True,  # Limit to π_t support
    target_top_k=100,            # Only top-100 tokens from π_t
    target_top_p=0.95            # Or top-p
)
outputs = model.generate(["What is 2+2?"], max_new_tokens=20)
"""

SNIPPETS = {
    "quick start": (QUICK_START, 2),
    "saved logits": (SAVED, 1),
    "plot of alpha": (PLOT, 2),
    "small models": (SMALL_MODELS, 3),
    "large models": (LARGE_MODELS, 3),
    "alpha methods": (ALPHA_METHODS, 1),
    "batch": (BATCH, 10),
    "diagnostics": (DIAGNOSTICS, 1),
    "dual prompts": (DUAL_PROMPTS, 1),
    "support": (SUPPORT, 1),
}
"""The code, and how many completions its `outputs` has."""


def adapted(code: str) -> str:
    """The shipped pair in place of the models; "cpu" in place of "cuda" where there is none."""
    code = re.sub(r"Qwen/Qwen2.5-(1.5B|7B)-Instruct", "toy-student", code)
    code = re.sub(r"Qwen/Qwen2.5-(3B|14B)-Instruct", "toy-teacher", code)
    return code if torch.cuda.is_available() else code.replace('device="cuda"', 'device="cpu"')


@pytest.mark.parametrize("name", SNIPPETS)
def test_example_runs_as_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: the promise that code written for the predecessor runs on this package."""
    code, count = SNIPPETS[name]
    if "load_in_4bit" in code and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("4-bit weights need bitsandbytes, which is not installed")
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    namespace: dict[str, Any] = {
        "torch": torch,
        "OptimalSamplingModel": OptimalSamplingModel,
        "plt": pyplot,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PyTorch finds no CUDA GPU here")
        warnings.filterwarnings(
            "ignore", r"`torch.jit.script", DeprecationWarning
        )  # by bitsandbytes
        warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")  # plt.show()
        exec(compile(adapted(code), name, "exec"), namespace)
    outputs = namespace["outputs"]
    assert isinstance(outputs, SamplingOutput)
    assert outputs.generated_texts is not None
    assert len(outputs.generated_texts) == count
    assert not any(outputs.errors)
    assert min(outputs.diagnostics["num_tokens"]) >= 1
    assert "nan" not in capsys.readouterr().out
    if name == "batch":
        rows = [json.loads(line) for line in Path("outputs.jsonl").read_text().splitlines()]
        assert all(0.5 <= row["alpha_mean"] <= 1 for row in rows)
    if name == "plot of alpha":
        check_plot(outputs)


def check_plot(outputs: SamplingOutput) -> None:
    """The figure of the example, drawn by matplotlib, has the alphas of both completions."""
    axes = pyplot.gca()
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert [*lines] == ["Example 0", "Example 1"]
    for row, drawn in enumerate(lines.values()):
        count = outputs.diagnostics["num_tokens"][row]
        assert [*map(float, drawn[:count])] == outputs.alpha_values[row][:count].tolist()
        assert not any(math.isfinite(float(x)) for x in drawn[count:])
    assert axes.get_ylabel() == "Alpha (Teacher Weight)"
    pyplot.close("all")


@pytest.mark.parametrize("name", ["basic_usage", "data_generation"])
def test_shipped_example_runs(name: str, tmp_path: Path) -> None:
    """Guards: examples that no longer match the code."""
    script = Path(__file__).parents[1] / "examples" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


COORDINATOR = """
import asyncio
from coordinator_enhanced import EnhancedDualVLLMCoordinator
from config_enhanced import EnhancedCoordinatorConfig

async def main():
    config = EnhancedCoordinatorConfig(
        theta_url="http://localhost:9000",  # 4B Base
        t_url="http://localhost:9001",      # 14B Teacher
        top_k=20,
        force_first_token=True,
        constraint_to_target=True,
        target_top_p=0.95,
    )

    prompts_theta = ["Q: What is AI?\\nA:"]
    prompts_t = ["<|im_start|>user\\nWhat is AI?<|im_end|>\\n<|im_start|>assistant\\n"]

    async with EnhancedDualVLLMCoordinator(config) as coordinator:
        results = await coordinator.generate_batch_dual_prompts(
            prompts_theta=prompts_theta,
            prompts_t=prompts_t,
            max_tokens=100,
            return_diagnostics=True
        )

        for result in results:
            print(f"Generated: {result.generated_text}")
            print(f"Alpha: {np.mean(result.alpha_history):.3f}")

asyncio.run(main())
"""

PRESETS = """
conservative = EnhancedCoordinatorConfig(
    force_first_token=True,
    constraint_to_target=True,
    target_top_p=0.90  # Strict constraint
)
balanced = EnhancedCoordinatorConfig(
    force_first_token=True,
    constraint_to_target=True,
    target_top_p=0.95  # Moderate constraint
)
exploratory = EnhancedCoordinatorConfig(
    force_first_token=False,
    constraint_to_target=False
)
"""

STREAM = """
async for token in coordinator.generate_stream(...):
    print(token, end='', flush=True)
"""


@pytest.fixture
def two_servers() -> Iterator[tuple[str, str]]:
    """Addresses of a student's and a teacher's server."""
    student, teacher = random_tables(40)
    with FakeServer(FakeModel(student)) as theta, FakeServer(FakeModel(teacher)) as t:
        yield theta.url, t.url


def with_addresses(code: str, urls: tuple[str, str]) -> str:
    """Only the ports are others, which may be in use."""
    code = code.replace("http://localhost:9000", urls[0])
    return code.replace("http://localhost:9001", urls[1])


def test_coordinator_example_runs_as_written(
    two_servers: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: the names of modules, classes, arguments and results of the coordinator."""
    exec(with_addresses(COORDINATOR, two_servers), {"np": np})
    printed = capsys.readouterr().out
    match = re.fullmatch(r"Generated: (.+)\nAlpha: (0\.\d+|1\.000)\n", printed, re.DOTALL)
    assert match
    assert len(match[1]) >= 1


def test_presets_are_those_of_the_example() -> None:
    """Guards: a preset with other values than the document gives it."""
    namespace: dict[str, Any] = {"EnhancedCoordinatorConfig": EnhancedCoordinatorConfig}
    exec(PRESETS, namespace)
    for name in ("conservative", "balanced", "exploratory"):
        assert namespace[name] == getattr(EnhancedCoordinatorConfig, name)()
    assert namespace["conservative"] != namespace["balanced"] != namespace["exploratory"]


def test_stream_example_runs_as_written(
    two_servers: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a stream that is no async iterator of texts."""
    call = '"Q: What is AI?", max_tokens=30'
    body = textwrap.indent(STREAM.replace("(...)", f"({call})"), "        ")
    code = (
        "async def main():\n"
        "    async with EnhancedDualVLLMCoordinator(config) as coordinator:"
        f"{body}"
        "        [whole] = await coordinator.generate_batch_dual_prompts("
        "['Q: What is AI?'], max_tokens=30)\n"
        "        return whole\n"
        "whole = asyncio.run(main())"
    )
    config = EnhancedCoordinatorConfig(theta_url=two_servers[0], t_url=two_servers[1])
    namespace: dict[str, Any] = {
        "asyncio": asyncio,
        "config": config,
        "EnhancedDualVLLMCoordinator": EnhancedDualVLLMCoordinator,
    }
    exec(code, namespace)
    assert capsys.readouterr().out == namespace["whole"].generated_text != ""
