"""Tests of the address of a name on this node."""

import socket

import pytest

from flip.runs import node_address

ELSEWHERE = "198.51.100.1"


def rows(*addresses):
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]


@pytest.mark.parametrize(
    "addresses, here",
    [([ELSEWHERE, "127.0.1.1", "127.0.0.1"], "127.0.1.1"), ([ELSEWHERE], ""), ([], "")],
)
def test_first_address_that_belongs_to_this_node_is_returned(addresses, here, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: rows(*addresses))
    assert node_address.address_here("n1") == here


@pytest.mark.parametrize("error", [OSError("unknown"), UnicodeError("label too long")])
def test_unknown_name_has_no_address_here(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert node_address.address_here("n1") == ""
