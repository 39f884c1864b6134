"""python tests/mutants.py [FILE ...]: mutation tests, the share of small mistakes in a file that its tests notice.

A mutant is the file with one change: another operator, comparison or constant, a negated condition, a missing
statement, two swapped arguments. It is tested in a copy of the tree; a mutant with which the tests pass has survived
and is printed. The exit code is 1 if fewer than nine in ten are killed. Not part of make test.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401  (for the forks)
import numpy  # noqa: F401
import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "flip/data/order.py": ["tests/flip/data/test_order.py", "tests/flip/data/test_order_reference.py"],
    "flip/runs/checkpoint_folder.py": ["tests/flip/runs/test_checkpoint_folder.py", "tests/parsers/test_records.py"],
    "flip/runs/restart_policy.py": ["tests/flip/runs/test_restart_policy.py", "-k", "not python"],
}
#: Timeout of the first run in seconds, and of later runs in multiples of its duration: some mutants never end.
DEADLINE = 300.0
TIMES = 5.0

OTHER = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitOr,
}  # fmt: skip


def changes(node):
    """Yield the mutations of a node as (kind, new node)."""
    if isinstance(node, ast.Compare | ast.BinOp | ast.BoolOp):
        if isinstance(node, ast.Compare):
            ops = node.ops
        else:
            ops = [node.op]
        text = isinstance(node, ast.BinOp) and isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)
        for i, op in enumerate(ops):
            if type(op) in OTHER and not text:  # % of a text only formats a message
                other = copy.deepcopy(node)
                if isinstance(node, ast.Compare):
                    other.ops[i] = OTHER[type(op)]()
                else:
                    other.op = OTHER[type(op)]()
                yield "operator", other
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield "constant", ast.Constant(not node.value)
        elif isinstance(node.value, int | float):
            yield "constant", ast.Constant(node.value + 1)
        elif isinstance(node.value, str) and node.value.isidentifier():  # a key, or a word that is compared
            yield "constant", ast.Constant(node.value + "x")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "operator", node.operand
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        other = copy.deepcopy(node)
        other.test = ast.UnaryOp(ast.Not(), other.test)
        yield "condition", other
    elif isinstance(node, ast.Call):
        commutes = isinstance(node.func, ast.Name) and node.func.id in ("min", "max")
        if (
            len(node.args) > 1
            and not commutes
            and not any(isinstance(argument, ast.Starred) for argument in node.args[:2])
        ):
            other = copy.deepcopy(node)
            other.args[:2] = other.args[1::-1]
            yield "arguments", other
    elif isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield "no statement", ast.Pass()
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield "no value", ast.Return(None)


def places(node):
    """Yield (owner, field, index or None, node) of all nodes except annotations, docstrings, ``__repr__``, ``if
    False``."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            hidden = (
                not isinstance(child, ast.AST)
                or (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant))
                or (isinstance(child, ast.FunctionDef) and child.name == "__repr__")
                or (isinstance(child, ast.If) and isinstance(child.test, ast.Constant))
                or isinstance(child, ast.JoinedStr)
            )
            if not hidden:
                yield node, field, i, child
                yield from places(child)


def mutants(source):
    """Yield (line, kind, before, after, text of the file) of every mutant, in the order of the file."""
    tree = ast.parse(source)
    for owner, field, i, node in list(places(tree)):
        for kind, other in changes(node):
            _put(owner, field, i, ast.copy_location(other, node))
            text = ast.unparse(ast.fix_missing_locations(tree))
            yield getattr(node, "lineno", 0), kind, _short(node), _short(other), text
            _put(owner, field, i, node)


def _put(owner, field, i, value):
    if i is None:
        setattr(owner, field, value)
    else:
        getattr(owner, field)[i] = value


def _short(node):
    return ast.unparse(node).partition("\n")[0][:70]


def survives(copied, tests, deadline=DEADLINE):
    """Return whether the tests pass in the copy of the tree, in a fork of this process with the slow imports done."""
    pid = os.fork()
    if not pid:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        os.chdir(copied)
        sys.path[0] = str(copied)
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]) != 0))
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def judge(name, copied, most, seed):
    """Test at most ``most`` mutants of a file and print those that survive; returns (killed, tested)."""
    source = (ROOT / name).read_text(encoding="utf-8")
    candidates = list(mutants(source))
    chosen = sorted(random.Random(seed).sample(range(len(candidates)), min(most, len(candidates))))
    start = time.monotonic()
    if not survives(copied, TESTS[name]):
        raise SystemExit(f"{name}: its tests fail without a mutation")
    deadline = 5.0 + TIMES * (time.monotonic() - start)
    killed = 0
    for number in chosen:
        line, kind, before, after, text = candidates[number]
        (copied / name).write_text(text, encoding="utf-8")
        if survives(copied, TESTS[name], deadline):
            print(f"{name}:{line}: survived: {kind}: {before}  ->  {after}", flush=True)
        else:
            killed += 1
    (copied / name).write_text(source, encoding="utf-8")
    print(f"{name}: {killed} of {len(chosen)} mutants killed, of {len(candidates)} in total", flush=True)
    return killed, len(chosen)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"files to mutate: {', '.join(TESTS)} (default: all)")
    parser.add_argument("--most", type=int, default=10_000, help="maximum number of mutants per file (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice if not all are tested")
    args = parser.parse_args()
    sys.dont_write_bytecode = True  # two mutants may be written within a second
    unknown = [name for name in args.files if name not in TESTS]
    if unknown:
        parser.error(f"no tests are known for {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="flip-mutants-") as folder:
        for entry in ("flip", "jobs", "tests", "tools", "lab", "sweeps", "pyproject.toml"):
            if (ROOT / entry).is_dir():
                shutil.copytree(ROOT / entry, Path(folder) / entry, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / entry, folder)
        shares = [judge(name, Path(folder), args.most, args.seed) for name in args.files or TESTS]
    return int(any(10 * killed < 9 * tested for killed, tested in shares))


if __name__ == "__main__":
    sys.exit(main())
