"""A small CLIP model with random weights, and images with labels and captions."""

import pytest

from flip.config.schema import Augment, ImageTower, Model, TextTower
from flip.evaluation.encoding.encoders import ModelEncoder
from flip.models import clip
from flip.tokenizer import Tokenizer
from tests.synthetic import make_dataset, make_tokenizer

CONFIG = Model(
    embed=48,
    image=ImageTower(64, 8, 64, 3, 2),
    text=TextTower(length=32, vocabulary=1000, width=64, layers=2, heads=2),
)


def built():
    model = clip.CLIPModel(CONFIG, Augment(), "sdpa")
    clip.init_weights(model, 1)
    return model


def encoder_of(model, folder, **more):
    return ModelEncoder(model, Tokenizer(folder / "tokenizer.json", 32, True), CONFIG.image, **more)


@pytest.fixture(scope="package")
def model():
    return built()


@pytest.fixture(scope="package")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=50, shards=3, classes=7, chunk=6)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="package")
def encoder(model, data):
    return encoder_of(model, data)
