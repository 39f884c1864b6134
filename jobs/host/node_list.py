"""First and last name of Slurm's lists of nodes. Standard library, Python >= 3.6."""

import re


def first_host(nodes: str) -> str:
    """The first name of Slurm's node list: ``n[03-07,12],m1`` -> ``n03``. Containers have no scontrol."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if not first:
        return ""
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", first.group(0))


def last_host(nodes: str) -> str:
    """The last name: ``n[03-07,12]`` -> ``n12``."""
    last = re.search(r"(?:[^,\[\]]|\[[^\]]*\])+$", nodes)
    if not last:
        return ""
    return re.sub(r"\[[^\]]*?([^,\-\]]*)\]", r"\1", last.group(0))
