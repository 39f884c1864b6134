"""Fuzz tests of the parsers of captions, labels, images, tokenizers, image lists and response headers."""

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
from flip.data.decode import DecodeError
from flip.data.sample_members import captions_of, json_fields, label_of
from flip.data.storage.base import RequestError
from flip.data.storage.checksums import ETag
from flip.data.storage.ranges import check_range
from flip.evaluation.datasets import annotations, prompts
from flip.runs.errors import ConfigError, DataError
from flip.tokenizer import Tokenizer, clean, train
from tests.parsers.spoil import DEEP, changed, spoiled, texts
from tools.shards_commands.inspect_samples import _json

pytestmark = pytest.mark.timeout(60)

#: Text as a JSON file can hold it, including lone surrogates, which UTF-8 cannot encode.
ANY = st.text(st.characters(), max_size=30) | st.sampled_from(["&#1114112;", "&" * 40, "\ud800", "&amp;amp;lt;", "\0"])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train(["a red cat", "the dogs & a mat"], 60, file)
    return file


@given(st.lists(ANY, max_size=3), st.booleans(), st.booleans())
@example(["\ud800 a"], False, True)
@example(["&" + "a" * 100_000], True, True)
def test_tokenizer_encodes_any_caption(path, texts, first, repair):
    tokenizer = Tokenizer(path, 8, first, repair)
    ids = tokenizer(texts)
    assert ids.shape == (len(texts), 8) and (ids >= 0).all() and (ids < tokenizer.size).all()


@given(ANY)
def test_clean_is_idempotent_except_for_entities(text):
    cleaned = clean(text)
    assert cleaned == " ".join(cleaned.split()) and ("&" in cleaned or clean(cleaned) == cleaned)


@given(
    st.dictionaries(st.sampled_from(["txt", "json", "cls"]), st.binary(max_size=30) | texts({"0": ["a"]}), max_size=3)
)
@example({"json": DEEP})
@example({"cls": b"9" * 5000})
@example({"cls": b"99999999999999999999"})
def test_sample_parsers_raise_only_decode_error_on_any_members(sample):
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


def test_inspect_shows_raw_text_of_deeply_nested_json_member():
    assert _json({"json": DEEP}) == DEEP.decode()


def draw_image(form):
    out = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(out, form)
    return out.getvalue()


IMAGES = [draw_image(form) for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]


@given(st.sampled_from(IMAGES).flatmap(spoiled) | st.binary(max_size=40))
def test_decode_returns_rgb_or_decode_error_for_any_bytes(data):
    for decoder in ("pillow", "simplejpeg"):
        with suppress(decode.DecodeError):
            pixels = decode.decode(data, decoder)
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


@given(data=st.data())
def test_tokenizer_raises_only_config_error_on_any_json(data, path, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(data.draw(texts(json.loads(path.read_text(encoding="utf-8")))))
    read(file)


@pytest.mark.parametrize("text", [DEEP, b'{"model": {"type": "WordPiece", "vocab": ' + DEEP, b"1" * 5000])
def test_tokenizer_rejects_overly_nested_or_overlong_json(text, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(text)
    assert read(tmp_path / "tokenizer.json") is None


def read(file):
    try:
        tokenizer = Tokenizer.of(file, TextTower())
        assert tokenizer(["a cat"]).shape == (1, TextTower().length)
        return tokenizer
    except ConfigError as error:
        assert str(file) in error.paragraph()
        return None


@given(texts({"names": ["cat", "dog"], "templates": ["a {}"]}))
@example(DEEP)
def test_read_prompts_raises_only_config_error_on_any_json(tmp_path, text):
    (tmp_path / "classes.json").write_bytes(text)
    with suppress(ConfigError):
        loaded = prompts.read_prompts(str(tmp_path / "classes.json"))
        assert all(name in prompts.fill_templates(name, ["{}"])[0] for name in loaded.names)


COCO = {"annotations": [{"image_id": 1, "caption": "a"}], "images": [{"id": 1, "file_name": "a.jpg"}]}
KARPATHY = {"images": [{"split": "test", "filename": "a.jpg", "filepath": "b", "sentences": [{"raw": "a"}]}]}


@given(st.sampled_from([COCO, KARPATHY]).flatmap(texts) | texts({"image": "a.jpg", "label": 1, "captions": ["b"]}))
@example(DEEP)
def test_read_annotations_raises_only_data_error_on_any_list(tmp_path, text):
    for name in ("list.json", "list.jsonl", "list.csv"):
        (tmp_path / name).write_bytes(text)
        with suppress(DataError):
            entries = annotations.read_annotations(tmp_path / name, "test")
            assert all(entry.label is None or isinstance(entry.label, int) for entry in entries)
            assert all(isinstance(caption, str) for entry in entries for caption in entry.captions)


@given(spoiled(b'image,caption\na.jpg,one\nb.jpg,"two, three"\n'))
def test_read_annotations_raises_only_data_error_on_any_csv(tmp_path, text):
    (tmp_path / "table.csv").write_bytes(text)
    with suppress(DataError):
        for entry in annotations.read_annotations(tmp_path / "table.csv", "test"):
            assert all(isinstance(caption, str) for caption in entry.captions)


@given(
    changed({"ContentRange": "bytes 5-9/20", "ContentLength": 5, "ETag": '"ab"'}),
    st.sampled_from([None, "bytes 5-9/*", "bytes 9-5/20", "", "bytes " + "9" * 5000 + "-9/20"]),
)
def test_check_range_raises_only_known_errors_on_any_response_header(reply, content_range):
    """The values have the types that a client returns; the server controls only their text."""
    if not isinstance(reply, dict):
        return
    types = {"ContentRange": str, "ContentLength": int, "ETag": str}
    reply = {key: value for key, value in reply.items() if isinstance(value, types.get(key, object))}
    if content_range is not None:
        reply["ContentRange"] = content_range
    with suppress(RequestError, DataError):
        check_range("s3://b/k", reply.get("ContentLength"), reply.get("ContentRange") or "", 5, 10)


@given(st.lists(st.binary(max_size=30), max_size=5), st.lists(st.integers(1, 40), max_size=4))
def test_etag_is_independent_of_chunking_and_matches_multipart_md5(pieces, parts):
    data = b"".join(pieces)
    etag = ETag(parts)
    for piece in pieces:
        etag.update(piece)
    part_bytes = []
    offset = 0
    for size in parts:
        part_bytes.append(data[offset : offset + size])
        offset += size
    single = ETag(parts)
    single.update(data)
    assert etag.value() == single.value()
    if offset == len(data) and parts:
        digests = b"".join(hashlib.md5(part, usedforsecurity=False).digest() for part in part_bytes)
        assert etag.value() == f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
