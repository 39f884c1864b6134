import shutil

import pytest

from tests.flip.data.loading import CHUNK, SAMPLES
from tests.synthetic import make_dataset, make_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_tokenizer(root / "tokenizer.json")
    return make_dataset(root / "shards", SAMPLES, 5, size=32, classes=7, chunk=CHUNK)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "shards")
