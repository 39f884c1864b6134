"""How an agent searches for the coordinator of its job."""

import socket

import pytest

from jobs.host.agents import contact
from jobs.host.agents.channel import CONTACT, new_key, publish
from tests.harness.common import free_port

ENVIRON = {"SLURMD_NODENAME": "n8", "SLURM_NODEID": "1"}


def test_search_without_published_address_has_no_errors_of_addresses(tmp_path):
    with pytest.raises(contact.NoCoordinator, match="not published its port") as caught:
        contact.find_coordinator(tmp_path / CONTACT, ["127.0.0.1"], ENVIRON, 0.1)
    assert caught.value.errors == {}


def test_search_names_the_error_of_each_address(tmp_path):
    port = free_port()
    publish(tmp_path / CONTACT, "127.0.0.1", port, new_key())
    with pytest.raises(contact.NoCoordinator) as caught:
        contact.find_coordinator(tmp_path / CONTACT, ["127.0.0.1", "n7.invalid"], ENVIRON, 0.1)
    errors = caught.value.errors
    assert list(errors) == ["127.0.0.1", "n7.invalid"], "the published address first, and each once"
    assert isinstance(errors["127.0.0.1"], ConnectionRefusedError)
    assert isinstance(errors["n7.invalid"], socket.gaierror)
    assert f"127.0.0.1, port {port}: " in str(caught.value) and f"; n7.invalid, port {port}: " in str(caught.value)
