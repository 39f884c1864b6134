"""Tests that no module of the toolkit makes a dangerous call, and that the search reports known forms."""

from pathlib import Path

import pytest

from tests.security.calls import DELETES, FOLDER, WRITES, dangerous_calls

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("flip", "jobs", "tools", "lab", "kernel/visible_jpeg")
#: (file, name) -> reason why the call is allowed.
ALLOWED = {
    ("flip/__init__.py", "importlib.import_module"): "modules are named in the file itself",
    ("tools/commands/shards.py", "importlib.import_module"): "modules are named in the file itself",
    ("lab/study.py", "importlib.import_module"): "a file of lab/studies in this repository",
    ("flip/data/manifest/uids.py", "numpy.load"): "allow_pickle=False",
    ("flip/evaluation/metrics/measures.py", "numpy.load"): "allow_pickle=False",
    ("lab/icons/drawings.py", "numpy.load"): "allow_pickle=False",
    ("tools/shards_commands/weights.py", "numpy.load"): "allow_pickle=False",
    ("jobs/common/terminal.py", "getattr(sys, name)"): "stdout and stderr, named in the file itself",
    ("jobs/common/terminal.py", "setattr(sys, name, above)"): "stdout and stderr, named in the file itself",
    ("jobs/tracking/tracker.py", "importlib.import_module"): "modules are named in the file itself",
    ("flip/training/compiled_code.py", "torch.compiler.load_cache_artifacts"): "from a folder of mode 0700 of the run",
    ("flip/common/user_classes.py", "builtins.exec"): "the bytes of a file of the code snapshot, of the pinned hash",
    ("flip/common/user_classes.py", "builtins.compile"): "the bytes of a file of the code snapshot, of the pinned hash",
    ("jobs/measuring/functions/__main__.py", "importlib.import_module"): "modules are named in the file itself",
    ("jobs/__main__.py", "importlib.import_module"): "modules are named in the file itself",
    ("jobs/runtime/node_agent.py", "importlib.import_module"): "the module of the job, as `python -m` would execute it",
    ("jobs/runtime/forked_rank.py", "importlib.import_module"): "the module of the job, as `python -m` does",
    ("jobs/runtime/forked_rank.py", "runpy"): "the module of the job, as `python -m` would execute it",
    ("jobs/runtime/forked_rank.py", "runpy.run_module"): "the module of the job, as `python -m` would execute it",
    ("flip/common/gpu_software.py", "ctypes.CDLL"): "the library of NVIDIA's driver, which torch loads too",
    ("jobs/measuring/functions/peak_memory.py", "ctypes.CDLL"): "malloc_trim of the C library, loaded anyway",
    (
        "jobs/measuring/functions/peak_memory.py",
        "Path('/proc/self/clear_refs').write_text",
    ): "a file of the kernel, no real one",
    ("jobs/host/processes.py", "ctypes.CDLL"): "prctl of the C library that the process has loaded anyway",
    ("jobs/runtime/program_start.py", "ctypes.CDLL"): "prctl of the C library that the process has loaded anyway",
    ("kernel/visible_jpeg/__init__.py", "ctypes.CDLL"): "the library of its own package, beside the module",
    ("flip/checkpoint/safetensors_io.py", "safetensors.torch.save_file"): "to a path of atomic_path",
    ("flip/data/storage/fsspec_storage.py", "files.makedirs"): "in object storage",
    ("jobs/common/cli.py", "os.O_WRONLY"): "/dev/null",
    ("jobs/common/filesystem.py", "os.symlink"): "in a temporary folder of mode 0700",
    ("jobs/commands/debug.py", "shutil.copytree"): "in a temporary folder of mode 0700",
    ("jobs/commands/tensorboard.py", "link.symlink_to"): "in a temporary folder of mode 0700",
    ("lab/icons/build.py", "shutil.copyfile"): "into a new folder of the cache, closed to others",
    ("flip/data/storage/s3.py", "'delete_object'"): "one request, for flip.files.deletion",
    ("flip/data/storage/fsspec_storage.py", "files.rm_file"): "one request, for flip.files.deletion",
    ("flip/checkpoint/remote.py", "self._storage.delete"): "one file of a folder, for flip.files.deletion",
    ("flip/checkpoint/remote_folder.py", "remote.delete"): "passed to flip.files.deletion, which chooses the names",
    ("jobs/planning/storage_checks.py", "remote.delete"): "an object with a random name, just written",
    ("lab/documentation/build.py", "shutil.copyfile"): "in a temporary folder of mode 0700",
    ("tools/sandbox/config.py", "gpu.symlink_to"): "in a folder of a test cluster, closed to others",
}
RECORDED = "in a temporary folder of mode 0700; by hand, on the machine of a maintainer"
RECORDER = "lab/recordings/tars.py"
ALLOWED |= {
    **{(RECORDER, f"(place / 'crate' / {name}).mkdir"): RECORDED for name in ("'src'", "'.cargo'")},
    **{
        (RECORDER, f"(place / 'crate' / {name}).write_text"): RECORDED
        for name in ("'Cargo.toml'", "'.cargo' / 'config.toml'")
    },
    **{(RECORDER, f"(place / {name}"): RECORDED for name in ("'in').mkdir", "'names').write_text")},
    **{(RECORDER, f"given{name}.write_text"): RECORDED for name in ("", ".with_suffix('.json')")},
    **{(RECORDER, f"path.{name}"): RECORDED for name in ("mkdir", "parent.mkdir", "write_text", "symlink_to")},
    **{(RECORDER, f"shutil.{name}"): RECORDED for name in ("copy", "rmtree")},
    (RECORDER, "['busybox', 'tar', '--no-recursion', '-cf', '{out}', '{names}']"): "its program tar, without a shell",
    (RECORDER, "tarfile.open(mode)"): "replaces the committed archive of the checkout",
}
#: The modules that make folders, open files to write, and delete: the reasons that do not count there.
OWN_REASONS = {"flip/files/creation.py": (FOLDER, WRITES), "flip/files/deletion.py": (DELETES,)}


def test_no_module_makes_a_dangerous_call():
    findings = []
    used = set()
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for line, name, reason in dangerous_calls(path.read_text(encoding="utf-8")):
            if reason in OWN_REASONS.get(file, ()):
                continue
            used.add((file, name))
            if (file, name) not in ALLOWED:
                findings.append(f"{file}:{line}: {name}: {reason}")
    assert not findings
    assert used == set(ALLOWED), "ALLOWED has an unused exception"


#: One module per line.
DANGEROUS = """
eval('1')
exec(text)
compile(text, '', 'exec')
f = eval
map(eval, lines)
import builtins; builtins.eval(x)
import builtins; getattr(builtins, 'eval')(x)
globals()[name](x)
import importlib; importlib.import_module(name)
from importlib import import_module
import runpy; runpy.run_path(x)
import importlib.util; importlib.util.spec_from_file_location(a, b)
spec.loader.exec_module(m)
import ctypes; ctypes.CDLL(x)
import torch; torch.ops.load_library(x)
from torch.utils.cpp_extension import load
import types; types.CodeType()
import pickle
from pickle import loads
from _pickle import loads
import shelve
import joblib
import torch; torch.load(path)
from torch import load; load(path)
from torch import load as read; read(path)
import torch as t; t.load(path)
import torch; t = torch; t.load(path)
import torch; read = torch.load; read(path)
import torch; getattr(torch, 'load')(path)
import torch; f = getattr(torch, 'load')
import torch; getattr(torch, name)(path)
import torch; from functools import partial; partial(torch.load, weights_only=True)
import torch; torch.load(path, weights_only=True)
import torch; torch.jit.load(path)
from torch import jit; jit.load(path)
import torch.jit; torch.jit.load(path)
import torch; torch.hub.load('a/b', 'c')
import torch.hub
from torch import package
import torch; torch.export.load(x)
import torch; torch.compiler.load_cache_artifacts(x)
from torch.distributed import checkpoint as dcp; dcp.FileSystemReader(path)
from torch.distributed.checkpoint import FileSystemReader
import torch.distributed.checkpoint as d; d.filesystem.FileSystemReader(x)
from torch import distributed; distributed.broadcast_object_list(x)
import torch; torch.distributed.all_gather_object(x, y)
from torch.distributed import gather_object
from torch.distributed import checkpoint as dcp; dcp.save(state, storage_writer=x)
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.state_dict_saver import async_save
import numpy as np; np.load(path)
from numpy import load
x(path, allow_pickle=True)
import pandas; pandas.read_pickle(x)
from multiprocessing.connection import Client; Client(x)
from multiprocessing.managers import BaseManager
frame.read_pickle(x)
import yaml; yaml.load(text, Loader=yaml.SafeLoader)
from yaml import load
import yaml; yaml.unsafe_load(text)
import yaml; Base = yaml.Loader
from yaml import CLoader
OmegaConf.register_new_resolver('x', f)
AutoTokenizer.from_pretrained(x, trust_remote_code=True)
AutoTokenizer.from_pretrained(x, trust_remote_code=y)
import os; os.system('ls')
from os import popen
import subprocess; subprocess.run('ls', shell=True)
import subprocess; subprocess.Popen(x, shell=y)
import subprocess; subprocess.run(['bash', '-c', x])
import subprocess; subprocess.run(['/bin/sh', '-ec', x])
command = ['env', 'bash', '-lc', x]
import os; os.execv('/bin/sh', ('sh', '-c', x))
from subprocess import getoutput
import asyncio; asyncio.create_subprocess_shell(x)
tar.extractall(folder)
tar.extract(member)
import shutil; shutil.unpack_archive(x)
import tempfile; tempfile.mktemp()
from xml.etree import ElementTree
import hashlib; hashlib.md5(x)
from hashlib import sha1; sha1(x)
requests.get(url, verify=False)
import os; os.mkdir(path)
import os; os.makedirs(path, exist_ok=True)
from os import makedirs; makedirs(path)
path.mkdir(parents=True)
Path(path).mkdir()
make = path.mkdir
open(path, 'w')
open(path, mode='a')
open(path, 'xb')
open(path, 'r+b', buffering=0)
open(path, mode)
open(path, 'w' if new else 'a')
f = open; f(path, 'wb')
import io; io.open(path, 'w')
import codecs; codecs.open(path, 'w')
from gzip import open as unpack; unpack(path, 'wb')
path.open('w')
path.open(mode='ab')
(folder / name).open('r+')
import tarfile; tarfile.open(path, 'w')
import tarfile; tarfile.open(path, 'w:gz')
import gzip; gzip.open(path, 'wt')
import zipfile; zipfile.ZipFile(path, 'w')
import os; os.open(path, os.O_WRONLY | os.O_CREAT)
import os; os.open(path, os.O_RDWR)
import os; flags = os.O_APPEND
from os import O_CREAT
path.write_text('')
path.write_bytes(b'')
path.touch()
path.symlink_to(target)
import os; os.symlink(a, b)
import shutil; shutil.copyfile(a, b)
from shutil import copytree
array.tofile(path)
from safetensors.torch import save_file
import logging; logging.FileHandler(path)
import os; os.unlink(x)
import os; os.remove(x)
from os import remove as r; r(x)
import os as o; o.rmdir(x)
import os; getattr(os, 'removedirs')(x)
import os; delete = os.remove
import shutil; shutil.rmtree(x, ignore_errors=True)
import shutil; cleanup.callback(shutil.rmtree, x)
from shutil import rmtree
from shutil import move
import pathlib; pathlib.Path.unlink(x)
from pathlib import Path; map(Path.unlink, files)
path.unlink(missing_ok=True)
(folder / name).unlink()
folder.rmdir()
files.rm_file(path)
files.rm(path, recursive=True)
client.delete_object(Bucket=b, Key=k)
getattr(client, 'delete_object')(Bucket=b, Key=k)
storage.delete(key)
partial(storage.delete, key)
import subprocess; subprocess.run(['rm', '-r', x])
"""
HARMLESS = """
model.eval()
import re; re.compile(x)
import torch; torch.compile(model)
from torch.distributed import checkpoint as dcp; dcp.DefaultLoadPlanner()
import subprocess; subprocess.run([a, b])
f(x, trust_remote_code=False)
compile = 1; compile(x)
import json; json.load(file)
from safetensors.torch import load_file
import hashlib; hashlib.md5(x, usedforsecurity=False)
import yaml; Base = yaml.SafeLoader
names = ['sh', 'a', 'b']
getattr(config, key)
import torch; getattr(torch, 'float32')
open(path)
open(path, 'rb')
open(path, encoding='utf-8')
path.open()
path.open('rb')
from flip.files.creation import open_append; open_append(path)
from flip.runs.rundir import write_text; write_text(path, 'a')
from flip.runs import rundir; rundir.write_text(path, 'a')
import os; os.fdopen(handle, 'wb')
import os; os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
import tarfile; tarfile.open(path)
import tarfile; tarfile.open(fileobj=file, mode='w')
from PIL import Image; Image.open(file, formats=('JPEG',))
source.open(run, 3)
text.replace('w', 'a')
names.remove(x)
del values[key]
from flip.files import deletion; deletion.delete_file(path)
import os; os.replace(a, b)
"""


@pytest.mark.parametrize("source", DANGEROUS.split("\n")[1:-1])
def test_dangerous_calls_reports_every_known_form(source):
    assert list(dangerous_calls(source))


@pytest.mark.parametrize("source", HARMLESS.split("\n")[1:-1])
def test_dangerous_calls_ignores_harmless_code(source):
    assert not list(dangerous_calls(source))
