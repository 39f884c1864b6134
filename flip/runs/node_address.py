"""The address of a name on this node. Standard library, Python >= 3.6."""

import ipaddress
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


def address_for_others(name: str) -> str:
    """The address of a name that belongs to this node, if other nodes can reach it; else "". There rank 0's store
    listens, for the name MASTER_ADDR; without such an address it listens on all interfaces."""
    address = address_here(name)
    if not address:
        return ""
    number = ipaddress.ip_address(address.partition("%")[0])
    return "" if number.is_loopback or number.is_link_local or number.is_unspecified else address
