"""Tests which image and captions are read from the members of a sample."""

import numpy as np
import pytest

from flip.data.decode import DecodeError
from flip.data.sample_members import captions_of, image_of, json_fields
from flip.tokenizer import clean
from tests.synthetic import draw_image, encode


def sample(**members):
    return {name: memoryview(data if isinstance(data, bytes) else data.encode()) for name, data in members.items()}


@pytest.mark.parametrize(
    "members, expected",
    [
        (["txt"], ["one", "two"]),
        (["txt", "alt"], ["one", "two", "three"]),
        (["alt", "txt"], ["three", "one", "two"]),  # in configured order: a draw selects by position
        (["missing", "alt"], ["three"]),
        (["empty", "alt"], ["three"]),
        (["empty"], [""]),
    ],
)
def test_captions_of_reads_members_in_configured_order(members, expected):
    assert captions_of(sample(txt="one\n\n  two  \n", alt="three", empty=""), members) == expected


def test_captions_of_replaces_invalid_utf8():
    assert captions_of(sample(txt=b"caf\xe9 noir"), ["txt"]) == ["caf\ufffd noir"]
    assert captions_of(sample(txt="Title\n\n line  1\nline 2\n"), ["txt:whole"]) == ["Title line 1 line 2"]


def test_captions_of_raises_decode_error_without_caption():
    with pytest.raises(DecodeError, match=r"no caption \['txt', 'alt'\] among its members \['json', 'png'\]"):
        captions_of(sample(png=b"", json="{}"), ["txt", "alt"])


JSON = '{"url": "http://x", "n": 3, "caption": "a\\n cat", "texts": ["one", "two"], "none": null, "a:b": "three"}'


@pytest.mark.parametrize(
    "members, expected",
    [
        (["json:caption"], ["a cat"]),
        (["json:texts"], ["one", "two"]),
        (["json:a:b"], ["three"]),  # the field starts after the first colon
        (["txt", "json:texts", "json:caption"], ["first", "one", "two", "a cat"]),
        (["json:none", "json:texts"], ["one", "two"]),
        (["more.json:caption"], ["another"]),
    ],
)
def test_captions_of_reads_fields_of_json_members(members, expected):
    inputs = sample(txt="first", json=JSON) | sample(**{"more.json": '{"caption": "another"}'})
    assert captions_of(inputs, members) == expected


@pytest.mark.parametrize(
    "text, field, why",
    [
        (JSON, "title", r"no caption \['json:title'\]"),
        (JSON, "none", "no caption"),
        (JSON, "n", "'n' in its json is neither text nor a list of texts"),
        ('{"n": ["a", 3]}', "n", "neither text nor a list"),
        ('["caption"]', "caption", "no caption"),
        ("{", "caption", "its json is not JSON"),
        ("[" * 100_000, "caption", "its json is not JSON"),
    ],
)
def test_captions_of_rejects_json_without_usable_caption(text, field, why):
    with pytest.raises(DecodeError, match=why):
        captions_of(sample(json=text), [f"json:{field}"])


def test_captions_of_returns_empty_caption_for_empty_json_field():
    assert captions_of(sample(json='{"caption": ""}'), ["json:caption"]) == [""]


def test_captions_of_returns_raw_json_if_no_field_is_named():
    assert captions_of(sample(json='{"caption": "a"}'), ["json"]) == ['{"caption": "a"}']


def test_json_fields_lists_possible_caption_fields():
    assert json_fields(sample(jpg=b"", txt="x", json=JSON)) == ["json:caption", "json:texts", "json:url", "json:a:b"]
    assert json_fields(sample(json="{")) == json_fields(sample(json="[1]")) == json_fields(sample(txt="x")) == []


def test_clean_unescapes_html_twice_and_collapses_whitespace():
    assert clean("  Tom &amp;amp; Jerry&nbsp;\t &lt;b&gt;1940 ") == "Tom & Jerry <b>1940"


def test_image_of_uses_first_known_extension_and_rejects_missing_image():
    first = draw_image(1, 8)
    second = draw_image(2, 8)
    assert np.array_equal(image_of(sample(webp=encode(second), png=encode(first)), "pillow"), first)
    with pytest.raises(DecodeError, match=r"no image among its members \['json', 'txt'\]"):
        image_of(sample(txt="x", json="{}"), "pillow")
    with pytest.raises(DecodeError, match="an empty file"):
        image_of(sample(jpg=b"", png=encode(first)), "simplejpeg")
