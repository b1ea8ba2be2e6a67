"""What a model's tokenizer and configs say about its tokens. Its weights are not touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimal_sampling.errors import MissingDependencyError, ModelError
from optimal_sampling.vocabulary.resolve import resolve_model

__all__ = ["ModelTokens", "load_tokens"]

_CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
)
_TOKENIZER_PACKAGES = ("sentencepiece", "protobuf", "tiktoken")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_MISTRAL_KINDS = {"mistral", "mistral3", "ministral", "ministral3", "mixtral", "pixtral", "voxtral"}


@dataclass(frozen=True)
class ModelTokens:
    """One model's side of the vocabulary."""

    name: str
    tokenizer: Any = field(repr=False, compare=False)
    end_ids: frozenset[int] = frozenset()
    """Ids at which the model ends a text: of its tokenizer, its config and its generation config together."""
    context: int | None = None
    """Most tokens of prompt and completion together; None where the config does not say."""
    rows: int | None = None
    """Rows of logits, which may be more than the tokenizer has ids; None where the config does not say."""

    @property
    def id_map(self) -> dict[int, str]:
        """Token of every id, added tokens included."""
        return {index: token for token, index in self.tokenizer.get_vocab().items()}

    @property
    def added_ids(self) -> frozenset[int]:
        """Ids that were added to the tokenizer after it was trained: markers, not words."""
        return frozenset(self.tokenizer.get_added_vocab().values())


def load_tokens(name: str, trust_remote_code: bool = False) -> ModelTokens:
    """Read tokenizer, config and generation config of a model by name.

    Raises ModelError where one of them cannot be read, MissingDependencyError where the tokenizer's kind needs a
    package that is not installed.
    """
    folder = resolve_model(name)
    with _quiet_transformers():
        config = _load_config(name, folder, trust_remote_code)
        tokenizer = _load_tokenizer(
            name, folder, trust_remote_code, str(getattr(config, "model_type", ""))
        )
        generation = _load_generation_config(folder)
    text_config = config.get_text_config()
    end_ids = _ids(tokenizer.eos_token_id)
    for source in (config, text_config, generation):
        end_ids |= _ids(getattr(source, "eos_token_id", None))
    return ModelTokens(
        name=name,
        tokenizer=tokenizer,
        end_ids=frozenset(end_ids),
        context=_first_int(text_config, _CONTEXT_NAMES),
        rows=_first_int(text_config, ("vocab_size",)),
    )


def _ids(value: object) -> set[int]:
    """Configs write no end token, one id, or a list of ids."""
    if value is None:
        return set()
    if isinstance(value, int):
        return {value} if value >= 0 else set()
    return {int(item) for item in value} if isinstance(value, (list, tuple, set)) else set()


def _first_int(config: object, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _load_config(name: str, folder: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(_cannot("config", name, folder, error)) from error


def _load_tokenizer(name: str, folder: str, trust_remote_code: bool, model_type: str) -> Any:
    from transformers import AutoTokenizer

    # Early Mistral tokenizer files split words by a wrong pattern. The flag mends those, leaves all others alone, and
    # keeps Transformers from changing to another tokenizer class just because `mistral_common` is installed.
    options = {"fix_mistral_regex": True} if model_type in _MISTRAL_KINDS else {}
    local = Path(folder)
    if local.is_dir() and not any((local / file).exists() for file in _TOKENIZER_FILES):
        raise ModelError(_no_tokenizer(name, folder))
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        # A missing package comes as ImportError or ValueError, and the package named is not always the missing one.
        if isinstance(error, ImportError) or any(
            package in str(error) for package in _TOKENIZER_PACKAGES
        ):
            raise MissingDependencyError(
                f"the tokenizer of model {name!r} is of a kind that needs one more package: "
                f"pip install {' '.join(_TOKENIZER_PACKAGES)} ({_reason(error)})"
            ) from error
        raise ModelError(_cannot("tokenizer", name, folder, error)) from error


def _no_tokenizer(name: str, folder: str) -> str:
    return f"the folder of model {name!r} has no tokenizer: looked for {', '.join(_TOKENIZER_FILES)} in {folder}"


def _load_generation_config(folder: str) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError as error:
        if (
            Path(folder) / "generation_config.json"
        ).exists():  # there, but not readable: its stop ids would be lost
            raise ModelError(_cannot("generation config", folder, folder, error)) from error
        return None  # a model need not have one
    except Exception as error:
        raise ModelError(_cannot("generation config", folder, folder, error)) from error


def _cannot(what: str, name: str, folder: str, error: Exception) -> str:
    message = f"cannot load the {what} of model {name!r}: {_reason(error)}"
    if "trust_remote_code" in str(error):
        return f"{message} Read that code first; then allow it with trust_remote_code."
    if Path(folder).is_dir():
        return message
    looked = str(Path(folder).absolute())
    return f"{message} There is no folder {looked!r} either. Is the name right, and can the hub be reached?"


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hints about tokenizer classes and padding tokens are for authors of models, not for who samples from them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
