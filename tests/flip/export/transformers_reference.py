"""Computes the outputs of an exported folder with unmodified transformers, without the package flip.

    python transformers_reference.py FOLDER DATA.json OUTPUT.npz

DATA holds texts, labels, and files (the paths of images).
"""

import socket
import sys


def refuse(*_):
    raise AssertionError("something wants the network")


socket.socket.connect = socket.getaddrinfo = refuse

import json  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline  # noqa: E402


@torch.no_grad()
def main(folder, data, output_path):
    data = json.loads(Path(data).read_text())
    pil_images = [Image.open(path) for path in data["files"]]
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "CLIPModel" and not any(report.values()), report
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    inputs = processor(text=data["texts"], images=pil_images, **padded)
    out = model(**inputs)
    arrays = {"tokens": inputs["input_ids"], "pixels": inputs["pixel_values"], "scale": model.logit_scale.exp()}
    arrays |= {"image": out.image_embeds, "text": out.text_embeds, "logits": out.logits_per_image}
    # Padded to the longest text, and each text alone.
    arrays["shorter"] = model(**processor(text=data["texts"], images=pil_images, padding=True, truncation=True,
                                          return_tensors="pt")).logits_per_image  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    alone = [tokenizer(text, truncation=True, return_tensors="pt") for text in data["texts"]]
    texts = [model.get_text_features(**encoding) for encoding in alone]
    arrays["alone"] = torch.cat([getattr(features, "pooler_output", features) for features in texts])
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    classify = pipeline("zero-shot-image-classification", model=folder, image_processor=images)
    for answers in classify(data["files"], candidate_labels=data["labels"], hypothesis_template="a {}"):
        scores = {answer["label"]: answer["score"] for answer in answers}
        arrays.setdefault("scores", []).append([scores[label] for label in data["labels"]])
    arrays["scores"] = torch.tensor(arrays["scores"])
    assert not any(name.split(".")[0] == "flip" for name in sys.modules)
    np.savez(output_path, **{name: value.numpy() for name, value in arrays.items()})


main(*sys.argv[1:])
