"""One model by name: its folder or hub id, tokenizer, end tokens and sizes. Reads no weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from optimal_sampling import toy_pair
from optimal_sampling.config import expand_user
from optimal_sampling.errors import MissingDependencyError, ModelError, did_you_mean
from optimal_sampling.vocabulary.hub_access import hub_problem
from optimal_sampling.vocabulary.model_folder import check_model_folder
from optimal_sampling.vocabulary.turn_end import turn_end

__all__ = ["ModelTokens", "fetch_model", "load_tokens", "resolve_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

_CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
)
_UNUSED_FILES = ["*.bin", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.pt", "*.pth"]
"""Of a hub model: other forms of its weights than safetensors."""
_WEIGHTS = ["*.safetensors"]
_SECOND_COPIES = ["consolidated*.safetensors", "original/*"]
"""Of a hub model: its weights once more, for other programs."""
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
    """What the tokenizer and the configs of one model say about its tokens."""

    name: str
    tokenizer: Any = field(repr=False, compare=False)
    end_ids: frozenset[int] = frozenset()
    """Ids at which the model ends a text: of tokenizer, configs and chat template together."""
    turn_end: int | None = None
    """The one of them that only the chat template names."""
    context: int | None = None
    """Most tokens of prompt and completion together; None where the config does not say."""
    rows: int | None = None
    """Rows of logits, at least the ids of the tokenizer; None where the config does not say."""

    @cached_property
    def id_map(self) -> dict[int, str]:
        """Token of every id, added tokens included."""
        return {index: token for token, index in self.tokenizer.get_vocab().items()}

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids added to the tokenizer after it was trained: markers, not words."""
        return frozenset(self.tokenizer.get_added_vocab().values())


def resolve_model(name: str, revision: str | None = None, *, weights: bool = False) -> str:
    """The folder of a shipped model, an existing folder, or a hub id.

    Of a hub id with a `revision`, the folder that holds its files of that revision, with or without
    the weights. Otherwise only names and folders are checked: a hub id that does not exist is an
    error when it is loaded. Raises ModelError where a folder is meant and is missing, has no
    `config.json`, or is given a revision, and where a revision cannot be downloaded.
    """
    found = _resolve_name(name)
    if revision is None:
        return found
    if found != name or Path(found).is_dir():
        raise ModelError(f"model {name!r} is a folder, which has no revision {revision!r}")
    return _download(name, revision, _UNUSED_FILES if weights else [*_UNUSED_FILES, *_WEIGHTS])


def fetch_model(name: str, revision: str | None = None) -> None:
    """Download what of a hub model is not here yet, weights included; nothing for a folder.

    Raises ModelError.
    """
    found = resolve_model(name, revision, weights=True)
    if not Path(found).is_dir():
        _download(name, None, [*_UNUSED_FILES, *_SECOND_COPIES])


def _download(name: str, revision: str | None, unused: list[str]) -> str:
    """The folder of a hub model, but for files of some patterns. Raises ModelError."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision, ignore_patterns=unused)
    except Exception as error:  # of the hub, the network or the disk: any class
        what = f"model {name!r}" if revision is None else f"revision {revision!r} of model {name!r}"
        raise ModelError(f"cannot download {what}: {_reason(error)}") from error


def _resolve_name(name: str) -> str:
    if not name.strip():
        raise ModelError(
            "the name of a model is empty; "
            "give a folder, a hub id, or `toy-teacher` / `toy-student`"
        )
    if name in toy_pair.NAMES:
        return _model_folder(name, toy_pair.path(name))
    try:
        folder = expand_user(name)
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except OSError as error:  # a name too long for the disk
        raise ModelError(f"{name[:200]!r} is no name of a model: {error}") from error
    if is_folder:
        return _model_folder(name, folder)
    if is_file:
        raise ModelError(f"{name!r} is a file; a model is the folder that holds its config.json")
    if name.startswith((".", "~", "/", "\\")) or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"there is no model at {name!r}: looked for the folder {folder.absolute()}"
        )
    if near := did_you_mean(name, toy_pair.NAMES):
        raise ModelError(f"there is no model {name!r}{near}")
    return name


def _model_folder(name: str, folder: Path) -> str:
    check_model_folder(name, folder)
    return str(folder)


def load_tokens(
    name: str, trust_remote_code: bool = False, revision: str | None = None
) -> ModelTokens:
    """Read tokenizer, config and generation config of a model by name.

    Raises ModelError where one of them cannot be read, MissingDependencyError where the tokenizer
    needs a package that is not installed.
    """
    _check_hub(name, revision)
    folder = resolve_model(name, revision)
    with _quiet_transformers():
        config = _load_config(name, folder, trust_remote_code)
        model_type = str(getattr(config, "model_type", ""))
        tokenizer = _load_tokenizer(name, folder, trust_remote_code, model_type)
        generation = _load_generation_config(folder)
    text_config = config.get_text_config()
    sources = {"tokenizer": tokenizer, "config.json": config, "text_config": text_config}
    sources["generation_config.json"] = generation
    end_ids: set[int] = set()
    for source, settings in sources.items():
        end_ids |= _end_ids(name, source, getattr(settings, "eos_token_id", None))
    end_of_turn = turn_end(tokenizer, end_ids)
    return ModelTokens(
        name=name,
        tokenizer=tokenizer,
        end_ids=frozenset(end_ids if end_of_turn is None else {*end_ids, end_of_turn}),
        turn_end=end_of_turn,
        context=_first_int(text_config, _CONTEXT_NAMES),
        rows=_first_int(text_config, ("vocab_size",)),
    )


def _check_hub(name: str, revision: str | None) -> None:
    """Raises ModelError for a hub id of which no file is here, where the hub is out of reach."""
    from huggingface_hub import try_to_load_from_cache

    found = _resolve_name(name)
    if Path(found).is_dir() or try_to_load_from_cache(found, "config.json", revision=revision):
        return
    if problem := hub_problem():
        raise ModelError(
            f"cannot load model {name!r}: there is no folder {str(Path(name).absolute())!r}, "
            f"nothing of that name was downloaded before, and {problem}"
        )


def _end_ids(name: str, source: str, value: Any) -> set[int]:
    """End ids as configs write them: none, one id, or a list of ids; -1 stands for none.

    Raises ModelError for other values: an end that is not noticed makes every text run on.
    """
    items = value if isinstance(value, (list, tuple, set)) else [] if value is None else [value]
    if any(type(item) not in (int, float) or item % 1 for item in items):
        raise ModelError(
            f"eos_token_id of model {name!r} is {value!r} in its {source}: "
            "it has to be an id or a list of ids"
        )
    return {int(item) for item in items if item >= 0}


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

    # Early Mistral tokenizer files split words by a wrong pattern. The flag corrects those, leaves
    # all others alone, and keeps Transformers from changing to another tokenizer class just because
    # `mistral_common` is installed.
    options = {"fix_mistral_regex": True} if model_type in _MISTRAL_KINDS else {}
    local = Path(folder)
    if local.is_dir() and not any((local / file).exists() for file in _TOKENIZER_FILES):
        raise ModelError(
            f"the folder of model {name!r} has no tokenizer: "
            f"looked for {', '.join(_TOKENIZER_FILES)} in {folder}"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        if _needs_package(error):
            raise MissingDependencyError(
                f"the tokenizer of model {name!r} is of a kind that needs one more package: "
                f"pip install {' '.join(_TOKENIZER_PACKAGES)} ({_reason(error)})"
            ) from error
        raise ModelError(_cannot("tokenizer", name, folder, error)) from error


def _needs_package(error: Exception) -> bool:
    """A missing package is an ImportError or a ValueError, which may name another package."""
    text = str(error)
    return isinstance(error, ImportError) or any(name in text for name in _TOKENIZER_PACKAGES)


def _load_generation_config(folder: str) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:
        absent = not (Path(folder) / "generation_config.json").exists()
        if absent and isinstance(error, OSError):
            return None  # a model need not have one
        raise ModelError(_cannot("generation config", folder, folder, error)) from error


def _cannot(what: str, name: str, folder: str, error: Exception) -> str:
    message = f"cannot load the {what} of model {name!r}: {_reason(error)}"
    if "trust_remote_code" in str(error):
        return f"{message} Read that code first; then allow it with trust_remote_code."
    if Path(folder).is_dir():
        return message
    looked = str(Path(folder).absolute())
    return (
        f"{message} There is no folder {looked!r} either. "
        "Is the name right, and can the hub be reached?"
    )


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    text = " ".join(str(error).split()) or kind
    if isinstance(error, KeyError):  # its text is the key alone
        text = f"{kind}: {text}"
    return text if text.endswith((".", "!", "?")) else f"{text}."


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Transformers without its hints about tokenizer classes and padding tokens."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
