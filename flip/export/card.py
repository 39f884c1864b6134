"""README.md of an exported folder: what it is, how it is loaded, what it cannot do (a model card)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flip.config.schema import Config, Model
from flip.evaluation.task import precision

_VARIANTS = {
    "native": "`native`: open_clip's own image encoder holds these weights as they are.",
    "extra-block": """\
`extra-block`: open_clip's own image encoder with one computed block more than was trained, because open_clip has no
key for a mean over class token and patches. Normalised features and logits are those of the trained model. **Not for
fine-tuning in open_clip, and not in float16** (its numbers overflow; bfloat16 is fine). The norm of features that are
not normalised means nothing. For fine-tuning take `timm/`.""",
    "timm-tower": """\
`timm-tower`: open_clip builds the image encoder by timm from `timm/`, which open_clip_config.json names by its
**absolute path** (`vision_cfg.timm_model_name`): where the folder moves, edit it.""",
}

_TEXT = """\
---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
---
# {run}, {stage} at {samples:,} samples

An image encoder and a text encoder, trained together by masked CLIP pre-training (FLIP, arXiv 2212.00794).

| | |
|---|---|
{facts}
{variant}
{scores}
## Loading

By open_clip (tested with 3.3.0), without a network. The tokenizer needs `transformers` as well.

```python
import open_clip

folder = "..."  # this folder
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{{folder}}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{{folder}}")
```

By timm (tested with 1.0.31), the image encoder without the projection, for fine-tuning. The positions are a fixed
table, which timm would train: freeze `pos_embed` to keep it.

```python
import timm

encoder = timm.create_model(f"local-dir:{{folder}}/timm", pretrained=True, num_classes=10)  # 0: features, width {width}
encoder.pos_embed.requires_grad_(False)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
```

By the toolkit itself, all files together:

```python
import flip

model = flip.load(folder)
```

## What to know

- An image is its central square over the whole short side, bicubic to {size} x {size}, mean
  {mean}, deviation {std}.
{differences}- A text is cut or padded with id 0 to {length} tokens, padding is {padding}{special}.
- `logit_scale` is the logarithm of the scale, clamped as in training; open_clip does not clamp it.{bias}
- Another image size (`force_image_size`) makes open_clip interpolate the table of positions. The toolkit computes it
  anew for the new grid, which is another model.
- Masking is for training alone: everything here sees all patches.
- To publish it on a hub, `hf_tokenizer_name` in open_clip_config.json must become the repository's name there.
"""


def text(record: dict[str, Any], config: Config) -> str:
    """``record``: export.json without its files."""
    model, augment = config.model, config.augment
    special = ", [CLS] stands first" if model.text.prepend_cls else ", nothing is put before or behind"
    padding = "attended to"
    if model.text.padding == "mask":
        padding = "not seen (open_clip's encoder is\n  wider by a channel per head, which sees to that)"
    bias = " `logit_bias` is SigLIP's." if model.objective == "siglip" else ""
    return _TEXT.format(
        run=record["run"], stage=record["stage"], samples=record["samples"], facts="".join(_facts(record, model)),
        variant=_VARIANTS[record["variant"]], scores="".join(_scores(record["evaluations"])), width=model.image.width,
        size=model.image.size, mean=augment.mean, std=augment.std, length=model.text.length, special=special,
        differences="".join(f"- {sentence}\n" for sentence in differences(config)), padding=padding, bias=bias,
    )  # fmt: skip


def differences(config: Config) -> list[str]:
    """The inputs for which open_clip's predictions differ from the toolkit's, one sentence each (docs/export.md)."""
    sentences = {
        "Pictures that are not square: predictions differ in part, because open_clip resizes and then crops, and this"
        " model is evaluated in the other order (evaluate.preprocess: crop_resize).":
        config.evaluate.preprocess == "crop_resize",
        "Pictures with transparency or 16-bit grey: predictions differ, because open_clip drops the alpha channel and"
        " clips 16-bit values, and this model sees them on white and scaled (data.to_rgb: flatten).":
        config.data.to_rgb == "flatten",
        "Texts with broken encodings or curly quotes: tokens differ, because open_clip repairs them and this model's"
        " training did not (model.text.repair: false).":
        not config.model.text.repair,
    }  # fmt: skip
    return [sentence for sentence, applies in sentences.items() if applies]


def _facts(record: dict[str, Any], model: Model) -> Iterator[str]:
    image, words = model.image, model.text
    rows = {
        "run": record["run"],
        "commit": f"`{record['stage']}/{record['samples']}-{record['attempt']}`",
        "data set": f"`{record['manifest']}`" if record.get("manifest") else None,
        "identity of the run": f"`{record['identity']}`" if record["identity"] else None,
        "code": f"`{record['code']}`" if record["code"] else None,
        "image encoder": f"{image.layers} x {image.width}, {image.heads} heads, patch {image.patch} at {image.size} px",
        "text encoder": f"{words.layers} x {words.width}, {words.heads} heads, {words.vocabulary} token ids",
        "embedding": model.embed,
    }
    yield from (f"| {name} | {value} |\n" for name, value in rows.items() if value is not None)


def _scores(evaluations: list[dict[str, Any]]) -> Iterator[str]:
    scored = [one for one in evaluations if "top1" in one]
    if scored:
        yield "\n## Accuracy, by the toolkit\n\n| data set | task | role | n | top-1 or R@1 | computed in |\n"
        yield "|---|---|---|---|---|---|\n"
    for one in scored:
        task = one.get("task", "zeroshot")  # an export of before lacks it
        yield f"| {one['name']} | {task} | {one['role']} | {one['n']:,} | {one['top1']:.2%} | {precision(one)} |\n"
    if any(precision(one) != "fp32" for one in scored):
        yield (
            "\nA score that was not computed in fp32 is not exactly that of these weights in float32: some answers"
            " differ.\n`python jobs/evaluate.py` on the run's commit computes it in fp32; export again afterwards.\n"
        )
