"""Paths in the repository or snapshot from which this code runs, and the folder of runs."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
"""The folder that contains flip/, jobs/ and sweeps/."""
JOBS = REPOSITORY / "jobs"
SWEEPS = REPOSITORY / "sweeps"
PROFILES = SWEEPS / "clusters"
"""Cluster profiles."""
RECIPES = SWEEPS / "recipes"
SHIPPED = {"sweep": SWEEPS, "cluster profile": PROFILES, "recipe": RECIPES}
"""Kind of a YAML file -> the folder of those that come with the toolkit."""
_USES = {
    "sweep": "To submit it: flip submit {name}",
    "cluster profile": "To use it: flip submit SWEEP --cluster {name}",
    "recipe": "To use it, write `recipe: {stem}` in a sweep file, such as that of: flip new NAME --data MANIFEST",
}


def other_kind(name: str, kind: str) -> str:
    """The remedy if ``name`` is a shipped file of another kind than ``kind``; empty if it is none."""
    for other, folder in SHIPPED.items():
        if other != kind and (folder / f"{Path(name).stem}.yaml").is_file():
            return f"There is a {other} of this name. {use_of(other, Path(name).stem)}"
    return ""


def use_of(kind: str, name: str) -> str:
    """How a YAML file of this kind is used, as a remedy. ``name``: as it is typed."""
    return f"{_USES[kind].format(name=name, stem=Path(name).stem)}."


def install_command() -> str:
    """The command that installs all packages that FLIP uses: by the list of a checkout, or by the installed wheel."""
    if (REPOSITORY / "requirements.txt").is_file():
        return "pip install -r requirements.txt"
    return "pip install 'flip-toolkit[all]'"


def runs_root(of_profile: str = "") -> Path:
    """RUNS_ROOT: ``runs_root`` of the cluster profile, else FLIP_RUNS, else ./runs."""
    chosen = of_profile or os.environ.get("FLIP_RUNS", "") or "runs"
    return Path(chosen).expanduser().absolute()
