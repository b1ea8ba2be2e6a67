"""Two servers of llama.cpp with the shipped pair in float32."""

import asyncio
import json
import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from optimal_sampling.cli import main as command_line
from optimal_sampling.config import LocalOptions, MixtureConfig, ModelConfig, ServersOptions
from optimal_sampling.engines.local.engine import LocalEngine
from optimal_sampling.engines.servers.access import ApiKey
from optimal_sampling.engines.servers.dialect import AFFINITY
from optimal_sampling.engines.servers.engine import ServersEngine
from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer, random_tables
from optimal_sampling.engines.servers.launch import started
from optimal_sampling.engines.servers.probe import PROBE_TEXTS, check_tokenizers
from optimal_sampling.engines.servers.server_process import ServerProcess, free_port
from optimal_sampling.errors import ConfigError, EngineError
from optimal_sampling.records import load
from optimal_sampling.vocabulary import Vocabulary, resolve_model
from tests.engines.servers.serving import run, served
from tests.engines.servers.shipped_pair import (
    SIZE,
    check_full_vocabulary,
    check_short_lists,
    exact_log_p,
    requests_for,
)

BINARY = os.environ.get("OPTIMAL_SAMPLING_LLAMA_SERVER") or shutil.which("llama-server")
pytest.importorskip("gguf", reason="needs llama.cpp's package gguf: make test-llama")
pytestmark = [
    pytest.mark.skipif(
        BINARY is None,
        reason="needs llama.cpp's llama-server, in the PATH or named by "
        "OPTIMAL_SAMPLING_LLAMA_SERVER: `make test-llama` builds it",
    ),
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(300),
]

ROWS = {"student": 264, "teacher": 272}
SLOTS, CONTEXT = 4, 512
OWN_CACHES = ("--parallel", SLOTS, "--no-kv-unified", "--ctx-size", SLOTS * CONTEXT)
"""A context of its own for each of the texts that the server keeps."""
FLOAT32 = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
TOLERANCE = 1e-4
"""Of log-probabilities down to -35, in nats; 4.0e-5 was the most of 280 lists."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The pair as GGUF files, by role."""
    from tests.engines.servers.toy_gguf import write_gguf

    folder = tmp_path_factory.mktemp("gguf")
    return {role: write_gguf(f"toy-{role}", folder / f"{role}.gguf") for role in ROWS}


def server_of(role, files, *options, port=None):
    """A server of one model, not started."""
    port = port or free_port()
    given = [str(each) for each in (*options, "--threads", 1, "--no-ui", "--port", port)]
    command = [BINARY, "--model", str(files[role]), "--alias", f"toy-{role}", *given]
    log = Path(files[role].parent, f"{role}-{port}.log")
    return ServerProcess(role, command, f"http://127.0.0.1:{port}", log)


@pytest.fixture(scope="module")
def urls(files):
    """Addresses by role."""
    processes = [server_of(role, files, *OWN_CACHES, *FLOAT32) for role in ROWS]
    with started(processes, 60, print):
        yield {process.name: process.url for process in processes}


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.load("toy-student", "toy-teacher")


@pytest.fixture(scope="module")
def local(vocabulary):
    """The reference: both models in this process."""
    models = ModelConfig(device="cpu", dtype="float32")
    with LocalEngine.load(models, MixtureConfig(), LocalOptions(), vocabulary) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine(urls, vocabulary):
    """Lists of all tokens."""
    with engine_at(urls, vocabulary, server_top_k=-1) as engine:
        yield engine


def engine_at(urls, vocabulary, **options):
    addresses = {f"{role}_url": (url,) for role, url in urls.items()}
    given = ServersOptions(**{"server_retry_seconds": 20.0, **addresses, **options})
    return ServersEngine.load(ModelConfig(), MixtureConfig(), given, vocabulary)


def tokens_of(completions):
    completions = [*completions]
    assert not [each.error for each in completions if each.error]
    return {each.request.key: (each.token_ids, each.finish_reason) for each in completions}


def values_of(tokens):
    """Log-probabilities of a whole list in the order of the ids."""
    assert len(tokens.ids) == SIZE
    return tokens.log_p[tokens.ids.argsort()]


def solved(vocabulary):
    """A text of the pair: the teacher's prompt, and a solution of the problem."""
    asked = requests_for(vocabulary, 1)[0]
    return list(asked.teacher_prompt_ids), [*b"12+34=46. 46*2=92"]


def test_facts_of_llama_server(urls):
    """Guards: the context of all slots taken for that of a text, a missed end token, an ability
    that is not there.
    """

    async def main():
        async with (
            served(urls["student"], vocab_size=SIZE) as student,
            served(urls["teacher"], vocab_size=SIZE) as teacher,
        ):
            for role, model in (("student", student), ("teacher", teacher)):
                facts = model.facts
                assert (facts.name, facts.kind) == (f"toy-{role}", "llama.cpp")
                assert (facts.context_length, model.dialect.slots) == (CONTEXT, SLOTS)
                assert (facts.max_top_k, facts.vocab_size) == (ROWS[role], ROWS[role])
                assert facts.stop_ids == {256, 257}  # llama.cpp knows <|endoftext|> by its name
                assert (facts.can_choose_ids, facts.can_draft) == (True, True)
                assert facts.scoring == "one_slot"
            await check_tokenizers({"student": student, "teacher": teacher})

    run(main)


@pytest.mark.parametrize("role", ROWS)
def test_whole_lists_are_those_of_transformers(urls, vocabulary, role):
    """Guards: a conversion of the weights, padding ids, a cache or a temperature that changes a
    distribution, and lists that are off by a position.
    """
    prompt, text = solved(vocabulary)
    exact = exact_log_p(role, [*prompt, *text])[len(prompt) - 1 :]

    async def main():
        async with served(urls[role], vocab_size=SIZE) as model:
            scored = await model.score(prompt, text, ROWS[role])
            ends = [[*prompt, *text[:end]] for end in range(len(text) + 1)]
            alone = [await model.next_tokens(each, ROWS[role]) for each in ends]
            return [np.array([*map(values_of, lists)]) for lists in (scored, alone)]

    scored, alone = run(main)
    error = max(np.abs(scored - exact).max(), np.abs(alone - exact).max())
    print(f"{role}: largest error {error:.1e}, log-probabilities down to {exact.min():.1f}")
    assert error <= TOLERANCE
    np.testing.assert_allclose(scored, alone, rtol=0, atol=TOLERANCE / 10)


def test_how_far_default_attention_is_off(files, urls, vocabulary):
    """Guards: figures of docs/servers.md. Attention is in float16 unless told otherwise."""
    asked = [each.teacher_prompt_ids for each in requests_for(vocabulary, 10)]
    text = [*b"12+34=46. 46*2=92. 92-7=85."]
    exact = [exact_log_p("teacher", [*prompt, *text])[len(prompt) - 1 :] for prompt in asked]

    async def main(url):
        async with served(url, vocab_size=SIZE) as model:
            lists = [await model.score(prompt, text, ROWS["teacher"]) for prompt in asked]
            return np.array([[*map(values_of, each)] for each in lists])

    with started([default := server_of("teacher", files, *OWN_CACHES)], 60, print):
        largest = {}
        for name, url in (("float32", urls["teacher"]), ("float16", default.url)):
            found = run(main, url)
            errors = np.abs(found - exact)
            distances = np.abs(np.exp(found) - np.exp(exact)).sum(-1) / 2
            largest[name] = errors.max()
            print(
                f"{name}: {distances.size} lists, log-probabilities down to {np.min(exact):.1f}, "
                f"largest error {errors.max():.1e}; total variation mean {distances.mean():.1e}, "
                f"most {distances.max():.1e}"
            )
    assert largest["float32"] <= TOLERANCE < 10 * TOLERANCE < largest["float16"] < 0.1


def test_options_of_the_server_change_nothing(files, urls, vocabulary):
    """Guards: lists and drafts by the temperature, penalties or biases that a server has of its
    command line.
    """
    own = ("--temp", 2, "--top-k", 1, "--repeat-penalty", 3, "--presence-penalty", 2)
    own += ("--mirostat", 2, "--logit-bias", "49+100", "--ignore-eos")
    server = server_of("student", files, *OWN_CACHES, *FLOAT32, *own)
    prompt = list(requests_for(vocabulary, 1)[0].student_prompt_ids)

    async def main(url):
        async with served(url, vocab_size=SIZE) as model:
            drafted = await model.draft(prompt, 40, 5, 0.0, 0)
            listed = await model.next_tokens(prompt, ROWS["student"])
            return [each.token for each in drafted], values_of(listed)

    with started([server], 60, print):
        (text, values), (same, expected) = (run(main, url) for url in (server.url, urls["student"]))
    assert text == same
    assert text[-1] == 257
    np.testing.assert_allclose(values, expected, rtol=0, atol=TOLERANCE / 10)


@pytest.mark.parametrize("role", ROWS)
def test_chosen_ids_have_the_values_of_the_whole_list(urls, vocabulary, role):
    """Guards: a log-probability of a chosen id that the biases which show it have changed."""
    prompt, text = solved(vocabulary)

    async def main():
        async with served(urls[role], vocab_size=SIZE) as model:
            for end in range(0, len(text), 4):
                prefix = [*prompt, *text[:end]]
                whole = values_of(await model.next_tokens(prefix, ROWS[role]))
                extra = [*whole.argsort()[:5].tolist(), *b"a7=", 195, 257]  # the least likely, ...
                found = await model.next_tokens(prefix, 5, extra)
                assert {*found.ids.tolist()} >= {*extra}
                assert (found.listed, len(found.ids)) == (5, len({*found.ids.tolist()}))
                np.testing.assert_allclose(found.log_p, whole[found.ids], rtol=0, atol=2e-5)

    run(main)


def test_drafts_have_the_lists_of_their_places(urls, vocabulary):
    """Guards: lists of a draft that belong to other places, and a draft that is not greedy."""
    prompt, _ = solved(vocabulary)

    async def main():
        async with served(urls["student"], vocab_size=SIZE) as model:
            drafted = await model.draft(prompt, 12, ROWS["student"], 0.0, 0)
            text = [each.token for each in drafted]
            assert len(text) > 4
            lists = await model.score(prompt, text[:-1], ROWS["student"])
            for each, listed in zip(drafted, lists, strict=True):
                assert each.token == each.choices.ids[0]
                found, expected = values_of(each.choices), values_of(listed)
                np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)

    run(main)


def test_tokens_within_a_character(urls):
    """Guards: the list of a token after which the text ends within a character, which llama-server
    leaves out: a row that fails, and a draft whose lists belong to the tokens before.
    """
    lead = "é".encode()[0]

    async def main():
        async with served(urls["student"], vocab_size=SIZE) as model:
            prompt = [*b"1+1="]
            wanted = await model.next_tokens(prompt, 5)
            drawn = model.dialect.draft(prompt, 6, 5, 0.0, 0)
            body = drawn.body | {"grammar": 'root ::= "aébcd"'}
            drafted = await model._retried(replace(drawn, body=body))
            assert [each.token for each in drafted] == [*b"a"]
            assert drafted[0].choices.ids.tolist() == wanted.ids.tolist()
            body = drawn.body | {"logit_bias": [[lead, 1e5]]}
            assert await model._retried(replace(drawn, body=body)) == []
            whole = replace(model.dialect.next_tokens(prompt, 5), read=lambda reply: reply)
            assert (await model._retried(whole))["tokens"] == [*b"a"]

    run(main)


def test_text_of_many_languages(urls):
    """Guards: a text that another encoding, a special token or a space in front changes."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("toy-teacher"))
    texts = [*PROBE_TEXTS, " <think>\n\\boxed{1}", "<|user|>né<|end|>[PAD264]"]

    async def main():
        async with served(urls["teacher"], vocab_size=SIZE) as model:
            for text in texts:
                ids = await model.tokenize(text)
                assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
                assert await model.detokenize(ids) == text

    run(main)


def test_the_cache_is_used(urls, vocabulary):
    """Guards: a prompt that is computed anew for every token, or for every prefix of a draft."""
    prompt, text = solved(vocabulary)

    async def main():
        async with served(urls["teacher"], vocab_size=SIZE) as model:
            AFFINITY.set(1)

            async def computed(call):
                body = dict(call.body, response_fields=["timings/prompt_n"])
                replies = await model._retried(replace(call, body=body, read=lambda reply: reply))
                replies = replies if isinstance(replies, list) else [replies]
                return [each["timings/prompt_n"] for each in replies]

            await model.next_tokens(prompt, 5)
            after_one = await computed(model.dialect.next_tokens([*prompt, text[0]], 5))
            scored = await computed(model.dialect.score(prompt, text, 5, "one_slot"))
            return after_one, scored

    after_one, scored = run(main)
    assert after_one == [1]
    assert scored[1:] == [1] * len(text)


def test_full_vocabulary_is_the_local_engine(engine, local, vocabulary):
    """Guards: tokens that differ from those of the models in this process."""
    check_full_vocabulary(engine, local, requests_for(vocabulary, 50))


@pytest.mark.parametrize(
    "texts", [pytest.param(8, id="quick"), pytest.param(160, marks=pytest.mark.slow, id="5000")]
)
def test_short_lists_stay_within_their_bound(engine, local, vocabulary, texts):
    """Guards: a bound on the total variation that a token of real models exceeds."""
    check_short_lists(engine, local, requests_for(vocabulary, texts))


def test_drafts_and_company_change_no_token(urls, vocabulary):
    """Guards: a token that depends on what was drafted, or on the texts in other slots."""
    asked = requests_for(vocabulary, 24)
    found = []
    for drafts, at_once in ((0, 1), (0, 16), (5, 16), ("auto", 3 * SLOTS)):
        options = {"draft_tokens": drafts, "batch_size": at_once}
        with engine_at(urls, vocabulary, **options) as engine:
            found.append(tokens_of(engine.generate(asked)))
            assert drafts != 5 or engine.counts.accepted > engine.counts.rounds
    assert found[1:] == found[:1] * 3


def test_a_tolerance_is_kept(urls, vocabulary):
    """Guards: ids of the other list that are asked for, and do not make the bound smaller."""
    asked = requests_for(vocabulary, 12)
    options = {"server_top_k": 5, "tv_tolerance": 1e-3}
    with engine_at(urls, vocabulary, **options) as engine:
        found = tokens_of(engine.generate(asked))
        counts = engine.counts
        assert counts.asked_again > counts.above == 0
        assert counts.largest_bound <= 1e-3
    with engine_at(urls, vocabulary, **options, draft_tokens=0) as engine:
        assert tokens_of(engine.generate(asked)) == found


def test_texts_at_the_end_of_the_context(urls, vocabulary):
    """Guards: a prompt that the server cuts or refuses, where a record is due."""
    asked = requests_for(vocabulary, 1)[0]
    prompts = [(*b"1+1=",) * (length // 4) for length in (CONTEXT - 4, CONTEXT)]
    requests = [
        replace(asked, id=str(len(ids)), student_prompt_ids=ids, teacher_prompt_ids=ids)
        for ids in prompts
    ]
    with engine_at(urls, vocabulary) as engine:
        fits, refused = sorted(engine.generate(requests), key=lambda each: bool(each.error))
    assert fits.finish_reason in ("length", "stop")
    assert 1 <= len(fits.token_ids) <= 4
    assert (refused.request.id, refused.token_ids) == (str(CONTEXT), ())
    assert str(CONTEXT) in refused.error


def test_a_cache_that_all_slots_share_is_waited_for(files):
    """Guards: texts that fail at 500 "Context size has been exceeded", which passes when others
    have ended: the slots of a server without --no-kv-unified share their cache.
    """
    secret = "sk-only-for-this-test"
    server = server_of("student", files, "--ctx-size", CONTEXT, "--api-key", secret)

    async def main(url):
        async with served(url, vocab_size=SIZE, key=ApiKey(secret)) as model:
            assert model.facts.context_length == CONTEXT  # of each, though not of all at once

            async def text(number):
                AFFINITY.set(number)
                prompt = [48 + number] * (CONTEXT // 2)
                return await model.score(prompt, [*b"1234"], 5)

            assert [len(each) for each in await asyncio.gather(*map(text, range(8)))] == [5] * 8
            assert model.statistics.errors["rate_limited"] > 0
            assert model.statistics.failed == 0

    with started([server], 60, print):
        run(main, server.url)
        with pytest.raises(EngineError, match="unauthorized"):
            served_once(server.url)


def served_once(url):
    """Starts a model, and nothing more."""
    options = ServersOptions(student_url=(url,), server_retry_seconds=1.0)
    vocabulary = Vocabulary.load("toy-student", "toy-student")
    ServersEngine.load(ModelConfig(), MixtureConfig(), options, vocabulary, mode="student").close()


def test_a_server_without_a_model_is_refused(files):
    """Guards: a traceback for a server that starts others on demand."""
    port = free_port()
    folder = files["student"].parent
    command = [BINARY, "--models-dir", str(folder), "--no-ui", "--port", str(port)]
    server = ServerProcess("router", command, f"http://127.0.0.1:{port}", folder / "router.log")
    with started([server], 60, print):
        with pytest.raises(ConfigError, match="2 models"):
            served_once(server.url)

        async def main():
            async with served(server.url, model="student"):
                pass

        with pytest.raises(ConfigError, match="without a model of its own"):
            run(main)


def test_a_server_that_is_killed_and_started_again(files, urls, vocabulary):
    """Guards: texts that are lost, or go on with other tokens, while a model is loaded."""
    asked = requests_for(vocabulary, 24)
    server = server_of("student", files, *OWN_CACHES, *FLOAT32)
    with ExitStack() as stack, started([server], 60, print):
        port = int(server.url.rpartition(":")[2])
        again = server_of("student", files, *OWN_CACHES, *FLOAT32, port=port)
        with engine_at(urls | {"student": server.url}, vocabulary, batch_size=4) as engine:
            expected = tokens_of(engine.generate(asked))
            done = []
            for completion in engine.generate(asked):
                done.append(completion)
                if len(done) == 6:
                    server.process.kill()
                    time.sleep(0.3)
                    stack.enter_context(again.start())
            figures = engine.models["student"].figures()
    assert tokens_of(done) == expected
    assert figures["errors_refused"] > 0


def test_generate_and_resume(urls, tmp_path, capfd):
    """Guards: the command line over llama-server, and a resume that draws again or is refused."""
    run_of = ["generate", "--engine", "servers", "--output-dir", str(tmp_path)]
    run_of += ["--device", "cpu", "--max-new-tokens", "24"]
    pair = ["--student-url", urls["student"], "--teacher-url", urls["teacher"]]
    assert command_line([*run_of, *pair, "--num-examples", "4"]) == 0
    first = {record["id"]: record for record in load(tmp_path)}
    assert command_line([*run_of, *pair, "--num-examples", "6"]) == 0
    records = {record["id"]: record for record in load(tmp_path)}
    assert (len(first), len(records)) == (4, 6)
    assert all(records[name] == record for name, record in first.items())
    assert all(0 <= record["tv_bound"] <= 1 for record in records.values())
    notes = json.loads((tmp_path / "summary.json").read_text())["notes"]
    assert notes["teacher_server"] == f"toy-teacher, context {CONTEXT} (llama.cpp)"
    swapped = ["--student-url", urls["teacher"], "--teacher-url", urls["student"]]
    assert command_line([*run_of, *swapped, "--num-examples", "7"]) != 0
    assert "model of the student's server" in capfd.readouterr().err


def test_a_pair_of_two_kinds_of_servers(urls, vocabulary):
    """Guards: lists of one dialect that the other's limits or abilities change."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("toy-teacher"))
    table = FakeModel(4 * random_tables(SIZE)[1], tokenizer=tokenizer, stop_ids=frozenset({257}))
    asked = requests_for(vocabulary, 2)
    with FakeServer(table) as teacher:
        pair = {"student": urls["student"], "teacher": teacher.url}
        with engine_at(pair, vocabulary, tv_tolerance=0.01) as engine:
            drafted = tokens_of(engine.generate(asked))
            kinds = [engine.models[role].facts.kind for role in pair]
            longer = engine.counts.asked_again
        with engine_at(pair, vocabulary, tv_tolerance=0.01, draft_tokens=0) as engine:
            assert tokens_of(engine.generate(asked)) == drafted
    assert kinds == ["llama.cpp", "fake"]
    assert longer > 0
