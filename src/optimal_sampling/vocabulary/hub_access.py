"""Whether the hub's name can be resolved: without a network, its client tries for half a minute."""

from __future__ import annotations

import os
import socket
import time
import urllib.parse
import urllib.request

__all__ = ["hub_problem"]

_PAUSE = 1.0  # seconds before the second look


def hub_problem(pause: float = _PAUSE) -> str:
    """Why no request can reach the hub; "" where one may.

    Only where the name of the hub's host does not exist, twice: a name server that is slow or
    fails for a moment is left to the client's own retries, and so is a proxy, which looks names up
    itself.
    """
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    host = urllib.parse.urlsplit(endpoint).hostname or ""
    if urllib.request.getproxies() or not _is_unknown(host):
        return ""
    time.sleep(pause)
    return f"this machine finds no host {host} (is there a network?)" if _is_unknown(host) else ""


def _is_unknown(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        return error.errno in {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", None)}
    except OSError:
        return False
    return False
