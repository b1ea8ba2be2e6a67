"""Models that differ in more than size: each has its own window, head and quantisation."""

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimal_sampling.config import MixtureConfig
from optimal_sampling.errors import ConfigError, ModelError
from optimal_sampling.types import Request
from tests.engines.vllm.quantised import quantise
from tests.engines.vllm.rows import LIMIT, assert_rows, expected_rows, full_rows
from tests.engines.vllm.tiny import VOCAB, Pair, log_softmax, tiny_model

MIXTURE = MixtureConfig(alpha_min=0.0)
LENGTHS = [(60, 60), (60, 10), (10, 60), (5, 5)]
"""Tokens of (teacher's, student's) prompt: some longer than every window."""

MODELS = {
    "llama": {"seed": 4, "kind": "Llama"},
    "window": {"seed": 31, "kind": "Mistral", "sliding_window": 16},
    "mixed": {"seed": 32, "kind": "Gemma2", "sliding_window": 24, "query_pre_attn_scalar": 32},
    "windowless": {
        "seed": 34,
        "kind": "Qwen3",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "tied": {"seed": 33, "kind": "Qwen3", "layers": 1, "tie_word_embeddings": True},
}
FULL_NAMES = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]


class Reference(Pair):
    """A pair of which some models have a reference other than Transformers on their folder."""

    def __init__(self, student, teacher, own):
        super().__init__(student, teacher)
        self.own = own

    def logits(self, role, ids):
        if role in self.own:
            return self.own[role](ids)[: self.size]
        return super().logits(role, ids)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of each of MODELS, and of `own_head`: it says tied, and has a head of its own."""
    root = tmp_path_factory.mktemp("roles")
    for name, options in MODELS.items():
        tiny_model(**options).save_pretrained(root / name)
    tiny_model(**MODELS["tied"]).save_pretrained(root / "own_head")
    file = root / "own_head" / "model.safetensors"
    weights = load_file(file)
    generator = torch.Generator().manual_seed(5)
    weights["lm_head.weight"] = torch.randn(VOCAB, 64, generator=generator) * 0.25
    save_file(weights, file, metadata={"format": "pt"})
    return {name: str(root / name) for name in [*MODELS, "own_head"]}


def some_ids(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (count,), generator=generator).tolist()


def assert_exact(pair, limit=LIMIT, lengths=LENGTHS, **options):
    with contextlib.closing(pair.open(batch_size=8, max_logprobs=-1, **options)) as engine:
        assert_compared(pair, engine)
        for teacher_length, student_length in lengths:
            teacher_ids = some_ids(teacher_length, 1)
            same = teacher_length == student_length
            student_ids = teacher_ids if same else some_ids(student_length, 2)
            tokens, rows = full_rows(engine, MIXTURE, student_ids, teacher_ids, new=6)
            expected = expected_rows(pair, MIXTURE, student_ids, teacher_ids, tokens)
            assert_rows(rows, expected, limit)


def assert_compared(pair, engine):
    """The engine has compared with Transformers all but weights quantised by GPTQ."""
    notes = engine.notes()
    for role in ("teacher", "student"):
        if role == "teacher" or pair.student != pair.teacher:
            config = Path(getattr(pair, role)) / "config.json"
            wanted = "quantised (auto_gptq)" if '"gptq"' in config.read_text() else "nats on"
            assert wanted in notes[f"check_{role}"]


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("window", "llama"), ("llama", "window"), ("mixed", "window")],
)
def test_each_model_has_its_own_window(saved, teacher, student):
    """Guards: the teacher's window in the student's layers; blocks freed that one model needs."""
    assert_exact(Pair(saved[student], saved[teacher]))


def test_drafts_beside_windows(saved):
    """Guards: a draft model's layers in another kind of block than those of the pair."""
    assert_exact(Pair(saved["window"], saved["mixed"]), draft_tokens=2)


@pytest.mark.parametrize("teacher", ["llama", "own_head"])
def test_a_head_that_the_config_calls_tied(saved, teacher):
    """Guards: the embedding as a student's head, beside another model and beside itself."""
    assert_exact(Pair(saved["own_head"], saved[teacher]), lengths=[(10, 10), (10, 5)])


@pytest.mark.parametrize(
    ("role", "scheme"),
    [
        ("teacher", "int8"),
        ("student", "int8"),
        ("both", "int8"),
        ("teacher", "int4"),
        ("teacher", "gptq"),
    ],
)
def test_a_quantised_model(saved, tmp_path, role, scheme):
    """Guards: names of full layers that match nothing below `teacher.`; one role's scheme in the
    other; weights repacked twice."""
    folder = str(tmp_path / "quantised")
    logits = quantise(saved["llama"], folder, scheme, FULL_NAMES)
    other = saved["window"]
    if role == "both":
        pair = Reference(folder, folder, {"student": logits, "teacher": logits})
    elif role == "teacher":
        pair = Reference(other, folder, {"teacher": logits})
    else:
        pair = Reference(folder, other, {"student": logits})
    # vLLM's kernel for 4 bits on a CPU takes bfloat16 alone.
    settings, limit = ({}, 1e-4) if scheme == "int8" else ({"dtype": "bfloat16"}, 0.3)
    assert_exact(pair, limit, [(40, 40), (10, 5)], **settings)


def test_windows_that_vllm_does_not_implement_are_refused(saved):
    """Guards: full attention in layers to which a config gives a window."""
    with pytest.raises(ConfigError, match="the student's config says 'sliding_attention' of layer"):
        Pair(saved["windowless"], saved["llama"]).open()


@pytest.mark.parametrize("change", ["missing", "unused"])
def test_weights_that_do_not_fit(saved, tmp_path, change):
    """Guards: uninitialised memory for a weight; a weight that vLLM skips without a word."""
    folder = tmp_path / "model"
    shutil.copytree(saved["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    key = "model.layers.1.self_attn.k_proj.weight"
    if change == "missing":
        del weights[key]
        named = "student.model.layers.1.self_attn.qkv_proj.weight"
    else:
        named = "student.model.layers.1.self_attn.k_proj.bias"
        weights["model.layers.1.self_attn.k_proj.bias"] = torch.ones(64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=named):
        Pair(str(folder), saved["llama"]).open()


def test_the_student_alone(saved):
    """Guards: the mixture, the teacher or the teacher's prompt in a baseline of the student."""
    pair = Pair(saved["window"], saved["mixed"])
    ids = tuple(some_ids(40, 1))
    request = Request("x", 0, 7, ids, (3,), 8)
    with contextlib.closing(pair.open(mode="student")) as engine:
        shared = engine.core.collective_rpc(_is_shared)
        (done,) = engine.generate([request])
    assert shared == [True]
    assert set(done.trace["alpha"]) == {0.0}
    for place, (token, found) in enumerate(zip(done.token_ids, done.trace["log_q"], strict=True)):
        wanted = log_softmax(pair.logits("student", [*ids, *done.token_ids[:place]]))
        assert found == pytest.approx(wanted[token], abs=LIMIT)


def _is_shared(worker):
    return worker.model_runner.get_model().settings.shared


def test_saved_as_expected(saved):
    """Guards: tests of tied heads and windows on models that have none."""
    assert "lm_head.weight" in load_file(Path(saved["own_head"]) / "model.safetensors")
    assert "lm_head.weight" not in load_file(Path(saved["tied"]) / "model.safetensors")
