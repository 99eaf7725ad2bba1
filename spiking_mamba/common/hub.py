"""Whether the hub can be asked at all."""

import socket
import urllib.parse
import urllib.request

from huggingface_hub import constants

__all__ = ["unreachable"]


def unreachable() -> bool:
    """Whether the hub's name is not known here: told at once, where its client tries for most of a minute.

    Behind a proxy, which knows names by itself, it counts as reachable.
    """
    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False
