"""Train a tokenizer on captions, count their tokens, or show the tokens of a text."""

import argparse
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jobs.common.cli import COUNT, Parser, run_command

EXAMPLES = """examples:
  flip tokenizer train --captions captions.txt --vocabulary 30522 --out tokenizer.json
  flip tokenizer train --captions data/manifest other/manifest --vocabulary 8000 --out tokenizer.json
  flip tokenizer train --kind bpe --captions captions.txt --vocabulary 49408 --out tokenizer.json
  flip tokenizer table tokenizer.json --captions data/manifest --parts-of-speech --out tokens.json
  flip tokenizer show tokenizer.json "a photo of a cat"
"""
KINDS = ("wordpiece", "bpe")
"""The rows of ``TOKENIZERS`` in flip/tokenizer.py, whose import is slow."""
HEAD = 1 << 20
"""Bytes at the start of a file by which a binary file is refused."""
TEXT_BYTES = bytes({*range(0x20, 0x7F), *range(0x80, 0x100), *b"\t\n\v\f\r\x1b"})
"""All bytes but control characters that no text holds."""
_MEMBER = "Captions of a manifest lie in the member that --member names."


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="flip tokenizer", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="command")
    train_ = commands.add_parser("train", help="write a tokenizer.json", description=train.__doc__, epilog=EXAMPLES)
    train_.add_argument("--vocabulary", type=COUNT, required=True, metavar="N", help="maximum number of entries")
    help_text = "wordpiece, as BERT's (default), or bpe: byte pairs, as CLIP's, for recipe clip"
    train_.add_argument("--kind", choices=KINDS, default="wordpiece", help=help_text)
    train_.set_defaults(run=train)
    table_ = commands.add_parser("table", help="write a token table", description=table.__doc__, epilog=EXAMPLES)
    table_.add_argument("tokenizer", help="a tokenizer.json")
    help_text = "tag words by TextBlob (pip install textblob), for text_masking: syntax"
    table_.add_argument("--parts-of-speech", action="store_true", help=help_text)
    table_.set_defaults(run=table)
    for parser_ in (train_, table_):
        help_text = "text files with one caption per line, or manifests"
        parser_.add_argument("--captions", nargs="+", required=True, metavar="FILE|MANIFEST", help=help_text)
        help_text = (
            "member of a sample that holds captions, or json:FIELD (default: txt, or the captions of parquet files)"
        )
        parser_.add_argument("--member", help=help_text)
        parser_.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    show_ = commands.add_parser("show", help="token ids of texts", description=show.__doc__, epilog=EXAMPLES)
    show_.add_argument("tokenizer", help="a tokenizer.json, or CLIP's bpe_simple_vocab_16e6.txt.gz")
    show_.add_argument("texts", nargs="+", metavar="text")
    show_.add_argument("--length", type=COUNT, default=32, metavar="T", help="tokens per caption (default 32)")
    show_.set_defaults(run=show)
    return run_command(run, parser.parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    from jobs.common.text import plain

    report = options.run(options)
    if options.json:
        print(json.dumps(report, indent=1))
        return 0
    for name, value in report.items():
        if isinstance(value, list):
            text = " ".join(f"{piece}:{i}" for i, piece in value)
        else:
            text = str(value)
        print(f"{plain(name)}: {plain(text)}")
    return 0


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train a tokenizer and write it to a new file."""
    from flip.runs.errors import ConfigError
    from flip.tokenizer import TOKENIZERS
    from jobs.common.terminal import ProgressBar

    kind = TOKENIZERS[options.kind]
    if options.vocabulary <= kind.smallest:
        raise ConfigError(f"a vocabulary needs more than {kind.smallest} entries", "--vocabulary", options.vocabulary)
    _claim(options.out)
    texts = _read_captions(options)
    if not texts:
        raise ConfigError("no captions found", " ".join(options.captions), remedy=_MEMBER)
    with _new_file(options.out) as path, ProgressBar("training the tokenizer"):
        entries = kind.train(texts, options.vocabulary, path)
    return {"captions": len(texts), "entries": entries, "file": str(options.out)}


def _read_captions(options: argparse.Namespace) -> list[str]:
    from jobs.common.terminal import ProgressBar

    texts = list[str]()
    with ProgressBar("reading captions") as bar:
        for source in options.captions:
            for line in captions(source, options.member):
                texts.append(line)
                if len(texts) % 1000 == 0:
                    bar(len(texts), 0, source)
    return texts


def table(options: argparse.Namespace) -> dict[str, Any]:
    """Count the tokens of captions, for text_masking: frequency, and write the table to a new file."""
    from flip.data.token_table import LONGEST, count_tokens
    from flip.runs.errors import ConfigError
    from flip.tokenizer import Tokenizer

    tokenizer = Tokenizer(options.tokenizer, LONGEST, prepend_cls=False)
    _claim(options.out)
    texts = (line for source in options.captions for line in captions(source, options.member))
    counted = count_tokens(tokenizer, texts, options.parts_of_speech)
    if not any(counted.counts):
        raise ConfigError("no captions found", " ".join(options.captions), remedy=_MEMBER)
    with _new_file(options.out) as path:
        counted.write(path)
    return {"tokens": sum(counted.counts), "entries": len(counted.counts), "file": str(options.out)}


def _claim(path: Path) -> None:
    """Check that a new file can be written before the captions are read; creates its folder.

    Raises ConfigError, PermissionDenied, StorageError.
    """
    from flip.files.creation import output_folder
    from flip.runs.errors import ConfigError, PermissionDenied
    from tools.shards_commands.output import writing

    with writing(path):
        if path.exists():
            raise ConfigError("already exists", str(path), remedy="Name another file, or move this one away.")
        output_folder(path.parent)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionDenied("may not be written", str(path.parent), remedy="Choose another --out.")


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` whose file is then renamed to it. Raises as ``_claim``."""
    from flip.files import deletion
    from tools.shards_commands.output import writing

    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with writing(path):
        try:
            yield temporary
            _claim(path)  # another command may have written it meanwhile
            os.rename(temporary, path)
        finally:
            deletion.delete_file(temporary, missing_ok=True)


def captions(source: str, member: str | None = None) -> Iterator[str]:
    """The lines of a text file, or those of one member of a manifest's samples, without excluded ones.

    ``member``: None for txt, or for the captions that the index of parquet files names.
    """
    from flip.runs.errors import read_error

    if Path(source).is_dir():
        from flip.data.chunk_reader import ChunkReader
        from flip.data.decode import DecodeError
        from flip.data.manifest.manifest import Manifest
        from flip.data.sample_members import captions_of, refuse_json_members
        from tools.shards_commands.output import parquet_captions

        manifest = Manifest.load(source)
        members = [member or "txt"]
        if manifest.pages and member is None:
            members = parquet_captions(manifest).split(",")
        refuse_json_members(members, "--member")
        for _, sample in ChunkReader().samples(manifest):
            with suppress(DecodeError):  # a sample without a caption
                yield from (text for text in captions_of(sample, members) if text)
        return
    try:
        with open(source, "rb") as file:
            _refuse_binary(source, file.read(HEAD))
        with open(source, encoding="utf-8", errors="replace", newline="\n") as file:
            yield from (line.rstrip("\r\n") for line in file if line.strip())
    except OSError as error:
        raise read_error(error, "captions cannot be read", source) from error


def _refuse_binary(source: str, head: bytes) -> None:
    """Raise ConfigError if the first bytes of a file are not those of a text in an encoding that extends ASCII."""
    from flip.runs.errors import ConfigError

    controls = head.translate(None, delete=TEXT_BYTES)
    if controls:
        remedy = "Give text files in UTF-8 with one caption per line, or the folder of a manifest."
        raise ConfigError("not a text file: it holds control characters", source, remedy=remedy)


def show(options: argparse.Namespace) -> dict[str, Any]:
    """Token ids and pieces, without [CLS]."""
    from flip.tokenizer import Tokenizer

    tokenizer = Tokenizer(options.tokenizer, options.length, prepend_cls=False)
    rows = tokenizer(options.texts)
    return {
        text: [[int(i), tokenizer.piece(int(i))] for i in tokenizer.without_padding(row)]
        for text, row in zip(options.texts, rows, strict=True)
    }
