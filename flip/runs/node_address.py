"""The address of a name on this node. Standard library, Python >= 3.6."""

import socket


def address_here(name: str) -> str:
    """The first address of a name that belongs to this node, so that a server can listen there; "" if none does."""
    try:
        addresses = socket.getaddrinfo(name, None, 0, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ""
    for family, kind, _, _, address in addresses:
        try:
            with socket.socket(family, kind) as probe:
                probe.bind(address)
        except OSError:
            continue
        return str(address[0])
    return ""
