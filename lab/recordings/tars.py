"""Records ``tests/parsers/foreign_tars.tar.xz``: small tars of writers that the machines of tests do not have.

    python -m lab.recordings.tars GO RUST_DEPENDENCIES JAVA_CLASS_PATH NODE_TAR

The arguments are the program go, a folder of vendored crates of Rust, the class path of Apache Commons
Compress, and the folder of node's module tar. busybox, cpio, pax, 7z, perl and git must be on the PATH.
Each archive is named WRITER-FORMAT-CONTENT.tar. Recorded were Go 1.24.4, Rust's tar 0.4.43, Commons Compress 1.27.1,
node's tar of node 20.20.2, Perl's Archive::Tar 3.02, busybox 1.37.0, GNU cpio 2.15, MirBSD's pax 20240817, 7-Zip 25.01
and git.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).with_name("tar_writers")
ARCHIVES = ROOT / "tests" / "parsers" / "foreign_tars.tar.xz"
TIME = 1_700_000_000.0
CRATE = """[package]
name = "w"
version = "1.0.0"
edition = "2021"

[dependencies]
tar = {version = "*", default-features = false}
"""


def file(name, text=None, **fields):
    return {"name": name, "kind": "file", "text": f"of {name}" if text is None else text, **fields}


def pair(*keys):
    return [file(f"{key}.{extension}") for key in keys for extension in ("jpg", "txt")]


def folder(name):
    return {"name": f"{name}/", "kind": "folder"}


CONTENTS = {
    "plain": pair("a", "b", "c"),
    "img2dataset": [file(f"{n:09d}.{extension}") for n in range(3) for extension in ("jpg", "json", "txt")],
    "folders": [folder("d"), *pair("d/a"), folder("d/v1.0"), *pair("d/v1.0/b")],
    "dot_slash": [folder("."), *pair("./a", "./d.e/b")],
    "names_of_100": pair("k" * 96, "l" * 96),
    "names_in_the_prefix": pair("p" * 120 + "/" + "k" * 60, "q" * 120 + "/" + "k" * 60),
    "long_names": pair("p" * 150 + "/" + "q" * 150 + "/" + "k" * 120, "b"),
    "unicode_names": pair("é", "e\u0301", "漢字", "😀/ü"),
    "dots_and_case": [file(name) for name in ("a.JPG", "a.seg.png", "a.Txt", "b.tar.gz", ".h.jpg", "README", "c.jpg")],
    "apart": [file(name) for name in ("a.jpg", "b.jpg", "a.txt", "b.txt")],
    "meta": [file("__info__/x.txt"), file("__meta__"), *pair("a"), file("._a.jpg"), file("b.__x__")],
    "empties": [file("a.jpg", ""), file("a.txt"), file("b.jpg"), file("b.txt", "")],
    "links": [
        *pair("a"),
        {"name": "b.jpg", "kind": "symlink", "link": "a.jpg"},
        {"name": "b.txt", "kind": "hardlink", "link": "a.txt"},
        *pair("c"),
    ],
    "large_numbers": [{**member, "owner": 2_000_000_000, "time": TIME + 0.25} for member in pair("a", "b")],
}


def cells(member):
    words = (member["kind"], member["name"], member.get("link", ""), member.get("owner", 0), member.get("time", TIME))
    return "\t".join(map(str, (*words, member.get("text", ""))))


def on_disk(place, members):
    """Write the members below a folder, for writers that pack files. Returns their names, in order."""
    for member in members:
        path = place / member["name"]
        if member["kind"] == "folder":
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if member["kind"] == "file":
            path.write_text(member["text"])
        elif member["kind"] == "symlink":
            path.symlink_to(member["link"])
        else:
            os.link(place / member["link"], path)
        if member["kind"] != "symlink":
            os.chown(path, member.get("owner", 0), 0)
            os.utime(path, (TIME, member.get("time", TIME)))
    return [member["name"] for member in members]


def programs(go, crates, java, node_tar, place):
    """Build the programs. Returns (writer, format) -> the words of its command, with the names of ``filled``."""
    built = str(place / "go")
    subprocess.run(
        [go, "build", "-o", built, PROGRAMS / "write.go"], env={**os.environ, "GO111MODULE": "off"}, check=True
    )
    (place / "crate" / "src").mkdir(parents=True)
    shutil.copy(PROGRAMS / "write.rs", place / "crate" / "src" / "main.rs")
    (place / "crate" / "Cargo.toml").write_text(CRATE)
    (place / "crate" / ".cargo").mkdir()
    (place / "crate" / ".cargo" / "config.toml").write_text(
        f'[source.crates-io]\nreplace-with = "here"\n[source.here]\ndirectory = "{crates}"\n'
    )
    subprocess.run(["cargo", "build", "--offline", "-q"], check=True, cwd=place / "crate")
    subprocess.run(["javac", "-cp", java, "-d", place, PROGRAMS / "Write.java"], check=True, cwd=place)
    rust = str(place / "crate" / "target" / "debug" / "w")
    commands: dict[tuple[str, str], list[str]] = {}
    for form in ("ustar", "pax", "gnu", "any"):
        commands["go", form] = [built, form, "{json}", "{out}"]
    for form in ("gnu", "ustar", "old"):
        commands["rust", form] = [rust, form, "{given}", "{out}"]
    for form in ("gnu", "pax"):
        commands["java", form] = ["java", "-cp", f"{java}:{place}", "Write", form, "{given}", "{out}"]
    commands["perl", "ustar"] = ["perl", str(PROGRAMS / "write.pl"), "ustar", "{given}", "{out}"]
    for form in ("pax", "npm", "ustar"):
        commands["node", form] = ["node", str(PROGRAMS / "write.js"), form, node_tar, "{folder}", "{out}", "{names}"]
    commands["busybox", "gnu"] = ["busybox", "tar", "--no-recursion", "-cf", "{out}", "{names}"]
    for form in ("ustar", "tar"):
        commands["cpio", form] = ["cpio", "-o", "-H", form, "-F", "{out}"]
        commands["pax", form] = ["pax", "-w", "-d", "-x", form, "-f", "{out}"]
    for form in ("gnu", "pax", "posix"):
        commands["7zip", form] = ["7z", "a", "-ttar", f"-mm={form}", "-snl", "-snh", "{out}", "@{listed}"]
    commands["git", "archive"] = ["git", "archive", "-o", "{out}", "HEAD"]
    return commands


def filled(words, given, out, names):
    """A command. ``{names}``: a word for each member."""
    places = {"given": given, "json": given.with_suffix(".json"), "folder": given.parent / "in", "out": out}
    places["listed"] = given.parent / "names"
    command = []
    for word in words:
        if word == "{names}":
            command += names
        else:
            command.append(word.format(**places))
    return command


def archive(words, writer, members, place):
    """The bytes of an archive, or None if the writer refuses these members."""
    shutil.rmtree(place, ignore_errors=True)
    (place / "in").mkdir(parents=True)
    given, out = place / "given", place / "out.tar"
    given.write_text("".join(cells(member) + "\n" for member in members))
    described = [{"Time": TIME} | {key.capitalize(): value for key, value in member.items()} for member in members]
    given.with_suffix(".json").write_text(json.dumps(described))
    names = on_disk(place / "in", members)
    listed = "".join(name.rstrip("/") + "\n" for name in names)
    (place / "names").write_text(listed)
    if writer == "git":
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=x"]
        for arguments in (["init", "-q"], ["add", "-A", "-f"], ["commit", "-q", "-m", "x"]):
            subprocess.run(["git", *identity, *arguments], cwd=place / "in", check=True)
    done = subprocess.run(
        filled(words, given, out, [name.rstrip("/") for name in names]), cwd=place / "in", input=listed.encode(),
        capture_output=True, env=os.environ | {"LC_ALL": "C.UTF-8", "TZ": "UTC"}, timeout=60,
    )  # fmt: skip
    if done.returncode != 0 or not out.exists():
        return None
    return out.read_bytes()


def main(go, crates, java, node_tar):
    refused = []
    new = ARCHIVES.with_suffix(".new")  # replaces the committed file once it is complete
    with tempfile.TemporaryDirectory() as folder, tarfile.open(new, "w:xz") as archives:
        place = Path(folder)
        for (writer, form), words in programs(go, crates, java, node_tar, place).items():
            for content, members in CONTENTS.items():
                name = f"{writer}-{form}-{content}"
                data = archive(words, writer, members, place / "case")
                if data is None:
                    refused.append(name)
                    continue
                info = tarfile.TarInfo(f"{name}.tar")
                info.size = len(data)
                archives.addfile(info, io.BytesIO(data))
    new.replace(ARCHIVES)
    print(f"{ARCHIVES}: {ARCHIVES.stat().st_size} bytes; writers refused: {', '.join(refused)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
