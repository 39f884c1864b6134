"""What is taken of a sample: its image, and its captions, one or many, in one member or several."""

import numpy as np
import pytest

from flip.data.decode import Undecodable
from flip.data.stream import captions_of, image_of
from flip.tokenizer import clean
from tests.synthetic import encode, picture


def sample(**members):
    return {name: memoryview(data if isinstance(data, bytes) else data.encode()) for name, data in members.items()}


@pytest.mark.parametrize(
    "members, expected",
    [
        (["txt"], ["one", "two"]),
        (["txt", "alt"], ["one", "two", "three"]),
        (["alt", "txt"], ["three", "one", "two"]),  # in the order of the configuration: a draw picks by position
        (["missing", "alt"], ["three"]),
        (["empty", "alt"], ["three"]),
        (["empty"], [""]),
    ],
)
def test_captions_of_several_members(members, expected):
    assert captions_of(sample(txt="one\n\n  two  \n", alt="three", empty=""), members) == expected


def test_captions_that_are_not_utf8():
    assert captions_of(sample(txt=b"caf\xe9 noir"), ["txt"]) == ["caf\ufffd noir"]


def test_no_caption_is_undecodable():
    with pytest.raises(Undecodable, match=r"no caption \['txt', 'alt'\] among its members \['json', 'png'\]"):
        captions_of(sample(png=b"", json="{}"), ["txt", "alt"])


def test_cleaning_is_the_tokenizer_s_and_as_open_clip_s_but_for_ftfy():
    assert clean("  Tom &amp;amp; Jerry&nbsp;\t &lt;b&gt;1940 ") == "Tom & Jerry <b>1940"


def test_the_first_known_extension_is_the_image():
    first, second = picture(1, 8), picture(2, 8)
    assert np.array_equal(image_of(sample(webp=encode(second), png=encode(first)), "pillow"), first)
    with pytest.raises(Undecodable, match=r"no image among its members \['json', 'txt'\]"):
        image_of(sample(txt="x", json="{}"), "pillow")
    with pytest.raises(Undecodable, match="an empty file"):
        image_of(sample(jpg=b"", png=encode(first)), "simplejpeg")
