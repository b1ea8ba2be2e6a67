"""The output of the vLLM class in a notebook; that of the local class is in test_local.py."""

import pickle

from tokenizers import Tokenizer

from optimal_sampling import OptimalSamplingOutput, toy_pair
from optimal_sampling.spans import reader_of


def output_of(texts, statistics):
    tokenizer = Tokenizer.from_file(str(toy_pair.path("toy-student") / "tokenizer.json"))
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    ids[0].append(tokenizer.token_to_id("<|end|>"))
    numbers = [len(each) for each in ids]
    stats = {"per_request": statistics(numbers)} if statistics else None
    return OptimalSamplingOutput(
        texts, ids, numbers, stats, ["stop", "length"], ["", ""], reader_of("toy-student")
    )


def test_the_output_of_vllm_is_coloured_text():
    """Guards: an output that a notebook shows as lists of ids, an end token shown as text, markup
    that runs, numbers of another completion, and a tokenizer that is pickled."""

    def statistics(numbers):
        alphas = [0.0, 1.0]
        return [
            {"alpha": [alpha] * n, "kl_theta": [0.5] * n, "kl_t": [0.5] * n}
            for alpha, n in zip(alphas, numbers, strict=True)
        ]

    output = output_of(["1+1", "<b>x"], statistics)
    html = output._repr_html_()
    first, second = html.split("prompt 1: length")
    assert "the first 2 of 2 completions" in first
    assert "prompt 0: stop" in first
    assert "end|" not in first
    assert "rgba(44,110,187," not in html  # an alpha that is 0 everywhere says nothing
    assert first.count('title="KL to student 0.5, KL to teacher 0.5"') == 3
    assert "<b>" not in second
    assert "&lt;" in second
    assert "no tokenizer" in pickle.loads(pickle.dumps(output))._repr_html_()


def test_an_output_without_statistics_has_its_text():
    """Guards: an error in the cell of a sampler without `track_alpha_stats`."""
    html = output_of(["1+1", "2"], None)._repr_html_()
    assert html.count("<span>") == 4
