"""What q* costs in vLLM: against each model alone, with drafts, the local engine, and one engine nested in another.

    python benchmarks/vllm/compare.py                      random models: 8 layers x 512 and 2 x 256, 32k tokens
    python benchmarks/vllm/compare.py --teacher Qwen/Qwen2.5-3B-Instruct --student Qwen/Qwen2.5-1.5B-Instruct \\
        --batches 8 16 32 --new 512                         on a GPU

Every engine runs in a process of its own, one after the other. On a CPU the time is CPU time of one thread, which
others on the machine disturb little; on a GPU it is wall-clock time. Prints a table and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {
    "teacher": {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8},
    "student": {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4},
}
VOCAB, CONTEXT = 32000, 2048
ENGINES = ("teacher", "student", "lockstep", "lockstep + alpha", "drafts", "teacher + drafts", "local", "nested")


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


def vocabulary_of(arguments: argparse.Namespace) -> Any:
    """What the two models share."""
    from optimal_sampling.vocabulary import Vocabulary

    if arguments.random:
        contexts = {"student_context": CONTEXT, "teacher_context": CONTEXT}
        rows = {"student_rows": VOCAB, "teacher_rows": VOCAB}
        return Vocabulary(size=VOCAB, stop_ids=frozenset({0}), **contexts, **rows)
    return Vocabulary.load(arguments.student, arguments.teacher, False)


def prompts(arguments: argparse.Namespace, batch: int, repeat: int) -> list[list[int]]:
    """Token ids of a batch; no two repeats share a prefix."""
    return [[1 + (i * 7919 + j * 104729 + repeat * 31) % 30000 for j in range(arguments.prompt)] for i in range(batch)]


def run_vllm(arguments: argparse.Namespace, core: Any, extra: dict[str, Any] | None) -> Any:
    """(batch, repeat) -> tokens drawn, all of them whatever they are."""
    from vllm import SamplingParams

    def run(batch: int, repeat: int) -> int:
        params = SamplingParams(max_tokens=arguments.new, ignore_eos=True, detokenize=False, extra_args=extra)
        for i, ids in enumerate(prompts(arguments, batch, repeat)):
            core.add_request(f"{batch}-{repeat}-{i}", {"prompt_token_ids": ids}, params)
        count = 0
        while core.has_unfinished_requests():
            count += sum(len(done.outputs[0].token_ids) for done in core.step() if done.finished)
        return count

    return run


def plain_core(arguments: argparse.Namespace, model: str, **settings: Any) -> Any:
    """vLLM with one model, as it comes."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(model=model, skip_tokenizer_init=True, **common(arguments), **settings)
    )


def common(arguments: argparse.Namespace) -> dict[str, Any]:
    """vLLM's arguments that all engines share."""
    batch = max(arguments.batches)
    settings: dict[str, Any] = {"max_num_seqs": batch, "max_num_batched_tokens": 8192, "disable_log_stats": True}
    settings["enable_prefix_caching"] = False
    if not arguments.gpu:
        settings |= {"dtype": "float32", "enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 1 << 30}
    return settings


def open_engine(arguments: argparse.Namespace) -> Any:
    """A function (batch, repeat) -> tokens drawn, for the engine that was asked for."""
    from optimal_sampling.config import EngineConfig, MixtureConfig, ModelConfig

    models = ModelConfig(teacher=arguments.teacher, student=arguments.student)
    name, batch = arguments.one, max(arguments.batches)
    speculation = {"method": "draft_model", "model": arguments.student, "num_speculative_tokens": arguments.drafts}
    speculation["draft_sample_method"] = "probabilistic"
    if name in ("teacher", "student"):
        return run_vllm(arguments, plain_core(arguments, getattr(arguments, name)), None)
    if name == "teacher + drafts":
        from optimal_sampling.engines.vllm.cpu_fixes import apply_cpu_fixes

        apply_cpu_fixes()
        return run_vllm(arguments, plain_core(arguments, arguments.teacher, speculative_config=speculation), None)
    if name == "local":
        return run_local(arguments, models, EngineConfig(batch_size=batch, batch_invariant=False))
    if name == "nested":
        return run_nested(arguments)
    from optimal_sampling.engines.vllm.engine import VllmEngine
    from optimal_sampling.engines.vllm.options import RequestOptions

    settings = {key: value for key, value in common(arguments).items() if key != "max_num_seqs"}
    drafts = arguments.drafts if name == "drafts" else 0
    options = EngineConfig(batch_size=batch)
    engine = VllmEngine.load(models, MixtureConfig(), options, vocabulary_of(arguments), drafts, settings)
    trace = "alpha" if name == "lockstep + alpha" else "off"
    return run_vllm(arguments, engine.core, RequestOptions(trace=trace).extra_args(MixtureConfig()))


def run_local(arguments: argparse.Namespace, models: Any, options: Any) -> Any:
    """The local engine on the same work."""
    from dataclasses import replace

    from optimal_sampling.config import MixtureConfig
    from optimal_sampling.engines import open_engine as open_ours
    from optimal_sampling.types import Request

    vocabulary = replace(vocabulary_of(arguments), stop_ids=frozenset())
    engine = open_ours("local", models, MixtureConfig(), options, vocabulary)

    def run(batch: int, repeat: int) -> int:
        requests = [
            Request(f"{repeat}-{i}", 0, 0, tuple(ids), tuple(ids), arguments.new)
            for i, ids in enumerate(prompts(arguments, batch, repeat))
        ]
        return sum(len(done.token_ids) for done in engine.generate(requests))

    return run


def run_nested(arguments: argparse.Namespace) -> Any:
    """The predecessor's design: at every token, the teacher's engine asks a second engine for the whole row."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    import torch

    from vllm import SamplingParams

    inner = plain_core(arguments, arguments.student, max_logprobs=-1)
    outer = plain_core(arguments, arguments.teacher)
    asked = SamplingParams(max_tokens=1, logprobs=-1, detokenize=False)
    calls = iter(range(10**9))

    def ask(texts: list[list[int]]) -> Any:
        names = [str(next(calls)) for _ in texts]
        for name, ids in zip(names, texts, strict=True):
            inner.add_request(name, {"prompt_token_ids": ids}, asked)
        rows = {}
        while inner.has_unfinished_requests():
            for done in inner.step():
                row = done.outputs[0].logprobs[0]
                rows[done.request_id] = [row[i].logprob for i in range(VOCAB)]
        return torch.tensor([rows[name] for name in names])

    runner = outer.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    sample = runner._sample

    def mixed(logits: Any, metadata: Any) -> Any:
        texts = [
            [*runner.requests[i].prompt_token_ids, *runner.requests[i].output_token_ids]
            for i in runner.input_batch.req_ids
        ]
        return sample(0.5 * logits.log_softmax(-1) + 0.5 * ask(texts), metadata)

    runner._sample = mixed
    return run_vllm(arguments, outer, None)


def measure(arguments: argparse.Namespace) -> None:
    """One engine in this process: milliseconds per step of each batch size, on the last line."""
    run = open_engine(arguments)
    clock = time.perf_counter if arguments.gpu else time.process_time
    results = {}
    for batch in arguments.batches:
        run(batch, 1000)  # what is compiled at the first call
        times = []
        for repeat in range(arguments.repeats):
            started = clock()
            count = run(batch, repeat)
            times.append((clock() - started) / count * batch)
        results[batch] = 1000 * min(times)
    print("RESULT " + json.dumps(results))


def run_all(arguments: argparse.Namespace, paths: dict[str, str]) -> dict[str, dict[int, float]]:
    """Every engine in a process of its own: milliseconds by name and batch size."""
    table: dict[str, dict[int, float]] = {}
    environment = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    for name in arguments.engines:
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            "--teacher",
            paths["teacher"],
            "--student",
            paths["student"],
        ]
        for option in ("prompt", "new", "repeats", "drafts"):
            command += [f"--{option}", str(getattr(arguments, option))]
        if name == "nested":
            command += ["--new", "8", "--repeats", "1"]
        command += ["--batches", *map(str, arguments.batches)] + ["--random"] * arguments.random
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            print(f"{name} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            continue
        table[name] = {int(batch): value for batch, value in json.loads(lines[0][7:]).items()}
        print(
            f"{name:18}" + "".join(f"{table[name].get(batch, float('nan')):11.2f}" for batch in arguments.batches),
            flush=True,
        )
    return table


def ratios(table: dict[str, dict[int, float]], batches: list[int]) -> dict[str, dict[int, float]]:
    """Throughput relative to the ideal of lockstep (the sum of both models alone), and to the teacher alone."""
    result: dict[str, dict[int, float]] = {}
    for name in table:
        for batch in batches:
            if batch not in table[name] or batch not in table.get("teacher", {}):
                continue
            result.setdefault(f"{name} / teacher", {})[batch] = table["teacher"][batch] / table[name][batch]
            if batch in table.get("student", {}):
                ideal = table["teacher"][batch] + table["student"][batch]
                result.setdefault(f"{name} / ideal", {})[batch] = ideal / table[name][batch]
    return result


def main() -> None:
    """Read the command line; measure one engine, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="default: a random model")
    parser.add_argument("--student", help="default: a random model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens drawn per sequence")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many is reported")
    parser.add_argument("--drafts", type=int, default=5, help="draft tokens")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--one", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--random", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    arguments.gpu = torch.cuda.is_available()
    if arguments.one:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.random = arguments.teacher is None
        paths = make_models(Path(folder)) if arguments.random else vars(arguments)
        device = torch.cuda.get_device_name() if arguments.gpu else f"{platform.machine()} CPU, 1 thread"
        kind = "wall-clock" if arguments.gpu else "CPU"
        print(f"{device}; prompt {arguments.prompt}, {arguments.new} new tokens, {arguments.drafts} drafts")
        print(f"{kind} ms per token of each sequence, best of {arguments.repeats}")
        print(f"{'batch':18}" + "".join(f"{batch:11}" for batch in arguments.batches))
        table = run_all(arguments, paths)
    relative = ratios(table, arguments.batches)
    for name, values in relative.items():
        print(f"{name:28}" + "".join(f"{batch:>6}: {value:.2f}" for batch, value in values.items()))
    setting = {"device": device, "prompt": arguments.prompt, "new": arguments.new, "drafts": arguments.drafts}
    print(json.dumps({**setting, "ms": table, "ratios": relative}))


if __name__ == "__main__":
    main()
