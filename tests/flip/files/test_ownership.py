"""Tests ownership checks of paths."""

import grp
import io
import os
import pwd
import stat
import sys

import pytest

from flip.files import acl, ownership
from flip.files.acl import Entry
from tests.flip.files.test_acl import set_or_skip


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_own_file_without_write_access_for_others_is_trusted(tmp_path):
    (tmp_path / "a").write_text("")
    assert ownership.why_untrusted(tmp_path / "a") == ""
    assert ownership.why_untrusted_inside(tmp_path) == ""


@pytest.mark.parametrize(("mode", "reason"), [(0o646, "every user"), (0o1777, "every user"), (0o600, ""), (0o755, "")])
def test_path_writable_by_others_is_untrusted(tmp_path, mode, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(mode)
    assert reason in ownership.why_untrusted(tmp_path / "folder")
    assert bool(ownership.why_untrusted(tmp_path / "folder")) == bool(reason)


def test_symlink_is_untrusted(tmp_path):
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert "link" in ownership.why_untrusted(tmp_path / "link")
    assert ownership.why_untrusted_inside(tmp_path).startswith(f"{tmp_path / 'link'}: ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ownership.NOT_CODE)
def test_links_in_environments_of_a_checkout_are_skipped(name, tmp_path):
    """The interpreter of an environment is a link out of it."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "python").symlink_to(sys.executable)
    assert ownership.why_untrusted_inside(tmp_path) == ""


def test_file_of_other_user_or_untrusted_group_is_untrusted(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    os.chown(file, 12345, 0)
    assert "uid 12345" in ownership.why_untrusted(file) and not ownership.is_mine(file)
    os.chown(file, 0, 100)
    file.chmod(0o664)
    group = ownership.group_name(100)
    assert group in ownership.why_untrusted(file)
    for named in (group, "100"):
        monkeypatch.setenv(ownership.TRUSTED_GROUP, named)
        assert ownership.why_untrusted(file) == ""
    os.chown(file, 0, 54321)
    assert "gid 54321" in ownership.why_untrusted(file)
    monkeypatch.setenv(ownership.TRUSTED_GROUP, "54321")
    assert ownership.why_untrusted(file) == "", "a group without a name"


ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
GROUP = 54321
STRANGER = 12345


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Trust no group, by variable or record, and return the path of an empty record's folder."""
    monkeypatch.delenv(ownership.TRUSTED_GROUP, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "flip"


def above(path):
    return [(exposure.place, exposure.reason, exposure.group) for exposure in ownership.exposures(path)]


@ROOT_ONLY
@pytest.mark.parametrize(
    ("owner", "group", "mode", "reason", "named"),
    [
        (0, 0, 0o755, "", None),
        (0, 0, 0o777, "every user may write to it", None),
        (0, 0, 0o1777, "", None),
        (0, GROUP, 0o755, "", None),
        (0, GROUP, 0o2775, f"members of the group gid {GROUP} may write to it", GROUP),
        (0, GROUP, 0o3775, "", None),
        (STRANGER, 0, 0o755, f"it belongs to uid {STRANGER}", None),
        (STRANGER, 0, 0o1777, f"it belongs to uid {STRANGER}", None),
    ],
)
def test_exposures_name_folder_above_in_which_others_can_rename(alone, tmp_path, owner, group, mode, reason, named):
    """The owner of a sticky folder may rename what is in it, too."""
    folder = tmp_path / "open"
    (folder / "mine" / "code").mkdir(parents=True)
    os.chown(folder, owner, group)
    folder.chmod(mode)
    expected = [(str(folder), reason, named)] if reason else []
    assert above(folder / "mine" / "code") == above(folder / "mine" / "missing" / "code") == expected
    assert above(folder) == [], "the path itself is checked by `why_untrusted`"


@ROOT_ONLY
def test_exposures_follow_every_link_on_the_way(alone, tmp_path):
    """A link may lie in a closed folder and lead through an open one, or lie in an open one."""
    shut = tmp_path / "shut"
    open_folder = tmp_path / "open"
    (open_folder / "mine").mkdir(parents=True)
    shut.mkdir()
    (shut / "absolute").symlink_to(open_folder / "mine")
    (shut / "relative").symlink_to("../open/./mine")
    (open_folder / "back").symlink_to("../shut")
    (shut / "round").symlink_to("round")
    open_folder.chmod(0o777)
    expected = [(str(open_folder), "every user may write to it", None)]
    for path in (shut / "absolute", shut / "relative" / "x", open_folder / "back" / "x", open_folder / ".." / "shut"):
        assert above(path) == expected, path
    assert above(shut / "x") == []
    open_folder.chmod(0o1777)
    assert above(open_folder / "back") == []
    os.chown(open_folder / "back", STRANGER, -1, follow_symlinks=False)
    reason = f"it is a link that belongs to uid {STRANGER}"
    assert above(open_folder / "back" / "x") == [(str(open_folder / "back"), reason, None)]
    with pytest.raises(OSError, match="symbolic links"):
        ownership.exposures(shut / "round")


@ROOT_ONLY
def test_trusted_groups_may_write_above_and_own_folders_above(alone, tmp_path, monkeypatch):
    folder = tmp_path / "project"
    (folder / "mine").mkdir(parents=True)
    os.chown(folder, STRANGER, GROUP)
    folder.chmod(0o2775)
    assert [exposure.group for exposure in ownership.exposures(folder / "mine")] == [None, GROUP]
    members = {STRANGER: frozenset([GROUP])}
    monkeypatch.setattr(ownership, "_is_member", lambda uid, groups: bool(members.get(uid, frozenset()) & groups))
    assert [exposure.group for exposure in ownership.exposures(folder / "mine")] == [GROUP, GROUP]
    monkeypatch.setenv(ownership.TRUSTED_GROUP, f"no-such-group, {GROUP}")
    assert ownership.exposures(folder / "mine") == []
    assert "belongs to" in ownership.why_untrusted(folder), "runs and their code stay those of one user"
    assert ownership.why_untrusted_target(folder) == "", "a profile or a program may be a member's"


@ROOT_ONLY
def test_recorded_group_counts_only_in_file_that_no_other_user_can_change(alone, tmp_path):
    file = tmp_path / "file"
    file.touch(0o664)
    os.chown(file, 0, GROUP)
    file.chmod(0o664)
    alone.mkdir(parents=True)
    record = alone / "trusted_groups.json"
    assert ownership.trust_record() == str(record)
    record.write_text(f'{{"groups": [{GROUP}]}}')
    assert ownership.why_untrusted(file) == "" and ownership.trusted_groups() == {GROUP}
    for path, mode in ((record, 0o666), (alone, 0o777), (alone.parent, 0o777)):
        before = path.stat().st_mode
        path.chmod(mode)
        assert "may write" in ownership.why_untrusted(file), path
        path.chmod(before)
    os.chown(record, STRANGER, -1)
    assert ownership.trusted_groups() == set()
    os.chown(record, 0, -1)
    for text in ("", "[]", "{}", '{"groups": 7}', '{"groups": ["7", true, null]}'):
        record.write_text(text)
        assert ownership.trusted_groups() == set(), text


def entries(*rows, mask=7):
    owner = [Entry(acl.USER_OBJ, 7, acl.NO_ID), *rows]
    named = sorted(owner, key=lambda entry: entry.tag)
    return [*named, Entry(acl.MASK, mask, acl.NO_ID), Entry(acl.OTHER, 0, acl.NO_ID)]


@ROOT_ONLY
@pytest.mark.parametrize(
    ("rows", "mask", "reason", "group"),
    [
        ([Entry(acl.USER, 5, STRANGER), Entry(acl.GROUP_OBJ, 5, acl.NO_ID)], 7, "", None),
        ([Entry(acl.USER, 7, STRANGER), Entry(acl.GROUP_OBJ, 5, acl.NO_ID)], 5, "", None),
        ([Entry(acl.USER, 7, 0), Entry(acl.GROUP_OBJ, 5, acl.NO_ID)], 7, "", None),
        ([Entry(acl.USER, 6, STRANGER), Entry(acl.GROUP_OBJ, 5, acl.NO_ID)], 7, f"lets uid {STRANGER} write", None),
        ([Entry(acl.GROUP_OBJ, 7, acl.NO_ID)], 7, f"lets members of the group gid {GROUP} write", GROUP),
        (
            [Entry(acl.GROUP_OBJ, 5, acl.NO_ID), Entry(acl.GROUP, 7, GROUP + 1)],
            7,
            f"lets members of the group gid {GROUP + 1} write",
            GROUP + 1,
        ),
    ],
    ids=["read-only", "masked", "root", "user", "owning group", "named group"],
)
def test_access_control_list_decides_who_may_write(alone, tmp_path, rows, mask, reason, group):
    """With an ACL the group bits of the mode are its mask, whatever the entries allow."""
    folder = tmp_path / "folder"
    (folder / "code").mkdir(parents=True)
    os.chown(folder, 0, GROUP)
    set_or_skip(folder, acl.ACCESS, entries(*rows, mask=mask))
    assert bool(folder.stat().st_mode & stat.S_IWGRP) == bool(mask & acl.WRITE)
    assert reason in ownership.why_untrusted(folder) and bool(ownership.why_untrusted(folder)) == bool(reason)
    groups = [exposure.group for exposure in ownership.exposures(folder / "code")]
    assert groups == ([group] if reason else [])
    folder.chmod(stat.S_IMODE(folder.stat().st_mode) | stat.S_ISVTX)
    assert ownership.exposures(folder / "code") == [], "nothing can be renamed in a sticky folder"


def test_link_inside_is_trusted_only_if_it_stays_inside(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    (folder / "inside").symlink_to("file")
    assert ownership.why_untrusted_inside(folder) == ""
    (folder / "outside").symlink_to(tmp_path)
    assert "symbolic link" in ownership.why_untrusted_inside(folder)


@pytest.mark.parametrize(("uid_map", "trusted"), [("0 0 4294967295", False), ("1000 1000 1", True)])
def test_owner_that_user_namespace_does_not_map_counts_as_root_above(alone, tmp_path, monkeypatch, uid_map, trusted):
    """In a rootless container the folders above a home folder seem to belong to 65534."""
    real = open
    files = {"/proc/sys/kernel/overflowuid": "65534\n", "/proc/self/uid_map": f"  {uid_map}\n"}
    fake = lambda path, *rest: io.StringIO(files[path]) if path in files else real(path, *rest)  # noqa: E731
    monkeypatch.setattr("builtins.open", fake)
    assert ownership._unmapped(65534) == trusted and not ownership._unmapped(STRANGER)


@pytest.mark.parametrize(("uid", "private"), [(None, True), (0, True), (60502, False)])
def test_group_of_the_user_is_private_unless_another_account_has_it_as_primary_group(monkeypatch, uid, private):
    """The group does not list such an account as a member."""
    own = pwd.struct_passwd(("alice", "x", 60501, 60501, "", "/", "/bin/sh"))
    accounts = [own]
    if uid is not None:
        accounts.append(pwd.struct_passwd(("other", "x", uid, 60501, "", "/", "/bin/sh")))
    monkeypatch.setattr(os, "geteuid", lambda: 60501)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: own)
    monkeypatch.setattr(pwd, "getpwall", lambda: accounts)
    monkeypatch.setattr(grp, "getgrgid", lambda number: grp.struct_group(("alice", "x", 60501, [])))
    info = os.stat_result((stat.S_IFDIR | 0o775, 1, 1, 1, 60501, 60501, 0, 0, 0, 0))
    monkeypatch.setattr(os, "lstat", lambda path: info)
    monkeypatch.setattr(ownership, "read_acl", lambda path, kind: ())
    assert (ownership.why_untrusted("/anywhere") == "") == private
