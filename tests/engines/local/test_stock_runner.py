"""Models that run with their own forward pass and cache."""

import contextlib
import io
import warnings

import numpy as np
import pytest
import torch
import transformers

from optimal_sampling.engines.local.model_check import SmallCopy
from optimal_sampling.engines.local.scheduler import Chunk
from optimal_sampling.engines.local.shrinking import small_model
from optimal_sampling.engines.local.stock_runner import StockRunner
from tests.engines.local import families

FAMILIES = ["bloom", "falcon", "gptj", "jamba", "lfm2", "mamba2", "qwen3_next"]
VOCAB = 90
PROMPTS = ([5, 6, 7], list(range(10, 52)), [8, 9, 10, 11, 12], [12, 11, 10, 9, 8])
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def greedy(model, prompts, new, batching="single", chunk=7, stop=None):
    """Argmax texts of all prompts at once, and the logits of every token."""
    runner = StockRunner(model, VOCAB, batching)
    cache = runner.open_cache((0,), 0, 0)
    texts, logits = [list(p) for p in prompts], [[] for _ in prompts]
    chunks = [
        Chunk(i, at, text[:-1][at : at + chunk])
        for i, text in enumerate(texts)
        for at in range(0, len(text) - 1, chunk)
    ]
    for _ in range(new):
        start = np.array([len(text) - 1 for text in texts])
        idle = [i for i, p in enumerate(prompts) if stop and len(texts[i]) - len(p) >= stop[i]]
        found = runner.forward(
            cache, torch.tensor([[t[-1]] for t in texts]), start, idle, chunks
        ).logits
        chunks = []
        for i in set(range(len(texts))) - set(idle):
            logits[i].append(found[i, 0])
            texts[i].append(int(found[i, 0].argmax()))
    return texts, [torch.stack(x) for x in logits]


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_those_of_stock_generate(name):
    """Guards: a recurrent state or a position that is handed on wrongly."""
    model = small_model(*families.config_of(name))
    model.generation_config.eos_token_id = None
    texts, _ = greedy(model, PROMPTS, 12)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        stock = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=list(range(VOCAB, 96)),
        )
        assert text == stock[0].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_has_the_same_bits_in_any_batch(name):
    """Guards: rows that change with what shares their round."""
    model = small_model(*families.config_of(name), torch.float32)
    texts, logits = greedy(model, PROMPTS, 5)
    for i, prompt in enumerate(PROMPTS):
        [text], [alone] = greedy(model, [prompt], 5)
        assert text == texts[i]
        assert torch.equal(alone, logits[i])


@pytest.mark.parametrize("name", ["bloom", "lfm2", "mamba2", "qwen3_next"])
def test_rows_of_one_length_go_together_and_may_end_apart(name):
    """Guards: a batch whose remaining rows get another row's state when one has ended."""
    model = small_model(*families.config_of(name))
    prompts = [[a, a + 1, a + 2] for a in (5, 20, 40)]
    stop = (9, 3, 6)
    texts, logits = greedy(model, prompts, 9, "by_length", stop=stop)
    for i, prompt in enumerate(prompts):
        [text], [alone] = greedy(model, [prompt], stop[i])
        assert text == texts[i]
        torch.testing.assert_close(alone, logits[i], rtol=1e-4, atol=1e-4)


BATCHING = {
    "bloom": "merged",  # its ALiBi leaves NaN where filler comes first
    "falcon (ALiBi)": "padded",
    "gptj": "padded",
    "jamba": "padded",
    "lfm3": "padded",
    "mamba2": "padded",
    "qwen2_moe (windows)": "padded",
    "qwen3_next": "padded",
}
UNEVEN = ([5, 6, 7], list(range(10, 40)), [8, 9, 10, 11, 12, 13], [30], list(range(50, 62)))
STOPS = (14, 9, 3, 12, 6)
"""The longest row ends before shorter ones, which takes filler away."""


def growing(model, batching, late=2):
    """Logits of every token of UNEVEN and of a row that starts late, and the forward passes."""
    runner = StockRunner(model, VOCAB, batching)
    cache = runner.open_cache((0,), 0, 0)
    texts, logits = [list(p) for p in (*UNEVEN, [70, 71])], [[] for _ in range(6)]
    stops, passes = (*STOPS, 5), []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    for step in range(max(stops) + late):
        ready = [i for i in range(6) if len(logits[i]) < stops[i] and (i < 5 or step >= late)]
        new = [i for i in ready if not logits[i]]
        chunks = [Chunk(i, 0, texts[i][:-1]) for i in new if len(texts[i]) > 1]
        fed = torch.tensor([[text[-1]] for text in texts])
        at = np.array([len(text) - 1 for text in texts])
        idle = [i for i in range(6) if i not in ready]
        found = runner.forward(cache, fed, at, idle, chunks).logits
        for i in ready:
            logits[i].append(found[i, 0])
            texts[i].append(int(found[i, 0].argmax()))
    handle.remove()
    return texts, [torch.stack(x) for x in logits], len(passes)


@pytest.mark.parametrize("name", list(BATCHING))
def test_rows_of_all_lengths_go_together(name):
    """Guards: rows whose state, positions or mask know of the filler before them, a window that
    counts it, and a batch that is none."""
    if not families.exists(name):
        pytest.skip(f"Transformers {transformers.__version__} has no {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = SmallCopy(*families.config_of(name), "")
    assert small.check_own_cache() == BATCHING[name]
    model = small.model
    model.generation_config.eos_token_id = None
    texts, logits, passes = growing(model, BATCHING[name])
    alone_texts, alone, passes_alone = growing(model, "single")
    assert texts == alone_texts
    for one, other in zip(logits, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    starts = 1 if BATCHING[name] == "padded" else 5
    # each step is one pass, and every start one; a row that is late starts alone
    assert passes == (max(STOPS) - 1) + starts + 1
    assert passes_alone == sum(STOPS) + 5
    for prompt, text, stop in zip(UNEVEN, texts, STOPS, strict=False):
        stock = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=stop,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=list(range(VOCAB, 96)),
        )
        assert text == stock[0].tolist()


@pytest.mark.parametrize("name", ["mamba2", "jamba"])
def test_a_state_that_has_read_filler_is_found(name, monkeypatch):
    """Guards: a check that a model passes whose recurrent layers see the filler."""
    small = SmallCopy(*families.config_of(name), "")
    module = __import__(type(small.model).__module__, fromlist=["x"])
    if name == "mamba2":
        monkeypatch.setattr(module, "apply_mask_to_padding_states", lambda states, mask: states)
        assert small.check_own_cache() == "merged"
    else:
        [layer] = {type(m) for m in small.model.modules() if "MambaMixer" in type(m).__name__}
        forward = layer.forward
        monkeypatch.setattr(
            layer, "forward", lambda self, *a, attention_mask=None, **k: forward(self, *a, **k)
        )
        assert small.check_own_cache() == "merged"


wrong_in_5_17 = pytest.mark.skipif(
    transformers.__version__.startswith("5.17."),
    reason="its own cache gives other logits than none, and it is refused",
)


@pytest.mark.parametrize(
    "name",
    ["bart", pytest.param("roformer", marks=wrong_in_5_17), "phimoe (LongRoPE and windows)"],
)
def test_positions_that_count_filler_are_found(name):
    """Guards: positions taken from the length of the cache, and rotary factors that the longest
    row of a batch chooses."""
    small = SmallCopy(*families.config_of(name), "")
    assert small.check_own_cache() == "by_length"


def test_filler_goes_with_the_row_that_needed_it():
    """Guards: a cache that stays as wide as a text that has ended, beyond its memory budget."""
    model = small_model(*families.config_of("qwen2_moe (windows)"))
    runner = StockRunner(model, VOCAB, "padded")
    cache = runner.open_cache((0,), 0, 0)
    long, short = list(range(5, 45)), [50, 51, 52]
    fed = torch.tensor([[long[-1]], [short[-1]]])
    chunks = [Chunk(0, 0, long[:-1]), Chunk(1, 0, short[:-1])]
    cache.make_room(np.array([[40], [3]]), 1)
    assert cache.manager.held == 2 * 41 * runner.bytes_per_token + 2 * runner.bytes_per_row
    runner.forward(cache, fed, np.array([39, 2]), (), chunks)
    group = cache.rows[1].group
    assert group.ids.shape == (2, 40)
    runner.forward(cache, torch.tensor([[9], [9]]), np.array([40, 3]), [0])
    assert group.ids.shape == (1, 4)
    layers = group.kwargs["past_key_values"].layers
    assert {layer.keys.shape[2] for layer in layers} == {4}
    assert {layer.get_seq_length() for layer in layers} == {4}


def test_memory_of_rows_that_are_aligned_is_that_of_the_longest():
    """Guards: an admission that counts short rows by their own length beside a long one."""
    model = small_model(*families.config_of("gptj"))
    lengths = np.array([[40], [3]])
    sizes = {}
    for batching in ("by_length", "padded"):
        runner = StockRunner(model, VOCAB, batching)
        manager = runner.open_cache((0,), 0, 0).manager
        sizes[batching] = manager.bytes_needed(lengths, 1) - 2 * runner.bytes_per_row
    assert sizes == {
        "by_length": 45 * runner.bytes_per_token,
        "padded": 82 * runner.bytes_per_token,
    }


def test_a_row_that_moves_or_starts_again_keeps_its_text():
    """Guards: a slot whose new row continues the old one's state."""
    model = small_model(*families.config_of("mamba2"))
    runner = StockRunner(model, VOCAB)
    cache = runner.open_cache((0,), 0, 0)
    first, second = [5, 6, 7, 8], [30, 31, 32]
    fed = torch.tensor([[first[-1]], [second[-1]]])
    chunks = [Chunk(0, 0, first[:-1]), Chunk(1, 0, second[:-1])]
    runner.forward(cache, fed, np.array([3, 2]), (), chunks)
    cache.move(1, 0, 3)
    found = runner.forward(cache, torch.tensor([[9]]), np.array([3])).logits
    again = runner.forward(
        cache, torch.tensor([[9]]), np.array([3]), (), [Chunk(0, 0, second)]
    ).logits
    _, [expected] = greedy(model, [[*second, 9]], 1)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(again[0], expected)
    with pytest.raises(ValueError, match="slot 0 holds 4 tokens, not 9"):
        runner.forward(cache, torch.tensor([[9]]), np.array([9]))
