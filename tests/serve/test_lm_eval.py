"""lm-evaluation-harness against the server, by the command line in docs/vllm.md."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.toy_pair.problems import make_problem
from optimal_sampling.vocabulary import resolve_model
from tests.serve.serving import KEY, expected

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)

PROBLEMS = [make_problem(11, i, steps=1) for i in range(6)]
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/problems.jsonl}}}}
test_split: test
doc_to_text: "{{{{problem}}}}"
target_delimiter: ""
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: right
metric_list: [{metric: acc}]
"""
GENERATE = """
output_type: generate_until
doc_to_target: solution
generation_kwargs: {until: ["}"], max_gen_toks: 40, temperature: 0}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def samples(server, tmp_path_factory):
    """What lm-eval wrote down of every document, by task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    rows = []
    for number, problem in enumerate(PROBLEMS):
        choices = [problem.solution, problem.solution.replace(problem.answer, "1000")]
        rows.append(
            {
                "problem": problem.text,
                "solution": problem.solution,
                "choices": choices,
                "number": number,
            }
        )
        rows[-1]["right"] = 0
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in (("toy_choice", CHOICE), ("toy_generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, folder=folder) + rest)
    model = {"model": "toy-teacher", "base_url": f"{server[0]}/v1/completions", "num_concurrent": 4}
    model |= {"tokenizer_backend": "huggingface", "tokenizer": resolve_model("toy-teacher")}
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "local-completions",
        "--include_path",
        str(folder),
    ]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in model.items())]
    command += [
        "--tasks",
        "toy_choice,toy_generate",
        "--log_samples",
        "--output_path",
        str(folder / "out"),
    ]
    environment = {
        **os.environ,
        "OPENAI_API_KEY": KEY,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for path in (folder / "out").rglob("samples_*.jsonl"):
        name = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        found[name] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def test_log_likelihoods_are_those_of_q(samples, vocabulary):
    """Guards: likelihoods of one of the models, of a shifted token, or at another temperature."""
    assert len(samples["toy_choice"]) == len(PROBLEMS)
    encode = vocabulary.teacher_tokenizer
    for sample in samples["toy_choice"]:
        context = encode(sample["doc"]["problem"])["input_ids"]
        for choice, [[given, greedy]] in zip(
            sample["doc"]["choices"], sample["resps"], strict=True
        ):
            ids = encode(sample["doc"]["problem"] + choice)["input_ids"]
            assert ids[: len(context)] == context
            wanted, likeliest = 0.0, True
            for place in range(len(context), len(ids)):
                row = expected(
                    vocabulary, ids[:place], ids[:place], MixtureConfig(alpha_min=0.0), place
                )
                wanted += row[ids[place]]
                likeliest &= bool(row.argmax() == ids[place])
            assert float(given) == pytest.approx(wanted, rel=1e-4, abs=1e-3)
            assert str(greedy) == str(likeliest)


def test_generations_are_those_of_the_server(samples, client):
    """Guards: stop strings, lengths or temperatures lost between the harness and the server."""
    assert len(samples["toy_generate"]) == len(PROBLEMS)
    for sample in samples["toy_generate"]:
        asked = {
            "model": "toy-teacher",
            "prompt": sample["doc"]["problem"],
            "max_tokens": 40,
            "temperature": 0,
        }
        [[given]] = sample["resps"]
        assert given == client.completions.create(stop="}", **asked).choices[0].text
        assert given
