"""Computes the outputs of an exported folder with unmodified open_clip and timm, without the package flip.

    python open_clip_reference.py FOLDER DATA.npz OUTPUT.npz

DATA holds pixels (n, 3, H, W) normalised, images (n, h, w, 3) uint8, and ``words``, a JSON object: texts, names,
templates, and files (the paths of images).
"""

import socket
import sys


def refuse(*_):
    raise AssertionError("something wants the network")


socket.socket.connect = socket.getaddrinfo = refuse

import json  # noqa: E402

import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402


@torch.no_grad()
def main(folder, data, output_path):
    data = np.load(data)
    pixels = torch.from_numpy(data["pixels"])
    strings = json.loads(str(data["words"]))
    out = {}
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    out["tokens"] = tokens = tokenizer(strings["texts"])
    out["image"] = model.encode_image(pixels)
    out["text"] = model.encode_text(tokens)
    out["views"] = torch.stack([preprocess(Image.fromarray(image)) for image in data["images"]])
    out["scale"] = model.logit_scale.exp()
    out["logits"] = model.get_logits(pixels, tokens)[0]
    if model.logit_bias is not None:
        out["bias"] = model.logit_bias
    classes = open_clip.build_zero_shot_classifier(model, tokenizer, strings["names"], strings["templates"])
    out["classes"] = classes.T
    features = model.encode_image(out["views"], normalize=True)
    out["scores"] = model.logit_scale.exp() * features @ classes
    out["file_views"] = torch.stack([preprocess(Image.open(path)) for path in strings["files"]])
    out["file_scores"] = model.logit_scale.exp() * model.encode_image(out["file_views"], normalize=True) @ classes
    del model
    for classes in (0, 10):
        tower = timm.create_model(f"local-dir:{folder}/timm", pretrained=True, num_classes=classes).eval()
        out[f"timm{classes}"] = tower.forward_head(tower.forward_features(pixels), pre_logits=True)
        out[f"head{classes}"] = tower(pixels)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(tower))
    out["timm_views"] = torch.stack([transform(Image.fromarray(image)) for image in data["images"]])
    out["timm_file_views"] = torch.stack([transform(Image.open(path).convert("RGB")) for path in strings["files"]])
    assert not any(name.split(".")[0] == "flip" for name in sys.modules)
    np.savez(output_path, **{name: value.numpy() for name, value in out.items()})


main(*sys.argv[1:])
