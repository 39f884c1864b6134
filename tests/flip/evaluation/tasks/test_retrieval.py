"""Tests recall against clip_benchmark's functions on the same features."""

import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval
from torch.nn.functional import normalize

from flip.config.schema import EvaluationSet
from flip.data.decode import DecodeError
from flip.data.sample_members import captions_of
from flip.evaluation.datasets.catalog import ResolvedDataset
from flip.evaluation.datasets.image_sources import File, ImageFiles, Shards
from flip.evaluation.evaluator import Evaluator, _captions
from flip.evaluation.tasks.retrieval import TILE, retrieve
from flip.runs.errors import DataError, Diverged
from tests.synthetic import draw_image, encode


def drawn(images, captions, seed=0, noise=0.6):
    """Features of images, of ``captions[i]`` similar texts for image i in random order, and the image of each text."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(captions)
    owners = torch.arange(images).repeat_interleave(counts)
    owners = owners[torch.randperm(len(owners), generator=generator)]
    features = normalize(torch.randn(images, 24, generator=generator), dim=1)
    texts = normalize(features[owners] + noise * torch.randn(len(owners), 24, generator=generator), dim=1)
    return features, texts, owners


class Table:
    """A model for clip_benchmark that looks features up by number."""

    def __init__(self, images, texts):
        self.images = images
        self.texts = texts

    def encode_image(self, indices):
        return self.images[indices]

    def encode_text(self, indices):
        return self.texts[indices]


def clip_benchmark_recall(images, texts, owners, top_k=(1, 5, 10)):
    captions = [(owners == i).nonzero()[:, 0].tolist() for i in range(len(images))]
    batches = [
        (torch.arange(start, min(start + 16, len(images))), captions[start : start + 16])
        for start in range(0, len(images), 16)
    ]
    return zeroshot_retrieval.evaluate(
        Table(images, texts), batches, torch.tensor, "cpu", amp=False, recall_k_list=list(top_k)
    )


@pytest.mark.parametrize(
    "images, captions", [(60, [5] * 60), (50, [1] * 50), (33, [1 + i % 7 for i in range(33)])], ids=["5", "1", "mixed"]
)
def test_retrieve_matches_clip_benchmark_recall(images, captions):
    features = drawn(images, captions)
    result = retrieve(*features, "synthetic")
    reference = clip_benchmark_recall(*features)
    for direction in ("image", "text"):
        for k in (1, 5, 10):
            expected = reference[f"{direction}_retrieval_recall@{k}"]
            assert result[direction][f"top{k}"] == pytest.approx(expected, abs=1e-6), (direction, k)
    assert (result["image"]["n"], result["text"]["n"]) == (sum(captions), images)
    assert 0 < result["text"]["correct1"] < result["text"]["correct10"] and 0.1 < result["image"]["top1"] < 0.95


def test_retrieve_matches_clip_benchmark_recall_over_several_tiles():
    features = drawn(TILE + 10, [2] * (TILE + 10), seed=3, noise=0.3)
    result = retrieve(*features, "synthetic")
    reference = clip_benchmark_recall(*features, top_k=(1, 5))
    assert result["image"]["top5"] == pytest.approx(reference["image_retrieval_recall@5"], abs=1e-6)
    assert result["text"]["top1"] == pytest.approx(reference["text_retrieval_recall@1"], abs=1e-6)


def test_retrieve_breaks_ties_by_order_and_reports_chance():
    same = torch.ones(4, 2)
    result = retrieve(same, torch.ones(12, 2), torch.arange(4).repeat(3), "synthetic")
    assert (result["image"]["correct1"], result["text"]["correct1"]) == (3, 1)  # only the first image and caption
    assert (result["image"]["chance"], result["text"]["chance"]) == (0.25, 0.25)


def test_retrieve_rejects_image_without_caption_and_nan_features():
    images, texts, owners = drawn(5, [2] * 5)
    with pytest.raises(DataError, match="no caption.*found: 3"):
        retrieve(images, texts[owners != 3], owners[owners != 3], "synthetic")
    with pytest.raises(Diverged, match="1 of 10 captions"):
        retrieve(images, texts.index_fill(0, torch.tensor([2]), torch.nan), owners, "synthetic")


def test_evaluator_scores_retrieval_from_shards_in_both_directions(model, encoder, data):
    """Each line of a caption file is a caption, as in retrieval sets: two per image."""
    scores = Evaluator(encoder, 8).score(
        ResolvedDataset.from_config(EvaluationSet("pairs", str(data), task="retrieval"))
    )
    assert [score["name"] for score in scores] == ["pairs-text", "pairs-image"]
    assert [(score["n"], score["images"], score["captions"]) for score in scores] == [(50, 50, 100), (100, 50, 100)]
    assert {score["task"] for score in scores} == {"retrieval"} and scores[0]["data"] == Shards(data).digest


def test_image_without_caption_is_refused():
    """Training reads an empty text; here it would be a query."""
    with pytest.raises(DecodeError, match="captions are empty"):
        _captions({"txt": memoryview(b" \n\n")})
    assert _captions({"txt": memoryview(b"a\nb")}) == ["a", "b"]


def test_image_files_do_not_split_caption_at_line_break(tmp_path):
    (tmp_path / "0.png").write_bytes(encode(draw_image(0)))
    files = ImageFiles([File(str(tmp_path / "0.png"), captions=("a dog\nruns", " a  cat"))], str(tmp_path))
    ((_, sample),) = files.samples(range(1))
    assert captions_of(sample, ["txt"]) == ["a dog runs", "a cat"]
