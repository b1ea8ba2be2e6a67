"""Models that differ in more than size: each has its own window, head and quantisation."""

import contextlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimal_sampling.config import MixtureConfig
from tests.engines.vllm.quantised import quantise
from tests.engines.vllm.rows import LIMIT, assert_rows, expected_rows, full_rows
from tests.engines.vllm.tiny import VOCAB, Pair, tiny_model

MIXTURE = MixtureConfig(alpha_min=0.0)
LENGTHS = [(60, 60), (60, 10), (10, 60), (5, 5)]
"""Tokens of (teacher's, student's) prompt: some longer than every window."""

MODELS = {
    "llama": {"seed": 4, "kind": "Llama"},
    "window": {"seed": 31, "kind": "Mistral", "sliding_window": 16},
    "mixed": {"seed": 32, "kind": "Gemma2", "sliding_window": 24, "query_pre_attn_scalar": 32},
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
        for teacher_length, student_length in lengths:
            teacher_ids = some_ids(teacher_length, 1)
            same = teacher_length == student_length
            student_ids = teacher_ids if same else some_ids(student_length, 2)
            tokens, rows = full_rows(engine, MIXTURE, student_ids, teacher_ids, new=6)
            expected = expected_rows(pair, MIXTURE, student_ids, teacher_ids, tokens)
            assert_rows(rows, expected, limit)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("window", "llama"), ("llama", "window"), ("mixed", "window")],
)
def test_each_model_has_its_own_window(saved, teacher, student):
    """Guards: the teacher's window in the student's layers; blocks freed that one model needs."""
    assert_exact(Pair(saved[student], saved[teacher]))


@pytest.mark.parametrize("teacher", ["llama", "own_head"])
def test_a_head_that_the_config_calls_tied(saved, teacher):
    """Guards: the embedding as a student's head, beside another model and beside itself."""
    assert_exact(Pair(saved["own_head"], saved[teacher]), lengths=[(10, 10), (10, 5)])


@pytest.mark.parametrize(
    ("role", "bits"), [("teacher", 8), ("student", 8), ("both", 8), ("teacher", 4)]
)
def test_a_quantised_model(saved, tmp_path, role, bits):
    """Guards: names of full layers that match nothing below `teacher.`; one role's scheme in the
    other; weights repacked twice."""
    folder = str(tmp_path / "quantised")
    logits = quantise(saved["llama"], folder, bits, FULL_NAMES)
    other = saved["window"]
    if role == "both":
        pair = Reference(folder, folder, {"student": logits, "teacher": logits})
    elif role == "teacher":
        pair = Reference(other, folder, {"teacher": logits})
    else:
        pair = Reference(folder, other, {"student": logits})
    # vLLM's kernel for 4 bits on a CPU takes bfloat16 alone.
    settings, limit = ({}, 1e-4) if bits == 8 else ({"dtype": "bfloat16"}, 0.3)
    assert_exact(pair, limit, [(40, 40), (10, 5)], **settings)


def test_saved_as_expected(saved):
    """Guards: tests of tied heads and windows on models that have none."""
    assert "lm_head.weight" in load_file(Path(saved["own_head"]) / "model.safetensors")
    assert "lm_head.weight" not in load_file(Path(saved["tied"]) / "model.safetensors")
