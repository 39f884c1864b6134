"""The files of a user's classes, FILE.py:Class: read and checked before a run is submitted, never executed."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flip.common import user_classes
from flip.common.user_classes import UserClass
from flip.config.schema import Config
from flip.runs.errors import ConfigError
from jobs.planning import callback_files


class _Setting(NamedTuple):
    """A setting that may name classes of a user."""

    key: str
    section: Any
    field: str
    base: str
    """Name of the class from which they are derived."""

    @property
    def entries(self) -> list[str]:
        """Those of its values that name one."""
        value = getattr(self.section, self.field)
        return [each for each in (value if isinstance(value, list) else [value]) if user_classes.is_entry(each)]

    def replace(self, entries: Mapping[str, str]) -> None:
        value = getattr(self.section, self.field)
        if isinstance(value, list):
            value = [entries.get(each, each) for each in value]
        else:
            value = entries.get(value, value)
        setattr(self.section, self.field, value)


def paths(config: Config, folder: Path) -> list[Path]:
    """The files that a configuration of a sweep file in ``folder`` names, each once; entries need not be valid."""
    entries = [*config.monitor.callbacks, *_entries(config)]
    return list(dict.fromkeys(folder / entry.partition(":")[0] for entry in entries))


def pinned(config: Config, folder: Path) -> Config:
    """The configuration, in which each class of a user's has the hash of its file; callbacks have none.

    Raises ConfigError if a file or class does not exist, or does not fit what names it; PermissionDenied if a file may
    not be read, or another user could have written it.
    """
    settings = [setting for setting in _settings(config) if setting.entries]
    if not settings:
        return config
    config = deepcopy(config)
    for setting in _settings(config):
        setting.replace({entry: _pinned(setting, entry, folder) for entry in setting.entries})
    _check_steps(config)
    return config


def read(config: Config, folder: Path, copies: Sequence[Path] = ()) -> dict[str, bytes]:
    """Path of the copy (``UserClass.copy``) -> content of the files of a pinned configuration.

    ``copies``: folders with copies of earlier submissions, for a run that keeps a file which has changed since.
    Raises as ``pinned``.
    """
    contents = callback_files.read(config.monitor.callbacks, folder)
    for setting in _settings(config):
        for entry in setting.entries:
            name = user_classes.parse(entry, setting.key)
            contents[name.copy] = _of_hash(name, setting.key, folder, copies)
    return contents


def described(config: Config) -> Iterator[str]:
    """A line for each class of a user's that changes results, for plans."""
    for setting in _settings(config):
        for entry in setting.entries:
            name = user_classes.parse(entry, setting.key)
            yield f"{setting.key}: {name.file}:{name.cls}, sha256 {name.digest[:12]}"


def _entries(config: Config) -> list[str]:
    return [entry for setting in _settings(config) for entry in setting.entries]


def _settings(section: Any, prefix: str = "") -> Iterator[_Setting]:
    """The settings below a section that may name classes of a user."""
    for field in fields(section):
        value = getattr(section, field.name)
        key = prefix + field.name
        if "user_class" in field.metadata:
            yield _Setting(key, section, field.name, field.metadata["user_class"])
        for member in value if isinstance(value, list) else [value]:
            if is_dataclass(member):
                name = f".{getattr(member, 'name', '')}" if isinstance(value, list) else ""
                yield from _settings(member, f"{key}{name}.")


def _pinned(setting: _Setting, entry: str, folder: Path) -> str:
    """The entry with the hash of its file, whose class is checked. An entry that has a hash stays."""
    name = user_classes.parse(entry, setting.key)
    if name.digest:
        return entry
    path = folder / name.file
    content = callback_files.content(path, setting.key)
    try:
        user_classes.stand_in(name, content, base(setting.base), str(path))
    except ConfigError as error:
        raise ConfigError(f"{setting.key}: {error.what}", error.where, error.value, error.remedy) from error
    _refuse_neighbours(path, content, setting.key)
    return str(name._replace(digest=user_classes.remember(content)))


def base(name: str) -> Any:
    """The class of this name from which a user's are derived."""
    from flip.data.augment import AugmentationStep
    from flip.data.patch_masking import PatchMasking
    from flip.data.text_masking import TextMasking
    from flip.loss_kinds import Loss
    from flip.optimizer_kinds import OptimizerKind
    from flip.tower_kinds import UserImageTower

    kinds = (AugmentationStep, PatchMasking, TextMasking, Loss, OptimizerKind, UserImageTower)
    return {each.__name__: each for each in kinds}[name]


def _refuse_neighbours(path: Path, content: bytes, key: str) -> None:
    """Raise ConfigError if a file imports a file beside it: only the file itself is copied."""
    for module in user_classes.imported(content, str(path)):
        beside = [path.parent / f"{module}.py", path.parent / module / "__init__.py"]
        if not module or any(each.exists() for each in beside):
            what = f"{key}: imports a file beside it, which the run does not get"
            raise ConfigError(what, str(path), module or "a relative import", "Put all of it into this one file.")


def _of_hash(name: UserClass, key: str, folder: Path, copies: Sequence[Path]) -> bytes:
    """The content with the hash of an entry: of the file beside the sweep, or of a copy."""
    places = [folder / name.file, *(copy / name.copy for copy in copies)]
    for place in places:
        if not place.is_file():
            continue
        content = callback_files.content(place, key)
        if user_classes.remember(content) == name.digest:
            return content
    remedy = "Restore the file, or submit with --changed fork or restart."
    raise ConfigError(f"{key}: the file has changed since the run was submitted", str(places[0]), name.digest, remedy)


def _check_steps(config: Config) -> None:
    """Raise ConfigError if draws of a user's augmentation steps are those of others."""
    from flip.data.augment import USER_PURPOSES, declared

    for augment in (config.augment, *(stage.augment for stage in config.stages)):
        users: dict[tuple[int, int], str] = {}
        for entry in augment.steps or ():
            step = declared(entry)
            where = f"augment.steps, {entry.partition('@')[0]}"
            if step.purpose < USER_PURPOSES:
                remedy = f"Take a number from {USER_PURPOSES} on."
                raise ConfigError("this purpose of draws is not for classes of users", where, step.purpose, remedy)
            for number in range(step.first, step.first + step.count):
                other = users.setdefault((step.purpose, number), entry)
                if other != entry or augment.steps.count(entry) > 1:
                    what = "two steps have the same draws"
                    raise ConfigError(what, where, step.purpose, "Give each step a purpose of its own.")
