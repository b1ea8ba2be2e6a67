"""The byte engine on tokens of several bytes, against a recomputation without caches."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import normalizers

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.bytes import utf8
from optimal_sampling.engines.bytes.byte_view import END, ByteView
from optimal_sampling.engines.bytes.contexts import ContextRows
from optimal_sampling.engines.bytes.laws import LawReader
from optimal_sampling.engines.bytes.mixing import Place, SymbolMixer
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import TRACE_FIELDS, Request
from optimal_sampling.vocabulary import continued_ids
from optimal_sampling.vocabulary.token_bytes import byte_of_letter
from tests.engines.bytes.conftest import CONTEXT, byte_engine, small_tokenizer, writing_model
from tests.engines.conformance import by_key
from tests.engines.local.conftest import stock_logits

PROMPTS = [([97, 98], [97]), ([99], [98, 256, 97, 99]), ([97] * 17, [98] * 21), ([258, 97], [97])]
FREE = MixtureConfig(alpha_min=0.0)


def requests(count=8, new=12, samples=1):
    return [
        Request(f"prompt {i}", j, 0, *map(tuple, PROMPTS[i % len(PROMPTS)]), new)
        for i in range(count)
        for j in range(samples)
    ]


@pytest.fixture(scope="module")
def engine(pair_models, tokenizers):
    return byte_engine(pair_models, tokenizers, FREE)


@pytest.fixture(scope="module")
def exact_engine(pair_models, tokenizers):
    """The same models in float64, where only a mistake makes a difference that can be seen."""
    doubles = [copy.deepcopy(model).double() for model in pair_models]
    return byte_engine(doubles, tokenizers, FREE)


def stock_of(engine):
    """By role, each model's own forward pass."""
    models = {role: runner.model for role, runner in engine.pair.runners.items()}
    return {
        role: stock_logits(model, model.lm_head.out_features, "sdpa")
        for role, model in models.items()
    }


@pytest.fixture(scope="module")
def stock(engine):
    return stock_of(engine)


@pytest.fixture(scope="module")
def exact_stock(exact_engine):
    return stock_of(exact_engine)


def drawn(completions):
    return {key: (c.token_ids, c.byte_level.text) for key, c in by_key(completions).items()}


class Recomputed:
    """A text drawn symbol by symbol from stock forward passes over whole contexts."""

    def __init__(self, engine, stock, request):
        self.request, self.stock = request, stock
        self.views = {
            role: ByteView(engine.tries[role], engine.options.byte_tolerance)
            for role in engine.roles
        }
        self.readers = {
            role: LawReader(
                engine.vocabulary.bytes_by_role[role],
                engine.tries[role],
                engine.mixture,
                role,
                engine.mode,
            )
            for role in engine.roles
        }
        self.mixer = SymbolMixer(engine.mixture, engine.mode)

    def settle(self):
        for role, view in self.views.items():
            while view.wanted:
                context = view.wanted[-1].context
                logits = self.stock[role]([*self.request.prompt_ids(role), *context])
                [law] = self.readers[role].read(torch.from_numpy(logits)[None], [context])
                view.receive(law)

    def draw(self, most):
        """Symbols and their traces until the end, or so many bytes."""
        text, rows = b"", []
        while len(text) < most:
            self.settle()
            laws = [view.law()[None] for view in self.views.values()]
            student = self.views.get("student")
            place = Place(
                self.request.noise_key,
                len(text),
                len(student.leading.context) if student else 0,
            )
            [symbol], [row] = self.mixer.draw(laws, [place])
            rows.append(row)
            if symbol == END:
                break
            text += bytes([symbol])
            for view in self.views.values():
                view.push(symbol)
        return text, rows


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("tolerance", [0.0005, 0.01])
def test_texts_and_traces_are_those_of_the_recomputation(
    exact_engine, exact_stock, tolerance, drafts
):
    """Guards: a cache that holds another hypothesis, rows of logits without a token (they are the
    largest here), a prompt of another row, an end in the middle of a token, a law made ahead for
    another context.
    """
    options = replace(exact_engine.options, byte_tolerance=tolerance, draft_tokens=drafts)
    view = exact_engine.view(options=options)
    done = list(view.generate(requests()))
    assert {c.finish_reason for c in done} == {"stop", "length"}
    assert (view.accepted > 0) == (drafts > 0)
    for c in done:
        text = c.byte_level.text.encode()
        expected, rows = Recomputed(view, exact_stock, c.request).draw(len(text) + 1)
        assert expected[: len(text)] == text
        ended = c.finish_reason == "stop"
        assert len(c.byte_level.trace) == len(text) + ended
        for name, column in c.byte_level.trace.columns.items():
            values = [row[TRACE_FIELDS.index(name)] for row in rows[: len(column)]]
            assert column == pytest.approx(values, rel=1e-6, abs=1e-6, nan_ok=True)


def test_texts_are_those_of_the_recomputation_in_float32(engine, stock):
    """Guards: as above, in the precision that is used on a CPU."""
    for c in engine.generate(requests()):
        text = c.byte_level.text.encode()
        expected, _ = Recomputed(engine, stock, c.request).draw(len(text) + 1)
        assert expected[: len(text)] == text


def test_texts_do_not_depend_on_the_batch(engine):
    """Guards: rows that move and leave their cache behind, noise of another row."""
    many = requests(8, new=8, samples=2)
    alone = drawn(c for r in many for c in engine.generate([r]))
    for batch_size, prefill_chunk in ((3, 2048), (64, 2048), (64, 3)):
        options = replace(engine.options, batch_size=batch_size, prefill_chunk=prefill_chunk)
        assert drawn(engine.view(options=options).generate(many[::-1])) == alone


def test_little_memory_changes_nothing(pair_models, tokenizers, engine):
    """Guards: a row whose views are lost when it gives up its memory."""
    many = requests(12, new=10)
    per_token = sum(runner.bytes_per_token for runner in engine.pair.runners.values())
    tight = byte_engine(
        pair_models, tokenizers, FREE, kv_memory_gib=per_token * 200 / 2**30, batch_size=12
    )
    assert drawn(tight.generate(many)) == drawn(engine.generate(many))
    tiny = tight.view(options=replace(tight.options, kv_memory_gib=per_token * 4 / 2**30))
    assert {c.finish_reason for c in tiny.generate(many)} == {"error"}
    assert all("raise kv_memory_gib" in c.error for c in tiny.generate(many))


PROMPTS_READ = [(97,), (98, 99, 97), (97,) * 9]


def walk_of_contexts(runner, steps=40):
    """Rows whose contexts grow and shrink at random: every context read, and its logits.

    Some passes read the last token of each context, others the last two of all rows.
    """
    rng = np.random.default_rng(0)
    rows = ContextRows(runner, 0, 1000, 3, 64)
    for row, prompt in enumerate(PROMPTS_READ):
        rows.place(row, prompt)
    rows.cache.make_room(np.full((3, 1), 64), 2)
    contexts = [()] * 3
    for step in range(steps):
        wanted = {}
        for row in range(3):
            kept = contexts[row][: rng.integers(0, len(contexts[row]) + 1)]
            contexts[row] = kept + tuple(rng.integers(95, 262, rng.integers(0, 3)).tolist())
            if rng.random() < 0.7:
                wanted[row] = contexts[row]
        if step % 4 == 3 and wanted and all(map(len, wanted.values())):
            counts = {row: 1 + (row + step) % 2 for row in wanted}
            found = rows.evaluate_ends({row: (wanted[row], counts[row]) for row in wanted})
            for row, logits in found.items():
                for place, each in enumerate(logits):
                    end = len(wanted[row]) - counts[row] + 1 + place
                    yield (*PROMPTS_READ[row], *wanted[row][:end]), each
        elif wanted:
            found = rows.evaluate(wanted)
            assert found.keys() == wanted.keys()
            for row, logits in found.items():
                yield (*PROMPTS_READ[row], *wanted[row]), logits
    assert rows.counts.tokens < steps * 3 * 2 * 2  # most of the contexts was not read again


def largest_difference(engine, stock):
    """Of the teacher's logits, and the largest of its logits."""
    difference = scale = 0.0
    for ids, logits in walk_of_contexts(engine.pair.runners["teacher"]):
        expected = stock["teacher"](ids)[: len(logits)]
        difference = max(difference, np.abs(logits.double().numpy() - expected).max())
        scale = max(scale, np.abs(expected).max())
    return difference, scale


def test_cached_contexts_have_the_logits_of_a_recomputation(exact_engine, exact_stock):
    """Guards: keys and values of tokens that were taken back, positions shifted by one, logits of
    another place. In float64 rounding is 1e-14.
    """
    difference, _ = largest_difference(exact_engine, exact_stock)
    assert difference < 1e-12


def test_in_float32_they_differ_by_rounding(engine, stock):
    """Guards: half precision on the way. Logits of 16 have steps of 2e-6, so 1e-6 is of them."""
    difference, scale = largest_difference(engine, stock)
    assert difference < 1e-6 * scale


def test_ids_are_the_students_own_for_the_text(engine, tokenizers):
    """Guards: ids of a hypothesis that the tokenizer would not give, more tokens than asked for,
    traces that are not one per token.
    """
    student = engine.vocabulary.bytes_by_role["student"]
    for c in engine.generate(requests(16, new=9)):
        ids = [index for index in c.token_ids if index not in engine.stop_ids]
        assert c.byte_level.canonical
        assert ids == continued_ids(tokenizers[0], student, c.byte_level.text)
        assert engine.vocabulary.decode(c.token_ids) == c.byte_level.text
        assert 1 <= len(c.token_ids) <= 9
        assert len(c.trace) == len(c.token_ids)
        assert (c.token_ids[-1] in engine.stop_ids) == (c.finish_reason == "stop")
        assert sum(c.trace["log_q"]) == pytest.approx(sum(c.byte_level.trace["log_q"]), abs=1e-4)


def test_ids_where_the_tokenizer_changes_the_text():
    """Guards: ids of another text than the one that was drawn: this student's tokenizer composes
    letters and accents.
    """
    accented = "e\u0301"
    letters = {byte: letter for letter, byte in byte_of_letter().items()}
    word = "".join(letters[byte] for byte in accented.encode())
    pair = [small_tokenizer((word,)) for _ in range(2)]
    pair[0].backend_tokenizer.normalizer = normalizers.NFC()
    models = [writing_model(seed, tokenizer) for seed, tokenizer in enumerate(pair)]
    for model, tokenizer in zip(models, pair, strict=True):
        model.lm_head.bias.data[tokenizer.convert_tokens_to_ids(word)] = 4.0
    engine = byte_engine(models, pair, FREE)
    changed = 0
    for c in engine.generate(requests(6, new=7)):
        ids = [index for index in c.token_ids if index not in engine.stop_ids]
        assert engine.vocabulary.bytes_by_role["student"].join(ids) == c.byte_level.text.encode()
        assert len(c.trace) == len(c.token_ids) <= 7
        assert c.byte_level.canonical == (accented not in c.byte_level.text)
        changed += not c.byte_level.canonical
    assert changed > 2


def test_fewer_tokens_are_the_first_of_more(engine):
    """Guards: a last token that is cut because the text ended within it. Where later bytes change
    how earlier ones are split, the texts agree all the same.
    """
    short = by_key(engine.generate(requests(12, new=5)))
    long = by_key(engine.generate(requests(12, new=14)))
    equal = 0
    for key, c in short.items():
        assert long[key].byte_level.text.startswith(c.byte_level.text)
        equal += c.token_ids == long[key].token_ids[:5]
    assert equal >= 10


def test_what_is_lost_follows_the_tolerance(engine):
    """Guards: a tolerance that is not used, and a loss that is not counted."""
    lost = []
    for tolerance in (0.05, 0.001):
        view = engine.view(options=replace(engine.options, byte_tolerance=tolerance))
        done = list(view.generate(requests()))
        lost.append(sum(sum(c.byte_level.lost.values()) for c in done))
        passes = sum(counts.contexts for counts in view.counts.values())
        lost.append(passes)
    assert lost[0] > 2 * lost[2] > 0
    assert lost[3] > lost[1]


def test_first_token_is_the_teachers(engine, stock):
    """Guards: a first byte of the teacher's and a second of the mixture."""
    mixture = MixtureConfig(alpha_min=0.0, force_first_token=True)
    count = 200
    many = [Request("forced", j, 3, (97, 98), (97,), 6) for j in range(count)]
    done = list(engine.view(mixture).generate(many))
    reader = LawReader(
        engine.vocabulary.bytes_by_role["teacher"], engine.tries["teacher"], mixture, "teacher"
    )
    [law] = reader.read(torch.from_numpy(stock["teacher"]([97]))[None], [()])
    words = engine.tries["teacher"].words
    for rank in np.argsort(-law.log_p)[:6]:  # a text may also come to begin so in other ways
        begun = [c for c in done if c.byte_level.text.encode().startswith(words[rank])]
        p = np.exp(law.log_p[rank])
        assert len(begun) / count > p - 4 * np.sqrt(p / count)
    assert all(c.byte_level.trace["alpha"][0] == 1 for c in done)
    assert any(c.byte_level.trace["alpha"][-1] < 1 for c in done)
    ended = [c for c in done if c.byte_level.text == ""]
    assert len(ended) / count == pytest.approx(law.end, abs=4 * np.sqrt(law.end / count))


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize(
    "mixture", [{"force_first_token": True}, {"teacher_support_top_k": 1}], ids=["forced", "top-k"]
)
def test_a_text_that_the_student_does_not_follow(mixture, drafts):
    """Guards: a text that fails, or a run that does, where the student is all but sure of a long
    token and the teacher alone draws another.
    """
    words = [["a" * 20 + "b"], ["a" * 20 + "c"]]
    pair = [small_tokenizer(each) for each in words]
    models = [writing_model(seed, tokenizer) for seed, tokenizer in enumerate(pair)]
    for model, tokenizer, (word,) in zip(models, pair, words, strict=True):
        model.lm_head.bias.data[tokenizer.convert_tokens_to_ids(word)] = 25.0
    engine = byte_engine(models, pair, MixtureConfig(**mixture), draft_tokens=drafts)
    for c in engine.generate(requests(4, new=30)):
        assert not c.error
        assert c.byte_level.text.startswith("a" * 20 + "c")
        assert c.byte_level.lost["student"] >= 1
        assert c.byte_level.lost["teacher"] < 1


def test_bad_logits_name_the_model(pair_models, tokenizers, engine):
    """Guards: NaN drawn as a byte, or one bad row that ends the others."""
    model = engine.pair.runners["teacher"].model
    before = model.model.embed_tokens.weight.data[100].clone()
    try:
        model.model.embed_tokens.weight.data[100] = float("nan")
        bad = Request("bad", 0, 0, (97,), (100, 97), 5)
        done = by_key(engine.generate([bad, *requests(3)]))
    finally:
        model.model.embed_tokens.weight.data[100] = before
    assert "the teacher gave logits with NaN" in done["bad", 0].error
    assert [c.error for c in done.values()].count("") == 3


def test_one_model_alone_writes_its_own_bytes(engine, stock):
    """Guards: the teacher's text in its own ids, or drawn with the student."""
    view = engine.view(mode="teacher")
    for c in view.generate(requests(4)):
        text = c.byte_level.text.encode()
        expected, _ = Recomputed(view, stock, c.request).draw(len(text) + 1)
        assert expected[: len(text)] == text
        assert engine.vocabulary.decode(c.token_ids) == c.byte_level.text
        assert c.byte_level.lost.keys() == {"teacher"}


def test_what_restricts_one_model_alone(engine, stock):
    """Guards: the mixture's options acting on one model, its own acting on bytes or not at all."""
    many = requests(4, samples=2)
    free = drawn(engine.view(mode="teacher").generate(many))
    support = MixtureConfig(teacher_support_top_k=1)
    assert drawn(engine.view(support, mode="teacher").generate(many)) == free
    for mode in ("teacher", "student"):
        view = engine.view(MixtureConfig(top_k=1), mode=mode)
        greedy = drawn(view.generate(many))
        assert greedy != free
        for c in view.generate(many):
            assert set(c.byte_level.trace["log_q"]) == {0}
        for (prompt, _), found in greedy.items():
            assert found == greedy[prompt, 0]
        [request, *_] = many
        ids = []
        while len(ids) < 12:
            logits = stock[mode]([*request.prompt_ids(mode), *ids])
            table = engine.vocabulary.bytes_by_role[mode]
            state = utf8.state_of(table.join(ids))
            known = [
                i for i, word in enumerate(table.of_id) if word and utf8.can_follow(state, word)
            ]
            known += table.end_ids if state == utf8.BETWEEN else ()
            ids.append(max(known, key=lambda i: logits[i]))
            if ids[-1] in table.end_ids:
                break
        assert greedy[request.key][1].encode().startswith(table.join(ids[:6]))


def test_options_without_a_byte_form_are_refused(engine):
    """Guards: options that are ignored."""
    with pytest.raises(ConfigError, match="top_p truncates q after mixing"):
        engine.view(MixtureConfig(top_p=0.9))
    with pytest.raises(ConfigError, match="top_tokens"):
        engine.view(options=replace(engine.options, top_tokens=3))
    with pytest.raises(ConfigError, match="cannot capture"):
        engine.view(capture=frozenset({"log_q"}))


def test_a_full_context_ends_the_text(engine):
    """Guards: positions beyond a model's last one."""
    request = Request("full", 0, 0, (97,), tuple([97] * (CONTEXT - 3)), 50)
    [c] = engine.generate([request])
    assert c.finish_reason in ("stop", "length")
    assert len(c.token_ids) <= 12
