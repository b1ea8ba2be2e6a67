"""The end of a turn, from chat templates as families of models write them; ids in configs."""

import json
import shutil

import pytest

from optimal_sampling import toy_pair
from optimal_sampling.errors import ModelError
from optimal_sampling.vocabulary import ModelTokens, Vocabulary, load_tokens
from optimal_sampling.vocabulary.turn_end import turn_end
from tests.vocabulary.conftest import CHATML, END, TEXT_END, make_tokenizer

EACH = "{%- for m in messages -%}"
PROMPT = "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
TEMPLATES = {
    "chatml": CHATML,
    "always opens the next turn": CHATML.replace("if add_generation_prompt", "if true"),
    "parts": EACH
    + "<|im_start|>{{ m.role }}\n{%- for c in m.content -%}{{ c.text }}{%- endfor -%}<|im_end|>"
    + "{%- endfor -%}",
    "a space before": EACH + "<|im_start|>{{ m.content }} <|im_end|>\n\n{%- endfor -%}",
    "no opening": EACH + "{{ m.content }}<|im_end|>{%- endfor -%}",
    "an inner marker": EACH + "<|im_start|>{{ m.content }}</think><|im_end|>{%- endfor -%}",
    "only between turns": EACH
    + "{{ m.content }}{%- if not loop.last -%}<|im_end|>{%- endif -%}{%- endfor -%}",
    "the conversation's end behind it": EACH
    + "<|im_start|>{{ m.content }}<|im_end|>\n{%- endfor -%}"
    + "{%- if not add_generation_prompt -%}<|endoftext|>{%- endif -%}",
    "the next role": EACH
    + "{%- if m.role == 'user' -%}<|im_end|>{%- else -%}<|im_start|>{%- endif -%}{{ m.content }}"
    + "{%- endfor -%}",
}


def tokens(template, eos=TEXT_END):
    tokenizer = make_tokenizer(eos=eos, chat_template=template)
    ends = {tokenizer.eos_token_id}
    found = turn_end(tokenizer, ends)
    added = set() if found is None else {found}
    return ModelTokens("m", tokenizer, frozenset(ends | added), turn_end=found)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_a_turn_is_found_and_said(name):
    """Guards: completions that run on through the turns of a conversation with themselves."""
    model = tokens(TEMPLATES[name])
    end = model.tokenizer.convert_tokens_to_ids(END)
    assert model.turn_end == end
    vocabulary = Vocabulary.share(model, model)
    assert {end, model.tokenizer.eos_token_id} <= vocabulary.stop_ids
    assert any(END in note and str(end) in note for note in vocabulary.notes)


SILENT = {
    "the config's own": (CHATML, END),
    "no template": (None, TEXT_END),
    "plain text": (EACH + "{{ m.role }}: {{ m.content }}\n\n{%- endfor -%}", TEXT_END),
    "refuses replies": ("{{ raise_exception('one turn only') }}", TEXT_END),
    "broken": ("{% for m in messages %}{{ m.content }", TEXT_END),
    "leaves replies out": ("{{ messages[0].content }}<|im_end|>", TEXT_END),
    "harmony: the last turn ends as the config says": (
        EACH
        + "<|im_start|>{{ m.content }}{%- if loop.last -%}<|im_end|>{%- else -%}</think>"
        + "{%- endif -%}{%- endfor -%}",
        END,
    ),
    "the config's own after a closing marker": (
        EACH + "<|im_start|>{{ m.content }}</think><|im_end|>\n{%- endfor -%}",
        END,
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_no_end_is_made_up(name):
    """Guards: a marker inside of turns, or a common word, that ends completions too early."""
    template, eos = SILENT[name]
    model = tokens(template, eos)
    assert model.turn_end is None
    assert not any("ends turns" in note for note in Vocabulary.share(model, model).notes)


def folder_with(tmp_path, file, value):
    folder = tmp_path / "model"
    shutil.copytree(toy_pair.path("toy-student"), folder)
    settings = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(settings | {"eos_token_id": value}))
    return str(folder)


@pytest.mark.parametrize("value", [[2, None], [[2]], "2", ["2"], 2.5, True, {"a": 2}, [2, [3]]])
def test_an_end_id_that_is_none_is_an_error(tmp_path, value):
    """Guards: a traceback, and an end that is lost, so that every completion runs on."""
    with pytest.raises(ModelError, match=r"eos_token_id|generation config"):
        load_tokens(folder_with(tmp_path, "generation_config.json", value))


@pytest.mark.parametrize("value", [2, 2.0, [2], [2, 3], [2, 2], [2.0], [2, -1]])
def test_an_end_id_in_any_form_that_stock_takes_ends_texts(tmp_path, value):
    """Guards: a float that is not taken for an id."""
    assert 2 in load_tokens(folder_with(tmp_path, "generation_config.json", value)).end_ids


@pytest.mark.parametrize("value", [[2, None], [[2]], "2", 2.5])
def test_an_end_id_of_the_config_that_is_none_is_an_error(tmp_path, value):
    """Guards: the same in config.json, which Transformers checks in part."""
    with pytest.raises(ModelError):
        load_tokens(folder_with(tmp_path, "config.json", value))
