"""A small pair with random weights, and labelled, captioned pictures for it."""

import pytest

from flip.config.schema import Augment, ImageTower, Model, TextTower
from flip.evaluation.encoders import ModelEncoder
from flip.models import clip
from flip.tokenizer import Tokenizer
from tests.synthetic import make_dataset, make_tokenizer

CONFIG = Model(
    embed=48,
    image=ImageTower(64, 8, 64, 3, 2),
    text=TextTower(length=32, vocabulary=1000, width=64, layers=2, heads=2),
)


def built():
    pair = clip.CLIPModel(CONFIG, Augment(), "sdpa")
    clip.init_weights(pair, 1)
    return pair


def encoder_of(pair, folder, **more):
    return ModelEncoder(pair, Tokenizer(folder / "tokenizer.json", 32, True), CONFIG.image, **more)


@pytest.fixture(scope="package")
def pair():
    return built()


@pytest.fixture(scope="package")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=50, shards=3, classes=7, chunk=6)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="package")
def encoder(pair, data):
    return encoder_of(pair, data)
