"""Refuses what other users could change before it is executed: cluster profiles, their programs, and runs below folders
in which others can rename. The rules are in ``flip.files.ownership``, their reasons in SECURITY.md.
"""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from flip.files import ownership
from flip.files.creation import private_folder
from flip.files.ownership import TRUSTED_GROUP, Exposure, group_name, user_name
from flip.runs.errors import PermissionDenied
from flip.runs.rundir import write_json
from jobs.common.filesystem import writing
from jobs.common.paths import REPOSITORY

MAY_RUN = "May every member run code as you?"
GUIDE = "docs/cluster.md, Shared by a group, shows how a group sets up its folders."


def require_trusted_file(path: Path, what: str, remedy: str) -> None:
    """Raise PermissionDenied if another user owns, or may write to, the file to which a path leads.

    ``what``: what the file is; ``remedy``: what else the user can do. Its folders are checked by ``open_places``.
    """
    reason = ownership.why_untrusted_target(path, _owners(path))
    if reason:
        place, _, why = reason.partition(": ")
        advice = f"It would be executed with your rights. If it is yours, run chmod go-w {place}. {remedy} Or trust a "
        advice += f"group to which its writers belong: export {TRUSTED_GROUP}=GROUP."
        raise PermissionDenied(f"{what} is not trusted: {why}", place, remedy=advice)


def open_places(paths: Iterable[Path]) -> list[Exposure]:
    """The folders and links on the way to these paths through which other users can exchange them, each once.

    Not the folders above the checkout of this command, whose code runs already: ``checkout_warnings`` names them.
    """
    every: list[Exposure] = []
    for path in paths:
        places = ownership.exposures(path, _owners(path))
        if _in_checkout(path):
            places = [place for place in places if REPOSITORY in (Path(place.place), *Path(place.place).parents)]
        every += places
    return list(dict.fromkeys(every))


def refuse(places: Sequence[Exposure]) -> None:
    """Raise PermissionDenied for the first place, if there is one, with the lines that close it or trust its group."""
    for place in sorted(places, key=lambda place: place.group is not None):
        remedy = "Other users could put other code in its place, which would be executed with your rights. "
        if ownership.is_mine(place.place):
            remedy += f"Close it: chmod go-w {place.place}. "
        elif os.geteuid() == 0:  # in most cases a mounted folder of the user who started the container
            remedy += f"In a container, work as its owner: docker run --user {_owner(place.place)}. "
        if place.group is not None:
            remedy += f"Or trust the group, if every member may run code as you: {export_line([place.group])}. "
        remedy += f"Or choose another folder: FLIP_RUNS=FOLDER, or runs_root in the cluster profile. {GUIDE}"
        what = f"this folder above the runs or their code is not trusted: {place.reason}"
        raise PermissionDenied(what, place.place, remedy=remedy)


def settle(paths: Sequence[Path], ask: Callable[[str], bool] | None) -> None:
    """Refuse paths that other users can exchange, or ask whether to trust their groups, which is then recorded.

    ``ask``: shows a question; None: there is no terminal.
    """
    places = open_places(paths)
    if not places:
        return
    if ask is None or not is_answerable(places) or not ask(f"{question(places)} {MAY_RUN}"):
        refuse(places)
    trust({place.group for place in places if place.group is not None})
    refuse(open_places(paths))


def is_answerable(places: Sequence[Exposure]) -> bool:
    """Whether trust in groups, which the user may declare, closes all places."""
    return all(place.group is not None for place in places)


def question(places: Sequence[Exposure]) -> str:
    """The question whether to trust the groups of these places; "" if there are none."""
    if not places:
        return ""
    groups = " and ".join(dict.fromkeys(group_name(place.group) for place in places if place.group is not None))
    folders = ", ".join(dict.fromkeys(place.place for place in places))
    return (
        f"Members of the group {groups} can rename in {folders}, so that they could exchange the code of these runs and"
        f" run their own as you. Trusting the group is recorded in {ownership.trust_record()}."
    )


def warnings(folders: Iterable[Path]) -> list[str]:
    """A line for each place through which other users can exchange folders of this user that exist."""
    mine = [folder for folder in folders if ownership.is_mine(folder)]
    return [warning(place) for place in open_places(mine)]


def warning(place: Exposure) -> str:
    what = f"warning: {place.place}: {place.reason}, so that others could exchange the code of the runs below it"
    return f"{what}. New runs are refused there. {GUIDE}"


def trust(groups: Collection[int]) -> None:
    """Add groups to the user's record. Raises PermissionDenied if the record itself would not be trusted."""
    path = ownership.trust_record()
    remedy = f"Trust the group by a line in your shell's profile: {export_line(groups)}."
    if path:
        with writing(path, remedy):
            private_folder(os.path.dirname(path))
            write_json(Path(path), {"groups": sorted(ownership.recorded_groups().union(groups))})
    if not ownership.recorded_groups().issuperset(groups):
        what = "the group cannot be recorded where only you can write"
        raise PermissionDenied(what, path or "no home folder", remedy=remedy)


def export_line(groups: Iterable[int]) -> str:
    """The shell line that trusts groups, in addition to those that are trusted already."""
    names = []
    for number in dict.fromkeys([*sorted(ownership.trusted_groups()), *groups]):
        name = group_name(number)
        names.append(name if ownership.group_number(name) == number else str(number))
    return f"export {TRUSTED_GROUP}={','.join(names)}"


def checkout_warnings() -> list[str]:
    """Lines about other users who can change the code of this command."""
    owner = _code_owner()
    lines = []
    if owner not in (os.geteuid(), 0):
        lines.append(f"warning: this checkout, {REPOSITORY}, belongs to {user_name(owner)}, whose code you run")
    for place, reason, _ in ownership.exposures(REPOSITORY, [owner]):
        lines.append(f"warning: {place}: {reason}, so that others could exchange this checkout, whose code you run")
    return lines


def _owner(place: str) -> str:
    """UID:GID of a folder or link."""
    info = os.lstat(place)
    return f"{info.st_uid}:{info.st_gid}"


def _owners(path: Path) -> list[int]:
    """Further trusted owners of a file: that of the checkout for its own files, since its code runs already."""
    if _in_checkout(path):
        return [_code_owner()]
    return []


def _in_checkout(path: Path) -> bool:
    return REPOSITORY in Path(os.path.realpath(path)).parents


def _code_owner() -> int:
    return os.stat(__file__).st_uid
