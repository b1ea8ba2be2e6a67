"""`EnhancedDualVLLMCoordinator` over two fake servers."""

import asyncio
import warnings

import numpy as np
import pytest
from transformers import AutoTokenizer

from optimal_sampling.api.servers import EnhancedCoordinatorConfig, EnhancedDualVLLMCoordinator
from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer, random_tables
from optimal_sampling.errors import (
    ConfigError,
    EngineError,
    ServerError,
    TokenizerMismatchError,
)
from optimal_sampling.vocabulary import resolve_model

PROMPTS = ["one", "two", "three", "one"]


@pytest.fixture(scope="module")
def urls():
    student, teacher = random_tables(30)
    with FakeServer(FakeModel(student)) as theta, FakeServer(FakeModel(teacher)) as t:
        yield {"theta_url": theta.url, "t_url": t.url}


def run(work, **options):
    """What an async function of a coordinator gives."""

    async def main():
        config = EnhancedCoordinatorConfig(**options)
        async with EnhancedDualVLLMCoordinator(config) as coordinator:
            return await work(coordinator)

    return asyncio.run(main())


def batch(*prompts, **options):
    return lambda each: each.generate_batch_dual_prompts(*prompts, **options)


def test_results_have_a_number_per_token(urls):
    """Guards: histories that are short, that stay empty, or that are of another row."""
    results = run(batch(PROMPTS, max_tokens=15, return_diagnostics=True), **urls)
    assert len(results) == 4
    for each in results:
        histories = [value for name, value in vars(each).items() if name.endswith("_history")]
        assert len(histories) == 10
        assert {len(history) for history in histories} == {each.num_tokens}
        assert each.alpha_history[0] == 1.0
        assert max(each.alpha_history[1:], default=0.5) < 1.0
        gaps = np.subtract(each.kl_theta_history, each.kl_t_history)
        assert np.abs(gaps[1:]).max(initial=0) < 1e-4
        assert each.error == ""
    assert results[0].generated_ids != results[3].generated_ids
    short = run(batch(PROMPTS, max_tokens=15), **urls)
    assert [each.generated_ids for each in short] == [each.generated_ids for each in results]
    assert short[0].alpha_history == results[0].alpha_history
    assert short[0].kl_t_history == []


def test_each_model_sees_its_own_prompt(urls):
    """Guards: one prompt that is sent to both servers."""
    same = run(batch(["ab"], max_tokens=20), **urls)
    dual = run(batch(["ab"], ["ab!"], max_tokens=20), **urls)
    swapped = run(batch(["ab!"], ["ab"], max_tokens=20), **urls)
    alphas = [each[0].alpha_history for each in (same, dual, swapped)]
    assert len({tuple(history) for history in alphas}) == 3
    with pytest.raises(ConfigError, match="1 prompts but 2 prompts_t"):
        run(batch(["ab"], ["a", "b"]), **urls)


def test_presets_change_what_is_drawn(urls):
    """Guards: a constraint that is not applied."""
    found = {}
    for name in ("conservative", "exploratory"):
        config = getattr(EnhancedCoordinatorConfig, name)(**urls)
        results = run(batch(PROMPTS, max_tokens=25, return_diagnostics=True), **vars(config))
        found[name] = np.mean([x for each in results for x in each.entropy_history])
    assert found["conservative"] < found["exploratory"]
    assert EnhancedCoordinatorConfig() == EnhancedCoordinatorConfig.balanced()
    assert EnhancedCoordinatorConfig.conservative(top_k=5).top_k == 5


def test_a_stop_string_ends_the_text_before_it(urls):
    """Guards: text that goes on, or that keeps the stop string."""
    [whole] = run(batch(["ab"], max_tokens=40), **urls)
    middle = whole.generated_text[3:5]
    [cut] = run(batch(["ab"], max_tokens=40, stop=[middle, "zzzz"]), **urls)
    assert cut.generated_text == whole.generated_text.partition(middle)[0]
    assert cut.finish_reason == "stop"
    assert cut.num_tokens < whole.num_tokens
    assert cut.generated_ids == whole.generated_ids[: cut.num_tokens]


def test_a_stream_gives_the_text_of_the_batch(urls):
    """Guards: pieces that are lost, repeated, or contain a part of the stop string."""

    async def both(coordinator):
        async def streamed(**options):
            stream = coordinator.generate_stream("ab", max_tokens=40, **options)
            return [piece async for piece in stream]

        [whole] = await coordinator.generate_batch_dual_prompts(["ab"], max_tokens=40)
        stop = whole.generated_text[5:8]
        return whole.generated_text, stop, await streamed(), await streamed(stop=stop)

    whole, stop, pieces, cut = run(both, **urls)
    assert "".join(pieces) == whole
    assert len(pieces) > 5
    assert "".join(cut) == whole.partition(stop)[0]


class Bytes:
    """A tokenizer with a token per byte of a text; a prompt is another token, and 0 is the end."""

    def __init__(self, text):
        self.pieces = [b"", *(bytes([each]) for each in text.encode()), b""]

    def __call__(self, text, **options):
        return {"input_ids": [0 if text == "</s>" else len(self.pieces) - 1]}

    def decode(self, ids):
        return b"".join(self.pieces[token] for token in ids).decode(errors="replace")


def test_a_stop_string_is_not_found_in_half_a_character():
    """Guards: a text that ends where the first byte of a character was drawn."""
    text = "a你🙂\N{REPLACEMENT CHARACTER}好b"
    tokenizer = Bytes(text)
    size = len(tokenizer.pieces)
    order = [size - 1, *range(1, size - 1), 0]
    table = np.full((size, size), -50.0)
    table[order[:-1], order[1:]] = 50.0  # both models write this text, a byte per token
    cases = {
        ("\ufffd", 40): "a你🙂",  # neither in the halves of 你 nor in those of 🙂
        ("🙂\ufffd", 40): "a你",
        ("a\ufffd", 40): text,
        ("\ufffd好", 40): "a你🙂",
        ("好", 40): "a你🙂\ufffd",
        ("\ufffd", 6): "a你",  # ends with half a character, which nothing completes
    }

    async def work(coordinator):
        found = {}
        for stop, length in cases:
            options = {"max_tokens": length, "stop": [stop]}
            [whole] = await coordinator.generate_batch_dual_prompts(["p"], **options)
            stream = coordinator.generate_stream("p", **options)
            found[stop, length] = {whole.generated_text, "".join([each async for each in stream])}
        return found

    model = FakeModel(table, tokenizer=tokenizer)
    with FakeServer(model) as theta, FakeServer(model) as t:
        found = run(work, theta_url=theta.url, t_url=t.url)
    assert found == {case: {expected} for case, expected in cases.items()}


def test_leaving_a_stream_gives_it_up(urls):
    """Guards: a text that is generated to its end for nobody."""

    async def work(coordinator):
        stream = coordinator.generate_stream("ab", max_tokens=4000)
        async for _ in stream:
            break
        await stream.aclose()
        before = coordinator.get_statistics()["tokens"]
        await asyncio.sleep(0.2)
        return before, coordinator.get_statistics()["tokens"]

    student, teacher = random_tables(30)
    endless = {"stop_ids": frozenset()}
    with (
        FakeServer(FakeModel(student, **endless)) as theta,
        FakeServer(FakeModel(teacher, **endless)) as t,
    ):
        before, after = run(work, theta_url=theta.url, t_url=t.url)
    assert before == after < 4000


def test_a_tokenizer_encodes_in_place_of_the_servers(models_of_the_pair):
    """Guards: a tokenizer that is given and not used, or not compared with the servers'."""

    async def work(coordinator):
        for model in coordinator.pair.models.values():
            model.tokenize = model.detokenize = None
        return await coordinator.generate_batch_dual_prompts(["2 + 2 = "], max_tokens=9, stop="x")

    with (
        FakeServer(models_of_the_pair[0]) as theta,
        FakeServer(models_of_the_pair[1]) as t,
        FakeServer(FakeModel(random_tables(30)[0])) as other,
    ):
        where = {"theta_url": theta.url, "tokenizer": "toy-student"}
        [result] = run(work, t_url=t.url, **where)
        assert result.error == ""
        assert result.num_tokens >= 1
        with pytest.raises(TokenizerMismatchError, match="the teacher's server makes other"):
            run(work, t_url=other.url, **where)


@pytest.fixture(scope="module")
def models_of_the_pair():
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("toy-student"))
    return [FakeModel(table, tokenizer=tokenizer) for table in random_tables(264)]


def test_statistics_count_requests_and_tokens(urls):
    """Guards: statistics that are not of this coordinator."""

    async def work(coordinator):
        results = await coordinator.generate_batch_dual_prompts(PROMPTS, max_tokens=10)
        return sum(each.num_tokens for each in results), coordinator.get_statistics()

    tokens, found = run(work, **urls)
    assert (found["prompts"], found["failed_prompts"], found["success_rate"]) == (4, 0, 1.0)
    assert found["tokens"] == tokens
    assert found["rounds"] <= tokens
    assert found["theta"]["requests"] > found["rounds"]
    assert 0 <= found["tv_bound_mean"] <= found["tv_bound_max"] <= 1


def test_a_failed_prompt_leaves_the_others(urls):
    """Guards: one long prompt that ends the batch, a cause that is lost."""
    with pytest.warns(UserWarning, match="1 of 2 prompts failed; prompt 1: the student's prompt"):
        results = run(batch(["ab", "a" * 5000], max_tokens=5), **urls)
    assert [bool(each.error) for each in results] == [False, True]
    assert results[1].finish_reason == "error"

    async def stream(coordinator):
        return [piece async for piece in coordinator.generate_stream("a" * 5000)]

    with pytest.raises(ServerError, match="5000 tokens, and its context holds 4096"):
        run(stream, **urls)


def test_what_cannot_run_is_refused(urls):
    """Guards: a traceback from within, a wrong option that is ignored."""
    with pytest.raises(ConfigError, match="must be an EnhancedCoordinatorConfig"):
        EnhancedDualVLLMCoordinator({"theta_url": "x"})
    with pytest.raises(ConfigError, match="interleaved"):
        EnhancedCoordinatorConfig(alpha_method="interleaved")
    for bad in (
        {"top_k": 0},
        {"max_concurrent_requests": 0},
        {"target_top_p": 1.5},
        {"theta_url": None},
        {"t_url": []},
        {"tokenizer": 5},
    ):
        with pytest.raises(ConfigError, match=f"^{next(iter(bad))} must"):
            EnhancedCoordinatorConfig(**bad)
    with pytest.raises(ConfigError, match=r"all tokens are asked for.*student's server.* most 20"):
        run(batch(["a"]), top_k=-1, **urls)
    idle = EnhancedDualVLLMCoordinator(EnhancedCoordinatorConfig(**urls))
    with pytest.raises(EngineError, match="not connected"):
        asyncio.run(idle.generate_batch_dual_prompts(["a"]))
    student, _ = random_tables(20)
    with FakeServer(FakeModel(student)) as other, pytest.raises(TokenizerMismatchError):
        run(batch(["a"]), theta_url=other.url, t_url=urls["t_url"])


def test_a_server_that_is_not_there_is_named(urls, unused_port):
    """Guards: a start that waits for ever, or does not say which server."""
    url = f"http://127.0.0.1:{unused_port}"
    with pytest.raises(EngineError, match=f"the teacher's server {url}"):
        run(batch(["a"]), theta_url=urls["theta_url"], t_url=url, retry_seconds=0.2)


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_no_warning_without_a_failure(urls):
    """Guards: warnings of a run that went well."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(batch(["a"], max_tokens=3), **urls)


@pytest.mark.parametrize("given", [{"max_tokens": 0}, {"max_tokens": "5"}, {"seed": "a"}])
def test_a_stream_checks_what_it_is_given(urls, given):
    """Guards: a stream that takes what the batch refuses."""

    async def stream(coordinator):
        return [piece async for piece in coordinator.generate_stream("ab", **given)]

    with pytest.raises(ConfigError, match=next(iter(given))):
        run(stream, **urls)


def test_a_coordinator_is_used_where_it_was_connected(urls):
    """Guards: "Event loop is closed" from within httpx, and connections that nobody closes."""

    async def nested(coordinator):
        with pytest.raises(EngineError, match="connected already"):
            await coordinator.start()
        return await batch(["a"], max_tokens=2)(coordinator)

    assert run(nested, **urls)[0].num_tokens == 2
    coordinator = EnhancedDualVLLMCoordinator(EnhancedCoordinatorConfig(**urls))

    async def again():
        for _ in range(2):
            async with coordinator:
                results = await batch(["a"], max_tokens=2)(coordinator)
        await coordinator.close()
        return results

    assert asyncio.run(again())[0].num_tokens == 2
    with asyncio.Runner() as one, asyncio.Runner() as other:
        one.run(coordinator.start())
        for work in (batch(["a"])(coordinator), coordinator.close()):
            with pytest.raises(EngineError, match="another event loop"):
                other.run(work)
        one.run(coordinator.close())


def test_a_start_that_failed_may_be_tried_again(urls, monkeypatch):
    """Guards: "connected already", after a start without its key."""
    config = EnhancedCoordinatorConfig(theta_api_key_env="OUR_KEY", **urls)
    coordinator = EnhancedDualVLLMCoordinator(config)

    async def main():
        with pytest.raises(ConfigError, match="OUR_KEY"):
            await coordinator.start()
        monkeypatch.setenv("OUR_KEY", "a-key")
        async with coordinator:
            return await batch(["a"], max_tokens=2)(coordinator)

    assert asyncio.run(main())[0].num_tokens == 2


def test_closing_in_the_middle_of_a_batch_ends_it(urls):
    """Guards: a batch that connects again after `close`, or RuntimeError from within httpx."""

    async def main(coordinator):
        work = asyncio.ensure_future(batch(["a"] * 20, max_tokens=4000)(coordinator))
        await asyncio.sleep(0.2)
        await coordinator.close()
        with pytest.raises(EngineError, match=r"closed|not connected"):
            await work

    run(main, **urls)


@pytest.mark.parametrize("prompts", [["a", "ab", "gone"], ["gone"]])
def test_what_is_finished_is_kept_when_a_server_is_gone(urls, prompts):
    """Guards: a batch that is lost with its last prompt; one without any result that returns."""

    async def work(coordinator):
        model = coordinator.pair.models["student"]
        lost = await model.tokenize("gone")
        answered = model.next_tokens

        async def answer(prefix, *given):
            if list(prefix[: len(lost)]) == lost:
                raise EngineError("server http://a: refused")
            return await answered(prefix, *given)

        model.next_tokens = answer
        return await batch(prompts, max_tokens=3)(coordinator)

    options = {**urls, "draft_tokens": 0, "max_concurrent_requests": 1}
    if len(prompts) == 1:
        with pytest.raises(EngineError, match="the student's server http://a: refused"):
            run(work, **options)
        return
    with pytest.warns(UserWarning, match="1 of 3 prompts failed; prompt 2: the student's server"):
        results = run(work, **options)
    assert [each.num_tokens > 0 for each in results] == [True, True, False]


def test_half_a_character_fails_its_prompt_alone(urls, models_of_the_pair):
    """Guards: TypeError from within a tokenizer that ends the batch."""
    student, teacher = models_of_the_pair
    with FakeServer(student) as theta, FakeServer(teacher) as t:
        own = {"theta_url": theta.url, "t_url": t.url, "tokenizer": "toy-student"}
        for options in (urls, own):
            with pytest.warns(UserWarning, match="the student's prompt holds half a character"):
                results = run(batch(["\ud83d", "ab"], max_tokens=2), **options)
            assert [bool(each.error) for each in results] == [True, False]
