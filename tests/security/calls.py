"""Finds dangerous calls in Python source: names are resolved through imports, aliases and constant ``getattr``.

A *reference* to a dangerous function is reported, called or not: ``partial(torch.load, ...)``, ``read = torch.load``,
``map(eval, lines)``. A member of a module that is chosen at run time is reported too.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache

PICKLE = "unpickles: executes what a file or a peer says"
SHELL = "runs a line of shell"
CODE = "executes code that is chosen at run time"
OBJECTS = "makes objects of any class"
UNPACK = "writes where an archive says"
FOLDER = "makes a folder that others may write to under umask 002 or a default ACL: see flip/files/creation.py"
WRITES = "opens or makes a file where another user may have prepared a link: see flip/files/creation.py"
DELETES = "deletes: only flip/files/deletion.py does, which checks the target"

#: Full name of a module, class or function (shell patterns) -> why it is refused.
REFUSED = {
    **dict.fromkeys(("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"), PICKLE),
    **dict.fromkeys(("numpy.load", "numpy.lib.npyio.load", "pandas.read_pickle", "multiprocessing.managers"), PICKLE),
    **dict.fromkeys(("multiprocessing.connection.Listener", "multiprocessing.connection.Client"), PICKLE),
    **dict.fromkeys(("torch.load", "torch.serialization.load", "torch.jit.load", "torch.export.load"), PICKLE),
    **dict.fromkeys(("torch.package*", "torch.hub*", "torch.utils.model_zoo*", "torch.multiprocessing"), PICKLE),
    "torch.compiler.load_cache_artifacts": PICKLE,
    **dict.fromkeys(("torch.distributed*.FileSystemReader", "torch.distributed*.FsspecReader"), PICKLE),
    **dict.fromkeys(("torch.distributed*.*_object", "torch.distributed*.*_object_list"), PICKLE),
    **dict.fromkeys((f"torch.distributed.checkpoint*.{name}" for name in ("save", "load", "async_save")), PICKLE),
    **dict.fromkeys(("torch.ops.load_library", "torch.classes.load_library", "torch.utils.cpp_extension*"), CODE),
    **dict.fromkeys(("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"), CODE),
    **dict.fromkeys(
        ("importlib.import_module", "importlib.util.spec_from_file_location", "runpy", "code", "imp"), CODE
    ),
    **dict.fromkeys(
        ("types.CodeType", "types.FunctionType", "ctypes.CDLL", "ctypes.cdll", "logging.config.listen"), CODE
    ),
    **dict.fromkeys(("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty"), SHELL),
    **dict.fromkeys(("asyncio.create_subprocess_shell", "commands"), SHELL),
    **dict.fromkeys(("yaml.load", "yaml.load_all", "yaml.unsafe_load*", "yaml.full_load*"), OBJECTS),
    **dict.fromkeys(("yaml.Loader", "yaml.CLoader", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.Unsafe*"), OBJECTS),
    **dict.fromkeys(("os.mkdir", "os.makedirs"), FOLDER),
    **dict.fromkeys((f"os.{name}" for name in ("O_WRONLY", "O_RDWR", "O_CREAT", "O_APPEND", "O_TRUNC")), WRITES),
    **dict.fromkeys(("os.symlink", "os.mkfifo", "os.mknod", "os.truncate", "shutil.copy*"), WRITES),
    **dict.fromkeys(("safetensors.*save_file", "logging.FileHandler", "logging.handlers"), WRITES),
    "shutil.unpack_archive": UNPACK,
    "tempfile.mktemp": "returns a name that another user may take first",
    "xml": "expands entities without a limit",
    **dict.fromkeys((f"{module}.{name}" for module in ("os", "posix") for name in ("unlink", "remove")), DELETES),
    **dict.fromkeys((f"{module}.{name}" for module in ("os", "posix") for name in ("rmdir", "removedirs")), DELETES),
    **dict.fromkeys(("shutil.rmtree", "shutil.move", "pathlib.Path.unlink", "pathlib.Path.rmdir"), DELETES),
}
#: Methods that are refused whatever object they belong to.
METHODS = {
    "extractall": UNPACK,
    "extract": UNPACK,
    "exec_module": CODE,
    "load_module": CODE,
    "create_subprocess_shell": SHELL,
    "read_pickle": PICKLE,
    "register_new_resolver": "resolvers of OmegaConf are off",
    **dict.fromkeys(("mkdir", "makedirs"), FOLDER),
    **dict.fromkeys(("write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "tofile"), WRITES),
    **dict.fromkeys(("unlink", "rmdir", "removedirs", "rmtree"), DELETES),
    **dict.fromkeys(("delete", "rm", "rm_file", "_rm_file", "_rm", "delete_object", "delete_objects"), DELETES),
}
#: Names of methods that a string may hold, for getattr and the like.
NAMES = {"unlink", "rmdir", "rmtree", "rm_file", "delete_object", "delete_objects"}
#: Keyword -> values with which it is refused; a value that is no constant is refused too.
KEYWORDS = {
    "shell": (True,),
    "trust_remote_code": (True,),
    "weights_only": (False,),
    "allow_pickle": (True,),
    "verify": (False,),
    "usedforsecurity": (True,),
}
#: A mode of ``open`` that creates or changes a file, also with the compression of ``tarfile.open``.
WRITING_MODE = re.compile(r"(?=[^:|]*[wax+])[rwaxbt+]+([:|]\w*)?")
SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "csh", "tcsh", "fish", "busybox"}
HASHES = {"hashlib.md5", "hashlib.sha1"}


def dangerous_calls(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield ``(line, full name, reason)`` of every dangerous reference in the text of a module."""
    tree = ast.parse(source)
    names = _Names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, name, reason) for name in _imported(node).values() for reason in _refusals(name))
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield from ((node.lineno, name, reason) for name in names.of(node) for reason in _refusals(name))
            if isinstance(node, ast.Attribute) and node.attr in METHODS and not _is_own(names.of(node)):
                yield node.lineno, ast.unparse(node), METHODS[node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            yield node.lineno, repr(node.value), DELETES
        elif isinstance(node, ast.List | ast.Tuple) and _is_command(node, {"rm", "rmdir", "unlink", "shred"}):
            yield node.lineno, ast.unparse(node), DELETES
        elif isinstance(node, ast.List | ast.Tuple) and _is_shell(node):
            yield node.lineno, ast.unparse(node), SHELL
        elif isinstance(node, ast.Call):
            yield from _call(node, names)


class _Names:
    """What the names of a module may stand for: modules and their members, by their full names."""

    def __init__(self, tree: ast.AST) -> None:
        self._bound: dict[str, set[str]] = defaultdict(set)
        self._own: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name, full in _imported(node).items():
                    self._bound[name].add(full)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self._own.add(node.name)
            elif isinstance(node, ast.arg):
                self._own.add(node.arg)
        for node in ast.walk(tree):  # aliases: ``t = torch``; twice, so that one of an alias is seen
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                if isinstance(node, ast.Assign):
                    targets = node.targets
                else:
                    targets = [node.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        self._bound[target.id] |= self.of(node.value) or set()
                        self._own.add(target.id)

    def of(self, node: ast.AST) -> set[str]:
        """Full names that an expression may stand for; empty if it is neither imported nor a builtin."""
        if isinstance(node, ast.Name):
            if self._bound.get(node.id):
                return self._bound[node.id]
            if node.id not in self._own and hasattr(builtins, node.id):
                return {f"builtins.{node.id}"}
            return set()
        if isinstance(node, ast.Attribute):
            return {f"{base}.{node.attr}" for base in self.of(node.value)}
        if isinstance(node, ast.Call) and self.of(node.func) == {"builtins.getattr"} and len(node.args) >= 2:
            member = node.args[1]
            if isinstance(member, ast.Constant):
                return {f"{base}.{member.value}" for base in self.of(node.args[0])}
        return set()


def _is_own(names: set[str]) -> bool:
    """Whether an expression is a member of a module of this project, which is checked itself."""
    return bool(names) and all(name.partition(".")[0] in ("flip", "jobs", "tools", "lab") for name in names)


def _imported(node: ast.Import | ast.ImportFrom) -> dict[str, str]:
    """Local name -> full name of what an import statement binds."""
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    bound = {}
    for alias in node.names:
        first = alias.name.partition(".")[0]
        if alias.asname:
            bound[alias.asname or first] = alias.name
        else:
            bound[alias.asname or first] = first
        bound.setdefault(alias.name, alias.name)  # ``import torch.hub`` is itself a reference
    return bound


@cache
def _refusals(name: str) -> list[str]:
    """Reasons against a full name: itself, or a module that contains it, matches a pattern of the table."""
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return [reason for pattern, reason in REFUSED.items() if any(fnmatchcase(prefix, pattern) for prefix in prefixes)][
        :1
    ]


def _is_command(node: ast.List | ast.Tuple, programs: set[str]) -> bool:
    """Return whether a literal list of arguments starts one of these programs."""
    first = node.elts[0] if node.elts else None
    return isinstance(first, ast.Constant) and str(first.value).rpartition("/")[2] in programs


def _is_shell(node: ast.List | ast.Tuple) -> bool:
    """Return whether a literal list of arguments starts a shell with ``-c``."""
    arguments = [argument.value if isinstance(argument, ast.Constant) else None for argument in node.elts]
    if not arguments or not isinstance(arguments[0], str):
        return False
    while arguments and isinstance(arguments[0], str) and arguments[0].rpartition("/")[2] == "env":
        arguments = arguments[1:]
    shell = bool(arguments) and isinstance(arguments[0], str) and arguments[0].rpartition("/")[2] in SHELLS
    return shell and any(
        isinstance(argument, str) and argument.startswith("-") and "c" in argument for argument in arguments[1:]
    )


def _opens_to_write(node: ast.Call, names: _Names) -> bool:
    """Whether this is ``open``, a method ``open`` or a class of files, with a mode that writes or is no constant.

    With a descriptor or an open file as its first argument it opens nothing: that was checked where it was opened.
    """
    full = names.of(node.func)
    is_method = isinstance(node.func, ast.Attribute) and node.func.attr == "open"
    is_open = bool(
        full
        & {
            "builtins.open",
            "io.open",
            "codecs.open",
            "io.FileIO",
            "zipfile.ZipFile",
            "gzip.open",
            "bz2.open",
            "lzma.open",
        }
    )
    if not (is_open or is_method) or "os.open" in full or _is_own(full):
        return False
    if any(keyword.arg == "fileobj" for keyword in node.keywords):
        return False
    modes = [keyword.value for keyword in node.keywords if keyword.arg == "mode"] + node.args[1:2]
    if is_open and modes and not isinstance(modes[0], ast.Constant):
        return True
    if is_method and not full:  # Path.open(mode), or open(path, mode) of an unknown object
        modes += node.args[:1]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    return any(WRITING_MODE.fullmatch(text) for text in texts)


def _call(node: ast.Call, names: _Names) -> Iterator[tuple[int, str, str]]:
    called = ast.unparse(node.func)
    if _opens_to_write(node, names):
        yield node.lineno, f"{called}(mode)", WRITES
    for keyword in node.keywords:
        refused = KEYWORDS.get(keyword.arg or "", ())
        if refused and (not isinstance(keyword.value, ast.Constant) or keyword.value.value in refused):
            yield node.lineno, f"{called}({keyword.arg}=...)", "an unsafe value, or one that is chosen at run time"
    for name in names.of(node.func):
        if name in HASHES and not any(keyword.arg == "usedforsecurity" for keyword in node.keywords):
            yield node.lineno, name, "a broken hash: say usedforsecurity=False if it protects nothing"
        if name in ("builtins.getattr", "builtins.setattr") and names.of(node.args[0]):
            if not isinstance(node.args[1], ast.Constant):
                yield node.lineno, ast.unparse(node), "a member of a module that is chosen at run time"
            else:
                yield from ((node.lineno, full, reason) for full in names.of(node) for reason in _refusals(full))
        if name in ("builtins.globals", "builtins.locals"):
            yield node.lineno, called, CODE
