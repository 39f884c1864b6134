"""Tests the direction of imports between packages and files, and that commands without training import no torch."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from benchmarks.counts.code import LAB, PRODUCT, read_modules
from benchmarks.counts.imports import circles_of, edges
from flip.config.schema import Config
from tests.harness.storm_site import EDITED

ROOT = Path(__file__).resolve().parents[1]
TOP_FOLDERS = (*PRODUCT, *LAB)
PROOF = ("lab", "benchmarks", "tests")
"""Folders that the product does not import."""
HEAVY = ("torch", "torchvision", "timm")

#: Packages in their order: a file imports only its own package and packages of earlier rows. A row may hold several
#: that do not import each other. ``flip`` and ``jobs`` stand for the files in these folders themselves.
ORDER = [
    ["flip.files"],
    ["flip.runs"],
    ["flip.common"],
    ["flip.config"],
    ["flip.distributed"],
    ["flip"],  # rng, model_costs, tokenizer, concurrency
    ["flip.data.storage"],
    ["flip.data.parquet"],
    ["flip.data.manifest"],
    ["flip.data"],
    ["flip.models"],
    ["flip.checkpoint"],
    ["flip.evaluation.metrics"],
    ["flip.evaluation.datasets"],
    ["flip.evaluation.encoding"],
    ["flip.evaluation.tasks"],
    ["flip.evaluation"],
    ["flip.monitoring"],
    ["flip.export"],
    ["flip.training"],
    ["jobs.host"],
    ["jobs.host.agents"],
    ["jobs.common"],
    ["jobs.pages"],
    ["jobs.tracking"],
    ["jobs.sweeps", "jobs.slurm", "jobs.local", "jobs.runtime"],
    ["jobs.backends"],
    ["jobs.submitted_runs"],
    ["jobs.planning"],
    ["jobs.workloads"],
    ["jobs.submission", "jobs.reporting"],
    ["jobs.measuring"],
    ["jobs.measuring.functions"],
    ["jobs.commands"],
    ["jobs"],
]
#: Programs, which start code of higher packages.
PROGRAMS = ("flip", "jobs.__main__", "jobs.host.job", "jobs.host.rank_entry")
LEVEL = {package: level for level, row in enumerate(ORDER) for package in row}

#: Packages of jobs/ whose modules run in processes of their own, which may import torch.
WITH_TORCH = ("jobs.runtime", "jobs.measuring.functions")

#: The configuration of a training.
CONFIGURATION = tuple(f"flip.config.{name}" for name in ("schema", "merge", "identity", "derived", "resolve"))
CONFIGURATION += ("flip.config.finish", "flip.config.validate")
#: What may know it: workloads, plans of their cost, the language of sweep files, reports that compare settings, ranks,
#: measurements of the model, the list of all checks, and ``flip new``, which writes settings.
OF_SETTINGS = (
    "jobs.workloads",
    "jobs.planning",
    "jobs.sweeps",
    "jobs.runtime.rank_process",
    "jobs.measuring.functions",
)
OF_SETTINGS += ("jobs.reporting.seed_groups", "jobs.reporting.paper_comparison", "jobs.reporting.scaling_laws")
OF_SETTINGS += ("jobs.reporting.axes", "jobs.check_list", "jobs.commands.new")

#: Modules without torch, in addition to jobs/ except WITH_TORCH: launcher, host and loader processes use them.
LIGHT = ("flip.files", "flip.runs", "flip.common", "flip.config", "flip.model_costs", "flip.rng")
LIGHT += ("flip.monitoring.results", "flip.monitoring.curves", "flip.traffic")
LIGHT += ("flip.training.warm_start", "flip.checkpoint.export_record", "flip.data.manifest", "flip.data.parquet")
LIGHT += ("flip.data.storage",)
LIGHT += ("flip.evaluation.datasets", "flip.evaluation.request")
LIGHT += (
    "flip.evaluation.metrics.predictions",
    "flip.evaluation.metrics.result_files",
    "flip.evaluation.metrics.score",
)
LIGHT += (
    "flip.export.open_clip_source",
    "flip.export.timm_source",
    "flip.evaluation.encoding.open_clip_folder",
    "flip.data.worker",
    "flip.data.worker_pool",
    "flip.data.chunk_reader",
)

#: Modules whose classes docs/reference.md documents; the package ``flip`` gives its functions.
PUBLIC = ("flip.runs.errors",)
#: Internal module that lab/ imports -> what for. Each is a seam that the public interface and the commands lack.
INTERNALS = {
    # programs are parsed and answered like the commands
    "jobs.common.cli": "options, exit codes and --json of the programs, as of every command",
    "jobs.common.filesystem": "the error for a folder that cannot be written",
    "jobs.common.paths": "the folders of the checkout and of the runs",
    "jobs.common.terminal": "the progress bar of a build",
    "flip.common.cache": "the folder of the demonstration data",
    "flip.files.creation": "every folder and file is created there",
    "flip.files.deletion": "every file is deleted there",
    "flip.runs.rundir": "reads and writes records of runs and JSON files",
    # studies: settings, costs and results of runs
    "flip.common.host": "the number of cores, which a calibration records",
    "flip.environment": "the kind of processor, which a calibration records",
    "flip.config.merge": "reads the rows of sweeps/records.yaml",
    "jobs.reporting.distributions": "statistics of the reports",
    "jobs.reporting.laws": "scaling laws of the reports",
    "jobs.reporting.outcomes": "CSV as the reports write it",
    "jobs.sweeps.published": "the paper's numbers, for the page of the scaling study",
    "jobs.common.text": "numbers and tables as in the reports",
    "jobs.pages.chart_files": "figures as in the reports",
    "jobs.pages.charts": "figures as in the reports",
    "jobs.pages.document": "pages as the reports",
    "jobs.pages.markdown": "pages as the reports",
    # the icon set is built as the demonstration data are
    "tools.commands.demo_data": "options and printed facts of a build",
    "tools.demo_datasets.npm": "packages, pinned by version and digest",
    "tools.demo_datasets.output": "shards, manifests and done.json in the cache",
    "tools.demo_datasets.render": "SVG to PNG with the same bytes on every machine",
    "flip.data.manifest.build": "indexes the subsets; the command would start a process for each",
    "flip.rng": "the order of the shuffled drawings",
    "flip.tokenizer": "trains the tokenizer; lists the kinds of tokenizers",
    # the references are written from the code
    "flip.common.option": "fields of the configuration, their bounds and descriptions",
    "flip.common.typed": "names of the types of fields",
    "flip.config.json_schema": "the form of a JSON schema",
    "flip.config.schema": "fields of the configuration",
    "flip.data.augment": "names of augmentation steps",
    "flip.data.text_masking": "names of text maskings",
    "flip.loss_kinds": "names of losses",
    "flip.optimizer_kinds": "names of optimisers",
    "flip.tower_kinds": "names of image towers",
    "flip.data.patch_masking": "names of ways to mask patches",
    "flip.monitoring.curves": "fields of metric lines, and their curves",
    "flip.runs.checks": "stages of checks",
    "flip.runs.metric_lines": "the newest line of metrics, for a figure",
    "flip.runs.next_step": "what follows for a job",
    "flip.runs.restart_policy": "the ends of an attempt",
    "flip.runs.run_files": "files of a run",
    "flip.version": "the version, for the site",
    "jobs.__main__": "the commands",
    "jobs.check_list": "checks before a start",
    "jobs.common.cluster_profile": "fields of a profile",
    "jobs.common.documents": "documents of --json",
    "jobs.common.next_commands": "states of runs",
    "jobs.host.job": "delays and exit codes of a job",
    "jobs.workloads.submitted": "kinds of work",
}


def modules():
    for folder in TOP_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


FILES = dict(modules())


@cache
def imports(path, everywhere=True):
    """Return the names that a file imports, only at top level if everywhere=False. Ignore imports for types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "False")
        for inner in ast.walk(node)
    }
    names = []
    for node in ast.walk(tree) if everywhere else tree.body:
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(names)


def package(name):
    """Return the package in ORDER of a module of flip/ or jobs/."""
    if name in LEVEL and FILES[name].name == "__init__.py":
        return name
    return name.rpartition(".")[0] or name


def under(name, *prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("name", [name for name in FILES if under(name, "flip", "jobs")])
def test_file_imports_only_lower_packages(name):
    own = LEVEL[package(name)]
    for other in {other for other in imports(FILES[name]) if other in FILES and under(other, "flip", "jobs")}:
        if FILES[other].name == "__init__.py" or package(other) == package(name) or name in PROGRAMS:
            continue
        assert LEVEL[package(other)] < own, f"{name} imports {other}, which is no lower package"


@pytest.mark.parametrize("name", FILES)
def test_file_respects_boundaries_of_flip_jobs_and_tools(name):
    """flip/ imports neither the launcher nor tools; of the launcher, only the rank process imports the trainer."""
    imported = set(imports(FILES[name]))
    if under(name, "flip"):
        assert not [x for x in imported if under(x, "jobs", "tools")]
    if under(name, "jobs.host"):
        assert not [x for x in imported - {"flip"} if under(x, "flip") and not under(x, "flip.files", "flip.runs")]
    if under(name, "jobs") and not under(name, "jobs.runtime"):
        assert not [x for x in imported if under(x, "flip.training.trainer", "tools")]
    if under(name, "jobs") and not under(name, *WITH_TORCH):
        assert not [x for x in imported if under(x, *HEAVY)]


@pytest.mark.parametrize("name", [name for name in FILES if under(name, *PRODUCT)])
def test_product_does_not_import_its_proof(name):
    assert not [x for x in imports(FILES[name]) if under(x, *PROOF)]


def test_lab_imports_the_public_interface_and_listed_modules():
    """An internal module that the lab needs stands in INTERNALS with the reason. It does not become public for it."""
    modules = {name: path for name, path in FILES.items() if under(name, *LAB)}
    assert len(modules) > 40
    used = set()
    for name, path in modules.items():
        for other in {other for other in imports(path) if other in FILES and under(other, *PRODUCT)}:
            if FILES[other].name == "__init__.py":
                continue
            used.add(other)
            assert other in PUBLIC or other in INTERNALS, f"{name} imports {other}: give a reason in INTERNALS"
    assert used >= set(INTERNALS), "INTERNALS has an unused module"


@pytest.mark.parametrize("name", [name for name in FILES if under(name, "jobs") and not under(name, *OF_SETTINGS)])
def test_launcher_does_not_know_the_configuration(name):
    """What a run does is known to its workload: the rest neither imports the configuration nor reads a field of it."""
    assert not [x for x in imports(FILES[name]) if under(x, *CONFIGURATION)]
    sections = Config.__dataclass_fields__
    read = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in sections and "config" in ast.unparse(node.value).split(".")
    ]
    assert read == []


def test_engine_of_studies_imports_no_study():
    engine = "lab.studies.engine"
    for name in FILES:
        if under(name, engine):
            assert not [x for x in imports(FILES[name]) if under(x, "lab.studies") and not under(x, engine)], name


def test_imports_form_no_circle():
    """Imports inside functions and for types count: a reader follows them, too."""
    assert circles_of(edges(read_modules(ROOT, TOP_FOLDERS))) == []


def test_no_module_below_tools_imports_the_package_flip():
    """``flip.submit`` is the launcher's, so that whoever imports the package itself stands above the launcher."""
    importers = {name for name, targets in edges(read_modules(ROOT, TOP_FOLDERS)).items() if "flip" in targets}
    assert {name for name in importers if not under(name, "tools", "lab")} == set()


def test_submission_imports_no_file_that_only_runs_use():
    """A storm edits these files: runs have their own copies, and a submission of the edited tree changes nothing."""
    reached: set[str] = set()
    waiting = ["jobs.submission.submission"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting += {x for x in imports(FILES[name], everywhere=False) if x in FILES} - reached
    assert not reached & {path.removesuffix(".py").replace("/", ".") for path in EDITED}


LIGHTLY = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
    if set(sys.argv[1].split()) & sys.modules.keys():
        sys.exit(f"{name} waits for torch")
"""


def test_light_modules_import_no_torch():
    """A single process imports all modules: a process per module takes a minute."""
    names = [name for name in FILES if under(name, *LIGHT) or (under(name, "jobs") and not under(name, *WITH_TORCH))]
    assert len(names) > 80 and not [light for light in LIGHT if light not in FILES]
    done = subprocess.run(
        [sys.executable, "-c", LIGHTLY, " ".join(HEAVY), *names], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", TOP_FOLDERS)
def test_package_init_files_import_nothing(room):
    for path in (ROOT / room).rglob("__init__.py"):
        assert not list(imports(path, everywhere=False))


@pytest.mark.parametrize("package", [name for name in FILES if FILES[name].name == "__init__.py"])
def test_package_docstring_names_its_modules(package):
    """Its docstring is the map of a package. Of commands, the table in jobs/__main__.py is one."""
    if package in ("flip", "jobs.commands"):
        return
    about = ast.get_docstring(ast.parse(FILES[package].read_text(encoding="utf-8")))
    modules = [name.rpartition(".")[2] for name in FILES if name.rpartition(".")[0] == package]
    missing = [name for name in modules if not re.search(rf"\b{name}\b", about)]
    assert not missing or missing == ["__main__"]


def test_no_class_name_is_defined_twice():
    """A class name has the same meaning in all packages."""
    places = {}
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    assert not {name: definitions for name, definitions in places.items() if len(definitions) > 1}


@pytest.mark.long
def test_trainer_import_leaves_inductor_cache_dir_unset():
    """The import of varlen would set TORCHINDUCTOR_CACHE_DIR, and ``parallel.set_compile_caches`` keeps a set value."""
    code = "import os, flip.training.trainer; assert 'TORCHINDUCTOR_CACHE_DIR' not in os.environ"
    environ = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, check=True, timeout=120)


@pytest.mark.long
def test_trainer_import_does_not_wait_for_fsdp():
    """An unsharded model needs neither FSDP nor DTensor, whose import takes as long as half of torch's."""
    code = "import sys, flip.training.trainer; print({'torch.distributed.fsdp', 'sympy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
