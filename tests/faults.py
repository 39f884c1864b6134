"""python -m tests.faults {draw,try,show,apply}: forty small faults, and which of them the tests find.

Before tests are shortened, ``draw`` chooses five faults in each of eight packages, and ``try`` notes in
tests/faults.json which test finds each. Afterwards ``try --again FILE`` plays the same faults with the tests of the
present commit: none that was found may be missed. A fault is a changed line, as tests/mutants.py changes it: another
operator, constant or order of arguments, a negated condition, a missing statement. A line that has moved since the draw
is found by its text, also in another file.

A fault is tried in a clone of the commit, with the test files of the faulted module: in the folder that mirrors its
package, those that have its name or import it, or all if there are none. A failure counts if the same test passes
without the fault.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest

from benchmarks.counts.code import PRODUCT
from tests.mutants import changes, places

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".json")
PACKAGES = (
    "flip/data", "flip/training", "flip/checkpoint", "flip/runs",
    "jobs/host", "jobs/submission", "jobs/planning", "tools/shards_commands",
)  # fmt: skip
COUNT = 5
"""Faults of each package."""
SEED = 61
MARKS = "not slow and not gpu and not (kill or slurm or s3 or browser)"
LIMIT = 240.0
"""Seconds for the tests of one fault. A fault that makes them hang is found, too."""
FOLDERS = {"tools/shards_commands": ("tests/tools/shards_commands", "tests/tools/commands")}
"""Package -> the folders of its tests, if they are not the mirrored folder alone."""
FOUND = ("found", "hangs")


@dataclass(frozen=True)
class Fault:
    """A changed line of a file.

    ``outcome``: found, hangs, missed, or empty if it was not tried or the tests last too long without the fault, too.
    """

    package: str
    file: str
    line: int
    before: str
    after: str
    outcome: str = ""
    test: str = ""
    seconds: float = 0.0
    tests: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before.strip()}  ->  {self.after.strip()}"


def draw(seed: int = SEED) -> list[Fault]:
    """Faults in the order of the packages: each of another file, as long as there are enough."""
    drawn = []
    for package in PACKAGES:
        random_order = random.Random(f"{seed} {package}")
        files = [path for path in sorted((ROOT / package).rglob("*.py")) if not path.name.startswith("__")]
        random_order.shuffle(files)
        for path in files[:COUNT]:
            candidates = list(faults_of(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"), package))
            drawn.append(random_order.choice(candidates))
    return drawn


def faults_of(file: str, text: str, package: str = "") -> Iterator[Fault]:
    """Every fault of a file that changes a single line, in the order of the file."""
    lines = text.splitlines()
    for _, _, _, node in places(ast.parse(text)):
        for _, other in changes(node):
            if isinstance(node, ast.If | ast.While | ast.IfExp):
                old, new = node.test, other.test
            else:
                old, new = node, other
            if not hasattr(old, "lineno") or old.lineno != old.end_lineno:
                continue
            before = lines[old.lineno - 1]
            encoded = before.encode()
            changed = encoded[: old.col_offset] + _source(new).encode() + encoded[old.end_col_offset :]
            after = changed.decode()
            if after != before and _parses([*lines[: old.lineno - 1], after, *lines[old.lineno :]]):
                yield Fault(package, file, old.lineno, before, after)


def _source(node: ast.AST) -> str:
    text = ast.unparse(ast.fix_missing_locations(node))
    if isinstance(node, ast.UnaryOp):
        return f"({text})"
    return text


def _parses(lines: list[str]) -> bool:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError:
        return False
    return True


def faulted(text: str, fault: Fault) -> str:
    """The text of the file with the fault. Raises ValueError if no line is that of the draw."""
    lines = text.splitlines(keepends=True)
    same = [i for i, line in enumerate(lines) if line.strip() == fault.before.strip()]
    if not same:
        raise ValueError(f"the line has changed since the draw: {fault}")
    nearest = min(same, key=lambda i: abs(i - fault.line + 1))
    line = lines[nearest]
    indentation = line[: len(line) - len(line.lstrip())]
    lines[nearest] = indentation + fault.after.strip() + "\n"
    return "".join(lines)


def located(fault: Fault, root: Path = ROOT) -> str:
    """The file that has the line now: that of the draw, or the only one in the product to which it was moved."""
    if _has_line(root / fault.file, fault):
        return fault.file
    moved = [path for folder in PRODUCT for path in (root / folder).rglob("*.py") if _has_line(path, fault)]
    if len(moved) != 1:
        raise ValueError(f"{len(moved)} files have the line: {fault}")
    return moved[0].relative_to(root).as_posix()


def _has_line(path: Path, fault: Fault) -> bool:
    if not path.is_file():
        return False
    return fault.before.strip() in map(str.strip, path.read_text(encoding="utf-8").splitlines())


def tests_of(file: str, root: Path = ROOT) -> list[str]:
    """The test files of a source file: of the mirrored folder, those with its name or an import of it, else all."""
    source = Path(file)
    package = next((name for name in PACKAGES if file.startswith(f"{name}/")), "")
    mirrored = FOLDERS.get(package, (f"tests/{source.parent.as_posix()}", f"tests/{package}"))
    paths = {path for folder in mirrored for path in (root / folder).glob("test_*.py")}
    module = source.with_suffix("").as_posix().replace("/", ".")
    parent, _, name = module.rpartition(".")
    imported = re.compile(rf"\b{re.escape(module)}\b|from {re.escape(parent)} import [^\n]*\b{name}\b")
    chosen = {path for path in paths if path.name.startswith(f"test_{name}.")}
    chosen |= {path for path in paths if imported.search(path.read_text(encoding="utf-8"))}
    return sorted(path.relative_to(root).as_posix() for path in chosen or paths)


def attempt(fault: Fault, clone: Path) -> Fault:
    """Try a fault in a clone of the tree; returns it with its outcome."""
    start = time.monotonic()
    file = located(fault, clone)
    files = tests_of(file, clone)
    if file != fault.file:
        files = sorted({*files, *(name for name in fault.tests if (clone / name).is_file())})
    source = clone / file
    text = source.read_text(encoding="utf-8")
    source.write_text(faulted(text, fault), encoding="utf-8")
    try:
        failed = failures(files, clone)
    finally:
        source.write_text(text, encoding="utf-8")
    outcome = "missed"
    test = ""
    if failed is None:
        outcome = "hangs" if failures(files, clone) == [] else ""
    elif failed:
        test = failed[0]
        words = [test] if "::" in test else files  # a file that cannot be imported has no test
        if failures(words, clone) == []:
            outcome = "found"
    return replace(fault, outcome=outcome, test=test, tests=files, seconds=round(time.monotonic() - start, 1))


def failures(words: list[str], clone: Path) -> list[str] | None:
    """The first test that fails, in a fork of this process with the slow imports done. None: they did not end."""
    if not words:
        return []
    with tempfile.NamedTemporaryFile(mode="r", encoding="utf-8") as output:
        pid = os.fork()
        if not pid:
            os.setsid()
            _run_tests(words, clone, output.name)
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            done, _ = os.waitpid(pid, os.WNOHANG)
            if done:
                return re.findall(r"^(?:FAILED|ERROR) (\S+)", output.read(), re.MULTILINE)
            time.sleep(0.05)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None


def _run_tests(words: list[str], clone: Path, output: str) -> None:
    """Replace this process by pytest in the clone."""
    nowhere = os.open(os.devnull, os.O_RDONLY)
    shown = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream, target in ((0, nowhere), (1, shown), (2, shown)):
        os.dup2(target, stream)
    os.chdir(clone)
    os.environ["PYTHONPATH"] = str(clone)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "flip", "jobs", "tools", "lab")]:
        del sys.modules[name]
    sys.path[:0] = [str(clone)]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", MARKS]
    code = pytest.main([*options, *words])
    sys.stdout.flush()
    os._exit(int(code))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="choose the faults and write the list")
    drawing.add_argument("--seed", type=int, default=SEED)
    trying = commands.add_parser("try", help="try those of the list that have no outcome")
    trying.add_argument("--package", choices=PACKAGES)
    trying.add_argument("--again", type=Path, metavar="FILE", help="try all, and write the outcomes to this file")
    commands.add_parser("show", help="print the list and a count of each package")
    applying = commands.add_parser("apply", help="write one fault into this tree")
    applying.add_argument("number", type=int, help="its place in the list, from 1 on")
    chosen = parser.parse_args()
    if chosen.command == "draw":
        write(draw(chosen.seed), LIST)
    elif chosen.command == "try":
        return try_all(chosen.package, chosen.again)
    elif chosen.command == "apply":
        fault = read(LIST)[chosen.number - 1]
        file = located(fault)
        path = ROOT / file
        path.write_text(faulted(path.read_text(encoding="utf-8"), fault), encoding="utf-8")
        print(f"{fault}\n{' '.join(tests_of(file))}")
    else:
        print(table(read(LIST)))
    return 0


def try_all(package: str | None, again: Path | None) -> int:
    """Try the faults of the list, and print each outcome. 1 if a fault is missed that the list says is found."""
    import hypothesis  # noqa: F401  (for the forks)
    import torch  # noqa: F401

    listed = read(LIST)
    target = again or LIST
    lost = 0
    with tempfile.TemporaryDirectory(prefix="flip-faults-") as folder:
        clone = Path(folder) / "flip"
        subprocess.run(["git", "clone", "-q", "--shared", str(ROOT), str(clone)], check=True)
        for i, fault in enumerate(listed):
            if (fault.outcome and not again) or package not in (None, fault.package):
                continue
            try:
                listed[i] = attempt(fault, clone)
            except ValueError as error:  # the line was rewritten: no test is missed by it
                print(f"{i + 1:2} not tried: {error}", flush=True)
                continue
            lost += fault.outcome in FOUND and listed[i].outcome not in FOUND
            print(f"{i + 1:2} {listed[i].outcome:6} {listed[i].seconds:5.0f} s  {fault}  {listed[i].test}", flush=True)
            write(listed, target)
    return int(lost > 0)


def table(faults: list[Fault]) -> str:
    """The list, and how many faults of each package were found."""
    lines = [f"{i:2} {fault.outcome or '-':6} {fault}" for i, fault in enumerate(faults, 1)]
    for package in PACKAGES:
        outcomes = Counter(fault.outcome for fault in faults if fault.package == package)
        lines.append(f"{package}: {sum(outcomes[name] for name in FOUND)} of {outcomes.total()} found")
    return "\n".join(lines)


def read(path: Path) -> list[Fault]:
    return [Fault(**record) for record in json.loads(path.read_text(encoding="utf-8"))]


def write(faults: list[Fault], path: Path) -> None:
    path.write_text(json.dumps([asdict(fault) for fault in faults], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
