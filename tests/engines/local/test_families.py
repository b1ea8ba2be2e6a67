"""Every causal family of Transformers runs as docs/models.md says, by the check at load."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
import transformers

from optimal_sampling.engines.local import model_check
from optimal_sampling.engines.local.loading import check_architecture
from optimal_sampling.engines.local.model_check import SmallCopy, check_small_copy
from optimal_sampling.engines.local.shrinking import shrink_config, small_model
from optimal_sampling.engines.local.slots.slot_attention import Group
from optimal_sampling.engines.local.slots.slot_runner import SlotRunner
from optimal_sampling.errors import ModelError
from tests.engines.local import families

QUICK = [
    "bloom",
    "deepseek_v3",
    "diffllama",
    "gemma3_text",
    "gpt2",
    "gpt_oss",
    "llama",
    "llama4_text",
    "mistral",
    "phimoe (LongRoPE and windows)",
    "qwen2 (windows)",
    "qwen2_5_vl (text)",
    "qwen2_moe (windows)",
    "qwen3",
    "rwkv",
    "roberta",
]
DOCS = Path(__file__).parents[3] / "docs" / "models.md"
ENGINE_DOCS = DOCS.with_name("local-engine.md")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def agrees_with_the_docs(name):
    assert families.outcome(name).row() in DOCS.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", QUICK)
def test_family_runs_as_documented(name):
    """Guards: a family that is sampled wrongly on texts longer than its windows or chunks."""
    agrees_with_the_docs(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*families.NAMES, *families.VARIANTS} - set(QUICK)))
def test_every_other_family_runs_as_documented(name):
    """Guards: a family that nobody has tried."""
    agrees_with_the_docs(name)


def documented():
    """Family -> how it runs, by the table."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    cells = [line.split("|") for line in lines if line.startswith("| ")][1:]
    return {family.strip(): kind.strip() for _, family, _, kind, *_ in cells}


def test_no_family_is_left_out():
    """Guards: a table that lists what works. Other versions of Transformers have other families."""
    version = f"Transformers {transformers.__version__}"
    if version not in DOCS.read_text(encoding="utf-8"):
        pytest.skip(f"this is {version}, and docs/models.md is of another one")
    assert list(documented()) == sorted([*families.NAMES, *families.VARIANTS])


def test_the_guide_lists_what_is_refused():
    """Guards: a list of refused models that is no longer true."""
    refused = [name for name, kind in documented().items() if kind in ("refused", "not testable")]
    text = " ".join(ENGINE_DOCS.read_text(encoding="utf-8").split())
    assert f"refused: {', '.join(refused)}." in text


WRONG_ON_LONG_TEXTS = {
    "llama4_text": "token 16 sees tokens 16-16, and would see 0-16",
    "qwen2_moe (windows)": "token 9 sees tokens 1-9, and would see 0-9",
    "phimoe (windows)": "token 9 sees tokens 1-9, and would see 0-9",
    "doge (windows)": "adds a bias to its attention scores",
}


@pytest.mark.parametrize("name", WRONG_ON_LONG_TEXTS)
def test_a_mask_that_is_not_implemented_is_named(name):
    """Guards: a window or chunk that the model hands over in its mask only."""
    with pytest.raises(ModelError) as error:
        SmallCopy(*families.config_of(name), "teacher").check_attention()
    assert WRONG_ON_LONG_TEXTS[name] in str(error.value)
    assert "the teacher model is a" in str(error.value)


CLEAR = {
    "diffllama": "calls a plugged-in attention function 2 times in a layer",
    "deepseek_v32": "reads the attention mask itself, to select keys",
    "glm_moe_dsa": "reads the attention mask itself, to select keys",
    "mamba": "in 0 of its 4 layers",
}


@pytest.mark.parametrize("name", CLEAR)
def test_refusals_say_why(name):
    """Guards: "3 of its 3 layers" and "'NoneType' object is not subscriptable" as reasons."""
    with pytest.raises(ModelError) as error:
        SmallCopy(*families.config_of(name), "student").check_attention()
    assert CLEAR[name] in str(error.value)


def test_logits_that_depend_on_the_batch_are_found(monkeypatch):
    """Guards: a maximum over the positions of the whole batch, whatever the model uses it for."""
    llama = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    original = llama.forward

    def scaled(self, x, position_ids):
        cos, sin = original(self, x, position_ids)
        return (cos, sin) if position_ids.max() < 40 else (cos * 0.5, sin * 0.5)

    monkeypatch.setattr(llama, "forward", scaled)
    with pytest.raises(ModelError, match=r"logits (depend on|differ)"):
        SmallCopy(*families.config_of("llama"), "teacher").check_attention()


def test_the_check_reaches_past_the_windows(monkeypatch):
    """Guards: a check of so few tokens that no window of the model ends within them."""
    original = Group.mask
    monkeypatch.setattr(Group, "mask", lambda self, window, dtype: original(self, None, dtype))
    with pytest.raises(ModelError, match="differ from its own forward pass on longer texts"):
        SmallCopy(*families.config_of("mistral"), "teacher").check_attention()


def test_the_check_feeds_prompts_in_chunks(monkeypatch):
    """Guards: chunked prefill that no check at load covers."""
    original = SlotRunner.forward

    def first_chunks_only(self, cache, tokens, start, idle=(), chunks=()):
        kept = [chunk for chunk in chunks if chunk.start == 0]
        return original(self, cache, tokens, start, idle, kept)

    monkeypatch.setattr(SlotRunner, "forward", first_chunks_only)
    with pytest.raises(ModelError, match="how its prompt is cut into chunks"):
        SmallCopy(*families.config_of("llama"), "teacher").check_attention()


def test_loading_checks_long_texts():
    """Guards: a check that exists and is not called when a model is loaded."""
    model = small_model(*families.config_of("qwen2_moe (windows)"), torch.float32)
    model.config.sliding_window = 25  # past the text of the first check
    with pytest.raises(ModelError, match="has a mask that this engine does not implement"):
        check_architecture(model, "teacher")


def test_the_check_is_made_once_for_a_configuration(monkeypatch):
    """Guards: seconds for every engine that is opened."""
    model = small_model(*families.config_of("llama"), torch.float32)
    check_small_copy(model, "teacher")
    monkeypatch.setattr(model_check, "SmallCopy", None)
    check_small_copy(model, "student")


@pytest.mark.parametrize("name", ["gemma3_text", "deepseek_v3", "qwen3_next", "llama4_text"])
def test_a_small_copy_has_every_kind_of_layer(name):
    """Guards: a small copy without the layers that matter."""
    _, config = families.config_of(name)
    small = shrink_config(config)
    for field in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        assert set(getattr(small, field, None) or []) == set(getattr(config, field, None) or [])
