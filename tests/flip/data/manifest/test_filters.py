"""Tests that a filtered manifest reads like the manifest of shards rewritten without the dropped samples."""

import hashlib
import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest import filters
from flip.data.manifest import manifest as manifests
from flip.data.manifest.build import index, merge, scan_shards
from flip.data.manifest.filters import Filter, Filters, Length
from flip.data.manifest.manifest import Manifest, write
from flip.evaluation.datasets.image_sources import Shards
from flip.runs.errors import ConfigError, DataError
from jobs.measuring.functions import input_stages
from tests.flip.data.loading import CHUNK, SAMPLES, loader
from tests.flip.data.manifest.test_manifest import write_tar
from tests.flip.data.test_loader import take
from tests.synthetic import draw_image, encode
from tests.tools.shards_commands.test_verify import checked, rot
from tools.shards_commands import inspect_samples, verify

LONG = Filters(length=Length(10, None))
"""Keeps the samples to which the tests give a long caption."""


def paths(folder):
    return sorted(str(path) for path in folder.glob("*.tar"))


def samples(manifest):
    """All members of all samples, per chunk and sample: extension -> bytes."""
    chunks = (ChunkReader().read_chunk(manifest, j) for j in range(manifest.chunks))
    return [[{name: bytes(data) for name, data in sample.items()} for sample in chunk] for chunk in chunks]


def members(path):
    """The members of a tar, in order: key -> [(name, bytes)]."""
    members_by_key = {}
    with tarfile.open(path) as file:
        for info in file:
            members_by_key.setdefault(info.name.split(".")[0], []).append((info.name, file.extractfile(info).read()))
    return members_by_key


def test_manifest_without_filters_has_pinned_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "TOOL", "flip 0.1.0")
    write_tar(tmp_path / "x.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("c.txt", b"3")])
    write_tar(tmp_path / "y.tar", [("d.txt", b"4" * 600), ("d.json", b"{}")])
    manifest = index(paths(tmp_path), tmp_path, chunk=2)
    digest = hashlib.sha256()
    for path in sorted(tmp_path.iterdir()):
        if path.suffix != ".tar":
            digest.update(path.name.encode() + path.read_bytes())
    assert digest.hexdigest() == "b643d73f5d332eb8bb61dd618bc7ef0f35b5a91e8e86f53b294aea78fbff25f2"
    everything = index(paths(tmp_path), tmp_path / "all", chunk=2, filters=filters.parse([], "1:"))
    assert everything.digest == manifest.digest
    assert everything.sample_filter is None
    assert everything.total_samples_in_tars == 4


shards = st.lists(st.lists(st.tuples(st.booleans(), st.integers(0, 1100)), max_size=9), min_size=1, max_size=5)


def bits(*shards):
    return [[(bit == "1", 0) for bit in shard] for shard in shards]


@pytest.mark.long
@example(bits("1111", "0110", "111"), 3)  # chunk across shards, first and last sample of a shard dropped
@example(bits("0001", "0000", "", "0100"), 2)  # chunk across a shard without kept samples and an empty shard
@example(bits("000", "00", "0010", "000"), 1)  # no kept sample in the shards before and after
@example(bits("01", "10", "01"), 1)  # chunks at the start and end of a shard
@example(bits("10110", "0100101"), 2)  # dropped samples inside a chunk
@given(shards.filter(lambda s: any(keep for shard in s for keep, _ in shard)), st.integers(1, 5))
def test_filtered_manifest_reads_like_shards_without_dropped_samples(tmp_path_factory, content, chunk):
    root = tmp_path_factory.mktemp("shards")
    (root / "all").mkdir(), (root / "less").mkdir()
    for number, shard in enumerate(content):
        groups = []
        for i, (keep, size) in enumerate(shard):
            data = bytes([number, i]) + bytes(size)
            text = b"long enough to stay" if keep else b"short"
            groups.append((keep, [(f"{i}.jpg", data), ("no sample", data), (f"{i}.txt", text)]))
        for folder, selected in (("all", groups), ("less", [(keep, group) for keep, group in groups if keep])):
            write_tar(
                root / folder / f"{number}.tar", [m for _, group in selected for m in group] or [("no sample", b"")]
            )
    chunk = min(chunk, sum(keep for shard in content for keep, _ in shard))
    filtered = index(paths(root / "all"), root / "m", chunk, filters=LONG)
    rewritten = index(paths(root / "less"), root / "n", chunk)
    assert (filtered.samples, filtered.chunks, filtered.first.tolist()) == (
        rewritten.samples,
        rewritten.chunks,
        rewritten.first.tolist(),
    )
    assert samples(filtered) == samples(rewritten)
    locations = [
        (str(root / "all" / f"{n}.tar"), i) for n, shard in enumerate(content) for i, (k, _) in enumerate(shard) if k
    ]
    assert [filtered.locate(id) for id in range(filtered.samples)] == locations
    keys = [inspect_samples.sample(filtered, id).key for id in range(filtered.samples)]
    assert keys == [str(ordinal) for _, ordinal in locations]
    assert filtered.read_bytes == sum(verify.chunk_bytes(filtered, j) for j in range(filtered.chunks))
    assert filtered.total_samples_in_tars == sum(map(len, content))
    assert (filtered.sample_filter is None) == (filtered.total_samples_in_tars == filtered.samples)
    assert filtered.digest == Manifest.load(root / "m").digest
    assert (filtered.digest == rewritten.digest) == (filtered.sample_filter is None)


# -- users of filtered manifests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest_pair(original, tmp_path_factory):
    """(filtered manifest, manifest of shards without the dropped samples). About half of the samples remain."""
    root = tmp_path_factory.mktemp("both")
    length_filter = filters.parse([], "41:44")
    filtered = index(paths(original), root / "filtered", CHUNK, filters=length_filter)
    for path in original.glob("*.tar"):
        kept_ordinals = {
            ordinal for shard, ordinal in map(filtered.locate, range(filtered.samples)) if shard == str(path)
        }
        groups = [group for i, group in enumerate(members(path).values()) if i in kept_ordinals]
        write_tar(root / path.name, [member for group in groups for member in group])
    return filtered, index(paths(root), root / "less", CHUNK)


def test_filtered_manifest_and_rewritten_shards_train_and_evaluate_alike(original, manifest_pair):
    filtered, rewritten = manifest_pair
    assert 0.4 * SAMPLES < filtered.samples < 0.7 * SAMPLES and filtered.samples == rewritten.samples
    for workers in (0, 2):
        actual, expected = (
            take(loader(original, folder=manifest.folder, workers=workers, lanes=6), 0, 6)
            for manifest in (filtered, rewritten)
        )
        for a, b in zip(actual, expected, strict=True):
            for name in ("ids", "patches", "keep_indices", "tokens"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
    actual, expected = (
        [members for _, members in Shards(manifest).samples(range(manifest.samples))] for manifest in manifest_pair
    )
    assert len(actual) == filtered.samples and actual == expected


def test_verify_and_exceptions_count_only_selected_samples(manifest_pair, tmp_path):
    filtered, _ = manifest_pair
    report = checked(filtered, workers=1)
    assert (report.samples, report.bad, report.bytes) == (filtered.samples, {}, filtered.read_bytes)
    planned = verify.planned_bytes(filtered, verify.VerificationPlan(range(filtered.chunks)))
    assert planned == filtered.read_bytes
    assert planned < filtered.shards[:, 2].sum()
    excepted = write(tmp_path / "less", filtered, filtered.checksums, {7: "ugly"}, filtered.settings)
    assert excepted.sample_filter is not None
    assert excepted.settings == filtered.settings
    assert excepted.digest != filtered.digest
    assert checked(excepted).samples == filtered.samples - 1 and samples(excepted) == samples(filtered)
    shard, ordinal = filtered.locate(7)
    line = (tmp_path / "less" / "exceptions.jsonl").read_text()
    assert f'"ordinal": {ordinal}' in line and ordinal > 7


def test_chunk_checksum_covers_dropped_samples_inside_chunk(tmp_path):
    write_tar(tmp_path / "0.tar", [(f"{i}.txt", b"x" * (20 if i in (2, 5, 6) else 5)) for i in range(9)])
    manifest = index(paths(tmp_path), tmp_path / "m", 2, filters=LONG)
    assert [(start, stop) for _, start, stop, _ in map(lambda j: manifest.chunk_reads(j)[0], (0, 1))] == [
        (2 * 1024, 6 * 1024), (6 * 1024, 9 * 1024)
    ]  # fmt: skip
    rot(manifest, 0, at=1024 + 514)
    with pytest.raises(DataError, match=r"samples 0 to 1\) is damaged: CRC32"):
        ChunkReader().read_chunk(manifest, 0)
    assert len(ChunkReader().read_chunk(manifest, 1)) == 1


def test_stages_count_selected_samples_and_bytes_of_all_samples(tmp_path):
    image = encode(draw_image(1, 16))
    members = []
    for i in range(16):
        members += [(f"{i}.png", image), (f"{i}.txt", b"long enough" if i % 2 else b"short")]
    write_tar(tmp_path / "0.tar", members)
    manifest = index(paths(tmp_path), tmp_path / "m", 2, filters=LONG)
    spec = input_stages.spec_of(manifest, "pillow", "pillow", 16, 8)
    for stage in input_stages.measure(manifest, spec, 0.1)[1][:2]:
        assert stage.bytes / stage.samples == pytest.approx(manifest.mean_bytes, rel=0.1), stage.name


@pytest.mark.parametrize("name", ["tars.u32", "kept.bits"])
def test_manifest_load_detects_damaged_filter_files(manifest_pair, tmp_path, name):
    copy = write(tmp_path / "m", manifest_pair[0], manifest_pair[0].checksums)
    (copy.folder / name).write_bytes(bytes(len((copy.folder / name).read_bytes())))
    with pytest.raises(DataError, match=f"{name}: the file does not have the checksum"):
        Manifest.load(copy.folder)


# -- parsing and applying filters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, column, op, value",
    [
        ("similarity>=0.28", "similarity", ">=", "0.28"),
        (" punsafe < .5 ", "punsafe", "<", ".5"),
        ("a b!=-1e-3", "a b", "!=", "-1e-3"),
        ("NSFW==UNLIKELY yes", "NSFW", "==", "UNLIKELY yes"),
    ],
)
def test_filter_parse_splits_column_operator_and_value(text, column, op, value):
    assert Filter.parse(text) == Filter(column, op, value)
    assert str(Filter.parse(text)) == f"{column}{op}{value}"


@pytest.mark.parametrize(
    "text", ["", "a", "a=1", "a=>1", "a<>1", ">1", "a>", "a>b", "a<nan", "a<inf", "a<0x1", "a<1 2", "a==='b'", "a=='b'",
             "a===1", "a<1<2", "__import__('os')"],
)  # fmt: skip
def test_filter_parse_rejects_invalid_text(text):
    with pytest.raises(ConfigError, match="--filter") as error:
        Filter.parse(text)
    assert error.value.remedy


def test_length_parse_accepts_ranges_and_rejects_invalid_text():
    assert [Length.parse(text) for text in ("5:1000", "5:", ":7")] == [Length(5, 1000), Length(5, None), Length(0, 7)]
    for text in ("", ":", "5", "7:5", "-1:5", "a:b", "1:2:3"):
        with pytest.raises(ConfigError, match="--caption-length"):
            Length.parse(text)
    assert filters.parse([], "") is None and filters.parse(["a<1"], "5:").names == ["a<1", "caption length 5:"]


def test_length_filter_counts_characters_of_cleaned_caption(tmp_path):
    texts = ["a&amp;b", "  \n ab  c\n", "äöü🙂", "abcde", "", None]
    groups = [[(f"{i}.txt", text.encode())] if text is not None else [] for i, text in enumerate(texts)]
    write_tar(tmp_path / "0.tar", [m for i, g in enumerate(groups) for m in [(f"{i}.jpg", b""), *g]])
    manifest = index(paths(tmp_path), tmp_path / "m", 1, filters=filters.parse([], "3:4"))
    assert [manifest.locate(id)[1] for id in range(manifest.samples)] == [0, 1, 2]
    assert manifest.settings == {
        "filters": ["caption length 3:4"], "seen": 6, "kept": 3,
        "dropped": {"caption length 3:4": 2, "caption length 3:4: no value": 1},
    }  # fmt: skip


@pytest.mark.parametrize("piece", [1, 2, 3, 100])
def test_sample_filter_fits_only_exact_counts_for_any_piece_size(monkeypatch, piece):
    monkeypatch.setattr(manifests, "PIECE", piece)
    draw = np.random.default_rng(3)
    builder = manifests.SampleFilterBuilder()
    counts = []
    for size in (0, 9, 40, 0, 0, 1, 8, 0):
        mask = draw.random(size) < 0.5
        builder.add(mask, 0)
        counts.append(int(mask.sum()))
    sample_filter = builder.build()
    assert sample_filter.fits(np.array(counts))
    for wrong in range(len(counts)):
        assert not sample_filter.fits(np.array([count + (i == wrong) for i, count in enumerate(counts)]))


# -- parquet files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    """A shard of ten samples and its parquet file as img2dataset writes it: in any order, with rows of failed links."""
    write_tar(tmp_path / "00000.tar", [(f"{i:09d}.{e}", b"a caption") for i in range(10) for e in ("jpg", "txt")])
    keys = [f"{i:09d}" for i in (12, 3, 1, 0, 2, 4, 11, 6, 5, 8, 7)]  # no row for sample 9
    table = pa.table({
        "URL": ["http"] * 11,
        "key": keys,
        "status": ["failed_to_download" if key >= "000000010" else "success" for key in keys],
        "similarity": pa.array([None if key >= "000000010" else int(key) / 10 for key in keys], pa.float32()),
        "width": pa.array([None if key == "000000004" else 100 * int(key) for key in keys], pa.int32()),
        "punsafe": pa.array([float("nan") if key == "000000002" else int(key) / 10 for key in keys]),
        "NSFW": pa.array(["UNLIKELY" if int(key) % 2 else "UNSURE" for key in keys]).dictionary_encode(),
        "Mixed": [True] * 11, "mixed": [1] * 11,
    })  # fmt: skip
    pq.write_table(table, tmp_path / "00000.parquet")
    return tmp_path


def apply_filters(folder, *texts):
    """(ordinals of the kept samples, number of dropped samples per reason)."""
    manifest = index(paths(folder), folder / f"m{hash(texts)}", 1, filters=filters.parse(texts, ""))
    return [manifest.locate(id)[1] for id in range(manifest.samples)], manifest.settings["dropped"]


@pytest.mark.parametrize(
    "texts, ordinals, dropped",
    [
        (["width>=300"], [3, 5, 6, 7, 8], {"width>=300": 3, "width>=300: no value": 1}),
        (["width>300"], [5, 6, 7, 8], {"width>300": 4, "width>300: no value": 1}),
        (["width<=300"], [0, 1, 2, 3], {"width<=300": 4, "width<=300: no value": 1}),
        (["WIDTH==3e2"], [3], {"WIDTH==3e2": 7, "WIDTH==3e2: no value": 1}),
        (["width!=300"], [0, 1, 2, 5, 6, 7, 8], {"width!=300": 1, "width!=300: no value": 1}),
        (["punsafe<0.5"], [0, 1, 3, 4], {"punsafe<0.5": 4, "punsafe<0.5: no value": 1}),
        (["punsafe!=7"], [0, 1, 3, 4, 5, 6, 7, 8], {"punsafe!=7: no value": 1}),
        (["nsfw==UNLIKELY"], [1, 3, 5, 7], {"nsfw==UNLIKELY": 5}),
        (["nsfw!=UNLIKELY", "similarity>=0.25"], [4, 6, 8], {"nsfw!=UNLIKELY": 4, "similarity>=0.25": 2}),
        (["mixed==1"], [0, 1, 2, 3, 4, 5, 6, 7, 8], {}),
    ],
)
def test_column_filter_selects_expected_samples(rows, texts, ordinals, dropped):
    assert apply_filters(rows, *texts) == (ordinals, {filters.NO_ROW: 1} | dropped)


def test_column_filter_accepts_column_of_nulls_in_a_shard(rows):
    """pyarrow cannot infer the type of such a column and writes the type null."""
    write_tar(rows / "00001.tar", [(f"{i}.{e}", b"a caption") for i in range(4) for e in ("jpg", "txt")])

    def index_with_column(values):
        pq.write_table(pa.table({"key": list("0123"), "punsafe": values}), rows / "00001.parquet")
        return index(paths(rows), rows / str(values.type), 1, filters=filters.parse(["punsafe<0.5"], ""))

    manifest = index_with_column(pa.nulls(4))
    assert manifest.settings["dropped"]["punsafe<0.5: no value"] == 4 + 1
    assert manifest.digest == index_with_column(pa.nulls(4, pa.float64())).digest


def test_column_filter_drops_sample_with_non_utf8_key(rows):
    """A key in Latin-1 matches no row, not even the row without a key."""
    table = pa.table({"key": ["b", None, "c"], "score": [1.0, 2.0, 3.0]})
    pq.write_table(table, rows / "00000.parquet")
    write_tar(rows / "00000.tar", [(f"{key}.jpg", b"") for key in ("caf\udce9", "b", "x/caf\udce9", "c")])
    assert apply_filters(rows, "score>0") == ([1, 3], {filters.NO_ROW: 2})


def test_scan_shards_reuses_only_scans_of_same_filters(rows):
    def scan(*texts):
        return scan_shards(paths(rows), rows / "m", filters=filters.parse(texts, "")).reused

    assert [scan(*texts) for texts in (("width>=300",), ("width>=400",), ("width>=300",), ())] == [0, 0, 1, 0]
    chosen = filters.parse(["width>=400"], "")
    results = scan_shards(paths(rows), rows / "m", filters=chosen)
    manifest = merge(results, rows / "m", 1, filters=chosen)
    assert results.reused == 1 and [manifest.locate(id)[1] for id in range(manifest.samples)] == [5, 6, 7, 8]
    with pytest.raises(ConfigError, match="filters do not go with --add"):
        merge(scan_shards(paths(rows), rows / "n"), rows / "n", old=manifest)
    everything = filters.parse(["width>=0"], "")
    kept = merge(scan_shards(paths(rows), rows / "all", filters=everything), rows / "all", 1, filters=everything)
    with pytest.raises(ConfigError, match="filters do not go with --add"):
        merge(scan_shards(paths(rows), rows / "n"), rows / "n", old=kept)


def test_scan_shards_scans_again_after_parquet_file_has_changed(rows):
    chosen = filters.parse(["width>=300"], "")
    path = rows / "00000.parquet"
    assert [scan_shards(paths(rows), rows / "m", filters=chosen).reused for _ in range(2)] == [0, 1]
    pq.write_table(pq.read_table(path).slice(0, 5), path)
    results = scan_shards(paths(rows), rows / "m", filters=chosen)
    manifest = merge(results, rows / "m", 1, filters=chosen)
    assert results.reused == 0 and [manifest.locate(id)[1] for id in range(manifest.samples)] == [3]


def test_digest_depends_on_kept_samples_not_on_text_of_filter(rows):
    two, three, same = (
        index(paths(rows), rows / text, 4, filters=filters.parse([text], ""))
        for text in ("width!=200", "width!=300", "width!=300.0")
    )
    assert np.array_equal(two.checksums, three.checksums) and np.array_equal(two.offsets, three.offsets)
    assert two.digest != three.digest == same.digest
    assert three.settings["filters"] == ["width!=300"] and same.settings["filters"] == ["width!=300.0"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("simlarity>0", r"00000\.parquet: there is no such column \(found: 'simlarity'\)\. Near are: similarity\."),
        ("nothing>0", r"There are: URL, key, status,"),
        ("MIXED==1", r"more than one column has this name .* Near are: Mixed, mixed\."),
        ("Mixed==1", "holds bool"),
        ("NSFW>1", "text, which has no order"),
        ("width==wide", "holds numbers"),
        ("width>1000", "no sample passes the filters .*width>1000"),
    ],
)
def test_column_filter_error_explains_unusable_condition(rows, text, words):
    with pytest.raises(ConfigError, match=words):
        apply_filters(rows, text)


def test_filter_error_lists_reasons_if_all_samples_are_dropped(rows):
    table = pq.read_table(rows / "00000.parquet")
    with pytest.raises(ConfigError, match="Dropped were 1 x no row .*; 8 x width>1000; 1 x width>1000: no value"):
        apply_filters(rows, "width>1000")
    numbers = table["key"].cast(pa.int64())  # as a tool may rewrite the file: 7 is not 000000007
    pq.write_table(table.set_column(1, "key", numbers), rows / "00000.parquet")
    with pytest.raises(ConfigError, match="Dropped were 10 x no row in the parquet file. Choose others"):
        apply_filters(rows, "width>1")
    write_tar(rows / "00000.tar", [("no sample", b"")])
    with pytest.raises(DataError, match="the shards hold no samples"):
        apply_filters(rows, "width>1")


def test_column_filter_rejects_unusable_parquet_file(rows):
    path = rows / "00000.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(3, 1)]), path)
    with pytest.raises(DataError, match=r"00000\.parquet: the parquet file has rows of one key"):
        apply_filters(rows, "width>1")
    pq.write_table(table.drop_columns(["key"]), path)
    with pytest.raises(DataError, match="has no column key"):
        apply_filters(rows, "width>1")
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    for damaged in (b"", b"<html>", buffer.getvalue()[:-9], bytes(200) + buffer.getvalue()[200:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"00000\.parquet: not a parquet file that can be read"):
            apply_filters(rows, "URL==http")
    path.unlink()
    with pytest.raises(DataError, match=r"00000\.parquet: the parquet file of this shard is missing.*img2dataset"):
        apply_filters(rows, "width>1")
    assert index(paths(rows), rows / "none", 1, filters=filters.parse([], "5:")).samples == 10  # reads no parquet
