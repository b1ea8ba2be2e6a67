"""lm-eval on our engines: the same completions as our own pipeline, and where the grades differ."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from optimal_sampling import generate, load
from optimal_sampling.config import ModelConfig, PromptConfig
from optimal_sampling.errors import ConfigError
from optimal_sampling.evaluate.benchmarks import BENCHMARKS, prepare
from optimal_sampling.evaluate.job import run_config
from optimal_sampling.evaluate.lm_eval_bridge import TASKS, EngineLM
from optimal_sampling.evaluate.options import EvaluateConfig
from optimal_sampling.records import load as load_records
from optimal_sampling.toy_pair.problems import make_problem
from optimal_sampling.verify import Task, grade, resolve_grader
from optimal_sampling.verify.graders import load_grader
from optimal_sampling.vocabulary import resolve_model

MODEL = "toy-student"
MOST_TOKENS = 80
PROBLEMS = [make_problem(23, index, steps=1 + index % 2) for index in range(12)]
GSM8K = [
    {
        "question": each.text,
        "answer": f"It is <<{each.expression}={each.answer}>>.\n#### {int(each.answer):,}",
    }
    for each in PROBLEMS
]
MATH500 = [
    {
        "problem": each.text,
        "solution": each.solution,
        "answer": each.answer,
        "subject": "Algebra",
        "level": 1,
        "unique_id": f"test/algebra/{number}.json",
    }
    for number, each in enumerate(PROBLEMS)
]


@pytest.fixture(scope="module")
def engine():
    with load(ModelConfig(student=MODEL, teacher=MODEL, device="cpu"), mode="student") as engine:
        yield engine


def ours(folder, name, **options):
    """Completion and verdict by question, from `generate` and our grader."""
    config = EvaluateConfig(
        extra_models=(MODEL,),
        temperature=0,
        max_new_tokens=MOST_TOKENS,
        output_dir=str(folder),
        device="cpu",
        **options,
    )
    benchmark = BENCHMARKS[name]
    run = run_config(config, MODEL, prepare(benchmark, config), folder / "run")
    generate(run)
    grader = load_grader(resolve_grader(benchmark.grader))
    found = {}
    for record in load_records(run.run.output_dir):
        row, text = record["row"], record["completion"]
        task = Task(text, row["answer"], record["finish_reason"])
        found[row["problem"]] = text, grade(task, grader).verdict
    return found


def theirs(model, task, include_path, limit=None):
    """Completion and exact match by question, from lm-eval."""
    results = simple_evaluate(
        model,
        tasks=[task],
        task_manager=TaskManager(include_path=include_path, include_defaults=False),
        apply_chat_template=True,
        limit=limit,
        gen_kwargs={"max_gen_toks": MOST_TOKENS},
        bootstrap_iters=0,
    )
    samples = results["samples"][task]
    accuracy = results["results"][task]["exact_match,none"]
    assert accuracy == sum(each["exact_match"] for each in samples) / len(samples)
    return {each["doc"]["problem"]: (each["resps"][0][0], each["exact_match"]) for each in samples}


def assert_same(theirs, ours):
    """The same greedy texts, and the same verdicts but for completions that ended by length."""
    differing = []
    for problem, (text, exact_match) in theirs.items():
        own_text, verdict = ours[problem]
        assert text == own_text
        if (verdict == "correct") != exact_match:
            differing.append(verdict)
    assert set(differing) <= {"truncated"}
    right = sum(exact_match for _, exact_match in theirs.values())
    assert 0 < right < len(theirs)


def test_both_harnesses_agree_on_synthetic(engine, tmp_path):
    """Guards: another prompt, other tokens or another answer key in one of the harnesses."""
    found = theirs(EngineLM(engine), "optimal_sampling_synthetic", TASKS, limit=40)
    own = ours(tmp_path, "synthetic", num_examples=40)
    assert found.keys() == own.keys()
    assert_same(found, own)


def test_lm_eval_alone_gives_the_same_texts(engine):
    """Guards: a score that nobody else can reproduce: here Transformers generates, not we."""
    model = HFLM(resolve_model(MODEL), device="cpu", dtype="float32", batch_size=8)
    alone = theirs(model, "optimal_sampling_synthetic", TASKS, limit=16)
    assert alone == theirs(EngineLM(engine), "optimal_sampling_synthetic", TASKS, limit=16)


@pytest.mark.parametrize(("name", "rows"), [("gsm8k", GSM8K), ("math500", MATH500)])
def test_both_harnesses_agree_on_local_rows(engine, tmp_path, name, rows):
    """Guards: a column or an answer format of a benchmark that only one harness understands."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "include": f"{TASKS}/optimal_sampling_{name}.yaml",
        "task": "local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{problem}}",  # the shipped student knows nothing but arithmetic
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(yaml.safe_dump(task))
    found = theirs(EngineLM(engine), "local", str(tmp_path / "tasks"))
    options = {"benchmark_file": (f"{name}={file}",), "allow_other_questions": True}
    own = ours(tmp_path, name, template="{problem}", benchmarks=(name,), **options)
    assert found.keys() == own.keys()
    assert_same(found, own)


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=BENCHMARKS)
def test_a_task_asks_as_the_benchmark_does(benchmark):
    """Guards: a task with another source, split or prompt than `evaluate` uses."""
    path = f"{TASKS}/optimal_sampling_{benchmark.name}.yaml"
    task = load_yaml(path, resolve_func=False)
    assert task["task"] == f"optimal_sampling_{benchmark.name}"
    assert task["doc_to_text"] == benchmark.template.replace("{problem}", "{{problem}}")
    if benchmark.hub:
        source = task["dataset_path"], task["test_split"], task.get("dataset_name")
        assert source == (benchmark.hub, benchmark.split, benchmark.subset)
    assert Path(path).exists()


# A completion and its reference; then what our grader, lm-eval's exact match and math-verify say.
DIFFERENCES = {
    "all agree": (r"So it is \boxed{141}.", "141", ("correct", 1, 1)),
    "all agree that it is wrong": (r"So it is \boxed{140}.", "141", ("wrong", 0, 0)),
    "another form of the same fraction": (r"\boxed{1/2}", r"\frac{1}{2}", ("correct", 1, 1)),
    # exact match normalises text and does no algebra
    "terms in another order": (r"\boxed{2+x}", "x+2", ("correct", 0, 1)),
    "a separator of thousands": (r"\boxed{1,234}", "1234", ("correct", 0, 1)),
    # exact match reads boxes only; our grader also what is called the answer
    "stated without a box": ("The answer is 141.", "141", ("correct", 0, 1)),
    # math-verify takes the last number of any text
    "a number alone": ("We have 140+1=141", "141", ("no_answer", 0, 1)),
    # our grader and exact match take the last box, math-verify takes both for one answer
    "two boxes": (r"\boxed{7}, no: \boxed{8}", "8", ("correct", 1, 0)),
    # only our grader knows that the text ends within the reasoning
    "a box in unfinished reasoning": (r"<think>Maybe \boxed{3}", "3", ("no_answer", 1, 1)),
    "a box that is not closed": (r"It is \boxed{3", "3", ("no_answer", 0, 0)),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_where_the_grades_differ(case):
    """Guards: a difference between the harnesses that docs/statistics.md does not list."""
    completion, reference, (verdict, exact_match, math_verify) = DIFFERENCES[case]
    task = load_yaml(f"{TASKS}/optimal_sampling_math500.yaml")
    found = task["process_results"]({"answer": reference}, [completion])
    assert found == {"exact_match": exact_match, "math_verify": math_verify}
    grader = load_grader(resolve_grader("math"))
    assert grade(Task(completion, reference), grader).verdict == verdict
    cut = grade(Task(completion, reference, "length"), grader)
    assert cut.verdict == "truncated"  # lm-eval does not know why a completion ended


def instances(*contexts, **options):
    """Requests as lm-eval makes them."""
    return [
        Instance("generate_until", {}, (context, dict(options)), number, ("a task", number, 1))
        for number, context in enumerate(contexts)
    ]


def turn(text):
    return [{"role": "user", "content": text}]


def test_sampled_repeats_are_different_samples(engine):
    """Guards: equal completions for `repeats: 4`, or other ones in the next call."""
    model = EngineLM(engine, seed=3)
    prompt = model.apply_chat_template(turn("87*9-14=?"))
    requests = instances(*[prompt] * 6, do_sample=True, temperature=1.5, max_gen_toks=40)
    first = model.generate_until(requests)
    assert len(set(first)) > 1
    assert model.generate_until(requests) == first
    assert EngineLM(engine, seed=4).generate_until(requests) != first


def test_greedy_is_the_default_and_settings_do_not_mix(engine):
    """Guards: a request that is drawn with the options of its neighbour; results out of order."""
    model = EngineLM(engine, max_new_tokens=40)
    prompts = [model.apply_chat_template(turn(each.text)) for each in PROBLEMS[:4]]
    greedy = model.generate_until(instances(*prompts))
    assert greedy == model.generate_until(instances(*prompts, do_sample=False, temperature=2.0))
    assert greedy == model.generate_until(instances(*prompts, temperature=0.0))
    short = instances(*prompts, max_gen_toks=3)
    mixed = [each for pair in zip(instances(*prompts), short, strict=True) for each in pair]
    texts = model.generate_until(mixed)
    assert texts[::2] == greedy
    assert all(text.startswith(cut) for text, cut in zip(greedy, texts[1::2], strict=True))
    assert all(len(cut) < len(text) for text, cut in zip(greedy, texts[1::2], strict=True))


def test_a_completion_is_cut_at_the_first_of_the_texts(engine):
    """Guards: `until` that is ignored, or cut after the text instead of before."""
    model = EngineLM(engine, max_new_tokens=40)
    prompt = model.apply_chat_template(turn("55*8=?"))
    (whole,) = model.generate_until(instances(prompt))
    (cut,) = model.generate_until(instances(prompt, until=["nowhere", r"\boxed", "."]))
    assert r"\boxed" in whole
    assert cut == whole.partition(".")[0] != whole


def test_a_prompt_of_the_template_has_the_ids_that_generate_gives_it(engine):
    """Guards: a second BOS, or control tokens that are encoded as text."""
    model = EngineLM(engine, PromptConfig(student_system_prompt="Be short."))
    text = model.apply_chat_template(turn("1+1=?"))
    assert "Be short." in text
    (request, error), *_ = model._jobs([text], 5)
    tokenizer = engine.vocabulary.student_tokenizer
    assert not error
    assert tokenizer.decode(request.student_prompt_ids) == text
    assert request.student_prompt_ids[0] == tokenizer(text)["input_ids"][0]
    (plain, _), *_ = model._jobs(["1+1=?"], 5)
    assert list(plain.student_prompt_ids) == tokenizer("1+1=?")["input_ids"]


def test_a_prompt_that_fails_is_an_empty_completion_with_a_warning(engine):
    """Guards: one long prompt that ends an evaluation of hours, or is cut in silence."""
    model = EngineLM(engine, max_new_tokens=5)
    requests = instances("1+1=?", "1" * 5000, " ")
    with pytest.warns(UserWarning, match="2 of 3 prompts failed.*context"):
        texts = model.generate_until(requests)
    assert texts[0]
    assert texts[1:] == ["", ""]


def test_what_an_engine_cannot_do_is_refused(engine):
    """Guards: an option that is ignored in silence, zeros for likelihoods."""
    model = EngineLM(engine)
    with pytest.raises(ConfigError, match=r"'top_pp'; did you mean 'top_p'"):
        model.generate_until(instances("1+1=?", top_pp=0.9))
    with pytest.raises(ConfigError, match="task a task asks for the likelihood"):
        model.loglikelihood(instances("1+1=?"))
    with pytest.raises(ConfigError, match="gen_prefix"):
        model.apply_chat_template(turn("1+1=?"), add_generation_prompt=False)


def test_without_lm_eval_the_message_says_what_to_install():
    """Guards: a traceback that ends in `No module named lm_eval`."""
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from optimal_sampling.errors import MissingDependencyError\n"
        "try:\n    import optimal_sampling.evaluate.lm_eval_bridge\n"
        "except MissingDependencyError as error:\n    print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install '.[eval]'" in shown.stdout
