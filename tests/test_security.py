"""What SECURITY.md says: nothing that is read is run, no secret stays in a file, no server listens to the world."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flip.config.load import merge
from flip.exitcodes import ConfigError, StorageError
from jobs.snapshot import take

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for room in ("flip", "jobs", "tools") for path in (ROOT / room).rglob("*.py"))
#: Modules whose readers run what they read, or that run a line of shell.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "pty", "commands", "code", "imp"}
NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
#: Functions by their last name, whatever they belong to.
CALLS = {
    "system": "a line of shell", "popen": "a line of shell", "getoutput": "a line of shell",
    "getstatusoutput": "a line of shell", "create_subprocess_shell": "a line of shell", "run_path": "runs a file",
    "run_module": "runs a module", "exec_module": "runs a file", "unsafe_load": "makes objects",
    "full_load": "makes objects", "read_pickle": "makes objects", "extractall": "writes where an archive says",
    "unpack_archive": "writes where an archive says", "mktemp": "a name that another may take first",
    "register_new_resolver": "resolvers of OmegaConf are off",
}  # fmt: skip
#: (module, function) that are refused though their last name is common.
PAIRS = {
    ("torch", "load"): "a pickle", ("yaml", "load"): "makes objects", ("np", "load"): "may be a pickle",
    ("numpy", "load"): "may be a pickle",
}  # fmt: skip
#: Keyword -> values with which it is refused.
KEYWORDS = {"shell": (True,), "trust_remote_code": (True,), "weights_only": (False,), "allow_pickle": (True,)}
KEYWORDS |= {"verify": (False,), "usedforsecurity": (True,)}
#: Where a module is chosen at run time: by a name that stands in the file itself.
CHOSEN = {"flip/__init__.py", "tools/shards.py"}


def dangers(tree):
    """(line, what) of calls and imports that could run what was read, or write where it says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, f"import {name}") for name in names if name.partition(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        first, _, last = called.rpartition(".")
        if called in NAMES or last in CALLS or (first, last) in PAIRS or last == "import_module":
            yield node.lineno, called
        for word in node.keywords:
            refused = KEYWORDS.get(word.arg or "", ())
            if refused and (not isinstance(word.value, ast.Constant) or word.value.value in refused):
                yield node.lineno, f"{called}({word.arg}=...)"
        if last in ("md5", "sha1") and "usedforsecurity=False" not in ast.unparse(node) and "partial" not in called:
            yield node.lineno, f"{called} without usedforsecurity=False"


def test_nothing_of_ours_runs_what_it_reads():
    found = []
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        for line, what in dangers(ast.parse(path.read_text(encoding="utf-8"))):
            if not (what.endswith("import_module") and name in CHOSEN):
                found.append(f"{name}:{line}: {what}")
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')", "exec(text)", "compile(text, '', 'exec')", "import pickle", "from pickle import loads",
        "import os; os.system('ls')", "os.popen('ls')", "subprocess.run('ls', shell=True)",
        "subprocess.Popen(x, shell=y)",
        "torch.load(path)", "torch.load(path, weights_only=True)", "np.load(path)", "x(path, allow_pickle=True)",
        "yaml.load(text, Loader=X)", "yaml.unsafe_load(text)", "tar.extractall(folder)", "shutil.unpack_archive(x)",
        "tempfile.mktemp()", "AutoTokenizer.from_pretrained(x, trust_remote_code=True)", "hashlib.md5(x)",
        "OmegaConf.register_new_resolver('x', f)", "importlib.import_module(name)", "runpy.run_path(path)",
        "asyncio.create_subprocess_shell(x)", "requests.get(url, verify=False)",
    ],
)  # fmt: skip
def test_the_search_sees(text):
    assert list(dangers(ast.parse(text)))


def test_what_is_no_danger_is_let_be():
    text = "model.eval(); re.compile(x); subprocess.run([a, b]); torch.compile(m); f(x, trust_remote_code=False)"
    assert not list(dangers(ast.parse(text)))


def test_servers_of_tests_listen_to_this_machine_alone():
    everywhere = re.compile(r"""["'](0[.]0[.]0[.]0|::|\[::\])["']""")
    rooms = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert not [path.name for path in rooms if everywhere.search(path.read_text(encoding="utf-8"))]


# -- secrets -----------------------------------------------------------------------------------------------------------

SECRET = "hush-hush-4711"


@pytest.mark.parametrize("key", ["checkpoint.url", "data.manifest", "stages.pretrain.name"])
def test_an_address_with_a_password_is_no_setting(key):
    with pytest.raises(ConfigError) as error:
        merge([("x.yaml", {key: f"https://me:{SECRET}@host/place"})])
    assert SECRET not in str(error.value) and "host/place" in str(error.value)


def test_no_error_shows_a_password():
    error = StorageError(
        "no answer from http://me:" + SECRET + "@proxy:3128/", f"https://{SECRET}@b", f"s3://a:{SECRET}@c"
    )
    assert SECRET not in str(error) + error.paragraph() + repr(error.args) and "proxy:3128" in str(error)


def test_a_link_to_a_secret_is_not_copied(tmp_path):
    home, repository = tmp_path / "home" / ".ssh", tmp_path / "repository"
    for folder in (home, repository / "flip"):
        folder.mkdir(parents=True)
    (home / "deploy").write_text(SECRET)
    (repository / "flip" / "a.py").write_text("A = 1\n")
    (repository / "flip" / "b.py").symlink_to(home / "deploy")
    (repository / "flip" / "c.py").symlink_to(repository / "flip" / "a.py")
    found = take(repository, tmp_path / "code")
    assert found.left_out == ("flip/b.py",) and found.files == 2
    assert not [path for path in found.path.rglob("*") if path.is_file() and SECRET in path.read_text()]


@pytest.mark.parametrize("words", [["jobs/status.py", "--json"], ["jobs/submit.py", "--sweep", "x.yaml", "--dry-run"]])
def test_no_command_prints_the_environment(tmp_path, words):
    """What a command says and leaves of variables that hold secrets: nothing."""
    (tmp_path / "x.yaml").write_text("recipe: paper\nset: {data.manifest: m, data.tokenizer: t}\nruns: {a: }\n")
    names = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "HTTPS_PROXY")
    environment = {**os.environ, "FLIP_RUNS": str(tmp_path / "runs"), **dict.fromkeys(names, f"http://me:{SECRET}@h")}
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert SECRET not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET in path.read_text()]
