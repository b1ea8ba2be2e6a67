"""The server with the official client: right answers, streams, refusals, and clients that go away."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import numpy as np
import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.naive import naive_step
from optimal_sampling.vocabulary import Vocabulary, resolve_model
from tests.vllm.tiny import reference

KEY = "a-key-that-no-log-may-hold"
LAUNCH = """
import sys
from optimal_sampling.config import EngineConfig, MixtureConfig
from optimal_sampling.serve import ServeConfig, serve
if __name__ == "__main__":
    options = EngineConfig(batch_size=48, prefill_chunk=512, kv_memory_gib=0.1)
    serve(ServeConfig(port=int(sys.argv[1]), options=options, mixture=MixtureConfig(alpha_min=0.0)))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, file with the server's output)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    script, log = folder / "launch.py", folder / "log"
    script.write_text(LAUNCH)
    environment = {**os.environ, "OPTIMAL_SAMPLING_API_KEY": KEY, "VLLM_LOGGING_LEVEL": "INFO"}
    with open(log, "w") as out:
        process = subprocess.Popen([sys.executable, script, str(port)], env=environment, stdout=out, stderr=out)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(process, address, log)
        yield address, log
    finally:
        process.terminate()
        process.wait(60)


def wait_until_healthy(process, address, log):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def client(server):
    import openai

    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, timeout=300, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.load("toy-student", "toy-teacher", False)


def expected(vocabulary, teacher_ids, student_ids, mixture, place):
    """log q* of the next token by the naive mathematics."""
    size = vocabulary.size
    contexts = (("toy-student", student_ids), ("toy-teacher", teacher_ids))
    rows = [reference(resolve_model(name))(ids)[:size].tolist() for name, ids in contexts]
    return np.array(naive_step(*rows, [0.0] * size, place, mixture).log_drawn)


def assert_logprobs(vocabulary, choice, teacher_prompt, student_prompt, mixture):
    """Every log-probability that was reported is that of the reference."""
    teacher_ids = vocabulary.teacher_tokenizer(teacher_prompt)["input_ids"]
    student_ids = vocabulary.student_tokenizer(student_prompt)["input_ids"]
    text = []
    for place, top in enumerate(choice.logprobs.top_logprobs):
        row = expected(vocabulary, [*teacher_ids, *text], [*student_ids, *text], mixture, place)
        for name, value in top.items():
            # Where both models are sure, alpha hardly matters and is solved to no more digits than matter.
            assert np.exp(value) == pytest.approx(np.exp(row[int(name.removeprefix("token_id:"))]), abs=1e-5)
        text.append(int(choice.logprobs.tokens[place].removeprefix("token_id:")))


FREE = MixtureConfig(alpha_min=0.0)
LONG = "Say what this is and explain every step of it: 12*3+4=?"


@pytest.mark.parametrize(
    ("fields", "mixture"),
    [
        ({}, FREE),
        ({"student_prompt": "12*3+4=?"}, FREE),
        ({"student_prompt": LONG}, FREE),
        ({"alpha_method": "fixed", "fixed_alpha": 0.9}, replace(FREE, alpha_method="fixed", fixed_alpha=0.9)),
        ({"force_first_token": True, "alpha_max": 0.4}, replace(FREE, force_first_token=True, alpha_max=0.4)),
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
    assert_logprobs(vocabulary, done.choices[0], prompt, fields.get("student_prompt", prompt), mixture)


def test_streams_say_what_whole_answers_say(client):
    """Guards: a stream that ends early or doubles a token."""
    ask = {"model": "toy-teacher", "prompt": "7*8-50=?", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**ask).choices[0]
    parts = list(client.completions.create(**ask, stream=True))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.text
    assert parts[-1].choices[0].finish_reason == whole.finish_reason == "stop"


def test_chat_with_messages_of_its_own_for_the_student(client):
    """Guards: the chat route without our fields."""
    done = client.chat.completions.create(
        model="toy-teacher",
        messages=[{"role": "user", "content": "12*3+4=? Hint: 40."}],
        max_tokens=48,
        n=3,
        extra_body={"student_messages": [{"role": "user", "content": "12*3+4=?"}], "alpha_min": 0.3},
    )
    assert len(done.choices) == 3
    assert all(choice.message.content for choice in done.choices)


def test_as_an_evaluation_harness_asks(client, vocabulary):
    """Guards: `echo` with log-probabilities of the prompt, as lm-eval's local-completions asks for them."""
    ids = vocabulary.teacher_tokenizer("12*3+4=? 40")["input_ids"]
    done = client.completions.create(
        model="toy-teacher", prompt=[ids], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1
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
    for fields in ({"alpha_min": 7}, {"student_prompt": []}, {"n": 1000}, {"max_tokens": 10**9}):
        extra = {key: value for key, value in fields.items() if key not in ("n", "max_tokens")}
        rest = {"max_tokens": 3, **{key: value for key, value in fields.items() if key in ("n", "max_tokens")}}
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
    while (usage := gauge(server[0], "vllm:kv_cache_usage_perc")) + gauge(server[0], "vllm:num_requests_running") > 0:
        assert time.monotonic() < deadline, f"{usage} of the blocks are still taken"
        time.sleep(0.5)
    test_completions_are_drawn_from_q(client, vocabulary, {}, FREE, 1.0)
    assert KEY not in server[1].read_text()


async def sixty_four(address):
    """64 streams at once; every third is left after its second piece, every fifth has another student prompt."""
    import openai

    async def one(client, i):
        extra = {"student_prompt": f"{i}+{i}=?", "alpha_min": 0.1} if i % 5 == 0 else {}
        prompt = f"{i}*3+4=? take your time"
        stream = await client.completions.create(
            model="toy-teacher", prompt=prompt, max_tokens=120, stream=True, extra_body={"ignore_eos": True, **extra}
        )
        pieces = 0
        async for _ in stream:
            pieces += 1
            if i % 3 == 0 and pieces == 2:
                await stream.close()
                return "left"
        return "done" if pieces >= 100 else f"{pieces} pieces"

    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY, timeout=300, max_retries=0) as client:
        return await asyncio.gather(*(one(client, i) for i in range(64)))


def gauge(address, name):
    request = urllib.request.Request(f"{address}/metrics/", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))
