"""Real users for tests of the boundary between them: processes with user ids of their own, started by root.

The users are numbers without entries in /etc/passwd, as in many containers. All of them can enter the folder of a test;
the interpreter and the checkout may lie where they cannot, for example below a /root of mode 0700. Their processes then
run in a private mount namespace, in which an empty folder covers the closed one, and the folders that Python and the
checkout need are mounted back into it. Nothing changes for other processes of the machine.
"""

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_site import lacking

ROOT = Path(__file__).resolve().parents[2]
ALICE = 60501
BOB = 60502
MALLORY = 60503
TEAM = 60600
"""Three user ids, each with a group of the same number, and a group that users can share."""

PROBE = "import flip.files.ownership, jobs.submitted_runs.select, omegaconf, numpy"
"""Imports from the checkout and from the installed packages."""


def require() -> None:
    """Skip the calling test if this process cannot start processes of other users; fail if FLIP_REQUIRE_SLURM=1."""
    if os.geteuid() != 0:
        lacking("only root can start processes of other users")
    missing = [name for name in ("setpriv", "unshare", "mount") if shutil.which(name) is None]
    if missing:
        lacking(f"{', '.join(missing)}: not on PATH (Debian: util-linux and mount)")


class User:
    """One user id. ``home`` is a folder that only this user can enter."""

    def __init__(self, uid: int, folder: Path, mounts: str) -> None:
        self.uid = uid
        self.gid = uid
        self.folder = folder
        self.home = folder / str(uid)
        self._mounts = mounts
        self.home.mkdir(mode=0o700)
        os.chown(self.home, uid, uid)

    def run(
        self, *arguments, umask=0o022, groups=(), cwd=None, timeout=60.0, **environment
    ) -> subprocess.CompletedProcess:
        """Run a command as this user with a small environment of its own, and return its exit code and outputs."""
        basic = {"PATH": os.defpath, "HOME": str(self.home), "TMPDIR": str(self.folder / "tmp"), "OMP_NUM_THREADS": "1"}
        if groups:
            extra = ["--groups", ",".join(map(str, groups))]
        else:
            extra = ["--clear-groups"]
        command = ["setpriv", "--reuid", str(self.uid), "--regid", str(self.gid), *extra, "--no-new-privs", "--"]
        script = f'{self._mounts}\numask {umask:03o}\ncd "$0" || exit 127\nexec "$@"'
        shell = ["sh", "-c", script, str(cwd or self.home), *command, *map(str, arguments)]
        if self._mounts:
            isolated = ["unshare", "--mount", "--propagation", "private", *shell]
        else:
            isolated = shell
        variables = {name: str(value) for name, value in {**basic, **environment}.items() if value is not None}
        return subprocess.run(
            isolated, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )

    def python(self, *arguments, **options) -> subprocess.CompletedProcess:
        """``run`` the interpreter of the tests; a first argument ``jobs`` or ``X.py`` is code of the checkout."""
        if arguments[0] == "jobs" or str(arguments[0]).endswith(".py"):
            return self.run(sys.executable, ROOT / arguments[0], *arguments[1:], **options)
        return self.run(sys.executable, *arguments, **{"PYTHONPATH": ROOT, **options})

    @contextlib.contextmanager
    def acts(self, umask: int = 0o022, groups=()) -> Iterator[None]:
        """Let this process read and write files as the user within the context."""
        before = os.getgroups()
        mask = os.umask(umask)
        os.setgroups([self.gid, *groups])
        os.setegid(self.gid)
        os.seteuid(self.uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(before)
            os.umask(mask)


class Users:
    """``alice``, ``bob`` and ``mallory``, and ``folder``, which all can enter, with a ``shared`` place and a ``tmp``.

    ``shared`` and ``tmp`` have mode 1777: every user can write there, and delete only what is their own.
    """

    def __init__(self, folder: Path, mounts: str) -> None:
        self.folder = folder
        self.shared = folder / "shared"
        for place in (self.shared, folder / "tmp"):
            place.mkdir()
            place.chmod(0o1777)
        self.alice, self.bob, self.mallory = (User(uid, folder, mounts) for uid in (ALICE, BOB, MALLORY))

    def end_processes(self) -> None:
        """Kill remaining processes of the users, found by their user id and by this folder in their HOME."""
        mark = f"HOME={self.folder}/".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if entry.stat().st_uid in (ALICE, BOB, MALLORY) and mark in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)


@contextlib.contextmanager
def users(mounts: str) -> Iterator[Users]:
    """Users with a new folder, which is deleted at the end. ``mounts``: see ``mount_script``."""
    folder = Path(tempfile.mkdtemp(prefix="flip-users-", dir=open_place()))
    folder.chmod(0o755)
    accounts = Users(folder, mounts)
    try:
        yield accounts
    finally:
        accounts.end_processes()
        shutil.rmtree(folder)


@contextlib.contextmanager
def protected_symlinks(value: int) -> Iterator[None]:
    """Set the sysctl, which is the whole machine's, and put it back; other processes that set it here wait.

    Skips the calling test if the sysctl has another value and cannot be changed.
    """
    with open("/proc/sys/fs/protected_symlinks", "rb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = int(file.read())
        try:
            set_sysctl(file.name, value)
        except OSError as error:
            if before != value:
                pytest.skip(f"fs.protected_symlinks is {before} and cannot be changed here: {error.strerror}")
        try:
            yield
        finally:
            if before != value:
                set_sysctl(file.name, before)


def set_sysctl(path: str, value: int) -> None:
    with open(path, "w") as file:
        file.write(str(value))


def open_place() -> str:
    """A folder for temporary files that every user can enter."""
    for place in dict.fromkeys([tempfile.gettempdir(), "/tmp", "/var/tmp"]):
        if os.path.isdir(place) and not closed(Path(place).resolve()):
            return place
    lacking("no folder for temporary files that other users can enter: set TMPDIR")


# -- the interpreter and the checkout, where other users cannot reach them ---------------------------------------------


def mount_script() -> str:
    """Lines of a shell script that open the interpreter, its packages and the checkout to other users, in the mount
    namespace in which it runs; "" if they are open. Checked by an import as another user; fails with what is closed.
    """
    places = [place for place in required_folders() if closed(place)]
    if unreachable := [place for place in places if place in closed(place)]:
        lacking(f"other users cannot enter {', '.join(map(str, unreachable))}: chmod o+rx")
    outermost = {closed(place)[0] for place in places}
    script = ""
    if places:
        script = cover(sorted(folder for folder in outermost if not outermost & {*folder.parents}), places)
    with users(script) as accounts:
        done = accounts.alice.python("-c", PROBE)
    if done.returncode:
        lacking(f"another user cannot run {sys.executable} with the checkout {ROOT}: {done.stderr.strip()}")
    return script


def cover(folders: list[Path], places: list[Path]) -> str:
    """The script that puts an empty folder over each of ``folders`` and mounts ``places`` back into them."""
    lines = ["set -e", "stash=$(mktemp -d)", "mount -t tmpfs -o mode=755 flip-users $stash"]
    for number, place in enumerate(places):
        lines += [f"mkdir $stash/{number}", f"mount --rbind {shlex.quote(str(place))} $stash/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 flip-users {shlex.quote(str(folder))}" for folder in folders]
    for number, place in enumerate(places):
        lines += [f"mkdir -p {shlex.quote(str(place))}", f"mount --rbind $stash/{number} {shlex.quote(str(place))}"]
    return "\n".join([*lines, "umount -l $stash", "rmdir $stash", "set +e"])


def required_folders() -> list[Path]:
    """Folders that a process of the tests' interpreter reads, without those inside another that is as closed."""
    roots = [Path(sys.prefix), Path(sys.base_prefix), ROOT, *(Path(path).absolute() for path in sys.path if path)]
    folders = {folder for path in [Path(sys.executable), *roots] if path.exists() for folder in traversed_folders(path)}
    inside = {place for place in folders for other in folders & {*place.parents} if closed(place) == closed(other)}
    return sorted(folders - inside)


def traversed_folders(path: Path) -> Iterator[Path]:
    """Folders through which a path is resolved to its end: those of every link on the way, and the last."""
    for part in [*reversed(path.parents), path]:
        if part.is_symlink():
            yield part.parent.resolve()
            yield from traversed_folders(
                Path(os.path.normpath(part.parent / os.readlink(part) / path.relative_to(part)))
            )
            return
    yield path if path.is_dir() else path.parent


def closed(place: Path) -> list[Path]:
    """The folders on the way to ``place``, itself included, that users other than the owner cannot enter."""
    return [folder for folder in [*reversed(place.parents), place] if not folder.stat().st_mode & stat.S_IXOTH]


# -- observations ------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every path below a folder, and itself, with what changes if it is written: (mode, owner, size, time)."""
    paths = [folder, *folder.rglob("*")]
    facts = {str(path): path.lstat() for path in paths}
    return {name: (info.st_mode, info.st_uid, info.st_size, info.st_mtime_ns) for name, info in facts.items()}
