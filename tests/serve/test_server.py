"""The server with the official client: answers, streams, refusals, and clients that go away."""

import asyncio
import time
import urllib.request
from dataclasses import replace

import numpy as np
import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.naive import naive_step
from optimal_sampling.vocabulary import resolve_model
from tests.engines.vllm.tiny import reference
from tests.serve.serving import KEY, expected


def assert_logprobs(vocabulary, choice, teacher_prompt, student_prompt, mixture):
    """Every log-probability that was reported is that of the reference."""
    teacher_ids = vocabulary.teacher_tokenizer(teacher_prompt)["input_ids"]
    student_ids = vocabulary.student_tokenizer(student_prompt)["input_ids"]
    text = []
    for place, top in enumerate(choice.logprobs.top_logprobs):
        row = expected(vocabulary, [*teacher_ids, *text], [*student_ids, *text], mixture, place)
        for name, value in top.items():
            # Where both models are sure, alpha is solved to no more digits than matter.
            assert np.exp(value) == pytest.approx(
                np.exp(row[int(name.removeprefix("token_id:"))]), abs=1e-5
            )
        text.append(int(choice.logprobs.tokens[place].removeprefix("token_id:")))


FREE = MixtureConfig(alpha_min=0.0)
LONG = "Say what this is and explain every step of it: 12*3+4=?"


@pytest.mark.parametrize(
    ("fields", "mixture"),
    [
        ({}, FREE),
        ({"student_prompt": "12*3+4=?"}, FREE),
        ({"student_prompt": LONG}, FREE),
        (
            {"alpha_method": "fixed", "fixed_alpha": 0.9},
            replace(FREE, alpha_method="fixed", fixed_alpha=0.9),
        ),
        (
            {"force_first_token": True, "alpha_max": 0.4},
            replace(FREE, force_first_token=True, alpha_max=0.4),
        ),
        (
            {"alpha_method": "veto", "veto_min_p": 0.3, "student_prompt": "12*3+4=?"},
            MixtureConfig(alpha_method="veto", veto_min_p=0.3),
        ),
        (
            {"alpha_method": "interleaved", "interleaved_min_p": 0.2},
            MixtureConfig(alpha_method="interleaved", interleaved_min_p=0.2),
        ),
        (
            {"alpha_method": "arithmetic", "arithmetic_weight": 0.8, "student_prompt": LONG},
            MixtureConfig(alpha_method="arithmetic", arithmetic_weight=0.8),
        ),
        ({"teacher_support_min_p": 0.1}, replace(FREE, teacher_support_min_p=0.1)),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_completions_are_drawn_from_q(client, vocabulary, fields, mixture, temperature):
    """Guards: fields that are lost between the client and the worker."""
    prompt = "12*3+4=? (the answer is 40)"
    done = client.completions.create(
        model="toy-teacher",
        prompt=prompt,
        max_tokens=6,
        temperature=temperature,
        logprobs=5,
        extra_body={"return_tokens_as_token_ids": True, **fields},
    )
    mixture = replace(mixture, temperature=temperature)
    assert_logprobs(
        vocabulary, done.choices[0], prompt, fields.get("student_prompt", prompt), mixture
    )


def test_streams_say_what_whole_answers_say(client):
    """Guards: a stream that ends early or doubles a token."""
    ask = {"model": "toy-teacher", "prompt": "7*8-50=?", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**ask).choices[0]
    parts = list(client.completions.create(**ask, stream=True))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.text
    assert parts[-1].choices[0].finish_reason == whole.finish_reason == "stop"


def test_drafts_for_a_client_that_is_alone(client, server):
    """Guards: `auto` that drafts in steps of many requests, where that is slower, or never."""
    asked = {"model": "toy-teacher", "prompt": "7*8-50=?", "max_tokens": 60}
    extra = {"ignore_eos": True}
    drafted = []
    for n in (1, 12):
        before = gauge(server[0], "vllm:spec_decode_num_draft_tokens_total")
        client.completions.create(**asked, n=n, extra_body=extra)
        drafted.append(gauge(server[0], "vllm:spec_decode_num_draft_tokens_total") - before)
    alone, together = drafted
    assert alone >= 30
    assert together < 12 * 60 / 10


def test_chat_with_messages_of_its_own_for_the_student(client):
    """Guards: the chat route without our fields."""
    done = client.chat.completions.create(
        model="toy-teacher",
        messages=[{"role": "user", "content": "12*3+4=? Hint: 40."}],
        max_tokens=48,
        n=3,
        extra_body={
            "student_messages": [{"role": "user", "content": "12*3+4=?"}],
            "alpha_min": 0.3,
        },
    )
    assert len(done.choices) == 3
    assert all(choice.message.content for choice in done.choices)


@pytest.mark.parametrize(
    "options",
    [
        {"continue_final_message": True, "add_generation_prompt": False},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {},
    ],
    ids=lambda options: " ".join(options),
)
def test_both_models_read_messages_as_the_request_says(client, options):
    """Guards: options of rendering that hold for the teacher's messages alone."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "12*3=?"}]},
        {"role": "assistant", "content": "12*3="},
    ]
    asked = {
        "model": "toy-teacher",
        "messages": messages,
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 5,
    }
    common, own = (
        client.chat.completions.create(**asked, extra_body={**options, **fields}).choices[0]
        for fields in ({}, {"student_messages": messages})
    )
    for one, other in zip(common.logprobs.content, own.logprobs.content, strict=True):
        assert one.token == other.token
        found = [each.logprob for each in other.top_logprobs]
        assert found == pytest.approx([each.logprob for each in one.top_logprobs], abs=1e-3)


def test_as_an_evaluation_harness_asks(client, vocabulary):
    """Guards: `echo` with log-probabilities of the prompt, as lm-eval asks for them."""
    ids = vocabulary.teacher_tokenizer("12*3+4=? 40")["input_ids"]
    done = client.completions.create(
        model="toy-teacher",
        prompt=[ids],
        echo=True,
        logprobs=1,
        max_tokens=1,
        temperature=0,
        seed=1,
    ).choices[0]
    for place in range(1, len(ids)):
        row = expected(vocabulary, ids[:place], ids[:place], FREE, 1)
        assert done.logprobs.token_logprobs[place] == pytest.approx(row[ids[place]], abs=1e-4)


def test_refusals_are_openai_errors(client, server):
    """Guards: 500s, and errors that the client's classes cannot be made from."""
    import openai

    wrong = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    assert client.models.retrieve("toy-teacher").id == "toy-teacher"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    for fields in (
        {"alpha_min": 7},
        {"alpha_minimum": 0},
        {"student_prompt": []},
        {"n": 1000},
        {"max_tokens": 10**9},
    ):
        extra = {key: value for key, value in fields.items() if key not in ("n", "max_tokens")}
        rest = {
            "max_tokens": 3,
            **{key: value for key, value in fields.items() if key in ("n", "max_tokens")},
        }
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="toy-teacher", prompt="1", extra_body=extra, **rest)
        assert caught.value.body["message"]
    with pytest.raises(openai.APIStatusError) as status:
        client.completions.create(model="toy-teacher", prompt="9" * 5000, max_tokens=3)
    assert 400 <= status.value.status_code < 500


def test_clients_that_go_away_leave_nothing_behind(client, server, vocabulary):
    """Guards: blocks of requests whose client has gone, and answers that end with them."""
    outcomes = asyncio.run(sixty_four(server[0]))
    assert outcomes.count("left") >= 16
    assert outcomes.count("done") + outcomes.count("left") == 64
    deadline = time.monotonic() + 60
    while (usage := gauge(server[0], "vllm:kv_cache_usage_perc")) + gauge(
        server[0], "vllm:num_requests_running"
    ) > 0:
        assert time.monotonic() < deadline, f"{usage} of the blocks are still taken"
        time.sleep(0.5)
    test_completions_are_drawn_from_q(client, vocabulary, {}, FREE, 1.0)
    assert KEY not in server[1].read_text()


async def sixty_four(address):
    """64 streams at once; every third is left after its second piece.

    Every fifth has another student prompt, every other one asks for statistics.
    """
    import openai

    async def one(client, i):
        extra = {"student_prompt": f"{i}+{i}=?", "alpha_min": 0.1} if i % 5 == 0 else {}
        extra["alpha_stats"] = i % 2 == 0
        prompt = f"{i}*3+4=? take your time"
        stream = await client.completions.create(
            model="toy-teacher",
            prompt=prompt,
            max_tokens=120,
            stream=True,
            extra_body={"ignore_eos": True, **extra},
        )
        pieces, last = 0, None
        async for piece in stream:
            pieces, last = pieces + 1, piece
            if i % 3 == 0 and pieces == 2:
                await stream.close()
                return "left"
        if i % 2 == 0 and last.choices[0].alpha_stats["count"] != 120:
            return "wrong statistics"
        return "done" if pieces >= 100 else f"{pieces} pieces"

    async with openai.AsyncOpenAI(
        base_url=f"{address}/v1", api_key=KEY, timeout=300, max_retries=0
    ) as client:
        return await asyncio.gather(*(one(client, i) for i in range(64)))


def gauge(address, name):
    request = urllib.request.Request(
        f"{address}/metrics/", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_alpha_statistics_come_with_the_answer(client, vocabulary, chat, stream):
    """Guards: statistics of another choice or request, of tokens cut, or missing in a stream."""
    extra = {"alpha_stats": "history", "return_tokens_as_token_ids": True, "alpha_max": 0.6}
    asked = {
        "model": "toy-teacher",
        "n": 3,
        "max_tokens": 24,
        "stop": "7",
        "stream": stream,
        "extra_body": extra,
    }
    text = "12*3+4=? and 77*2=?"
    if chat:
        answer = client.chat.completions.create(
            messages=[{"role": "user", "content": text}], logprobs=True, **asked
        )
        messages = [{"role": "user", "content": text}]
        rendered = vocabulary.teacher_tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = vocabulary.teacher_tokenizer(rendered, add_special_tokens=False)["input_ids"]
    else:
        answer = client.completions.create(prompt=text, logprobs=1, **asked)
        ids = vocabulary.teacher_tokenizer(text)["input_ids"]
    choices = [each for piece in answer for each in piece.choices] if stream else answer.choices
    tokens = {index: [] for index in range(3)}
    for each in choices:
        tokens[each.index] += getattr(each, "token_ids", None) or []
    reported = {each.index: each.alpha_stats for each in choices if hasattr(each, "alpha_stats")}
    assert all(hasattr(each, "alpha_stats") == (each.finish_reason is not None) for each in choices)
    assert sorted(reported) == [0, 1, 2]
    for index, found in reported.items():
        assert_statistics(
            vocabulary, ids, tokens[index], found, MixtureConfig(alpha_min=0.0, alpha_max=0.6)
        )


def assert_statistics(vocabulary, ids, tokens, found, mixture):
    """The history is that of the reference, and the summary is that of the history."""
    size = vocabulary.size
    models = [reference(resolve_model(name)) for name in ("toy-student", "toy-teacher")]
    wanted = {"alpha": [], "clamped": [], "kl_student": [], "kl_teacher": []}
    for place in range(len(tokens)):
        rows = [logits([*ids, *tokens[:place]])[:size].tolist() for logits in models]
        step = naive_step(*rows, [0.0] * size, place, mixture)
        for name, values in wanted.items():
            values.append(step.trace[name])
    history = found["history"]
    assert found["count"] == len(tokens) == len(history["alpha"]) > 0
    # Where both models are almost sure of the token, alpha is solved to the digits that matter.
    matters = np.array(wanted["kl_student"]) > 1e-3
    assert matters.any()
    for name in ("alpha", "clamped"):
        assert np.array(history[name])[matters] == pytest.approx(
            np.array(wanted[name])[matters], abs=2e-3
        )
    for name in ("kl_student", "kl_teacher"):
        assert history[name] == pytest.approx(wanted[name], abs=1e-4)
    assert found["mean"] == pytest.approx(np.mean(history["alpha"]))
    assert found["std"] == pytest.approx(np.std(history["alpha"]))
    assert (found["min"], found["max"]) == (min(history["alpha"]), max(history["alpha"]))
    for name in ("clamped", "kl_student", "kl_teacher"):
        assert found[name] == pytest.approx(np.mean(history[name]))


def test_several_prompts_have_their_own_statistics(client):
    """Guards: choices of several prompts counted as samples of one."""
    prompts = ["1+1=?", "12*3+4-77*5=?"]
    asked = {"model": "toy-teacher", "max_tokens": 12, "temperature": 0}
    extra = {"alpha_stats": True, "ignore_eos": True}
    together = client.completions.create(prompt=prompts, n=1, extra_body=extra, **asked).choices
    for prompt, choice in zip(prompts, together, strict=True):
        alone = client.completions.create(prompt=prompt, extra_body=extra, **asked).choices[0]
        assert choice.alpha_stats["count"] == 12
        assert choice.alpha_stats["mean"] == pytest.approx(alone.alpha_stats["mean"], abs=1e-3)
        assert "history" not in choice.alpha_stats


@pytest.mark.parametrize(("method", "alpha"), [("veto", 0.0), ("arithmetic", None)])
def test_statistics_of_methods_that_choose_no_alpha(client, method, alpha):
    """Guards: NaN in JSON, and means over it."""
    asked = {"model": "toy-teacher", "prompt": "12*3+4-77*5=?", "max_tokens": 6}
    extra = {"alpha_stats": "history", "alpha_method": method, "ignore_eos": True}
    found = client.completions.create(**asked, extra_body=extra).choices[0].alpha_stats
    assert found["mean"] == alpha
    assert found["history"]["alpha"] == [alpha] * 6
    assert found["count"] == 6
    assert 0 < found["kl_student"] < 20


def test_answers_without_statistics_are_as_they_were(client):
    """Guards: fields that OpenAI's answers do not have, where no request asks for them."""
    done = client.completions.create(model="toy-teacher", prompt="1+1=?", max_tokens=4)
    choice = done.choices[0]
    assert not hasattr(choice, "alpha_stats")
    assert getattr(choice, "token_ids", None) is None
    with pytest.raises(Exception, match="alpha_stats"):
        client.completions.create(
            model="toy-teacher", prompt="1", max_tokens=4, extra_body={"alpha_stats": 3}
        )
