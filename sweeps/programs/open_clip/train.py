"""open_clip's trainer with a seed for each epoch: a restarted run ends with the weights of an undisturbed one.

    python train.py --shards ~/.cache/flip/emoji/train --model local-dir:tiny ...    # the others: as open_clip_train

open_clip saves after an epoch, and no state of random generators. Therefore each epoch begins with a seed of its own
here. ``--shards FOLDER`` unpacks pairs NAME.png and NAME.txt of tars into a table of pictures for open_clip's reader.
open_clip itself is unchanged. Copy this folder; it needs open_clip_torch and pandas<4.
"""

import argparse
import csv
import os
import sys
import tarfile
from pathlib import Path

import open_clip_train.main as trainer
import torch

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
TABLE = Path("pictures.tsv")


def unpack(shards):
    """Write the pictures and captions of ``shards`` below the working directory. The table of all comes last."""
    folder = TABLE.with_suffix("")
    folder.mkdir(exist_ok=True)
    rows = []
    for tar in sorted(shards.rglob("*.tar")):
        captions = {}
        images = {}
        with tarfile.open(tar) as file:
            for member in file:
                name = Path(member.name)
                if member.isfile() and name.suffix == ".txt":
                    captions[name.stem] = file.extractfile(member).read().decode()
                elif member.isfile() and name.suffix in IMAGES:
                    path = folder / f"{len(rows) + len(images):08}{name.suffix}"
                    path.write_bytes(file.extractfile(member).read())
                    images[name.stem] = path
        rows += [(path.absolute(), captions[name]) for name, path in images.items() if name in captions]
    if not rows:
        raise SystemExit(f"{shards} has no tars with pictures and captions.")
    saving = TABLE.with_suffix(".saving")
    with open(saving, "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("filepath", "title"), *rows])
    os.replace(saving, TABLE)


def seed_each_epoch(train_one_epoch):
    """``train_one_epoch`` with a seed for the order of samples, augmentation and dropout, by epoch and rank."""

    def seeded(model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args, **named):
        trainer.random_seed(args.seed + 1000 * (epoch + 1), args.rank)
        train_one_epoch(model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args, **named)

    return seeded


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--shards", type=Path)
    own, words = parser.parse_known_args()
    if own.shards:
        if not TABLE.exists():
            unpack(own.shards.expanduser())
        words += ["--dataset-type", "csv", "--train-data", str(TABLE), "--csv-separator", "\t"]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    trainer.train_one_epoch = seed_each_epoch(trainer.train_one_epoch)
    sys.exit(1 if trainer.main(words) else 0)  # -1: the folder of its logs exists already


if __name__ == "__main__":
    main()
