"""Fixtures with real users; see ``tests.security.users``."""

import pytest

from tests.security import users as harness


@pytest.fixture(scope="session")
def mounts():
    """What opens the interpreter and the checkout to other users, found out once."""
    harness.require()
    return harness.mount_script()


@pytest.fixture
def users(mounts):
    """``alice`` and ``mallory`` in a folder of their own."""
    with harness.users(mounts) as made:
        yield made


@pytest.fixture(params=[0, 1], ids=["protected_symlinks=0", "protected_symlinks=1"])
def symlinks(request, mounts):
    """Attacks are tried with and without the kernel's own protection against links of other users in /tmp."""
    with harness.protected_symlinks(request.param):
        yield request.param
