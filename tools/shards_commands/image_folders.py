"""How a folder of images is laid out, for `shards make`: where its captions are, and which folders are classes.

Three layouts are known: a text file beside each image; a folder per class; and that of Hugging Face's imagefolder,
where a file ``metadata.jsonl``, ``.csv`` or ``.parquet`` has a row per image with the column ``file_name``, and where
folders such as ``train`` and ``test`` are splits. A split is neither a class nor a part of another one.
"""

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from flip.runs.errors import ConfigError
from jobs.common.cli import command

FILE_NAME = "file_name"
"""The column of a metadata file that names the image, relative to the folder of that file."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLITS = (
    "train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation",
)  # fmt: skip
"""Names of splits; case does not count."""


def is_split(name: str) -> bool:
    """Whether a folder of this name is usually a split."""
    return name.lower() in SPLITS


def metadata_files(root: Path) -> list[Path]:
    """The metadata files of a folder, or of its splits. Raises ConfigError if a folder has several."""
    if own := _metadata_of(root):
        return own
    try:
        splits = sorted(path for path in root.iterdir() if is_split(path.name) and path.is_dir())
    except OSError:  # reported by the walk through the images
        return []
    return [path for split in splits for path in _metadata_of(split)]


def refuse_several_splits(root: Path, files: Sequence[Path]) -> None:
    """Raise ConfigError if several splits have metadata files: one set would mix training and test images."""
    if len(files) > 1:
        raise _several_splits(root, [path.parent.name for path in files])


def class_depth(root: Path, images: Iterable[Path]) -> int:
    """The part of an image's path, relative to ``root``, that names its class: 0, or 1 below a split.

    Raises ConfigError if folders can be read as splits and as classes.
    """
    paths = [path.relative_to(root).parts for path in images]
    folders = sorted({parts[0] for parts in paths if len(parts) > 1})
    splits = [name for name in folders if is_split(name)]
    if not splits:
        return 0
    is_one_of_the_classes = len(splits) == 1 and len(folders) > 1  # "train" beside "car" and "bus"
    if is_one_of_the_classes:
        return 0
    if len(splits) > 1:
        raise _several_splits(root, splits)
    if any(len(parts) > 2 for parts in paths):
        return 1
    raise _no_classes(root, splits[0])


def _metadata_of(folder: Path) -> list[Path]:
    files = [folder / name for name in METADATA if os.path.lexists(folder / name)]
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise ConfigError("several files can hold the captions", str(folder), names, "Move all but one away.")
    return files


def _several_splits(root: Path, splits: Collection[str]) -> ConfigError:
    names = " and ".join(splits)
    what = f"{names} are names of splits or of classes. As splits they must not become one set"
    each = command("shards", "make", root / next(iter(splits)), "--out", "OUT")
    remedy = f"Make a set of each split: {each}. If they are classes, rename them, or give a table with --label."
    return ConfigError(what, str(root), remedy=remedy)


def _no_classes(root: Path, split: str) -> ConfigError:
    what = f"{split} is the name of a split or of a class. As a split, it holds images without captions and classes"
    remedy = (
        f"For a split, write {split}/{METADATA[0]} with {FILE_NAME} and text, a text file for each image, or a folder"
        " per class below it. If it is the only class, rename the folder."
    )
    return ConfigError(what, str(root / split), remedy=remedy)
