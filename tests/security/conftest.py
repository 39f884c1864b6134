"""Fixtures with real users; see ``tests.security.users``."""

import pytest

from tests.harness.user_command_line import UserCommandLine
from tests.security import users as harness
from tests.synthetic import make_dataset, make_tokenizer


@pytest.fixture(scope="session")
def mounts():
    """Script that opens the interpreter and the checkout to other users, computed once."""
    harness.require()
    return harness.mount_script()


@pytest.fixture
def users(mounts):
    """``alice`` and ``mallory`` in a folder of their own."""
    with harness.users(mounts) as accounts:
        yield accounts


@pytest.fixture(params=[0, 1], ids=["protected_symlinks=0", "protected_symlinks=1"])
def symlinks(request, mounts):
    """Attacks are tried with and without the kernel's own protection against links of other users in /tmp."""
    with harness.protected_symlinks(request.param):
        yield request.param


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Labelled images with their tokenizer."""
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=32, shards=2, size=32, classes=4)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture
def desk(users, data):
    return UserCommandLine(users, data)
