"""Tests of the address of a name on this node."""

import ipaddress
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


@pytest.mark.parametrize("address", ["127.0.1.1", str(ipaddress.IPv4Address(0)), ""])
def test_address_that_other_nodes_cannot_reach_is_none_for_them(address, monkeypatch):
    monkeypatch.setattr(node_address, "address_here", lambda name: address)
    assert node_address.address_for_others("n1") == ""
    monkeypatch.setattr(node_address, "address_here", lambda name: "fd00::1%eth0")
    assert node_address.address_for_others("n1") == "fd00::1%eth0"


@pytest.mark.parametrize("error", [OSError("unknown"), UnicodeError("label too long")])
def test_unknown_name_has_no_address_here(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert node_address.address_here("n1") == ""
