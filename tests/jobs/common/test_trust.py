"""Tests that submissions refuse folders, cluster profiles and programs that other users can change or exchange."""

import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flip.files import ownership
from flip.runs.errors import ConfigError, PermissionDenied
from flip.runs.rundir import read_json
from jobs.commands import doctor, evaluate
from jobs.common import cluster_profile, trust
from jobs.common.cluster_profile import ClusterProfile, executed_files, load_profile, profile_path
from jobs.common.paths import PROFILES, SWEEPS
from jobs.sweeps import sweep_file

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
LAB = 54321
STRANGER = 12345
"""A group and a user without names."""


@pytest.fixture(autouse=True)
def record(tmp_path, monkeypatch):
    """Trust no group, and return the path of the record."""
    monkeypatch.delenv(ownership.TRUSTED_GROUP, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "flip" / "trusted_groups.json"


@pytest.fixture
def project(desk):
    """The runs root as a project folder: mode 2775, so that members of its group can rename what is in it."""
    desk.runs.mkdir()
    os.chown(desk.runs, 0, LAB)
    desk.runs.chmod(0o2775)
    return desk.runs


def answer(monkeypatch, text):
    """Answer the next questions on a terminal, and return the list of those that are asked."""
    asked = []
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or text)
    return asked


LINE = f"export FLIP_TRUST_GROUP={LAB}"


def test_submit_asks_once_whether_to_trust_group_of_project_folder(typed, project, record, monkeypatch):
    for options in ([], ["--yes"]):
        code, _, err = typed(*options)
        assert code == 77 and LINE in err and str(project) in err, err
        assert not list(project.iterdir()), "nothing was written"
    code, out, _ = typed("--dry-run")
    assert code == 0 and f"asked first: Members of the group gid {LAB} can rename in {project}" in out
    asked = answer(monkeypatch, "n")
    code, _, err = typed()
    assert code == 77 and LINE in err and len(asked) == 1 and not record.exists()
    assert not list(project.iterdir()), "nothing stays of the folder that was locked"
    asked = answer(monkeypatch, "y")
    assert typed()[0] == 0 and typed.started == ["half", "whole"] and len(asked) == 1
    assert read_json(record) == {"groups": [LAB]} and stat.S_IMODE(record.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    assert typed("--changed", "fork", "seed=1")[0] == 0 and len(asked) == 1


def test_trusted_group_of_variable_is_not_asked_about(typed, project, monkeypatch):
    monkeypatch.setenv("FLIP_TRUST_GROUP", f"{LAB + 1},{LAB}")
    assert typed()[0] == 0 and typed.started == ["half", "whole"]


@pytest.mark.parametrize(("owner", "mode"), [(0, 0o777), (STRANGER, 0o755), (STRANGER, 0o1777)])
def test_submit_refuses_root_in_which_anyone_can_rename(typed, project, owner, mode, monkeypatch):
    """No group explains it, so there is no question to ask."""
    os.chown(project, owner, 0)
    project.chmod(mode)
    asked = answer(monkeypatch, "y")
    for options in ([], ["--dry-run"]):
        code, _, err = typed(*options)
        assert code == 77 and str(project) in err and "FLIP_RUNS=FOLDER" in err and not asked, err
    assert not list(project.iterdir())


@pytest.mark.parametrize("mode", [0o2775, 0o777])
def test_existing_runs_continue_below_open_folder_with_warning(typed, project, monkeypatch, mode):
    """They were submitted before the folders above them were checked: only new runs are refused."""
    jobs = []
    monkeypatch.setattr(type(typed), "submit", lambda self, submitted: jobs.extend(submitted))
    project.chmod(0o755)
    assert typed()[0] == 0 and [list(job.exposed) for job in jobs] == [[], []]
    project.chmod(mode)
    jobs.clear()
    code, out, _ = typed()
    assert code == 0 and f"warning: {project}: " in out and "New runs are refused there" in out, out
    assert [job.exposed for job in jobs] == [[str(project)]] * 2
    code, _, err = typed("seed=1", "--changed", "fork")
    assert code == 77 and str(project) in err


def test_warnings_name_folders_above_own_runs_only(tmp_path):
    for name, owner in (("mine", 0), ("hers", STRANGER)):
        (tmp_path / name / "sweep").mkdir(parents=True)
        (tmp_path / name).chmod(0o777)
        os.chown(tmp_path / name / "sweep", owner, -1)
    lines = trust.warnings([tmp_path / "mine" / "sweep", tmp_path / "hers" / "sweep", tmp_path / "missing"])
    assert len(lines) == 1 and lines[0].startswith(f"warning: {tmp_path / 'mine'}: every user may write to it")


# -- profiles ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def profile(tmp_path):
    file = tmp_path / "site.yaml"
    file.write_text("kind: local\n")
    return file


@pytest.mark.parametrize(
    ("owner", "group", "mode", "reason"),
    [
        (STRANGER, 0, 0o644, f"it belongs to uid {STRANGER}"),
        (0, LAB, 0o664, f"members of the group gid {LAB}"),
        (0, 0, 0o646, "every user"),
    ],
)
def test_profile_that_other_users_can_change_is_refused(typed, profile, owner, group, mode, reason):
    os.chown(profile, owner, group)
    profile.chmod(mode)
    link = profile.with_name("link.yaml")
    link.symlink_to(profile.name)
    for path in (profile, link):
        code, _, err = typed("--cluster", str(path), "--dry-run")
        assert code == 77 and f"{profile}: the cluster profile is not trusted: {reason}" in err, err
        assert "cp " in err and "executed with your rights" in err
    os.chown(profile, 0, 0)
    profile.chmod(0o644)
    assert typed("--cluster", str(link), "--dry-run")[0] == 0


@pytest.mark.parametrize(
    "line", ["python: {}", "setup: ['export A=1; source {} || exit 78']", "notify: [sh, '{}']", "container: {}"]
)
def test_program_of_profile_that_other_users_can_change_is_refused(typed, profile, tmp_path, line):
    program = tmp_path / "tools" / "program"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    profile.write_text(f"kind: local\n{line.format(program)}\n")
    assert typed("--cluster", str(profile), "--dry-run")[0] == 0
    os.chown(program, STRANGER, -1)
    code, _, err = typed("--cluster", str(profile), "--dry-run")
    assert code == 77 and f"{program}: {line.partition(':')[0]}, in the cluster profile site," in err, err
    os.chown(program, 0, -1)
    program.parent.chmod(0o777)
    code, _, err = typed("--cluster", str(profile), "--dry-run")
    assert code == 77 and err.startswith(f"{program.parent}: "), err


def test_doctor_and_evaluate_execute_no_program_of_other_user(profile, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jobs.slurm.site.read", lambda profile: pytest.fail("a program of the profile may run"))
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\n")
    os.chown(program, STRANGER, -1)
    profile.write_text(f"kind: slurm\nhost_python: {program}\n")
    for command, words in ((doctor, []), (evaluate, ["demo/run", "--sets", "imagenet1k"])):
        assert command.main(["--cluster", str(profile), *words]) == 77
        assert f"{program}: host_python, in the cluster profile site, is not trusted" in capsys.readouterr().err


def test_words_of_setup_that_are_executed():
    lines = ["source /a/env.sh", "export X=/b; . /c/d || exit 78", "A=1 /x/y -z /data", 'echo "open']
    lines += ["if [ -e /q ]; then bash -l /r; fi", "cat /data > /dev/null"]
    words = [word for line in lines for word in cluster_profile._executed_words(line) if word.startswith("/")]
    assert words == ["/a/env.sh", "/c/d", "/x/y", "/r"]
    profile = ClusterProfile(python=sys.executable, host_python="/usr/bin/env", setup=["/nowhere"])
    assert executed_files(profile) == [("host_python", Path("/usr/bin/env"))]


def test_shipped_profile_is_trusted_as_code_of_its_checkout(monkeypatch, tmp_path):
    """The code of a colleague's checkout runs already: its own files may have the same owner, other files may not."""
    monkeypatch.setattr(trust, "REPOSITORY", tmp_path / "checkout")
    monkeypatch.setattr(cluster_profile, "PROFILES", tmp_path / "checkout" / "sweeps" / "clusters")
    (tmp_path / "checkout" / "sweeps" / "clusters").mkdir(parents=True)
    file = tmp_path / "checkout" / "sweeps" / "clusters" / "site.yaml"
    file.write_text("kind: local\n")
    for path in (tmp_path / "checkout", file):
        os.chown(path, STRANGER, -1)
    with pytest.raises(PermissionDenied, match="the cluster profile is not trusted: it belongs to uid 12345"):
        load_profile("site")
    assert trust.open_places([file])
    monkeypatch.setattr(trust, "_code_owner", lambda: STRANGER)
    assert load_profile("site").name == "site" and not trust.open_places([file])
    assert trust.checkout_warnings()[0].endswith("belongs to uid 12345, whose code you run")


def test_folder_above_checkout_gives_a_warning(monkeypatch, tmp_path):
    """The command itself lies below it."""
    checkout = tmp_path / "builds" / "checkout"
    checkout.mkdir(parents=True)
    (checkout / "file").touch()
    monkeypatch.setattr(trust, "REPOSITORY", checkout)
    assert trust.checkout_warnings() == []
    checkout.parent.chmod(0o777)
    assert [line.partition(": every")[0] for line in trust.checkout_warnings()] == [f"warning: {checkout.parent}"]
    assert trust.open_places([checkout / "file"]) == []
    checkout.chmod(0o777)
    assert [place.place for place in trust.open_places([checkout / "file"])] == [str(checkout)]


# -- names that mean several files -------------------------------------------------------------------------------------


def test_bare_name_of_two_files_is_refused_with_both_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("runs: {a: }\n")
    with pytest.raises(ConfigError) as error:
        sweep_file.find_sweep("quickstart")
    text = str(error.value)
    assert f"{tmp_path / 'quickstart.yaml'} and {SWEEPS / 'quickstart.yaml'}" in text and error.value.code == 78
    assert f"Type the path: ./quickstart.yaml or {SWEEPS / 'quickstart.yaml'}" in text
    assert str(sweep_file.find_sweep("./quickstart.yaml")) == "quickstart.yaml"
    assert sweep_file.find_sweep(str(SWEEPS / "quickstart.yaml")) == SWEEPS / "quickstart.yaml"
    (tmp_path / "my.yaml").write_text("runs: {a: }\n")
    # As the tutorial types it.
    assert str(sweep_file.find_sweep("my")) == str(sweep_file.find_sweep("my.yaml")) == "my.yaml"
    (tmp_path / "my").write_text("")
    with pytest.raises(ConfigError, match="ambiguous: sweeps of this name are"):
        sweep_file.find_sweep("my")
    monkeypatch.chdir(SWEEPS)
    assert sweep_file.find_sweep("quickstart").samefile(SWEEPS / "quickstart.yaml"), "both names are the same file"


def test_bare_name_of_two_profiles_is_refused_with_both_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local.yaml").write_text("runs: {a: }\n")
    assert profile_path("local") == PROFILES / "local.yaml", "the other file is a sweep"
    (tmp_path / "local.yaml").write_text("kind: local\nsetup: [/hers]\n")
    with pytest.raises(ConfigError) as error:
        load_profile("local")
    assert f"{tmp_path / 'local.yaml'} and {PROFILES / 'local.yaml'}" in str(error.value)
    assert load_profile("./local.yaml").setup == ["/hers"]


def test_plan_names_files_of_sweep_and_profile(typed, desk):
    files = f"read from {desk.sweep} and {PROFILES / 'local.yaml'}"
    assert files in typed("--dry-run")[1] and files in typed()[1]


def test_plan_names_owner_of_checkout_of_other_user(typed, monkeypatch):
    monkeypatch.setattr(trust, "_code_owner", lambda: STRANGER)
    warning = f"belongs to uid {STRANGER}, whose code you run"
    assert warning in typed("--dry-run")[1] and warning in typed()[1]


def test_root_of_a_container_is_advised_to_work_as_owner_of_mounted_folder(typed, desk):
    desk.runs.mkdir()
    os.chown(desk.runs, STRANGER, LAB)
    code, _, err = typed("--yes")
    assert code == 77 and f"{desk.runs}: " in err and "it belongs to uid" in err, err
    assert f"docker run --user {STRANGER}:{LAB}" in err


@pytest.mark.parametrize("mode", [0o2775, 0o777], ids=["group without a terminal", "writable for all"])
def test_settle_refuses_without_asking_what_no_answer_can_close(tmp_path, record, mode):
    root = tmp_path / "root"
    root.mkdir()
    os.chown(root, 0, LAB)
    root.chmod(mode)
    questions = []
    ask = None if mode == 0o2775 else lambda question: questions.append(question) or True
    with pytest.raises(PermissionDenied, match="is not trusted"):
        trust.settle([root / "sweep"], ask)
    assert not questions and not record.exists()
