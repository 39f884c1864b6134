"""``python -m lab.documentation.build --out FOLDER``: the site of the documentation. Any broken link is an error."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from flip.files.creation import output_folder
from flip.runs.rundir import write_text
from jobs.common.paths import REPOSITORY
from lab.documentation import (
    checks,
    choices,
    commands,
    configuration,
    json_documents,
    metrics,
    packages,
    python_api,
    run_directory,
)

PROJECT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "AGENTS.md", "tests/storm/README.md")
GENERATED: dict[str, tuple[str, Callable[[], str]]] = {
    "configuration": ("configuration", configuration.configuration_page),
    "commands": ("commands-and-options", commands.commands_page),
    "json": ("json-documents-and-exit-codes", json_documents.json_documents_page),
    "python": ("python-interface", python_api.python_api_page),
    "choices": ("choices-by-name", choices.choices_page),
    "metrics": ("metrics", metrics.metrics_page),
    "run_directory": ("run-directory", run_directory.run_directory_page),
    "checks": ("checks-before-a-start", checks.checks_page),
    "packages": ("packages", packages.packages_page),
}
"""Page below docs/reference/ -> its heading on docs/reference.md, which links follow on the site; its text."""
LINK = re.compile(r"(\]\()([^)\s:]+?)(#[^)\s]*)?(\))")
NAME_OF_PAGE = re.compile(r"\[[\w/]+\.md\](?=\([^)\s:]+\.md)")
"""A link whose text is the name of a file: the site shows the heading instead."""
FIGURE = re.compile(r'(?:src|srcset)="([^":]+)"')
SECTION = re.compile(r"^## (.*)\n((?:(?!## ).*\n)*)", re.MULTILINE)
REDIRECT = '<!doctype html><title>FLIP</title><meta http-equiv="refresh" content="0; url=docs/index.html">\n'


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make docs", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder of the site")
    out = parser.parse_args(arguments).out
    with tempfile.TemporaryDirectory(prefix="flip-docs-") as folder:
        stage(Path(folder))
        line = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-b", "html"]
        line += ["-c", str(Path(__file__).parent), "-d", f"{folder}/.doctrees", folder, str(out)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        code = subprocess.run(line, env=environment).returncode
    if code == 0:
        copy_figures(out)
        write_text(out / "index.html", REDIRECT)
        print(f"the site: {out.resolve() / 'index.html'}")
    return code


def stage(folder: Path) -> None:
    """Copy the pages and the files that they link to, and write the generated pages."""
    pages = [REPOSITORY / name for name in PROJECT_PAGES]
    pages += sorted((REPOSITORY / "docs").glob("*.md"))
    pages += sorted((REPOSITORY / "benchmarks").glob("*.md"))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        copy_targets(page, text, pages, folder)
        if page.name == "index.md":
            text += navigation(text)
        write_page(folder / page.relative_to(REPOSITORY), follow_references(text, page))
    for name, (_, text_of) in GENERATED.items():
        write_page(folder / "docs" / "reference" / f"{name}.md", NAME_OF_PAGE.sub("[]", text_of()))


def write_page(path: Path, text: str) -> None:
    output_folder(path.parent)
    write_text(path, text)


def copy_targets(page: Path, text: str, pages: Sequence[Path], folder: Path) -> None:
    """Copy each file that a page links to and that is no page itself. A missing one is left to Sphinx, which warns."""
    for _, link, _, _ in LINK.findall(text):
        source = (page.parent / link).resolve()
        if source in pages or not source.is_file() or not source.is_relative_to(REPOSITORY):
            continue
        target = folder / source.relative_to(REPOSITORY)
        output_folder(target.parent)
        shutil.copyfile(source, target)


def copy_figures(out: Path) -> None:
    """Copy the files that README shows by HTML, which Sphinx leaves as it is."""
    for name in FIGURE.findall((REPOSITORY / "README.md").read_text(encoding="utf-8")):
        output_folder((out / name).parent)
        shutil.copyfile(REPOSITORY / name, out / name)


def follow_references(text: str, page: Path) -> str:
    """Links to a heading of docs/reference.md lead to the generated page, and names of pages become their titles."""
    pages = {f"#{anchor}": name for name, (anchor, _) in GENERATED.items()}
    to_docs = os.path.relpath(REPOSITORY / "docs", page.parent)

    def follow(match: re.Match[str]) -> str:
        link = match[2]
        anchor = match[3] or ""
        if Path(link).name == "reference.md" and anchor in pages:
            link = os.path.normpath(f"{to_docs}/reference/{pages[anchor]}.md")
            anchor = ""
        return f"{match[1]}{link}{anchor}{match[4]}"

    return NAME_OF_PAGE.sub("[]", LINK.sub(follow, text))


def navigation(index: str) -> str:
    """The tree of all pages for Sphinx: a caption per section of docs/index.md, with the pages that it lists."""
    trees = []
    for title, body in SECTION.findall(index):
        links = [link for _, link, _, _ in LINK.findall(body) if link.endswith(".md")]
        entries = list(dict.fromkeys(links))
        if "reference.md" in entries:
            at = entries.index("reference.md") + 1
            entries[at:at] = [f"reference/{name}.md" for name in GENERATED]
        if entries:
            lines = "\n".join(entry.removesuffix(".md") for entry in entries)
            trees.append(f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{lines}\n```\n")
    return "".join(trees)


if __name__ == "__main__":
    sys.exit(main())
