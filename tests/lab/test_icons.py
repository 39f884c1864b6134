"""Tests of the icon data: families, names, near-duplicates, and a complete build from a tiny package."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flip.data.manifest.manifest import Manifest
from flip.evaluation.datasets.catalog import DatasetRequest, resolve_dataset
from lab.icons import build, drawings, families, names, selection
from tests.harness.common import ROOT
from tests.tools.demo_packages import contents, pack, samples
from tools.commands import shards
from tools.demo_datasets import output, render

SUBJECTS = (
    "arrow-left", "home", "star", "fish", "tree", "boat", "lamp", "moon", "bird", "leaf", "drum", "rock", "gate",
    "wolf", "crab",
)  # fmt: skip
TRAINING = ("aa", "bb", "cc", "dd", "lucide", "feather")


def grid(*seed: object, fill: str = "#000") -> str:
    """Draw on 4 x 4 cells of 8 px. Two opposite corners are always filled; the seed determines the other cells."""
    bits = int(hashlib.sha1(repr((1, *seed)).encode(), usedforsecurity=False).hexdigest(), 16) | 1 | 1 << 15
    cells = (f"M{8 * (i % 4)} {8 * (i // 4)}h8v8h-8z" for i in range(16) if bits >> i & 1)
    return f'<path fill="{fill}" d="{"".join(cells)}"/>'


def collection(prefix: str, bodies: dict[str, str], licence: str = "MIT", **info: object) -> dict:
    facts = {"name": prefix.upper(), "author": {"name": "A"}, "license": {"title": licence, "spdx": licence}} | info
    icons = {name: {"body": body} for name, body in bodies.items()}
    return {"prefix": prefix, "info": facts | {"total": len(bodies)}, "icons": icons, "width": 32, "height": 32}


# -- families and names ------------------------------------------------------------------------------------------------


def test_family_contains_variants_and_forks_of_icon_set() -> None:
    assert {families.family(p) for p in ("fa", "fa6-solid", "la")} == {"fontawesome"}
    assert families.family("streamline-plump-color") == families.family("covid") == "streamline"
    assert families.family("ri") == "ri"
    assert [families.family(name) for name in families.HELD_OUT] == list(families.HELD_OUT)


@pytest.mark.parametrize(
    ("prefix", "licence", "category", "reason"),
    [
        ("aa", "MIT", "", ""),
        ("aa", "CC-BY-SA-4.0", "", ""),
        ("aa", "GPL-2.0-only", "", "licence GPL-2.0-only"),
        ("aa", "CC-BY-NC-4.0", "", "licence CC-BY-NC-4.0"),
        ("aa", "", "", "licence unknown"),
        ("noto", "MIT", "Emoji", "emoji"),
        ("fluent-emoji", "MIT", "", "emoji"),
    ],
)
def test_refusal_rejects_emoji_and_restrictive_licences(prefix: str, licence: str, category: str, reason: str) -> None:
    assert families.refusal(prefix, {"license": {"spdx": licence}, "category": category}) == reason


def test_icon_names_are_split_into_subject_style_and_aliases() -> None:
    stroke = '<path stroke="#000" d="M0 0h9"/>'
    item = collection("aa", dict.fromkeys(["home-24-filled", "traffic-light", "round-star-02", "sun-outline"], ""))
    item["icons"]["traffic-light"]["body"] = stroke
    item["icons"]["empty"] = {"body": "", "width": 0, "height": 0}
    item |= {"suffixes": {"24-filled": "24 Filled"}, "prefixes": {"round": "Round"}}
    item["categories"] = {"FoodDrink": ["sun-outline"]}
    item["aliases"] = {
        "house-24-filled": {"parent": "home-24-filled"},
        "home-filled": {"parent": "home-24-filled"},
        "home-left": {"parent": "home-24-filled", "hFlip": True},
    }
    icons = {icon.name: icon for icon in names.icons(item)}
    assert {name: (icon.subject, icon.style) for name, icon in icons.items()} == {
        "home-24-filled": ("home", "a filled icon"),
        "traffic-light": ("traffic light", "a line icon"),
        "round-star-02": ("star", "a rounded icon"),
        "sun-outline": ("sun", "a line icon"),
    }
    assert icons["home-24-filled"].aliases == ("house",), "an alias that mirrors is another drawing"
    assert names.captions(icons["sun-outline"]) == [
        "sun", "an icon of sun", "a symbol of sun", "sun, a line icon", "sun, food drink",
    ]  # fmt: skip
    assert names.captions(icons["home-24-filled"])[-1] == "an icon of home, or house"


def test_subject_of_two_variants_does_not_depend_on_hash_seed() -> None:
    """Of two variants of equal length the one counts that is where the set says: prefix first, suffix last."""
    first = "bold", "line", "thin", "flat"
    last = "tall", "base", "open", "wide"
    listed = [f"{a}-star-{b}" for a in first for b in last]
    subjects = {"prefixes": {f"star {b}" for b in last}, "suffixes": {f"{a} star" for a in first}}
    for field, expected in subjects.items():
        item = collection("aa", dict.fromkeys(listed, "")) | {field: dict.fromkeys((*first, *last), "")}
        assert {icon.subject for icon in names.icons(item)} == expected


# -- near-duplicates ---------------------------------------------------------------------------------------------------


def drawing(number: int, body: str, family: str = "aa", subject: str = "star") -> selection.Drawing:
    item = {"icons": {"x": {"body": body}}, "width": 32, "height": 32}
    png, shape = drawings.convert(render.picture(render.svg(item, "x")))
    icon = names.Icon(f"{subject}-{number}", subject, "", "", ())
    return selection.Drawing(number, family, family, icon, png, shape)


def test_nearest_detects_copy_in_other_colour_size_and_position() -> None:
    original = drawing(0, grid(1))
    other = drawing(1, grid(2))
    copy = drawing(2, f'<g transform="translate(9 2) scale(.5)">{grid(1, fill="#203060")}</g>')
    to_others, converse = selection.nearest([original], [other, copy])
    assert to_others[0] == converse[1] < selection.NEAR < converse[0]
    assert selection.nearest([original], [original])[0][0] == 0


def test_different_drops_copies_and_blanks_but_no_held_out_drawings() -> None:
    items = [drawing(0, grid(1)), drawing(1, grid(1)), drawing(2, grid(1), "tabler"), drawing(3, "")]
    distinct, blank, copies = selection.different(items, ["tabler"])
    assert ([d.number for d in distinct], blank, copies) == ([0, 2], 1, 1)


def test_shuffled_order_is_independent_of_other_drawings() -> None:
    items = [drawing(n, "") for n in range(40)]
    order = [d.number for d in selection.shuffled(items)]
    assert order != list(range(40)) and sorted(order) == list(range(40))
    assert [n for n in order if n % 2] == [d.number for d in selection.shuffled(items[1::2])]


def test_classes_require_enough_families_and_distinct_drawings() -> None:
    training = {
        "star": {"a", "b", "c", "d"},
        "sun": {"a", "b", "c", "d", "e"},
        "rare": {"a", "b", "c"},
        "x2": {*"abcd"},
    }
    chosen = [("star", 1), ("sun", 1), ("rare", 2), ("x2", 3)]
    items = [drawing(n, grid(seed), "tabler", subject) for n, (subject, seed) in enumerate(chosen)]
    assert list(selection.classes(items, training)) == ["sun"], "star is drawn like sun, which more families draw"


def test_pictures_are_all_drawings_whose_name_training_has() -> None:
    """Of a class the set with one picture has the plainest drawing. The set of all has rare names and variants, too."""
    training = {"star": {*"abcd"}, "rare": {"a"}, "gone": set[str]()}
    named = [("star", "star-filled-2"), ("star", "star"), ("rare", "rare"), ("star", "star-outline"), ("new", "new")]
    items = [
        replace(d, icon=replace(d.icon, name=name))
        for n, (subject, name) in enumerate(named)
        for d in [drawing(n, grid(n), "tabler", subject)]
    ]
    assert {name: d.icon.name for name, d in selection.classes(items, training).items()} == {"star": "star"}
    assert [d.number for d in selection.pictures(items, training)] == [0, 1, 2, 3]


# -- the build ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a cache whose package has six training sets in five families, all held-out and three refused sets."""
    (tmp_path / "packages").mkdir()
    sets = {}
    for prefix in (*TRAINING, *families.HELD_OUT):
        sets[prefix] = collection(prefix, {subject: grid(prefix, subject) for subject in SUBJECTS})
    sets["aa"]["icons"] |= {"blank": {"body": ""}, "home-2": sets["aa"]["icons"]["home"]}
    sets["bb"]["icons"] |= {
        "boat": {"body": grid("tabler", "moon", fill="#305020")},
        "lamp": sets["bi"]["icons"]["lamp"],
    }
    sets["tabler"]["icons"] |= {
        "star-02": {"body": grid("tabler", "another star")},
        "flag": {"body": grid("tabler", "flag")},
        "alone": {"body": grid("tabler", "alone")},
    }
    sets["aa"]["icons"]["flag"] = {"body": grid("aa", "flag")}
    sets["tabler"]["icons"]["wolf"] = {"body": grid("carbon", "wolf", fill="#305020")}
    sets["bb"]["info"]["license"]["spdx"] = "CC-BY-4.0"
    left_out = [("noto", "MIT", "Emoji"), ("wordpress", "GPL-2.0-or-later", ""), ("ps", "CC-BY-NC-4.0", "")]
    for prefix, licence, category in left_out:
        sets[prefix] = collection(prefix, {"star": grid(prefix)}, licence, category=category)
    sets["empty"] = collection("empty", {})
    files: dict[str, object] = {"collections.json": {prefix: item["info"] for prefix, item in sets.items()}}
    files |= {f"json/{prefix}.json": item for prefix, item in sets.items()}
    package = pack(tmp_path / "packages", families.PACKAGE, files)
    monkeypatch.setattr(families, "PACKAGE", package)
    monkeypatch.setattr(build, "DATA", replace(build.DATA, packages=[package]))
    return tmp_path


@pytest.mark.long
def test_build_writes_training_and_held_out_sets_without_leakage(tiny: Path) -> None:
    facts = build.DATA.build(tiny)
    folder = tiny / "icons"
    assert facts["counts"] == {
        "drawings": 156, "blank": 1, "copies": 1, "near-duplicates": 2, "collections": 10, "families": 9,
    }  # fmt: skip
    sizes = {name: item["samples"] for name, item in facts["sets"].items()}
    assert sizes == {
        "train": 89, "train-1of8": 11, "train-1of64": 1, **dict.fromkeys(families.HELD_OUT, 15),
        "tabler-all": 17, "carbon-all": 15, "game-icons-all": 15,
        "retrieval": 16, "probe/train": 30, "probe/test": 15,
    }  # fmt: skip
    one, every = (samples(folder / name) for name in ("tabler", "tabler-all"))
    assert every.keys() - one.keys() == {"tabler_star-02", "tabler_flag"} and "tabler_star" in one
    assert {key: every[key]["png"] for key in one} == {key: each["png"] for key, each in one.items()}
    assert [facts["leakage"][name]["near_before"] for name in ("tabler", "bi", "carbon")] == [0.0556, 0.0667, 0.0]
    assert {item["near_after"] for item in facts["leakage"].values()} == {0.0}

    train = samples(folder / "train")
    # Held-out families and those left out are not trained on.
    assert {key.split("_")[0] for key in train} == set(TRAINING)
    assert "bb_boat" not in train and "bb_lamp" not in train and "aa_blank" not in train
    assert train["aa_fish"]["txt"].decode().split("\n")[:2] == ["fish", "an icon of fish"]
    for name, shards_used in build.SUBSETS.items():
        parts = [(folder / "train" / f"{i:05d}.tar").read_bytes() for i in range(shards_used)]
        assert parts == [path.read_bytes() for path in sorted((folder / name).glob("*.tar"))], "a subset is nested"
    assert "tabler_wolf" not in samples(folder / "probe" / "train"), "it is a near-duplicate of carbon_wolf"
    for name in (*families.HELD_OUT, "tabler-all", "probe/train", "probe/test"):
        classes = json.loads((folder / name / "classes.json").read_text())
        for key, sample in samples(folder / name).items():
            subject = key.split("_")[1].removesuffix("-02").replace("-", " ")
            assert sample["txt"].decode() == classes["names"][int(sample["cls"])] == subject
    sets = {name: resolve_dataset(DatasetRequest(name), str(folder)) for name in ("tabler", "retrieval")}
    sets["probe"] = resolve_dataset(DatasetRequest("probe", task="probe"), str(folder))
    assert [(name, item.task) for name, item in sets.items()] == [
        ("tabler", "zeroshot"), ("retrieval", "retrieval"), ("probe", "probe"),
    ]  # fmt: skip
    assert sets["tabler"].prompts and sets["tabler"].prompts.names[0] == "arrow left"
    licences = (folder / "LICENCES.md").read_text()
    assert "| BB (bb) | A | CC-BY-4.0 |" in licences and "NOTO" not in licences

    pattern = str(folder / "train" / "*.tar")
    out = str(tiny / "permissive")
    assert shards.main(["index", pattern, "--out", out, "--filter", "licence==MIT", "--quiet"]) == 0
    assert Manifest.load(out).samples == 89 - 13, "set bb has another licence"
    folder.rename(tiny / "elsewhere")
    assert Manifest.load(tiny / "elsewhere" / "train-1of8").samples == 11


@pytest.mark.long
def test_build_reuses_rendered_sets_after_interrupt(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = build.DATA.build(tiny)
    before = contents(tiny / "icons")
    with monkeypatch.context() as patch:
        patch.setattr(output, "write_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build.DATA.build(tiny, force=True)
    assert contents(tiny / "icons") == before, "the earlier data stay until the new ones are complete"
    (tiny / "icons.work" / "aa.npz").unlink()
    rendered = []
    original = render.render
    monkeypatch.setattr(render, "render", lambda pool, *rest: rendered.append(1) or original(pool, *rest))
    assert build.DATA.build(tiny, force=True) == complete
    assert rendered == [1] and contents(tiny / "icons") == before
    assert sorted(path.name for path in tiny.iterdir()) == ["icons", "icons.lock", "packages"]


@pytest.mark.slow  # renders 357,876 drawings once into the cache, in about 15 minutes of a core
def test_build_of_real_package_has_expected_sizes_and_no_leakage() -> None:
    command = [sys.executable, "-m", "lab.icons", "--json"]
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    sizes = {name: item["samples"] for name, item in facts["sets"].items()}
    assert sizes["train"] > 300_000
    assert abs(sizes["train"] - 8 * sizes["train-1of8"]) <= 64 and abs(sizes["train"] - 64 * sizes["train-1of64"]) <= 64
    assert all(facts["sets"][name]["classes"] > 450 for name in families.HELD_OUT)
    trained = json.loads((ROOT / "docs" / "scaling_study" / "data.json").read_text())["sets"]
    assert {name: facts["sets"][name] for name in trained} == trained, "the data of the committed runs"
    assert all(facts["sets"][f"{name}-all"]["samples"] > facts["sets"][name]["samples"] for name in families.TEST)
    assert all(item["near_after"] == 0 for item in facts["leakage"].values())
    folder = Path(facts["path"])
    shard = next(iter(sorted((folder / "train").glob("*.tar"))))
    assert shard.read_bytes() == (folder / "train-1of64" / shard.name).read_bytes()
    held_out = {path for name in families.HELD_OUT for path in samples(folder / name)}
    assert not held_out & set(samples(folder / "train-1of8"))
    assert np.isclose(len(samples(folder / "retrieval")), selection.RETRIEVAL)
