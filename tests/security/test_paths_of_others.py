"""A table of what Alice's commands refuse: a row is who prepared a path, the path, and the command that would use it.

The path is code or a file that the command would execute, copy or publish. It is refused with its name, its owner and
the right exit code, nothing is executed, no file of the other user changes, and no run and no shards appear.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.security.users import tree
from tests.synthetic import draw_image, encode

pytestmark = pytest.mark.long
EXECUTED = '#!/bin/sh\ntouch "$HOME/executed"\n'


@dataclass(frozen=True)
class Row:
    """``actor`` writes ``text`` to ``path``, below the folder that all can write to."""

    actor: str
    path: str
    text: str | bytes
    command: tuple[str, ...]
    """{path}, {sweep}, {site}, {desk}, {home}: see ``test_path_of_another_user_is_refused``."""
    code: int
    words: tuple[str, ...]
    """In stderr. {path} is the path, {owner} the user id of the actor."""
    before: Callable = lambda users, desk, path: None
    """What Alice, or an administrator, has done with the path."""
    within: str = ""
    """Folder of the command, below the shared folder."""


SUBMIT = ("jobs/submit.py", "{sweep}")
OWNER = "it belongs to uid {owner}"
SETTING = ("--sweep", "{sweep}", "--cluster", "{site}", "monitor.callbacks=[mine.py:Mine]", "--yes")
CALLBACK = "class Mine:\n    def step(self, view): pass\n"
PLACE = "data/"
AMBIGUOUS = ("ambiguous", "{folder}", "Type the path: ./")


def moved_beside_the_sweep(users, desk, path):
    """It still belongs to the actor."""
    path.rename(desk.place / "mine.py")


def linked_beside_the_sweep(users, desk, path):
    (desk.place / "mine.py").symlink_to(path)


def named_by(line):
    """Alice's own profile names the program."""

    def write(users, desk, path):
        with users.alice.acts():
            (users.alice.home / "mine.yaml").write_text(f"kind: local\n{line.format(path)}\n")

    return write


def program(line, *words):
    command = (*SUBMIT, "--cluster", "{home}/mine.yaml", *words)
    shown = "{path}: " + line.partition(":")[0] + ", in the cluster"
    return Row("mallory", "tools/program", EXECUTED, command, 77, (shown,), before=named_by(line))


def linked_as_metadata(users, desk, path):
    """The table is private to Alice; Mallory's link to it is in a folder of images."""
    with users.alice.acts():
        private = users.alice.home / "private.jsonl"
        private.write_text('{"file_name": "cat.png", "text": "a secret"}\n')
        private.chmod(0o600)
    with users.mallory.acts(umask=0):
        (path.parent / "metadata.jsonl").symlink_to(private)


PYTHON = "python: {}"
NOTIFY = "notify: [{}, x]"
SETUP = "setup: ['. {} || exit 78']"
PROFILE = "kind: local\npython: /bin/false\n"
ROWS = {
    "callback": Row(
        "mallory", "mine.py", CALLBACK, ("jobs/submit.py", *SETTING), 77, ("mine.py: ", OWNER), moved_beside_the_sweep
    ),
    "callback by a link": Row(
        "mallory", "mine.py", CALLBACK, ("jobs/submit.py", *SETTING), 77, ("mine.py", OWNER), linked_beside_the_sweep
    ),
    "profile in her folder": Row(
        "mallory", PLACE + "site.yaml", PROFILE, (*SUBMIT, "--cluster", "site.yaml", "--yes"), 77,
        ("site.yaml: the cluster profile is not trusted: it belongs to uid",), within=PLACE,
    ),
    "sweep with a shipped name": Row(
        "mallory", PLACE + "quickstart.yaml", "runs: {a: }\n", ("jobs/submit.py", "quickstart", "--dry-run"), 78,
        AMBIGUOUS, within=PLACE,
    ),
    "profile with a shipped name": Row(
        "mallory", PLACE + "local.yaml", PROFILE, (*SUBMIT, "--cluster", "local", "--dry-run"), 78, AMBIGUOUS,
        within=PLACE,
    ),
    "python, in a plan": program(PYTHON, "--dry-run"),
    "python": program(PYTHON, "--yes"),
    "notify, in a plan": program(NOTIFY, "--dry-run"),
    "notify": program(NOTIFY, "--yes"),
    "setup, in a plan": program(SETUP, "--dry-run"),
    "setup": program(SETUP, "--yes"),
    "link to private metadata": Row(
        "mallory", "imagefolder/train/cat.png", encode(draw_image(0, 16)),
        ("jobs", "shards", "make", "{shared}/imagefolder", "--out", "{home}/out"), 78, ("outside of the source",),
        linked_as_metadata,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, symlinks",
    # Links also without the kernel's own protection against them.
    [(name, protected) for name in ROWS for protected in ((0, 1) if "link" in name else (1,))],
    indirect=["symlinks"],
)
def test_path_of_another_user_is_refused(users, desk, name, symlinks):
    row = ROWS[name]
    actor = getattr(users, row.actor)
    home = users.alice.home
    path = users.shared / row.path
    actor.home.chmod(0o755)
    with actor.acts():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row.text if isinstance(row.text, bytes) else row.text.encode())
        path.chmod(0o755)
    if name == "link to private metadata":  # she also writes the link
        path.parent.chmod(0o777)
    row.before(users, desk, path)
    places = {"path": path, "sweep": desk.sweep, "site": desk.site, "home": home, "shared": users.shared}
    before = tree(users.shared)
    words = [word.format(**places) for word in row.command]
    done = users.alice.python(*words, cwd=users.shared / row.within, FLIP_RUNS=home / "runs")
    assert done.returncode == row.code, done.stderr
    for expected in row.words:
        assert expected.format(**places, owner=actor.uid, folder=path.parent) in done.stderr, done.stderr
    assert tree(users.shared) == before
    assert sorted(entry.name for entry in home.iterdir() if not entry.name.startswith(".")) in (
        [], ["mine.yaml"], ["private.jsonl"],
    )  # fmt: skip


def test_callback_file_of_her_own_is_executed(users, desk):
    """The control of the first rows: the owner alone makes the difference."""
    alice = users.alice
    file = desk.place / "mine.py"
    file.write_text(CALLBACK)
    os.chown(file, alice.uid, alice.uid)
    done = desk.submit(alice, alice.home / "runs", "monitor.callbacks=[mine.py:Mine]")
    assert done.returncode == 0, done.stderr
    desk.until_complete(alice, alice.home / "runs")
