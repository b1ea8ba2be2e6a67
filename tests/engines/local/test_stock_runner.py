"""Models that run with their own forward pass and cache."""

import contextlib
import io

import numpy as np
import pytest
import torch
import transformers

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


def greedy(model, prompts, new, batched=False, chunk=7, stop=None):
    """Argmax texts of all prompts at once, and the logits of every token."""
    runner = StockRunner(model, VOCAB, batched)
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
    texts, logits = greedy(model, prompts, 9, batched=True, stop=stop)
    for i, prompt in enumerate(prompts):
        [text], [alone] = greedy(model, [prompt], stop[i])
        assert text == texts[i]
        torch.testing.assert_close(alone, logits[i], rtol=1e-4, atol=1e-4)


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
