"""Tests that every image and text that other libraries prepare in another way has a sentence in the export.

The images have all modes that Pillow reads from files, and are square: the shape has tests in test_exporter.py.
"""

import io

import numpy as np
import pytest
import tokenizers
from PIL import Image

from flip.data.decode import open_image
from flip.data.view import EvaluationView
from flip.export import format
from flip.export.differences import differences
from flip.tokenizer import Tokenizer
from tests.flip.export.test_exporter import configured
from tests.flip.test_byte_pairs import PUBLISHED
from tests.synthetic import make_tokenizer

pytestmark = pytest.mark.long

SIDE = 64


def noise(channels, dtype=np.uint8):
    """Gradients with noise, so that the order of conversion and resize shows in every mode."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    draws = np.random.default_rng(0).integers(0, 20, (SIDE, SIDE, channels))
    slopes = [columns * 4, rows * 4, (rows + columns) * 2, 255 - columns * 4]
    values = (np.stack(slopes[:channels], axis=-1) + draws) % 256
    return values.astype(dtype)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def images():
    """Name -> (file, the word by which a sentence must name it, if a side shows it otherwise)."""
    rgb = Image.fromarray(noise(3))
    grey = Image.fromarray(noise(1)[..., 0])
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    wide = noise(1)[..., 0].astype(np.uint16) * 257
    colour = tuple(int(value) for value in noise(3)[3, 3])
    four = noise(4).tobytes()
    return {
        "RGB": (encoded(rgb), ""),
        "JPEG": (encoded(rgb, "JPEG"), ""),
        "L": (encoded(grey), ""),
        "1": (encoded(grey.convert("1")), "1 bit"),
        "P": (encoded(palette), "palette"),
        "GIF": (encoded(palette, "GIF"), "palette"),
        "CMYK": (encoded(Image.frombytes("CMYK", (SIDE, SIDE), four), "JPEG"), "CMYK"),
        "YCbCr": (encoded(rgb.convert("YCbCr"), "TIFF"), "YCbCr"),
        "LAB": (encoded(Image.frombytes("LAB", (SIDE, SIDE), noise(3).tobytes()), "TIFF"), "LAB"),
        "F": (encoded(Image.fromarray(noise(1)[..., 0].astype(np.float32) * 1.5), "TIFF"), "floating-point"),
        "I;16": (encoded(Image.fromarray(wide)), "16-bit grey"),
        "I": (encoded(Image.fromarray(wide), "PPM"), "16-bit grey"),
        "RGBA": (encoded(Image.frombytes("RGBA", (SIDE, SIDE), four)), "transparency"),
        "LA": (encoded(Image.merge("LA", (grey, grey))), "transparency"),
        "clear RGB": (encoded(rgb, transparency=colour), "transparency"),
        "clear L": (encoded(grey, transparency=100), "transparency"),
        "clear P": (encoded(palette, transparency=bytes([0, 128] * 32)), "transparency"),
    }


@pytest.fixture(scope="module")
def open_clip_view():
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = PreprocessCfg(size=32, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bicubic", resize_mode="shortest")
    transform = image_transform_v2(settings, is_train=False)
    return lambda image: transform(image).numpy()


@pytest.fixture(scope="module")
def transformers_view():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = configured("clip", "none.json", "tiny", "model.image.size=32")
    config.augment.mean = [0.0] * 3
    config.augment.std = [1.0] * 3
    settings = format.preprocessor_config(config.model, config.augment)
    processor = CLIPImageProcessorPil(**settings)
    return lambda image: processor(image, return_tensors="np")["pixel_values"][0]


SETTINGS = [
    (order, conversion)
    for order in ("crop_resize", "resize_crop", "resize_crop_floor")
    for conversion in ("flatten", "convert")
]


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
@pytest.mark.parametrize("order, conversion", SETTINGS)
def test_every_differing_image_has_a_sentence(library, order, conversion, request):
    view_of = request.getfixturevalue(f"{library}_view")
    settings = ("model.image.size=32", f"evaluate.preprocess={order}", f"data.to_rgb={conversion}")
    config = configured("clip", "none.json", "tiny", *settings)
    listed = [sentence.partition(":")[0] for sentence in differences(config, library)]
    view = EvaluationView.of(config)
    silent = []
    differing = []
    for name, (data, word) in images().items():
        own = view(open_image(data)).transpose(2, 0, 1) / 255
        if np.abs(view_of(Image.open(io.BytesIO(data))) - own).max() > 1e-6:
            differing.append(name)
            if not word or not any(word in sentence for sentence in listed):
                silent.append(name)
    assert not silent
    exact = {("open_clip", "resize_crop", "convert"), ("open_clip", "crop_resize", "convert")}
    assert bool(differing) != ((library, order, conversion) in exact)


TEXTS = {
    "a red square": "", "don't 3.5-inch": "", "caf\u00e9 nai\u0308ve": "accents", "\u732b\u304c\u597d\u304d": "",
    "\u0130stanbul STRASSE \u00df": "", "\U0001f600 zero\u200bwidth": "", "nbsp\u00a0x\u3000y line\u2028end": "",
    "\u201cquoted\u201d it\u2019s \u2018so\u2019 \u201elow\u201f": "quotes",
    "o\ufb03ce \ufb01x \u0133s \u01c4": "ligatures",
    "\u0149 \u02bcn": "ligatures", "nul \x00 bell \x07": "control", "a\x1cb\x1db": "control", "\ufeffmark": "control",
    "esc \x1b[31mred\x1b[0m": "control", "\uff21\uff22 \uff11 \uff76": "full-width", "caf\u00c3\u00a9": "encodings",
    "it\u00e2\u20ac\u2122s": "encodings", "x\x85y \x80\x99s": "encodings", "AT&amp;T &lt;b&gt;": "entities",
    "&eacute; &quot;x&quot;": "entities",
}  # fmt: skip
"""Text -> the word by which a sentence must name it, if a side has other tokens for it."""


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize("kind", ["byte pairs", "WordPiece"])
def test_every_text_with_other_tokens_in_transformers_has_a_sentence(kind, repair, wordpiece):
    causal = kind == "byte pairs"
    config = configured("clip" if causal else "portable", "none.json", "tiny", f"model.text.repair={repair}")
    sentence = differences(config, "transformers")[-1]
    tokenizer = Tokenizer(PUBLISHED if causal else wordpiece, 77, prepend_cls=not causal, repair=repair)
    written = tokenizers.Tokenizer.from_str(tokenizer.to_json(normalized=True))
    silent = []
    for text, word in TEXTS.items():
        own = tokenizer.without_padding(tokenizer([text])[0]).tolist()
        if written.encode(text).ids != own and not (word and word in sentence):
            silent.append(text)
    assert not silent


@pytest.mark.parametrize("repair", [True, False])
def test_every_text_with_other_tokens_in_open_clip_has_a_sentence(repair):
    import open_clip

    config = configured("clip", "none.json", "tiny", f"model.text.repair={repair}")
    sentences = differences(config, "open_clip")
    tokenizer = Tokenizer(PUBLISHED, 77, prepend_cls=False, repair=repair)
    reference = open_clip.SimpleTokenizer()(list(TEXTS)).numpy()
    silent = []
    for text, word, row in zip(TEXTS, TEXTS.values(), reference, strict=True):
        differs = not np.array_equal(row, tokenizer([text])[0])
        if differs and not (word and any(word in sentence for sentence in sentences)):
            silent.append(text)
    assert not silent
