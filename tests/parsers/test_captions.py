"""What stands in shards and beside them: captions, labels, pictures, tokenizers, lists of images, heads of replies."""

import hashlib
import io
import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from flip.config.schema import TextTower
from flip.data import decode
from flip.data.decode import DecodeError, captions_of, json_fields, label_of
from flip.data.storage import s3
from flip.data.storage.base import RequestError
from flip.data.storage.checksums import ETag
from flip.evaluation import annotations, prompts
from flip.runs.errors import ConfigError, DataError
from flip.tokenizer import Tokenizer, clean, train
from tests.parsers.spoil import DEEP, changed, spoiled, texts
from tools.shards_commands.inspect_samples import _json

pytestmark = pytest.mark.timeout(60)

#: Text as a JSON file can hold it: half of a pair, which UTF-8 has not, included.
ANY = st.text(st.characters(), max_size=30) | st.sampled_from(["&#1114112;", "&" * 40, "\ud800", "&amp;amp;lt;", "\0"])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train(["a red cat", "the dogs & a mat"], 60, file)
    return file


@given(st.lists(ANY, max_size=3), st.booleans(), st.booleans())
@example(["\ud800 a"], False, True)
@example(["&" + "a" * 100_000], True, True)
def test_any_caption(path, texts, first, repair):
    tokenizer = Tokenizer(path, 8, first, repair)
    ids = tokenizer(texts)
    assert ids.shape == (len(texts), 8) and (ids >= 0).all() and (ids < tokenizer.size).all()


@given(ANY)
def test_cleaning_twice_is_cleaning_once_but_for_entities(text):
    done = clean(text)
    assert done == " ".join(done.split()) and ("&" in done or clean(done) == done)


@given(
    st.dictionaries(st.sampled_from(["txt", "json", "cls"]), st.binary(max_size=30) | texts({"0": ["a"]}), max_size=3)
)
@example({"json": DEEP})
@example({"cls": b"9" * 5000})
@example({"cls": b"99999999999999999999"})
def test_any_members(sample):
    try:
        assert all(isinstance(caption, str) and "\n" not in caption for caption in captions_of(sample, ["txt"]))
    except DecodeError:
        assert "txt" not in sample
    with suppress(DecodeError):
        assert all(isinstance(caption, str) for caption in captions_of(sample, ["json:0"]))
    json_fields(sample)
    with suppress(DecodeError):
        assert np.int64(label_of(sample)) >= 0
    _json(sample)


def test_a_json_member_nested_without_end():
    assert _json({"json": DEEP}) == DEEP.decode()


def picture(form):
    out = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(out, form)
    return out.getvalue()


PICTURES = [picture(form) for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]


@given(st.sampled_from(PICTURES).flatmap(spoiled) | st.binary(max_size=40))
def test_any_picture(data):
    for decoder in ("pillow", "simplejpeg"):
        with suppress(decode.DecodeError):
            pixels = decode.decode(data, decoder)
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


@given(data=st.data())
def test_any_tokenizer(data, path, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(data.draw(texts(json.loads(path.read_text(encoding="utf-8")))))
    read(file)


@pytest.mark.parametrize("text", [DEEP, b'{"model": {"type": "WordPiece", "vocab": ' + DEEP, b"1" * 5000])
def test_a_tokenizer_nested_without_end(text, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(text)
    assert read(tmp_path / "tokenizer.json") is None


def read(file):
    try:
        found = Tokenizer.of(file, TextTower())
        assert found(["a cat"]).shape == (1, TextTower().length)
        return found
    except ConfigError as error:
        assert str(file) in error.paragraph()
        return None


@given(texts({"names": ["cat", "dog"], "templates": ["a {}"]}))
@example(DEEP)
def test_any_names_of_classes(tmp_path, text):
    (tmp_path / "classes.json").write_bytes(text)
    with suppress(ConfigError):
        found = prompts.read_prompts(str(tmp_path / "classes.json"))
        assert all(name in prompts.fill_templates(name, ["{}"])[0] for name in found.names)


COCO = {"annotations": [{"image_id": 1, "caption": "a"}], "images": [{"id": 1, "file_name": "a.jpg"}]}
KARPATHY = {"images": [{"split": "test", "filename": "a.jpg", "filepath": "b", "sentences": [{"raw": "a"}]}]}


@given(st.sampled_from([COCO, KARPATHY]).flatmap(texts) | texts({"image": "a.jpg", "label": 1, "captions": ["b"]}))
@example(DEEP)
def test_any_list_of_images(tmp_path, text):
    for name in ("list.json", "list.jsonl", "list.csv"):
        (tmp_path / name).write_bytes(text)
        with suppress(DataError):
            found = annotations.read_annotations(tmp_path / name, "test")
            assert all(one.label is None or isinstance(one.label, int) for one in found)
            assert all(isinstance(caption, str) for one in found for caption in one.captions)


@given(spoiled(b'image,caption\na.jpg,one\nb.jpg,"two, three"\n'))
def test_any_table_of_images(tmp_path, text):
    (tmp_path / "table.csv").write_bytes(text)
    with suppress(DataError):
        assert all(
            isinstance(caption, str)
            for one in annotations.read_annotations(tmp_path / "table.csv", "test")
            for caption in one.captions
        )


@given(
    changed({"ContentRange": "bytes 5-9/20", "ContentLength": 5, "ETag": '"ab"'}),
    st.sampled_from(["bytes 5-9/20", "bytes 5-9/*", "bytes 9-5/20", "", "bytes " + "9" * 5000 + "-9/20"]),
)
def test_any_head_of_a_reply(reply, wanted):
    """Of the types that a client gives: what a server chose to say is the text."""
    if not isinstance(reply, dict):
        return
    reply = {"ContentRange": wanted} | {key: value for key, value in reply.items() if key == "ContentLength"}
    if not isinstance(reply.get("ContentLength", 0), int):
        return
    with suppress(RequestError, DataError):
        s3._check("s3://b/k", reply, 5, 10)


@given(st.lists(st.binary(max_size=30), max_size=5), st.lists(st.integers(1, 40), max_size=4))
def test_an_etag_is_that_of_the_parts_however_the_bytes_come(pieces, parts):
    whole, found = b"".join(pieces), ETag(parts)
    for piece in pieces:
        found.update(piece)
    cut, at = [], 0
    for size in parts:
        cut.append(whole[at : at + size])
        at += size
    once = ETag(parts)
    once.update(whole)
    assert found.text() == once.text()
    if at == len(whole) and parts:
        digests = b"".join(hashlib.md5(part, usedforsecurity=False).digest() for part in cut)
        assert found.text() == f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
