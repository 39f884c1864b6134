"""Names the inputs for which predictions of an exported model differ from the toolkit's (docs/export.md).

The library that reads an export prepares images and texts by rules of its own. Every difference that an input can
meet has a sentence in export.json and in the model card; tests/flip/export/test_differences.py compares both sides for
each Pillow mode and for a list of texts.
"""

from flip.config.schema import Config

_CONVERTED = "with a palette, of 1 bit, CMYK, YCbCr, LAB or floating-point values"
"""Images whose pixels depend on whether the conversion to RGB or the resize comes first."""


def differences(config: Config, form: str = "open_clip") -> list[str]:
    """Sentences on inputs for which predictions differ, in the order of an image's way: shape, pixels, texts.

    ``form``: open_clip; or another one, whose inputs are prepared by the processor and tokenizer of transformers.
    """
    if form == "open_clip":
        return [*_open_clip_images(config), *_open_clip_texts(config)]
    return [*_transformers_images(config), _transformers_texts(config)]


def _open_clip_images(config: Config) -> list[str]:
    """Open_clip resizes the short side, crops at the nearest pixel, then converts with Pillow's ``convert("RGB")``."""
    order = config.evaluate.preprocess
    flatten = config.data.to_rgb == "flatten"
    sentences = []
    if order == "crop_resize":
        sentences.append(
            "Images that are not square: predictions differ in part, because open_clip resizes and then crops, and"
            " this model is evaluated in the other order (evaluate.preprocess: crop_resize)."
        )
    if order == "resize_crop_floor":
        sentences.append(
            "Images that are not square: a quarter of them differ by one pixel, because open_clip crops at the"
            " nearest pixel, and this model is evaluated with the crop's corner rounded down (evaluate.preprocess:"
            " resize_crop_floor)."
        )
    if flatten:
        sentences.append(
            "Images with transparency or 16-bit grey: predictions differ, because open_clip drops the alpha channel"
            " and clips 16-bit values, and this model sees them on white and scaled (data.to_rgb: flatten)."
        )
        sentences.append(
            f"Images {_CONVERTED}: predictions differ, because open_clip converts them to RGB after the resize, and"
            " this model's view before it (data.to_rgb: flatten)."
        )
    elif order == "resize_crop_floor":
        sentences.append(
            f"Images with transparency, 16-bit grey or {_CONVERTED}: predictions differ, because open_clip converts"
            " them to RGB after the resize, and this model's view before it (evaluate.preprocess: resize_crop_floor)."
        )
    if config.data.exif == "apply":
        sentences.append(
            "Images with an EXIF orientation: predictions differ, because open_clip ignores it, and this model sees"
            " them upright (data.exif: apply)."
        )
    return sentences


def _open_clip_texts(config: Config) -> list[str]:
    if config.model.text.repair:
        return []
    return [
        "Texts with broken encodings, curly quotes, ligatures, full-width or control characters, or accents written as"
        " characters of their own: tokens differ, because open_clip repairs them and this model's training did not"
        " (model.text.repair: false)."
    ]


def _transformers_images(config: Config) -> list[str]:
    """The processor converts to RGB, resizes the short side, and rounds the corner of its crop down."""
    order = config.evaluate.preprocess
    flatten = config.data.to_rgb == "flatten"
    if flatten:
        transparency = "on white"
    else:
        transparency = "without the alpha channel"
    sentences = []
    if order == "crop_resize":
        sentences.append(
            "Images that are not square: predictions differ in part, because the processor resizes and then crops,"
            " and this model is evaluated in the other order (evaluate.preprocess: crop_resize)."
        )
    if order == "resize_crop":
        sentences.append(
            "Images that are not square: a quarter of them differ by one pixel, because the processor rounds the"
            " corner of its crop down, and this model is evaluated with the nearest pixel (evaluate.preprocess:"
            " resize_crop)."
        )
    sentences.append(
        "Images with transparency: predictions can differ, because transformers 5 puts them on white, its"
        " pipelines and transformers 4 drop the alpha channel, and this model sees them"
        f" {transparency} (data.to_rgb: {config.data.to_rgb})."
    )
    if flatten:
        sentences.append(
            "Images of 16-bit grey: predictions differ, because the processor clips their values, and this model sees"
            " them scaled (data.to_rgb: flatten)."
        )
    elif order != "resize_crop_floor":
        sentences.append(
            f"Images of 16-bit grey or {_CONVERTED}: predictions differ, because the processor converts them to RGB"
            " before the resize, and this model's view after it (data.to_rgb: convert)."
        )
    if config.data.exif == "apply":
        sentences.append(
            "Images with an EXIF orientation: predictions differ, because the processor ignores it, and this model"
            " sees them upright (data.exif: apply)."
        )
    return sentences


def _transformers_texts(config: Config) -> str:
    if config.model.text.repair:
        return (
            "Texts: in training and evaluation HTML entities are unescaped, and broken encodings and full-width"
            " characters are repaired; the tokenizer here does neither."
        )
    return "Texts: in training and evaluation HTML entities are unescaped; the tokenizer here does not."
