"""LongRoPE with factors per row."""

import copy

import pytest
import torch

from optimal_sampling.engines.local.rotary import LONG, split_by_row
from optimal_sampling.engines.local.shrinking import small_model
from tests.engines.local import families

LONGROPE = [name for name in families.VARIANTS if "LongRoPE" in name]
SWITCH = 24


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LONGROPE)
def test_every_row_of_a_batch_has_the_factors_of_its_own_length(name):
    """Guards: a short row that changes with the longest row of its batch."""
    stock = small_model(*families.config_of(name))
    model = copy.deepcopy(stock)
    assert split_by_row(model) == SWITCH
    assert split_by_row(model) == SWITCH
    ids = torch.randint(4, 90, (3, 40), generator=torch.Generator().manual_seed(0))
    lengths = (SWITCH, SWITCH + 1, 40)
    positions = torch.arange(40).repeat(3, 1)
    positions += LONG * torch.tensor([length > SWITCH for length in lengths])[:, None]
    positions[0, SWITCH:] = 0
    with torch.inference_mode():
        found = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for row, length in enumerate(lengths):
            expected = stock(input_ids=ids[row : row + 1, :length], use_cache=False).logits[0]
            torch.testing.assert_close(found[row, :length], expected, rtol=1e-9, atol=1e-9)
        # the test can tell: without the mark the second row differs
        other = stock(input_ids=ids[1:2], use_cache=False).logits[0, :SWITCH]
        short = stock(input_ids=ids[1:2, :SWITCH], use_cache=False).logits[0]
    assert (other - short).abs().max() > 0.01


def test_other_embeddings_are_left_alone():
    """Guards: every model paying for two sets of factors."""
    assert split_by_row(small_model(*families.config_of("llama"))) is None
