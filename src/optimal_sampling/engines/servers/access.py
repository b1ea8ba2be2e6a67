"""How the servers of one model are reached: addresses, API key, deadlines. No HTTP."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from optimal_sampling.engines.servers.replies import CUT
from optimal_sampling.errors import ConfigError

__all__ = ["Access", "ApiKey", "address_of", "base_url"]

_HIDDEN = "[API key]"
_USUAL_NAME = re.compile("[A-Z_][A-Z0-9_]*")
_SHORT = 8
"""Characters below which a key may stand in other words by chance."""
_FEWEST_HIDDEN = 3
"""Characters of a key before a cut that are hidden."""


class ApiKey:
    """A secret that no representation shows. `reveal` gives it."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def __repr__(self) -> str:
        return "ApiKey(...)"

    def reveal(self) -> str:
        """The secret itself."""
        return self._secret

    def hidden_in(self, text: str) -> str:
        """A message without the secret, which a server may repeat, or the start of it, where the
        message is cut.

        Replies are read as they are: a key may be a word that they have, such as `token`. For that
        reason a short one is hidden where it is a word.
        """
        if len(self._secret) < _SHORT:
            return re.sub(rf"(?<!\w){re.escape(self._secret)}(?!\w)", _HIDDEN, text)
        written = json.dumps(self._secret)[1:-1]
        for form in (written.replace("/", "\\/"), written, repr(self._secret)[1:-1], self._secret):
            text = text.replace(form, _HIDDEN)
            for end in range(len(form) - 1, _FEWEST_HIDDEN - 1, -1):
                text = text.replace(form[:end] + CUT, _HIDDEN + CUT)
        return text

    @classmethod
    def from_environment(cls, variable: str, environment: Mapping[str, str] = os.environ) -> ApiKey:
        """The key in an environment variable. Raises ConfigError where there is none, which shows
        no text that may be a key in place of a name."""
        if variable not in environment and not _USUAL_NAME.fullmatch(variable):
            raise ConfigError(
                "the option for an API key takes the name of an environment variable, such as "
                "VLLM_API_KEY, and there is none of the name given (not shown: is it the key?)"
            )
        return cls._checked(environment.get(variable, ""), f"environment variable {variable}")

    @classmethod
    def from_file(cls, path: str | Path) -> ApiKey:
        """The key in a file, without white space around it. Raises ConfigError."""
        try:
            text = Path(path).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the API key file {path}: {error}") from error
        return cls._checked(text, f"API key file {path}")

    @classmethod
    def _checked(cls, text: str, place: str) -> ApiKey:
        secret = text.strip()
        if not secret:
            raise ConfigError(f"the {place} holds no API key; set it, or leave the option out")
        if not secret.isascii() or not secret.isprintable() or " " in secret:
            raise ConfigError(f"the {place} holds more than one API key: white space or non-ASCII")
        return cls(secret)


@dataclass(frozen=True)
class Access:
    """The servers of one model, and how long to try."""

    urls: tuple[str, ...]
    """Addresses, each of a server of the same model, with or without `/v1`."""
    model: str | None = None
    """Name of the model at the server; None: the only one that it has."""
    key: ApiKey | None = None
    """Sent as `Authorization: Bearer`."""
    vocab_size: int | None = None
    """Number of ids that are no padding, of the tokenizer; None: unknown."""
    deadline: float = 60.0
    """Seconds after which an attempt is given up."""
    retry_seconds: float = 300.0
    """Seconds during which a request is tried again; a server with a large model starts in that."""
    start_seconds: float = 10.0
    """Likewise when a run starts, at most: an address with a mistake is said soon."""
    most_in_flight: int = 256
    """Most requests at one server at once."""

    def __post_init__(self) -> None:
        if not self.urls:
            raise ConfigError("no address of a server is given, such as http://127.0.0.1:8000")
        addresses = [base_url(url) for url in self.urls]
        if len({*addresses}) < len(addresses):
            raise ConfigError(f"an address of a server is given twice: {', '.join(addresses)}")
        object.__setattr__(self, "urls", tuple(addresses))


def base_url(url: str) -> str:
    """The address without `/v1` and slashes at its end. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is no address of a server: {error}") from error
    if parts.username or parts.password:
        raise ConfigError(
            f"the address of {parts.hostname} holds a user name or a password, which logs would "
            "show; give a key by environment variable or file"
        )
    is_http = parts.scheme in ("http", "https") and parts.hostname
    is_clean = url.isprintable() and " " not in url and not (parts.query or parts.fragment)
    if not is_http or not is_clean:
        raise ConfigError(f"{url!r} is no address of a server, such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def address_of(host: str, port: int) -> str:
    """Address of a server at a host: a name, or a number of IPv4 or IPv6."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
