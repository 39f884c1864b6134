"""Tests captions with weights: one member is drawn in proportion, of those that a sample has."""

import io
import json
import tarfile

import numpy as np
import pytest
import yaml

import flip
from flip import rng
from flip.config.merge import dump, merge
from flip.config.schema import Config
from flip.config.validate import check_fields
from flip.data.decode import DecodeError
from flip.data.manifest.build import index
from flip.data.sample_members import caption_groups, choose_caption
from flip.runs.errors import ConfigError
from tests.synthetic import draw_image, encode

MEMBERS = ["txt", "json:synthetic"]
WEIGHTS = [1.0, 3.0]
SAMPLES = 256


def sample_of(**members):
    return {name: memoryview(text.encode()) for name, text in members.items()}


def configured(*layers):
    return merge([(f"layer {n}", {"data.captions": layer}) for n, layer in enumerate(layers)]).data


def test_mapping_gives_members_and_weights_and_a_later_list_has_none():
    data = configured({"txt": 1, "json:synthetic": 3})
    assert (data.captions, data.caption_weights) == (MEMBERS, WEIGHTS)
    data = configured({"txt": 1, "json:synthetic": 3}, ["txt"])
    assert (data.captions, data.caption_weights) == (["txt"], [])
    config = merge([("", {"data.captions": {"txt": 1, "json:synthetic": 3}})])
    assert merge([("", yaml.safe_load(dump(config)))]).data == config.data


@pytest.mark.parametrize(
    ("weights", "error"), [([1.0], "as many as data.captions"), ([1.0, 0.0], "above 0"), ([1.0, -1.0], "above 0")]
)
def test_weights_that_do_not_fit_are_refused(weights, error):
    config = Config()
    config.data.captions = MEMBERS
    config.data.caption_weights = weights
    with pytest.raises(ConfigError, match=error):
        check_fields(config)


def test_mapping_with_text_or_dotted_name_is_refused():
    with pytest.raises(ConfigError, match="captions"):
        configured({"txt": "much"})
    with pytest.raises(ConfigError, match="a name with a dot"):
        configured({"caption.txt": 1})


def test_first_draw_chooses_member_and_second_its_caption():
    sample = sample_of(txt="a\nb", json=json.dumps({"synthetic": ["c", "d", "e"]}))
    groups = caption_groups(sample, MEMBERS, WEIGHTS)
    assert groups == [(1.0, ["a", "b"]), (3.0, ["c", "d", "e"])]
    chosen = [choose_caption(groups, WEIGHTS, u, v) for u in (0.0, 0.2499, 0.25, 0.9999) for v in (0.0, 0.9999)]
    assert chosen == ["a", "b", "a", "b", "c", "e", "c", "e"]
    every = caption_groups(sample, MEMBERS, [])
    assert [choose_caption(every, [], u, 0.5) for u in (0.0, 0.2, 0.5, 0.99)] == ["a", "b", "c", "e"]


def test_missing_and_empty_members_leave_their_weight_to_the_others():
    assert caption_groups(sample_of(txt="a"), MEMBERS, WEIGHTS) == [(1.0, ["a"])]
    assert caption_groups(sample_of(txt="\n", json='{"synthetic": "c"}'), MEMBERS, WEIGHTS) == [(3.0, ["c"])]
    assert caption_groups(sample_of(txt=""), MEMBERS, WEIGHTS) == [(1.0, [""])]
    with pytest.raises(DecodeError, match="no caption"):
        caption_groups(sample_of(cls="1"), MEMBERS, WEIGHTS)


def test_loader_draws_captions_in_proportion_and_by_the_hash(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(SAMPLES):
            record = {"synthetic": [f"{i} s0", f"{i} s1"]}
            if i % 4 == 0:
                record = {}
            members = {"png": encode(draw_image(i, 8)), "txt": b"%d t" % i, "json": json.dumps(record).encode()}
            for name, content in members.items():
                info = tarfile.TarInfo(f"{i:03d}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index([str(tmp_path / "0.tar")], tmp_path, chunk=1)
    captions = dict(zip(MEMBERS, (1, 3), strict=True))
    seen = []
    with flip.batches(tmp_path, batch=64, size=8, patch=8, mask="0", seed=3, captions=captions) as stream:
        for _ in range(16):
            batch = next(stream)
            seen += zip(batch.ids.tolist(), batch.epochs.tolist(), batch.texts, strict=True)
    counts = {"t": 0, "s0": 0, "s1": 0}
    for id, epoch, text in seen:
        number, kind = text.split()
        first, second = (float(rng.uniform(rng.key(3, epoch, id, 5, i))) for i in (0, 1))
        expected = "t" if id % 4 == 0 or first < 0.25 else f"s{int(second * 2)}"
        assert (int(number), kind) == (id, expected)
        if id % 4:
            counts[kind] += 1
    total = sum(counts.values())
    for kind, share in (("t", 0.25), ("s0", 0.375), ("s1", 0.375)):
        assert abs(counts[kind] - total * share) < 4 * np.sqrt(total * share * (1 - share)), counts
