"""What a card says of how its text was drawn."""

from types import SimpleNamespace

import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.records.export.card import made_with


@pytest.mark.parametrize(
    ("mixture", "shown", "hidden"),
    [
        (MixtureConfig(), {"alpha min": "0.5", "top-k of q (1: greedy)": "-1"}, "veto min p"),
        (
            MixtureConfig(alpha_method="veto", veto_min_p=0.2, top_k=1),
            {"veto min p": "0.2", "top-k of q (1: greedy)": "1"},
            "alpha min",
        ),
        (MixtureConfig(alpha_method="arithmetic"), {"arithmetic weight": "0.5"}, "alpha max"),
    ],
)
def test_the_options_of_the_method(mixture, shown, hidden):
    """Guards: bounds of alpha on a card of text that has no alpha, and greedy text that is not
    called so."""
    lines = dict(made_with([SimpleNamespace(compared=vars(mixture), stages=())]))
    assert shown.items() <= lines.items()
    assert hidden not in lines
