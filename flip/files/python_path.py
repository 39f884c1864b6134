"""Where Python processes find modules: never in the current folder, which may hold files of another user.

Python puts the current folder first on the path of a process that it starts with ``-c`` or ``-m``, as multiprocessing
and TensorBoard are, and an empty entry of PYTHONPATH means the current folder, too. PYTHONSAFEPATH prevents the first
from Python 3.11 on; older Pythons of hosts start scripts by path with ``-I``. Standard library, Python >= 3.6.
"""

import contextlib
import os
import sys
from typing import Dict, Iterator, List, Set

from flip.files.ownership import PathLike

#: Folder from which this code was imported.
ROOT = os.path.abspath(os.path.join(__file__, "..", "..", ".."))


def variables(code: PathLike, inherited: str = "") -> Dict[str, str]:
    """Environment variables of a Python process that runs the code in the folder ``code``.

    ``inherited``: a PYTHONPATH whose folders follow.
    """
    places = [os.path.abspath(str(code))] + _folders(inherited)
    return {"PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"}


def standard_library_first(stated: str) -> str:
    """A PYTHONPATH in which no folder hides a module of the standard library of this Python.

    The folders of the standard library precede the others if one of those has a module of the same name. Otherwise
    the value is unchanged.
    """
    library = os.path.dirname(os.path.abspath(os.__file__))
    names = _module_names(library)
    if not any(names & _module_names(place) for place in _folders(stated)):
        return stated
    extensions = [place for place in sys.path if os.path.basename(place) == "lib-dynload"]
    return os.pathsep.join([library] + extensions + _folders(stated))


def leave_current_folder() -> None:
    """Remove the current folder from the module path of this process, and of all that it starts.

    It stays if it is the folder of this code, or if PYTHONPATH names it. Modules imported before stay, too.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    stated = os.environ.pop("PYTHONPATH", "")
    folders = _folders(stated)
    if folders:
        os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    if len(folders) < len(stated.split(os.pathsep)):
        current = os.getcwd()
        if current not in map(os.path.normpath, [ROOT] + folders):
            sys.path[:] = [place for place in sys.path if os.path.abspath(place) != current]


@contextlib.contextmanager
def for_children(code: PathLike) -> Iterator[None]:
    """Within the context, processes that this one starts import from ``code`` first, not from the current folder."""
    chosen = variables(code, os.environ.get("PYTHONPATH", ""))
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _folders(stated: str) -> List[str]:
    """The entries of a PYTHONPATH without those that mean the current folder."""
    return [place for place in stated.split(os.pathsep) if os.path.normpath(place or ".") != "."]


def _module_names(folder: str) -> Set[str]:
    """Names of the modules and packages in a folder; empty if it cannot be read."""
    try:
        entries = os.listdir(folder)
    except OSError:  # Python passes over such a folder, too
        return set()
    modules = {name[:-3] for name in entries if name.endswith(".py")}
    packages = {name for name in entries if os.path.exists(os.path.join(folder, name, "__init__.py"))}
    return modules | packages
