import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimal_sampling import toy_pair
from optimal_sampling.toy_pair import problems

PAIR = ("toy-teacher", "toy-student")
SIZES = {
    "toy-teacher": (272, 3.0e6),
    "toy-student": (264, 0.3e6),
    "toy-number-student": (1264, 0.37e6),
}


def load(name: str):
    return AutoModelForCausalLM.from_pretrained(toy_pair.path(name), dtype=torch.float32).eval()


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(KeyError, match=r"toy-oracle.*toy-teacher, toy-student"):
        toy_pair.path("toy-oracle")


def test_finding_the_models_loads_no_torch():
    """Guards: seconds of imports in every command that only looks for a folder."""
    code = """
import sys
from optimal_sampling import toy_pair
toy_pair.path("toy-student")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_fit_the_package():
    sizes = {
        name: sum(file.stat().st_size for file in toy_pair.path(name).iterdir())
        for name in toy_pair.NAMES
    }
    assert sum(sizes.values()) < 12e6
    assert sizes["toy-number-student"] < 2e6


def test_the_number_student_has_numbers_as_tokens():
    """Guards: a second student with the tokenizer of the first, and so no pair with two."""
    tokenizer = AutoTokenizer.from_pretrained(toy_pair.path("toy-number-student"))
    assert tokenizer.tokenize("47*188=(5)") == ["47", "*", "188", "=(", "5", ")"]
    assert tokenizer.decode(tokenizer("47*188=(5)\n\u00e9")["input_ids"]) == "47*188=(5)\n\u00e9"


@pytest.mark.parametrize("name", SIZES)
def test_a_model_is_what_it_says(name: str):
    rows, parameters = SIZES[name]
    model, tokenizer = load(name), AutoTokenizer.from_pretrained(toy_pair.path(name))
    assert model.config.model_type == "qwen3"
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.2)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, rows)
    assert (
        model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    )
    assert (
        model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    )


def test_the_teacher_has_surplus_rows_and_never_uses_them():
    """So that every run meets a vocabulary padded beyond the tokenizer, as many real models have
    it.
    """
    model, tokenizer = (
        load("toy-teacher"),
        AutoTokenizer.from_pretrained(toy_pair.path("toy-teacher")),
    )
    assert model.config.vocab_size > len(tokenizer)
    ids = torch.tensor([tokenizer.encode("<|user|>47*3=?<|end|><|assistant|>47*3=141")])
    p = model(ids).logits.softmax(-1)[0, -8:, len(tokenizer) :]
    assert p.sum(-1).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("toy-teacher", 0.85, 1.0), ("toy-student", 0.15, 0.55), ("toy-number-student", 0.02, 0.25)],
)
def test_accuracy_at_temperature_1(name: str, low: float, high: float):
    torch.manual_seed(0)
    model, tokenizer = (
        load(name),
        AutoTokenizer.from_pretrained(toy_pair.path(name), padding_side="left"),
    )
    questions = [problems.make_problem(77, i) for i in range(200)]
    chats = [[{"role": "user", "content": problem.text}] for problem in questions]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompts, max_new_tokens=200, do_sample=True, temperature=1.0, top_k=0)
    texts = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :])
    right = sum(problems.is_correct(t, p.answer) for t, p in zip(texts, questions, strict=True))
    assert low < right / len(questions) < high


def test_the_report_is_about_these_files():
    report = json.loads((toy_pair.path("toy-teacher").parent / "report.json").read_text())
    for name in PAIR:
        model = load(name)
        assert report[toy_pair.NAMES[name]]["parameters"] == sum(
            p.numel() for p in model.parameters()
        )
