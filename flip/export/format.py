"""The text files of an exported folder: its model card and the configurations that open_clip, timm and transformers
read.

A configuration names every key whose default would be another model (docs/export.md).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flip.config.schema import Augment, Config, ImageTower, Model, TextTower
from flip.evaluation.metrics.result_files import precision
from flip.evaluation.metrics.score import score_of
from flip.export import fold_padding
from flip.tokenizer import END, START

_VARIANT_NOTES = {
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


def model_card(record: dict[str, Any], config: Config) -> str:
    """README.md. ``record``: export.json without its files."""
    model = config.model
    augment = config.augment
    form = record.get("format", "open_clip")
    if model.text.causal:
        padding = "not seen"
    else:
        padding = "attended to"
    if fold_padding.applies(model.text):
        padding = "not seen (open_clip's encoder is\n  wider by a channel per head, which sees to that)"
    fields = {
        "run": record["run"], "stage": record["stage"], "samples": record["samples"], "library": form,
        "facts": "".join(_facts(record, config)), "variant": _VARIANT_NOTES.get(record.get("variant", ""), ""),
        "scores": "".join(_scores(record["evaluations"])), "embed": model.embed, "width": model.image.width,
        "size": model.image.size, "mean": augment.mean, "std": augment.std, "length": model.text.length,
        "special": _special_tokens(model.text), "learned": model.image.positions == "learned",
        "differences": "".join(f"- {sentence}\n" for sentence in record["differences"]), "padding": padding,
        "bias": " `logit_bias` is SigLIP's." if model.objective == "siglip" else "",
        "scale": record.get("logit_scale"), "plus_bias": f" + {record['logit_bias']}" if "logit_bias" in record else "",
    }  # fmt: skip
    template, usage = (
        Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("model_card.md", f"card_{form}.md")
    )
    return template.format(**fields, usage=usage.format(**fields))


def _special_tokens(text: TextTower) -> str:
    if text.causal:
        return f", between `{START}` and `{END}`"
    if text.prepend_cls:
        return ", [CLS] stands first"
    return ", nothing is put before or behind"


def _facts(record: dict[str, Any], config: Config) -> Iterator[str]:
    model = config.model
    data = config.data
    image = model.image
    words = model.text
    sets = ", ".join(f"{item.name} ({item.samples:,} samples)" for item in data.sets) or f"{data.samples:,} samples"
    stages = (
        f"{stage.name}: {stage.samples:,} samples, batch {stage.batch:,}, {100 * float(stage.mask):g} % masked patches"
        for stage in config.stages
    )
    rows = {
        "run": record["run"],
        "checkpoint": f"`{record['stage']}/{record['samples']}-{record['attempt']}`",
        "recipe": f"{config.recipe}, objective {model.objective}",
        "training": "; ".join(stages) or None,
        "data": f"{sets}, manifest `{record['manifest']}`" if record.get("manifest") else None,
        "identity of the run": f"`{record['identity']}`" if record["identity"] else None,
        "code": f"`{record['code']}`" if record["code"] else None,
        "image encoder": f"{image.layers} x {image.width}, {image.heads} heads, patch {image.patch} at {image.size} px",
        "text encoder": f"{words.layers} x {words.width}, {words.heads} heads, {words.vocabulary} token ids",
        "embedding": model.embed,
    }
    yield from (f"| {name} | {value} |\n" for name, value in rows.items() if value is not None)


def _scores(evaluations: list[dict[str, Any]]) -> Iterator[str]:
    scored = [result for result in evaluations if "top1" in result]
    if scored:
        yield "\n## Scores, by the toolkit\n\n"
        yield "| data set | task | role | n | metric | score | 95 % interval | chance | computed in |\n"
        yield "|---|---|---|---|---|---|---|---|---|\n"
    for result in scored:
        score = score_of(result)
        interval = " to ".join(f"{end:.2%}" for end in score.interval or ()) or "-"
        if score.chance is None:
            chance = "-"
        else:
            chance = f"{score.chance:.2%}"
        first_cells = result["name"], result["task"], result["role"], f"{result['n']:,}", score.label
        row = *first_cells, f"{score.value:.2%}", interval, chance, precision(result)
        yield f"| {' | '.join(row)} |\n"
    if any(precision(result) != "fp32" for result in scored):
        yield (
            "\nA score that was not computed in fp32 is not exactly that of these weights in float32: some answers"
            " differ.\n`flip evaluate` on the run's checkpoint computes it in fp32; export again afterwards.\n"
        )


def open_clip_config(model: Model, augment: Augment, variant: str, timm: Path, text_eps: float) -> dict[str, Any]:
    """open_clip_config.json. ``text_eps``: of the text encoder's norms, which ``fold_padding`` changes."""
    both: dict[str, Any] = {"norm_kwargs": {"eps": model.norm_eps}}
    if model.activation == "gelu_tanh":
        both["act_kwargs"] = {"approximate": "tanh"}
    more: dict[str, Any] = {}
    if model.objective == "siglip":
        more = {"init_logit_bias": model.logit_bias}
    if model.activation == "quick_gelu":
        more["quick_gelu"] = True
    image = model.image
    text = model.text
    extra = variant == "extra-block"
    vision: dict[str, Any] = {
        "image_size": image.size, "patch_size": image.patch, "width": image.width, "layers": image.layers + extra,
        "head_width": image.width // image.heads, "no_ln_pre": not image.norm_pre,
        "pool_type": "tok" if extra or image.pool == "class" else "avg",
        "pos_embed_type": "sin_cos_2d" if image.positions == "sincos" else "learnable", **both,
    }  # fmt: skip
    if variant == "timm-tower":
        vision = {"image_size": image.size, "timm_model_name": f"local-dir:{timm}"}
        vision["timm_pool"] = _timm_pool(image)
        vision["timm_proj"] = "linear"
    return {
        "model_cfg": {
            "embed_dim": model.embed, **more,
            "vision_cfg": vision,
            "text_cfg": {
                "context_length": text.length, "vocab_size": text.vocabulary, "hf_tokenizer_name": "local",
                "width": text.width, "heads": text.heads, "layers": text.layers, "no_causal_mask": not text.causal,
                "pool_type": "argmax" if text.causal else "first", **both,
                "norm_kwargs": {"eps": text_eps},
            },
        },
        "preprocess_cfg": {
            "size": image.size, "mean": augment.mean, "std": augment.std, "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }  # fmt: skip


def _timm_pool(image: ImageTower) -> str:
    """timm's ``global_pool``."""
    return {"class": "token", "attention": "map"}.get(image.pool, "avg")


def transformers_config(model: Model, start: int, end: int) -> dict[str, Any]:
    """config.json of CLIPModel. ``start``, ``end``: ids of the tokens around a caption."""
    image = model.image
    text = model.text
    names = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    vision_config, text_config = (
        {
            "hidden_size": tower.width, "intermediate_size": 4 * tower.width, "projection_dim": model.embed,
            "num_hidden_layers": tower.layers, "num_attention_heads": tower.heads,
            "hidden_act": names[model.activation], "layer_norm_eps": model.norm_eps,
        }
        for tower in (image, text)
    )  # fmt: skip
    return {
        "architectures": ["CLIPModel"], "model_type": "clip", "torch_dtype": "float32", "projection_dim": model.embed,
        "vision_config": {"image_size": image.size, "patch_size": image.patch, **vision_config},
        "text_config": {
            "vocab_size": text.vocabulary, "max_position_embeddings": text.length, **text_config,
            "bos_token_id": start, "eos_token_id": end, "pad_token_id": end,
        },
    }  # fmt: skip


def timm_config(model: Model, augment: Augment) -> dict[str, Any]:
    """timm/config.json. All sizes are in ``model_args``; the name of the architecture selects the class and its eps."""
    image = model.image
    pool = _timm_pool(image)
    features: dict[str, Any] = {}
    if image.registers:
        features["reg_tokens"] = image.registers
    if image.qk_norm:
        features["qk_norm"] = True
    if image.pool == "attention":
        features["class_token"] = False
    name = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}[model.norm_eps]
    return {
        "architecture": name, "num_classes": 0, "num_features": image.width, "global_pool": pool,
        "model_args": {
            "img_size": image.size, "patch_size": image.patch, "embed_dim": image.width, "depth": image.layers,
            "num_heads": image.heads, "global_pool": pool,
            "no_embed_class": image.positions == "sincos" or image.registers > 0,
            "fc_norm": False, "pool_include_prefix": image.pool == "all", "act_layer": model.activation,
            "pre_norm": image.norm_pre, **features,
        },
        "pretrained_cfg": {
            "input_size": [3, image.size, image.size], "fixed_input_size": True, "interpolation": "bicubic",
            "crop_pct": 1.0, "crop_mode": "center", "mean": augment.mean, "std": augment.std, "num_classes": 0,
            "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip


def preprocessor_config(model: Model, augment: Augment) -> dict[str, Any]:
    """preprocessor_config.json for the CLIPImageProcessor of transformers: resizes the short side, then crops."""
    size = model.image.size
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,  # PIL.Image.Resampling.BICUBIC
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": augment.mean, "image_std": augment.std,
    }  # fmt: skip


def tokenizer_config(model: Model) -> dict[str, Any]:
    """tokenizer_config.json for transformers.

    The class is the general one: its classes for BERT would add [CLS] and [SEP] by themselves. A causal text is padded
    with the end token, as the published models are: what follows the first one is not seen.
    """
    first = {}
    if model.text.prepend_cls:
        first = {"cls_token": "[CLS]"}
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", **first}
    if model.text.causal:
        special = {"bos_token": START, **dict.fromkeys(("eos_token", "pad_token", "unk_token"), END)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.text.length, **special,
        "padding_side": "right", "truncation_side": "right", "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],  # not token_type_ids, which CLIPModel refuses
    }  # fmt: skip
