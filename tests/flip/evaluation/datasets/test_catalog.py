"""Tests how evaluation data sets of all formats are located and read, and the errors for missing data sets."""

import io
import json
import re

import numpy as np
import pytest
import webdataset
from open_clip import zero_shot_metadata

from flip.common.host import cores
from flip.config.schema import EvaluationSet
from flip.data.manifest.build import index
from flip.data.sample_members import captions_of, label_of
from flip.evaluation.datasets import catalog, prompts
from flip.evaluation.datasets.catalog import DatasetRequest, ResolvedDataset
from flip.runs.errors import ConfigError, DataError
from tests.synthetic import draw_image, encode
from tools.commands import prompts as prompts_command


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def images(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(draw_image(i, 16)))


def wds(folder, split="test", count=10, shards=2, captions=False, image="jpg", metadata=None):
    """Writes a data set in the layout of CLIP_benchmark's wds_* sets. ``metadata(i)`` gives the metadata of image i."""
    (folder / split).mkdir(parents=True)
    (folder / split / "nshards.txt").write_text(f"{shards}\n")
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / split / f"{shard}.tar")) as writer:
            for i in range(shard * count // shards, (shard + 1) * count // shards):
                if captions:
                    more = {"txt": f"one {i}\ntwo {i}\n"}
                else:
                    more = {"cls": i % 3}
                if metadata:
                    more["npy"] = np.array(metadata(i))
                writer.write({"__key__": f"s{i:07d}", image: encode(draw_image(i, 16)), **more})
    if not captions:
        (folder / "classnames.txt").write_text("tench\ngreat white shark\ncock")
        (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nart of the {c}.")
    return folder


def samples(location):
    dataset = location.open()
    return [sample for _, sample in dataset.samples(range(dataset.count))]


def test_resolve_dataset_reads_clip_benchmark_layout(tmp_path, cache):
    wds(tmp_path / "wds_fgvc_aircraft")
    dataset = catalog.resolve_dataset(DatasetRequest("fgvc_aircraft"), str(tmp_path))
    assert (dataset.task, [label_of(sample) for sample in samples(dataset.location)]) == (
        "zeroshot",
        [i % 3 for i in range(10)],
    )
    assert dataset.prompts.names == ["tench", "great white shark", "cock"]
    assert dataset.prompts.templates == ["a photo of a {}.", "art of the {}."]
    (manifest,) = (cache / "manifests").iterdir()
    before = manifest.stat().st_mtime_ns
    assert catalog.resolve_dataset(DatasetRequest("fgvc_aircraft"), str(tmp_path)).location == dataset.location
    assert manifest.stat().st_mtime_ns == before  # the second call does not index again
    wds(tmp_path / "wds_fgvc_aircraft", "train", 6)
    probe = catalog.resolve_dataset(DatasetRequest("fgvc_aircraft", "probe"), str(tmp_path))
    assert (probe.location, probe.train.open().count, probe.prompts) == (dataset.location, 6, None)
    assert probe.train.open().digest != probe.location.open().digest
    wds(tmp_path / "wds_flickr30k", captions=True, image="png")
    pairs = catalog.resolve_dataset(DatasetRequest("flickr30k"), str(tmp_path))
    assert pairs.task == "retrieval" and captions_of(samples(pairs.location)[3], ["txt"]) == ["one 3", "two 3"]
    assert catalog.resolve_dataset(DatasetRequest("mine", path=str(tmp_path / "wds_flickr30k")), "").task == "retrieval"


def test_locate_split_selects_shards_by_split_in_file_name(tmp_path):
    """In the layout of timm's imagenet-1k-wds, all splits share a folder. The test split has no training images."""
    wds(tmp_path / "made", count=5, shards=1), wds(tmp_path / "made", "train", count=6)
    flat = tmp_path / "flat"
    flat.mkdir()
    for split, shard, name in (("train", 0, "train-0000"), ("train", 1, "train-0001"), ("test", 0, "validation-00")):
        (tmp_path / "made" / split / f"{shard}.tar").rename(flat / f"imagenet1k-{name}.tar")
    assert [catalog.locate_split(str(flat), split).open().count for split in ("test", "train")] == [5, 6]
    (flat / "imagenet1k-train-0001.tar").rename(flat / "imagenet1k-test-0000.tar")
    assert catalog.locate_split(str(flat)).open().count == 3, "not those of the validation split, too"
    (flat / "imagenet1k-test-0000.tar").rename(flat / "imagenet1k-train-0001.tar")
    (flat / "imagenet1k-validation-00.tar").unlink()
    assert catalog.locate_split(str(flat)) is None
    for number, shard in enumerate(sorted(flat.iterdir())):
        shard.rename(flat / f"{number:05}.tar")
    assert catalog.locate_split(str(flat)).open().count == 6 and catalog.locate_split(str(flat), "train") is None


def test_locate_split_reuses_manifest_of_concurrent_process(tmp_path, cache, monkeypatch):
    """The first process has finished its manifest when the second process starts to write."""
    folder = wds(tmp_path / "set")
    index = catalog.index

    def slow_index(keys, out, workers):
        assert workers == cores()
        monkeypatch.setattr(catalog, "index", index)
        assert catalog.locate_split(str(folder)).manifest == str(out)
        index(keys, out)

    monkeypatch.setattr(catalog, "index", slow_index)
    location = catalog.locate_split(str(folder))
    assert [str(path) for path in (cache / "manifests").iterdir()] == [location.manifest]
    assert location.open().count == 10


def test_resolve_dataset_labels_images_by_class_folder(tmp_path):
    images(tmp_path / "imagenet1k" / "val", ["b/b.JPEG", "b/a.png", "a/c.jpg", "c/d.webp", "a/notes.txt"])
    with pytest.raises(ConfigError, match=r"folders match no class name \(of 1000\): a .*, b .*, c\."):
        catalog.resolve_dataset(DatasetRequest("imagenet1k", templates="80"), str(tmp_path))
    (tmp_path / "three.json").write_text('{"names": ["a", "b", "c"], "templates": ["{}"]}')
    dataset = catalog.resolve_dataset(
        DatasetRequest("imagenet1k", templates=str(tmp_path / "three.json")), str(tmp_path)
    )
    labelled = [(file.key.split("val/")[1], file.label) for file in dataset.location.files]
    assert labelled == [("a/c.jpg", 0), ("b/a.png", 1), ("b/b.JPEG", 1), ("c/d.webp", 2)]
    images(tmp_path / "imagenet1k" / "train", ["a/c.jpg", "b/a.png", "bb/d.png", "c/d.webp"])
    with pytest.raises(ConfigError, match="test and train have not the same folders.*c beside bb"):
        catalog.resolve_dataset(DatasetRequest("imagenet1k", "probe"), str(tmp_path))
    images(tmp_path / "whole", [f"{c}/x.png" for c in range(1000)])
    numbered = catalog.resolve_dataset(DatasetRequest("imagenetv2", path=str(tmp_path / "whole"), templates="80"), "")
    assert [file.key.split("/")[-2] for file in numbered.location.files] == [str(c) for c in range(1000)]
    assert (len(numbered.prompts.names), len(numbered.prompts.templates)) == (1000, 80)
    images(tmp_path / "v2", ["a/x.png", "b/x.png"])
    with pytest.raises(ConfigError, match="has no names of its classes"):
        catalog.resolve_dataset(DatasetRequest("mine", path=str(tmp_path / "v2")), "")
    (tmp_path / "v2" / "classes.json").write_text('{"names": ["a", "b"], "templates": ["{}"]}')
    assert catalog.resolve_dataset(DatasetRequest("mine", path=str(tmp_path / "v2")), "").prompts.names == ["a", "b"]


def test_imagenet_templates_change_no_set_with_own_names(tmp_path):
    wds(tmp_path / "wds_vtab-cifar10")
    prompts = catalog.resolve_dataset(DatasetRequest("cifar10", templates="80"), str(tmp_path)).prompts
    assert prompts.names == ["tench", "great white shark", "cock"] and len(prompts.templates) == 2


def test_objectnet_is_scored_by_bare_names_unless_templates_are_given(tmp_path):
    """The paper does so, whatever templates come with the images."""
    wds(tmp_path / "wds_objectnet")
    assert catalog.resolve_dataset(DatasetRequest("objectnet"), str(tmp_path)).prompts.templates == ["{}"]
    (tmp_path / "own.json").write_text('{"names": ["a", "b", "c"], "templates": ["a picture of {}"]}')
    request = DatasetRequest("objectnet", templates=str(tmp_path / "own.json"))
    assert catalog.resolve_dataset(request, str(tmp_path)).prompts.templates == ["a picture of {}"]


def test_imagenet_templates_leave_unknown_set_its_own_names(tmp_path):
    images(tmp_path / "birds", ["test/a/1.png", "test/b/2.png"])
    request = DatasetRequest("birds", path=str(tmp_path / "birds"), templates="80")
    with pytest.raises(ConfigError, match="2 of 2 folders match no class name"):
        catalog.resolve_dataset(request, "")  # without names of its own, ImageNet's are meant
    (tmp_path / "birds" / "classes.json").write_text('{"names": ["a", "b"], "templates": ["a {}"]}')
    assert catalog.resolve_dataset(request, "").prompts.names == ["a", "b"]


def test_list_is_training_split_only_if_its_name_says_so(tmp_path):
    """Else a linear probe would be fitted on the images that it scores."""
    images(tmp_path, ["a.png", "b.png"])
    for name, image in (("labels", "a.png"), ("train", "b.png")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"image": image, "label": 0}))
    assert catalog.locate_split(str(tmp_path)).where.endswith("labels.jsonl")
    (tmp_path / "test.jsonl").write_text(json.dumps({"image": "a.png", "label": 0}))
    assert catalog.locate_split(str(tmp_path)).where.endswith("test.jsonl"), "its name says so"
    assert catalog.locate_split(str(tmp_path), "train").where.endswith("train.jsonl")
    assert catalog.locate_split(str(tmp_path / "labels.jsonl"), "train") is None
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ConfigError, match="no data set with a split train here"):
        catalog.resolve_dataset(DatasetRequest("mine", "probe", str(tmp_path)), "")


def test_probe_rejects_splits_whose_classes_are_numbered_differently(tmp_path):
    for split, names in (("train", ["ant", "cat"]), ("test", ["cat", "dog"])):
        folder = wds(tmp_path / "set", split, captions=True)
        index([str(path) for path in sorted((folder / split).glob("*.tar"))], folder / split)
        (folder / split / "classes.json").write_text(json.dumps({"names": names, "templates": ["{}"]}))
    with pytest.raises(ConfigError, match=r"different classes\.json"):
        catalog.resolve_dataset(DatasetRequest("mine", "probe", str(folder)), "")
    item = EvaluationSet("mine", str(folder / "test"), task="probe", train=str(folder / "train"))
    assert "different classes.json" in ResolvedDataset.from_config(item).note, "it must not end a trained run"
    item.train = item.manifest
    assert "fitted on the images that it scores" in ResolvedDataset.from_config(item).note


def test_table_of_other_things_does_not_hide_image_folder(tmp_path):
    images(tmp_path, ["test/a/1.png", "test/b/2.png"])
    for name in ("Meta.csv", "Test.csv"):
        (tmp_path / name).write_text("width,height\n1,2\n")
    (tmp_path / "karpathy-tools").mkdir()
    assert catalog.locate_split(str(tmp_path)).classes == ("a", "b")
    (tmp_path / "labels.jsonl").write_text("no json\n")
    with pytest.raises(DataError, match="is no list of images"):  # not other labels in its place
        catalog.locate_split(str(tmp_path))


def named(tmp_path, folders, names):
    """Writes a folder with one image per class and a file of class names. Returns the request for both."""
    images(tmp_path / "set", [f"{folder}/x.png" for folder in folders])
    (tmp_path / "names.json").write_text(json.dumps({"names": names, "templates": ["a photo of a {}"]}))
    return DatasetRequest("set", path=str(tmp_path / "set"), templates=str(tmp_path / "names.json"))


@pytest.mark.parametrize(
    "folders, names",
    [
        (["cat", "dog", "owl"], ["owl", "cat", "dog"]),
        (["Polar_Bear", "ice-cream", "tabby cat"], ["tabby cat", "polar bear", "Ice Cream"]),
        (["0", "1", "2", "10"], ["2", "10", "0", "1"]),
    ],
)
def test_class_folders_match_class_names_despite_other_order_and_spelling(tmp_path, folders, names):
    dataset = catalog.resolve_dataset(named(tmp_path, folders, names), "")
    letters = [name.lower().replace(" ", "") for name in names]
    expected = {folder: letters.index(re.sub("[ _-]", "", folder.lower())) for folder in folders}
    assert {file.key.split("/")[-2]: file.label for file in dataset.location.files} == expected
    assert [label_of(sample) for sample in samples(dataset.location)] == [file.label for file in dataset.location.files]
    assert dataset.note == ""


@pytest.mark.parametrize(
    "folders, names, message",
    [
        (["cat", "dogs", "owl"], ["owl", "cat", "dog"], "1 of 3 .* (of 3): dogs (nearest: dog).*names.json"),
        (["n01440764", "dog"], ["tench", "dog"], r"match no class name.*n01440764.*\*\.jsonl"),
        (["1", "2", "3"], ["0", "1", "2"], "match no class name.*: 3"),
        (["001.cat", "002.dog"], ["cat", "dog"], "match no class name.*001.cat (nearest: cat), 002.dog"),
        (["cat", "dog"], ["cat", "dog", "owl"], "no folder for 1 of 3 class names: owl"),
        (["crane", "drake"], ["crane", "Crane"], "two class names are the same but for.*Crane"),
        (["a_b", "a-b"], ["a b", "c"], "two folders are the same but for.*a_b"),
        (["n01440764", "n01443537"], ["tench"], "not as many class names.*2 folders, 1 names"),
    ],
)
def test_class_folders_without_matching_class_names_are_rejected(tmp_path, folders, names, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        catalog.resolve_dataset(named(tmp_path, folders, names), "")


@pytest.mark.parametrize("folders", [["n01440764", "n01443537", "n01484850"], ["0", "7", "10"]])
def test_numeric_and_wnid_folders_are_matched_by_order_with_note(tmp_path, folders, caplog):
    caplog.set_level("INFO")
    dataset = catalog.resolve_dataset(named(tmp_path, folders, ["tench", "goldfish", "great white shark"]), "")
    assert [(file.key.split("/")[-2], file.label) for file in dataset.location.files] == list(
        zip(folders, range(3), strict=True)
    )
    assert f"{folders[0]} = tench" in dataset.note and f"{folders[-1]} = great white shark" in dataset.note
    assert dataset.note in caplog.text


def test_resolve_dataset_reads_karpathy_coco_and_table_captions(tmp_path):
    expected = [(f"{i}.jpg", [f"first of {i}", f"second of {i}, with a comma"]) for i in range(4)]
    flickr = tmp_path / "flickr30k"
    coco = tmp_path / "coco"
    kaggle = tmp_path / "kaggle"
    images(flickr / "flickr30k-images", [name for name, _ in expected])
    entries = [
        {"filename": name, "split": "train" if name == "0.jpg" else "test", "sentences": [{"raw": t} for t in texts]}
        for name, texts in expected
    ]
    (flickr / "dataset_flickr30k.json").write_text(json.dumps({"images": entries, "dataset": "flickr30k"}))
    images(coco / "val2014", [name for name, _ in expected])
    (coco / "dataset_coco.json").write_text(
        json.dumps({"images": [{**entry, "filepath": "val2014"} for entry in entries]})
    )
    images(kaggle / "Images", [name for name, _ in expected])
    rows = "".join(f'{name},"{text}"\n' for name, texts in expected[1:] for text in texts)
    (kaggle / "flickr8k_test_karpathy.txt").write_text("image,caption\n" + rows)
    (kaggle / "flickr8k_train_karpathy.txt").write_text("image,caption\n0.jpg,wrong split\n")
    official = tmp_path / "captions_val2014.json"
    official.write_text(json.dumps({
        "images": [{"id": 7 * i, "file_name": name} for i, (name, _) in enumerate(expected)],
        "annotations": [
            {"image_id": 7 * i, "caption": text} for i, (_, texts) in enumerate(expected) if i for text in texts
        ],
    }))  # fmt: skip
    images(tmp_path / "val2014", [name for name, _ in expected])
    requests = {
        flickr: DatasetRequest("flickr30k"), coco: DatasetRequest("mscoco_captions"), kaggle: DatasetRequest("mine",
        path=str(kaggle)), tmp_path: DatasetRequest("official", path=str(official)),
    }  # fmt: skip
    for folder, dataset_request in requests.items():
        dataset = catalog.resolve_dataset(dataset_request, str(tmp_path))
        assert dataset.task == "retrieval", folder
        names = [file.key.split("/")[-1] for file in dataset.location.files]
        assert names == [name for name, _ in expected[1:]], folder
        assert [captions_of(sample, ["txt"]) for sample in samples(dataset.location)] == [
            texts for _, texts in expected[1:]
        ]


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ('image,caption\na.png,one, two\na.png,"Hello" said he\n', ["one, two", '"Hello" said he']),
        ('image,caption\r\na.png,"one, two"\r\na.png,plain\r\n', ["one, two", "plain"]),
        ("image,caption\na.png,plain\na.png, one, two\n\n", ["plain", " one, two"]),
        ('\ufeffimage, caption\na.png, "one, two"\n', ["one, two"]),
        ('caption,image,more\n"one, two",a.png,3\n', ["one, two"]),
    ],
)
def test_caption_tables_are_read_with_and_without_quotes(tmp_path, text, captions):
    """Spreadsheets quote captions. CLIP_benchmark does not, and splits a line at its first comma only."""
    images(tmp_path, ["a.png"])
    (tmp_path / "captions.csv").write_bytes(text.encode())
    (image,) = catalog.locate_split(str(tmp_path)).files
    assert image.captions == tuple(captions)


@pytest.mark.parametrize("text", ["image,caption\na.png,one, two\nno comma\n", "name,caption\na.png,b\n", "image\na\n"])
def test_invalid_caption_table_is_rejected(tmp_path, text):
    (tmp_path / "captions.csv").write_text(text)
    with pytest.raises(DataError, match="is no list of images"):
        catalog.locate_split(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b'image,caption\na.png,"one, two"\na.png,one, two\n', "line 2 quotes a caption with a comma, line 3"),
        ("t.csv", b'image,caption\na.png,one, two\nb.png,"""one"", two"\n', "line 3 quotes a caption with a comma"),
        ("t.csv", b"image,caption,split\na.png,b,train\na.png,c,test\n", "names a split for each row"),
        ("t.csv", b'"image","caption","Split"\n"a.png","b","train"\n', "names a split for each row"),
        ("t.jsonl", b'{"image": "a.png", "label": 0, "split": "train"}\n', "names a split for each row"),
        ("t.csv", b"image;caption\na.png;one, two\n", "not separated by commas"),
        ("t.csv", b"image\tcaption\na.png\tone\n", "not separated by commas"),
        ("t.csv", b"image,caption\na.png,caf\xe9\n", "is not UTF-8.*iconv"),
        ("t.jsonl", b'{"image": "a.png", "captions": ["caf\xe9"]}\n', "is not UTF-8.*iconv"),
    ],
)
def test_ambiguous_list_of_images_is_rejected_with_remedy(tmp_path, name, content, words):
    images(tmp_path, ["a.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        catalog.locate_split(str(tmp_path))


def test_jsonl_captions_may_contain_unicode_line_separator(tmp_path):
    images(tmp_path, ["a.png"])
    lines = [{"image": "a.png", "captions": ["one\u2028line"]}, {"image": "a.png", "captions": ["b"]}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "mine.jsonl").write_text("\ufeff" + text)
    assert [file.captions for file in catalog.locate_split(str(tmp_path)).files] == [("one\u2028line",), ("b",)]


def test_resolve_dataset_reads_unpacked_coco_folder(tmp_path):
    images(tmp_path / "val2017", ["1.jpg", "2.jpg"]), images(tmp_path / "train2017", ["3.jpg"])
    (tmp_path / "annotations").mkdir()
    for split, numbers in (("val", (1, 2)), ("train", (3,))):
        content = {"images": [], "annotations": []}
        for i in numbers:
            content["images"].append({"id": i, "file_name": f"{i}.jpg"})
            content["annotations"].append({"image_id": i, "caption": f"of {i}"})
        (tmp_path / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(content))
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text("{}")
    dataset = catalog.resolve_dataset(DatasetRequest("mscoco_captions", path=str(tmp_path)), "")
    assert dataset.task == "retrieval"
    assert [file.key for file in dataset.location.files] == [str(tmp_path / "val2017" / f"{i}.jpg") for i in (1, 2)]
    assert [file.captions for file in catalog.locate_split(str(tmp_path), "train").files] == [("of 3",)]


def test_resolve_dataset_reads_jsonl_list_and_rejects_invalid_list(tmp_path):
    images(tmp_path / "there", ["a.png", "b.png"])
    lines = [{"image": "there/b.png", "label": 1}, {"image": str(tmp_path / "there" / "a.png"), "label": 0}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts_file = tmp_path / "words.json"
    prompts_file.write_text('{"names": ["a", "b"], "templates": ["{}"]}')
    dataset = catalog.resolve_dataset(
        DatasetRequest("mine", path=str(tmp_path / "mine.jsonl"), templates=str(prompts_file)), ""
    )
    assert (dataset.task, [label_of(sample) for sample in samples(dataset.location)]) == ("zeroshot", [1, 0])
    first = (opened := dataset.location.open()).digest, opened.cache_key
    (tmp_path / "there" / "a.png").write_bytes(encode(draw_image(1, 20)))
    second = catalog.locate_split(str(tmp_path / "mine.jsonl")).open()
    assert first[0] != second.digest and first[1] != second.cache_key
    (tmp_path / "mine.jsonl").write_text("no json\n")
    with pytest.raises(DataError, match="is no list of images"):
        catalog.locate_split(str(tmp_path / "mine.jsonl"))
    (tmp_path / "mine.jsonl").write_text("")
    with pytest.raises(DataError, match="names no image"):
        catalog.locate_split(str(tmp_path / "mine.jsonl"))


def test_resolve_dataset_error_explains_how_to_get_missing_set(tmp_path):
    with pytest.raises(ConfigError, match="imagenet1k is not here.*clip-benchmark/wds_imagenet1k.*NAME=PATH"):
        catalog.resolve_dataset(DatasetRequest("imagenet1k"), str(tmp_path))
    with pytest.raises(ConfigError, match="Known names: imagenet1k, "):
        catalog.resolve_dataset(DatasetRequest("nothing"), str(tmp_path))
    (tmp_path / "cars").mkdir()
    with pytest.raises(ConfigError, match="no data set with a split test"):
        catalog.resolve_dataset(DatasetRequest("cars"), str(tmp_path))
    wds(tmp_path / "wds_pets")
    with pytest.raises(ConfigError, match="split train"):
        catalog.resolve_dataset(DatasetRequest("pets", "probe"), str(tmp_path))


def test_dataset_request_parse_accepts_task_name_and_path():
    assert DatasetRequest.parse("imagenet1k") == DatasetRequest("imagenet1k")
    assert DatasetRequest.parse("probe:x=/a=b:c") == DatasetRequest("x", "probe", "/a=b:c")
    for text in ("", "=/x", "nothing:x", "a b", "../x"):
        with pytest.raises(ConfigError, match="--sets"):
            DatasetRequest.parse(text)


def test_dataset_entries_have_only_known_tasks_and_fields():
    for name, entry in catalog.entries().items():
        assert entry["task"] in catalog.COLUMNS and entry["get"], name
        assert set(entry) <= {"task", "count", "folders", "words", "templates", "get", "metric", "group", "note"}, name
        assert DatasetRequest.parse(name).name == name


@pytest.mark.parametrize("templates", [7, 80])
def test_imagenet_prompts_match_open_clip_templates(templates):
    imagenet = prompts.imagenet_prompts(templates)
    assert (len(imagenet.names), len(set(imagenet.names)), len(imagenet.templates)) == (1000, 998, templates)
    source = {7: zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES, 80: zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES}
    assert prompts.fill_templates("{odd}", imagenet.templates) == [template("{odd}") for template in source[templates]]
    with pytest.raises(ConfigError, match="7 or 80"):
        prompts.imagenet_prompts(81)


def test_locate_split_does_not_read_images(tmp_path):
    buffer = io.BytesIO(b"no image")
    images(tmp_path / "set", ["0/a.png"])
    (tmp_path / "set" / "0" / "b.png").write_bytes(buffer.getvalue())
    assert len(catalog.locate_split(str(tmp_path / "set")).files) == 2


def test_prompts_command_writes_names_and_templates(tmp_path, capsys):
    folder = wds(tmp_path / "wds_pets")
    assert prompts_command.main([str(folder), "--out", str(tmp_path / "pets.json")]) == 0
    assert prompts.read_prompts(str(tmp_path / "pets.json")) == prompts.read_folder(folder)
    assert prompts_command.main(["imagenet", "--out", str(tmp_path / "imagenet.json")]) == 0
    assert "1000 names, 7 templates" in capsys.readouterr().out
    assert prompts.read_prompts(str(tmp_path / "imagenet.json")) == prompts.imagenet_prompts(7)
    assert prompts_command.main([str(tmp_path), "--out", str(tmp_path / "none.json")]) == 78
