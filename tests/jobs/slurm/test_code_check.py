"""Tests that a batch script executes no code that another user can change, in a real bash."""

import ast
import os
import shutil

import pytest

from flip.files import acl
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.slurm import batch_script
from tests.flip.files.test_acl import set_or_skip
from tests.jobs.slurm.batch_stage import ROOT, script


@pytest.fixture
def code(tmp_path):
    """A copy of the code in a folder of its own, as a snapshot has it."""
    folder = tmp_path / "root" / "code"
    for name in ("flip", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder.parent, folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o022)
    return folder


def put(stage, code, monkeypatch, **fields):
    """Write the script of a job with this code."""
    job = Job(stage.run, code, JobResources(), {}, **fields)
    stage.script.write_text(script(ClusterProfile(name="x", kind="slurm"), job, 2, stage.folder, monkeypatch))
    stage.commands("srun", "env > $FLIP_RUN/env; exit 0")


LAB = 54321
"""A group without a name, of which this process is no member."""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize(
    ("place", "owner", "group", "mode", "reason"),
    [
        ("code/jobs", 12345, 0, 0o755, "it belongs to uid 12345"),
        ("code/flip/__init__.py", 0, 0, 0o666, "every user may write to it"),
        ("code/flip/runs", 0, LAB, 0o775, f"members of the group gid {LAB} may write to it"),
        ("code/flip/__init__.py", 0, LAB, 0o664, f"members of the group gid {LAB} may write to it"),
        (".", 0, LAB, 0o2775, f"members of the group gid {LAB} may write to it"),
        (".", 0, 0, 0o777, "every user may write to it"),
        (".", 12345, 0, 0o755, "it belongs to uid 12345"),
    ],
)
def test_script_does_not_execute_code_of_other_user(stage, code, monkeypatch, place, owner, group, mode, reason):
    """A user with write access to the code, or to a folder above, may have replaced it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(stage.folder / "none"))
    put(stage, code, monkeypatch)
    path = code.parent / place
    before = path.stat().st_mode
    os.chown(path, owner, group)
    path.chmod(mode)
    assert stage.start().wait(60) == 77 and not stage.run.attempts.exists()
    assert f"{path}: {reason}: not executed" in (stage.folder / "57_1.err").read_text()
    assert not [call for call in stage.commands.calls() if "requeue" in call]
    os.chown(path, 0, 0)
    path.chmod(before)
    stage.start().wait(60)
    assert stage.run.newest_attempt() == 1


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_script_carries_trusted_groups_and_accepted_places(stage, code, monkeypatch):
    """Nodes may not have the user's record of trusted groups, nor the variable of the submission."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(stage.folder / "none"))
    os.chown(code / "flip", 0, LAB)
    (code / "flip").chmod(0o775)
    monkeypatch.setenv("FLIP_TRUST_GROUP", str(LAB))
    put(stage, code, monkeypatch)
    monkeypatch.delenv("FLIP_TRUST_GROUP")
    stage.start().wait(60)
    assert stage.run.newest_attempt() == 1
    assert f"FLIP_TRUST_GROUP={LAB}\n" in (stage.run.path / "env").read_text()
    (code / "flip").chmod(0o755)
    code.parent.chmod(0o777)
    put(stage, code, monkeypatch, exposed=[str(code.parent)])
    shutil.rmtree(stage.run.attempts)
    stage.start().wait(60)
    assert stage.run.newest_attempt() == 1
    warning = f"warning: {code.parent}: every user may write to it, so that others could exchange the code"
    assert (stage.folder / "57_1.err").read_text().count(warning) == 1
    code.chmod(0o777)
    assert stage.start().wait(60) == 77, "accepted is one folder, not what lies in it"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize(("permissions", "refused"), [(6, True), (5, False)], ids=["write", "read"])
def test_script_reads_access_control_lists_of_code(stage, code, monkeypatch, permissions, refused):
    """The group bits of the mode are the mask of the list: they show write access in both cases."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(stage.folder / "none"))
    put(stage, code, monkeypatch)
    file = code / "flip" / "__init__.py"
    rows = [(acl.USER_OBJ, 7), (acl.USER, permissions), (acl.GROUP_OBJ, 5), (acl.MASK, 7), (acl.OTHER, 5)]
    entries = [acl.Entry(tag, bits, 12345 if tag == acl.USER else acl.NO_ID) for tag, bits in rows]
    set_or_skip(file, acl.ACCESS, entries)
    assert file.stat().st_mode & 0o020
    assert (stage.start().wait(60) == 77) == refused
    if refused:
        reason = "its access control list lets uid 12345 write to it: not executed"
        assert f"{file}: {reason}" in (stage.folder / "57_1.err").read_text()


def test_ownership_program_has_syntax_of_python_3_6_and_imports_no_module_of_ours():
    tree = ast.parse(batch_script.ownership_program(), feature_version=(3, 6))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in imported} == {"typing"}
