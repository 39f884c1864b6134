"""Tests that sweep files expand into named runs, and that mistakes in them are reported."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flip.common.host import Host
from flip.common.plain_data import ConfigChange
from flip.common.yaml_io import SourceLocation, dump_yaml
from flip.config.derived import world_size
from flip.config.finish import finish, resolve_auto_as_stored
from flip.config.identity import identity, is_same_run
from flip.config.merge import dump
from flip.config.resolve import dataset_facts, resolve_auto
from flip.runs.errors import ConfigError
from flip.runs.rundir import write_json
from jobs.common.paths import SWEEPS
from jobs.sweeps import sweep_file
from jobs.sweeps.constraints import parse
from jobs.sweeps.sweep_file import read_sweep

H100_NODE = Host(cores=96, memory=10**12, bf16=True, cuda=True)
COMMON = "set: {model.size: tiny, data.samples: 1e6, stages: [{name: pretrain, samples: 1000, batch: 128}]}\n"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sweep(tmp_path):
    """``sweep(text, ...)`` writes a sweep file and loads it."""

    def write(text, *args, **kwargs):
        path = tmp_path / "trial.yaml"
        path.write_text(text, encoding="utf-8")
        return read_sweep(path, *args, **kwargs)

    return write


def mistake(sweep, text, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        sweep(text, *args, **kwargs)
    assert caught.value.code == 78 and "\n" not in caught.value.paragraph()
    return caught.value.paragraph()


@pytest.mark.parametrize(
    "name, runs",
    [
        ("model_scaling", {"baseline": (128, "L/16", 12.8e9), "model": (256, "H/14", 12.8e9)}),
        ("data_scaling", {"data": (128, "L/16", 12.8e9)}),
        ("schedule_scaling", {"schedule": (128, "L/16", 25.6e9)}),
        ("joint_scaling", {"model-data": (256, "H/14", 12.8e9), "joint": (256, "H/14", 25.6e9)}),
    ],
)
def test_paper_sweeps_expand_and_validate(name, runs):
    loaded = read_sweep(SWEEPS / f"{name}.yaml")
    assert (loaded.name, loaded.cluster, set(loaded.paper)) == (name, "h100", set(runs))
    for run in loaded.runs:
        config, notes = finish(run.config, H100_NODE)
        assert not [note for note in notes if "buffer" in note or "accuracy" in note]
        assert (world_size(config), config.model.size, config.stages[0].samples) == runs[run.name]
        assert [(s.name, s.batch, s.mask) for s in config.stages] == [
            ("pretrain", 65536, "0.5"),
            ("unmasked", 65536, "0"),
        ]
        assert config.recipe == "paper" and config.model.image.pool == "all" and config.optim.decay_logit_scale
        assert config.stages[1].base_lr == 4e-8 and config.stages[1].samples == 128_000_000
        assert config.stages[0].warmup == (256e6 if config.model.size == "H/14" else 51.2e6)


def test_quickstart_sweep_uses_portable_recipe():
    loaded = read_sweep(SWEEPS / "quickstart_full.yaml", ["data.samples=5507"])
    assert [run.name for run in loaded.runs] == ["mask50", "mask75", "clip"]
    for run in loaded.runs:
        config = finish(run.config, Host(cores=2, memory=8 * 10**9)).config
        assert config.recipe == "portable" and config.model.image.pool == "patches" and config.model.text.prepend_cls
        assert not config.optim.decay_logit_scale and config.data.lanes == 128
        assert config.stages[0].base_lr * config.stages[0].batch / 256 == 1e-3
    assert [s.mask for s in loaded.runs[0].config.stages] == ["0.5", "0"]
    assert loaded.runs[0].differs["stages.unmasked"] is True and loaded.runs[2].differs["stages.unmasked"] is False


#: Names and identities of the runs of shipped sweeps. If either changes, submit trains the run a second time.
PINNED = {
    "batch": {
        "mask50-16k": "3a95f82928a6a76b",
        "mask50-64k": "0b02a50303f106a7",
        "mask75-16k": "97851de356e5767f",
        "mask75-32k": "cf7e703087937085",
    },
    "batch_small": {
        "mask0.5-batch64": "f2d403b2e8607443",
        "mask0.5-batch128": "1e926355c7a4b49f",
        "mask0.5-batch256": "61da85aabaaec357",
        "mask0.75-batch64": "1909806da7e4736b",
        "mask0.75-batch128": "738a50683c569ae6",
        "mask0.75-batch256": "192697966b6198c9",
    },
    "cheapest": {"clipa": "7040c153ade74639", "flip": "4f6bb504817eefbc", "clip": "1bb2561c4dc74fae"},
    "clipa": {"b16-i112-t16": "7d1ba0bd0540e2d2", "l16-i64-t16": "10264c299b5825c7", "l16-i96-t8": "f6bd75b3f71d05c4"},
    "clipa_v2": {
        "l14-datacomp": "3924cf5043753afd",
        "l14-datacomp-336": "5fba41aafe84a20d",
        "h14-laion2b": "7040c153ade74639",
        "h14-laion2b-336": "7ed1a7b187b3dd48",
        "h14-datacomp-i70": "8d550ec14d847c27",
    },
    "data_scaling": {"data": "31ee98a7b6ff5e9a"},
    "grid": {
        "l16-laion400m-12.8b": "cf25ce37da36d1d0",
        "l16-laion400m-25.6b": "4b63e78aa7b12e91",
        "l16-laion2b-12.8b": "31ee98a7b6ff5e9a",
        "l16-laion2b-25.6b": "3362c2c2a12a2d37",
        "h14-laion400m-12.8b": "127549daa8978dec",
        "h14-laion2b-12.8b": "9b5e7be02bb69534",
        "h14-laion2b-25.6b": "fedb2652159bec11",
    },
    "grid_small": {
        "s-half-113k": "bfb54f6b35791352",
        "s-half-225k": "0780bc6bffa94ed0",
        "s-all-113k": "c99274d6a24bfe48",
        "s-all-225k": "1e926355c7a4b49f",
        "l-half-113k": "60facbd21fc1d088",
        "l-half-225k": "37f3b14116f73f44",
        "l-all-113k": "153f12da65944776",
        "l-all-225k": "937413bd28bd93a2",
    },
    "inference": {"mask50": "f981eb489d201d4d", "mask75": "58f99c2680eb5948"},
    "joint_scaling": {"model-data": "9b5e7be02bb69534", "joint": "fedb2652159bec11"},
    "masking": {"mask0": "2a95139d1520e5c8", "mask50": "f981eb489d201d4d", "mask75": "58f99c2680eb5948"},
    "masking_small": {"mask0": "69a7b28b61540eeb", "mask50": "1e926355c7a4b49f", "mask75": "192697966b6198c9"},
    "model_scaling": {"baseline": "cf25ce37da36d1d0", "model": "127549daa8978dec"},
    "quickstart": {"masked": "8b67a5df4740de63", "unmasked": "80a696c53a1cc67a"},
    "quickstart_full": {"mask50": "c55f4235cc4a53f3", "mask75": "7e9b466087ab0bb3", "clip": "1678f77cd5f29ac2"},
    "schedule_scaling": {"schedule": "4b63e78aa7b12e91"},
    "sizes": {
        "clip-b16": "90553119291ec9a5",
        "clip-l16": "e326c5bc5c118cc0",
        "clip-l14": "f37914ac8abee9c5",
        "flip-b16": "0bdf815593eaeb37",
        "flip-l14": "e2cf96654effa426",
    },
    "text_masking": {"random50": "a13ffca9721bdfa9", "prioritised50": "dcd6211d68d4dd36"},
    "tuning": {"mask50": "95c4562aef6a0852", "mask75": "6721cf51fd026dc6"},
    "tuning_small": {
        "mask50": "1e926355c7a4b49f",
        "mask50-tuned": "51b573dfc9d39e57",
        "mask75": "738a50683c569ae6",
        "mask75-tuned": "be559b0ef15943a1",
    },
}


@pytest.mark.parametrize("name", PINNED)
def test_shipped_sweeps_keep_pinned_names_and_identities(name, monkeypatch):
    monkeypatch.setenv("FLIP_CACHE", "/no/cache")  # without the data, the identity contains their path
    fixed = ["data.decoder=pillow", "data.resize=pillow", "data.samples=1e6"]  # same on every machine
    runs = read_sweep(SWEEPS / f"{name}.yaml", fixed).runs
    resolved = {run.name: resolve_auto(run.config, H100_NODE, dataset_facts(run.config)) for run in runs}
    stored = {name: identity(config, "") for name, config in resolved.items()}
    assert {name: record["hash"][:16] for name, record in stored.items()} == PINNED[name]


def test_grid_runs_and_seeds_have_short_names(sweep):
    text = COMMON + "grid: {stages.pretrain.mask: [0.5, 0.75], model.size: [tiny, L/16], seed: [3]}\n"
    loaded = sweep(text)
    assert [r.name for r in loaded.runs] == ["mask0.5-tiny", "mask0.5-l16", "mask0.75-tiny", "mask0.75-l16"]
    assert loaded.runs[3].differs == {"stages.pretrain.mask": "0.75", "model.size": "L/16"}
    assert loaded.runs[3].config.model.image.width == 1024 and loaded.runs[3].config.seed == 3
    text = COMMON + "runs: {a: , b: {optim: {eps: 1e-6}, stages.pretrain.batch: 64}}\nseeds: [0, 7]\n"
    loaded = sweep(text)
    assert [(r.name, r.arm, r.config.seed) for r in loaded.runs] == [
        ("a", "a", 0),
        ("a-s7", "a", 7),
        ("b", "b", 0),
        ("b-s7", "b", 7),
    ]
    assert loaded.runs[0].differs == {"optim.eps": 1e-8, "stages.pretrain.batch": 128, "seed": 0}
    assert [r.name for r in sweep(text, seeds=[5]).runs] == ["a-s5", "b-s5"]
    assert [r.name for r in sweep(COMMON + "grid: {stages.pretrain.samples: [12.8e9, 65536]}").runs] == [
        "samples12.8b",
        "samples65536",
    ]


NESTED = """
set: {stages: [{name: pretrain, samples: 1e6, batch: 1024}], data.samples: 1e6}
runs:
  plain:
  tuned: {stages.unmasked: {samples: 1e5, batch: 512, mask: 0}}
grid:
  size:                                   # a labelled axis: its points carry what belongs together
    zip: {model.size: [B/16, L/16], resources.nodes: [1, 2]}
  data:
    list:
      - {name: laion400m, set: {data.manifest: /a}}
      - name: laion2b
        data.manifest: /b
        grid: {stages.pretrain.mask: [0.5, 0.75]}
"""


def test_nested_axes_expand_and_run_names_follow_nesting(sweep):
    loaded = sweep(NESTED)
    names = [run.name for run in loaded.runs]
    tails = ["laion400m", "laion2b-mask0.5", "laion2b-mask0.75"]
    assert names == [
        f"{head}-{size}-{tail}" for head in ("plain", "tuned") for size in ("b16", "l16") for tail in tails
    ]
    last = loaded.runs[-1].config
    assert (last.model.size, last.resources.nodes, last.data.manifest) == ("L/16", 2, "/b")
    assert [(stage.name, stage.mask) for stage in last.stages] == [("pretrain", "0.75"), ("unmasked", "0")]
    assert loaded.runs[0].against_base == [ConfigChange("data.manifest", "", "/a")]
    assert [change.key for change in loaded.runs[5].against_base if not change.key.startswith("model.")] == [
        "data.manifest", "resources.nodes", "stages.pretrain.mask",
    ]  # fmt: skip


def test_load_compares_runs_once_per_setting(sweep, monkeypatch):
    """Not once per setting of each run: that made the expansion of a large sweep quadratic."""
    varying = Mock(wraps=sweep_file._varying)
    monkeypatch.setattr(sweep_file, "_varying", varying)
    (*_, last) = sweep(COMMON + "grid: {stages.pretrain.mask: [0, 0.25, 0.5], optim.clip: [0, 1, 2]}").runs
    assert last.differs == {"stages.pretrain.mask": "0.5", "optim.clip": 2.0} and varying.call_count == 2


def test_zip_pairs_values_and_names_runs_by_first_axis(sweep):
    text = COMMON + "zip: {stages.pretrain.mask: [0, 0.5, 0.75], stages.pretrain.batch: [64, 128, 128]}\n"
    assert [(r.name, r.config.stages[0].batch) for r in sweep(text).runs] == [
        ("mask0", 64), ("mask0.5", 128), ("mask0.75", 128),
    ]  # fmt: skip
    longer = sweep(text.replace("0.75]", "0.75, 0.9]").replace("128]", "128, 128]"))
    assert [run.name for run in longer.runs][:3] == [run.name for run in sweep(text).runs]


@pytest.mark.parametrize(
    "lines, left",
    [
        ("stages.pretrain.mask > 0.5", ["mask0.75-b16", "mask0.75-l16"]),
        ("[stages.pretrain.mask > 0, model.size == L/16]", ["mask0.5-l16", "mask0.75-l16"]),
        ("[model.size != 'L/16' or stages.pretrain.mask >= 0.75, seed == 0]", [
            "mask0-b16", "mask0.5-b16", "mask0.75-b16", "mask0.75-l16",
        ]),
        ('["stages.pretrain.mask in [0, 0.50]", \'model.size not in ["L/16"]\']', ["mask0-b16", "mask0.5-b16"]),
        ("stages.pretrain.warmup < stages.pretrain.mask", [
            "mask0.5-b16", "mask0.5-l16", "mask0.75-b16", "mask0.75-l16",
        ]),
        ("model.text.prepend_cls == true or seed == 3", "all"),
    ],
)  # fmt: skip
def test_where_filters_runs_by_conditions(sweep, lines, left):
    text = COMMON + "grid: {stages.pretrain.mask: [0, 0.5, 0.75], model.size: [B/16, L/16]}\n"
    if left == "all":
        expected = [run.name for run in sweep(text).runs]
    else:
        expected = left
    assert [run.name for run in sweep(text + f"where: {lines}\n").runs] == expected


def test_nested_where_filters_own_runs_by_complete_configuration(sweep):
    inner = NESTED + "    where: model.size == B/16 or data.manifest == /a\n"
    names = [run.name for run in sweep(inner).runs]
    assert [name for name in names if "l16" in name] == ["plain-l16-laion400m", "tuned-l16-laion400m"]
    absent = "where: stages.unmasked.batch == null or stages.unmasked.batch < 512\n"
    assert {run.arm.split("-")[0] for run in sweep(NESTED + absent).runs} == {"plain"}
    assert "absent" in mistake(sweep, NESTED + "where: stages.unmasked.batch < 1024\n")


def test_given_lists_keys_set_by_sweep_and_overrides(sweep):
    first, second = sweep(
        "set: {stages: [{name: one, batch: 8}]}\nruns: {a: {model: {size: L/16}}, b: {}}", ["seed=3"]
    ).runs
    assert {"stages.one.batch", "seed", "model.size", "model.image.width"} <= first.given
    assert "stages.one.mask" not in first.given and not {"model.size", "model.image.width"} & second.given


def test_each_seed_starts_from_run_of_its_own_seed(sweep):
    text = COMMON + "runs: {trunk: , short: {init: {run: trunk}}, other: {init: {run: far/trunk}}}\nseeds: [0, 1]\n"
    assert {run.name: run.config.init.run for run in sweep(text).runs if run.config.init.run} == {
        "short": "trunk", "short-s1": "trunk-s1", "other": "far/trunk", "other-s1": "far/trunk",
    }  # fmt: skip
    where = text + "where: seed == 0 or init.run != ''\n"
    assert {run.name: run.config.init.run for run in sweep(where).runs}["short-s1"] == "trunk", "trunk has one seed"


def test_where_restricts_seed_to_some_runs(sweep):
    text = COMMON + "runs: {a: , b: {optim.eps: 1e-6}}\nseeds: [0, 1]\nwhere: seed == 0 or optim.eps == 1e-6\n"
    assert [run.name for run in sweep(text).runs] == ["a", "b", "b-s1"]
    # Overrides do not change which runs exist.
    assert [run.name for run in sweep(text, ["seed=5"]).runs] == ["a", "b", "b-s1"]


def test_overrides_take_precedence_and_only_selects_runs(sweep):
    text = COMMON + "runs: {a: , b: {seed: 4}}\ngrid: {optim.eps: [1e-8]}\n"
    loaded = sweep(text, ["seed=9"], only="b*")
    assert [(r.name, r.config.seed) for r in loaded.runs] == [("b", 9)]
    assert loaded.runs[0].differs == {}
    assert "a, b" in mistake(sweep, text, only="c*")


def test_recipe_siglip_is_portable_with_another_objective(sweep):
    config, other = (sweep(f"recipe: {name}\nruns: {{a: }}\n").runs[0].config for name in ("siglip", "portable"))
    model = config.model
    assert (model.objective, model.temperature, model.logit_bias) == ("siglip", 0.1, -10)
    model.objective = other.model.objective
    model.temperature = other.model.temperature
    model.max_logit_scale = other.model.max_logit_scale
    config.recipe = other.recipe
    assert config == other


def test_recipe_portable2_is_portable_with_the_image_transform_of_open_clip(sweep):
    config, other = (sweep(f"recipe: {name}\nruns: {{a: }}\n").runs[0].config for name in ("portable2", "portable"))
    assert (config.evaluate.preprocess, config.data.to_rgb) == ("resize_crop", "convert")
    assert (other.evaluate.preprocess, other.data.to_rgb) == ("crop_resize", "flatten")
    config.evaluate = other.evaluate
    config.data = other.data
    config.recipe = other.recipe
    assert config == other


def test_set_values_override_recipe_values(sweep, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text("base: portable\noptim: {beta1: 0.8, beta2: 0.7}\n")
    config = sweep("recipe: mine\nset: {optim.beta1: 0.5}\nruns: {a: }\n").runs[0].config
    assert (config.recipe, config.optim.beta1, config.optim.beta2) == ("mine", 0.5, 0.7)
    assert config.optim.weight_decay == 0.2 and config.stages[1].samples == 128_000_000
    assert sweep("recipe: [paper, mine]\nruns: {a: }\n").runs[0].config.recipe == "paper+mine"
    (tmp_path / "recipes/mine.yaml").write_text("base: mine\n")
    assert "its own base" in mistake(sweep, "recipe: mine\nruns: {a: }\n")


@pytest.mark.parametrize(
    "text, words",
    [
        (COMMON, ["is empty", "runs"]),
        ("", ["is empty"]),
        (COMMON + "runs: {}\n", ["is empty"]),
        (COMMON + "runs: []\n", [":2", "runs", "mapping"]),
        (COMMON + "grid: {optim.eps: []}\n", [":2", "optim.eps", "list"]),
        (COMMON + "grid: {optim.eps: 3}\n", ["optim.eps", "list"]),
        (COMMON + "grid: {optim.eps: [1e-8, 0.00000001]}\n", [":2", "same name", "eps1e-08"]),
        (COMMON + "grid: {model: [{size: tiny}, {size: B/16}]}\n", [":2", "grid.model", "no short name", "list"]),
        (COMMON + "grid: {}\n", [":2", "grid", "is empty"]),
        (COMMON + "list: []\n", [":2", "list", "is empty"]),
        (COMMON + "zip: {}\n", [":2", "zip", "is empty"]),
        (
            COMMON + "zip:\n  seed: [1, 2]\n  optim.eps: [1e-8]\n",
            [":2", "zip", "different lengths", "seed 2, optim.eps 1"],
        ),
        (COMMON + "zip: {optim.eps: [1e-8, 1e-8], seed: [1, 2]}\n", [":2", "same name", "first axis"]),
        (COMMON + "list:\n  - {name: a}\n  - {name: a}\n", [":2", "list", "same name", "'a'"]),
        (COMMON + "list:\n  - name: a\n  - seed: 3\n", [":4", "list.1", "has no name"]),
        (COMMON + "list:\n  - name: a\n    optim: {ebs: 1}\n", [":4", "optim.ebs", "optim.eps"]),
        (COMMON + "list: [a]\n", [":2", "list.0", "mapping"]),
        (COMMON + "list: [{name: ../a}]\n", [":2", "list.0", "../a", "a-z"]),
        (COMMON + "grid:\n  x:\n    size: 3\n", [":3", "grid.x", "runs, list, zip, grid"]),
        (COMMON + "runs:\n  a:\n    gird: {seed: [1]}\n", [":4", "runs.a.gird", "Did you mean runs.a.grid?"]),
        (COMMON + "grid: {data.tokenizer: ['..', b]}\n", [":2", "cannot be part of a name", ".."]),
        (COMMON + "grid: {recipe: [paper, portable]}\n", [":2", "grid.recipe", "a label"]),
        (COMMON + f"grid: {{data.samples: {[*range(200)]}, seed: {[*range(99)]}}}\n", ["19,800 runs"]),
        (COMMON + "runs: {a: , b: }\nwhere: optim.ebs > 1\n", [":3", "where", "optim.ebs", "optim.eps"]),
        (COMMON + "runs: {a: }\nwhere: optim.eps > 1\n", [":3", "where", "holds for none", "optim.eps > 1"]),
        (COMMON + "runs: {a: {seed: 1}, b: {}}\nwhere: [seed == 1, seed == 0]\n", [":3", "no run satisfies"]),
        (COMMON + "runs: {a: }\nwhere: model.size < 3\n", [":3", "model.size is 'tiny' in run a", "order"]),
        (COMMON + "runs: {a: }\nwhere: seed = 3\n", [":3", "seed = 3 is not a comparison"]),
        (COMMON + "runs: {a: }\nwhere: seed == 3 and seed == 4\n", ["joined by or", "two lines"]),
        (COMMON + "runs: {a: }\nwhere: seed ==\n", ["seed == is not a comparison", "For example"]),
        (COMMON + "runs: {a: }\nwhere: seed is 0\n", ["is does not compare"]),
        (COMMON + "runs: {a: }\nwhere: __import__('os').system('true')\n", ["where", "is not a comparison"]),
        (COMMON + "runs: {a: }\nwhere: [3]\n", ["where", "lines of comparisons", "3"]),
        (COMMON + "runs: {a: }\nwhere: []\n", ["where", "is empty"]),
        (COMMON + "runs: {a: }\nwhere: seed == ${x}\n", ["interpolation is off"]),
        (COMMON + "runs: {a: }\nseeds: [1, 1]\n", [":3", "seeds", "a seed is repeated", "1"]),
        (COMMON + "runs:\n  a:\n  b:\n  a:\n", [":5:3", "occurs twice"]),
        (COMMON + "runs: {A/B: }\n", ["runs.A/B", "a-z"]),
        (COMMON + "runs: {a: 3}\n", ["runs.a", "mapping"]),
        (COMMON + "runs:\n  a:\n    optim:\n      ebs: 1\n", [":5", "optim.ebs", "optim.eps"]),
        (COMMON + "grid:\n  optim.ebs: [1, 2]\n", [":3", "optim.ebs"]),
        (COMMON + "run: {a: }\n", [":2", "run", "Did you mean runs"]),
        (COMMON + "optim.eps: 1\n", ["set.optim.eps"]),
        (COMMON + "runs: {a: }\nrecipe: papr\n", [":3", "papr", "paper"]),
        (COMMON + "runs: {a: }\npaper:\n  b: {x: 1}\n", [":4", "paper.b", "no such run"]),
        (COMMON + "runs: {a: }\npaper:\n  a: 74.3\n", [":4", "paper.a", "mapping"]),
        (COMMON + "runs: {a: }\npaper:\n  a:\n    x: good\n", [":5", "paper.a.x", "number", "good"]),
        (COMMON + "runs: {a: }\npaper: {a: {x: true}}\n", [":3", "paper.a.x", "number"]),
        (COMMON + "runs: {a: }\nbaselines: {near: 48}\n", [":3", "baselines.near", "mapping"]),
        (COMMON + "runs: {a: }\nbaselines: {near: {x: good}}\n", [":3", "baselines.near.x", "number", "good"]),
        (COMMON + "runs: {a: }\nseeds: [x]\n", [":3", "seed", "'x'"]),
        (COMMON + "runs: {a: {seed: 7}}\nseeds: [0, 1]\n", ["run a: its seed has no effect", "7", "Remove the seed"]),
        (COMMON + "runs: {a: {grid: {seed: [2, 3]}}}\nseeds: [0, 1]\n", ["run a-seed2: its seed has no effect", "2"]),
        (COMMON + "runs: {a: }\nname: a/b\n", ["name", "a/b"]),
        ("- a\n", ["a mapping is needed"]),
        (COMMON + "runs: {a: {data.tokenizer: '${x}'}}\n", ["interpolation is off"]),
    ],
)
def test_load_error_names_file_line_and_key(sweep, text, words):
    paragraph = mistake(sweep, text)
    for word in ["trial.yaml", *words]:
        assert word in paragraph


HOSTILE = st.one_of(
    st.text(min_size=1, max_size=120),
    st.text("ab/.-_$()`'\"; \n\t*?~&|<>\\{}\0é", min_size=1, max_size=12),
    st.sampled_from(["..", ".hidden", "-rf", "$(touch x)", "a/../../b", "a\nb", "a" * 300, "con", "~", "latest", "A"]),
)
FORMS = {
    "sweep": lambda name: {"name": name, "runs": {"a": None}},
    "run": lambda name: {"runs": {name: None}},
    "member": lambda name: {"list": [{"name": name}, {"name": "other"}]},
    "label": lambda name: {"grid": {name: {"list": [{"name": "a"}, {"name": "b"}]}}},
    "value": lambda name: {"grid": {"data.tokenizer": [name, "other"]}},
    "nested": lambda name: {"runs": {"a": {"zip": {"data.tokenizer": [name, name + "x"]}}}},
    "stage": lambda name: {"runs": {"a": {"stages": [{"name": name, "samples": 1000, "batch": 128}]}}},
    "evaluation": lambda name: {"runs": {"a": {"evaluate.sets": [{"name": name, "manifest": "m", "classes": "c"}]}}},
}


@pytest.mark.parametrize("form", FORMS)
@given(name=HOSTILE)
def test_accepted_names_are_safe_for_paths_and_shells(form, name, tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(COMMON + dump_yaml(FORMS[form](name)), encoding="utf-8")
    try:
        loaded = read_sweep(path)
        configs = [finish(run.config, H100_NODE).config for run in loaded.runs]
    except ConfigError as error:
        assert "\n" not in error.paragraph()
        return
    names = [loaded.name, *(run.name for run in loaded.runs)]
    names += [part.name for config in configs for part in (*config.stages, *config.evaluate.sets)]
    for part in names:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", part) and shlex.quote(part) == part
        assert (tmp_path / part).resolve().parent == tmp_path


@given(text=st.text("abc.seed01 =!<>\"'[],()${}&*#:\\n", max_size=30))
def test_where_parser_accepts_or_refuses_arbitrary_text(text):
    try:
        assert all(condition.any for condition in parse(text, SourceLocation("trial.yaml", "where", 3)))
    except ConfigError as error:
        assert "trial.yaml" in error.paragraph()


def test_load_does_not_import_torch():
    root = Path(__file__).resolve().parents[3]
    code = "import sys; from jobs.sweeps.sweep_file import read_sweep; read_sweep('sweeps/model_scaling.yaml'); "
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_recipe_clip_is_portable2_with_another_model(sweep):
    config, other = (sweep(f"recipe: {name}\nruns: {{a: }}\n").runs[0].config for name in ("clip", "portable2"))
    image = config.model.image
    text = config.model.text
    assert (image.pool, image.positions, image.norm_pre) == ("class", "learned", True)
    assert (text.causal, text.length, text.vocabulary, text.repair) == (True, 77, 49_408, True)
    assert (config.model.activation, config.model.norm_eps, config.augment.mean[0]) == ("quick_gelu", 1e-5, 0.48145466)
    assert config.evaluate.preprocess == "resize_crop_floor"
    config.model = other.model
    config.recipe = other.recipe
    config.evaluate = other.evaluate
    config.augment.mean = other.augment.mean
    config.augment.std = other.augment.std
    assert config == other


def test_resolve_as_stored_keeps_identity_of_run_before_gpu_defaults(monkeypatch, tmp_path):
    """Recipes set compile, replicate and loss_tile to auto now; a run from before keeps its values."""
    monkeypatch.setenv("FLIP_CACHE", "/no/cache")
    before = ["compute.compile=no", "compute.replicate=1", "compute.loss_tile=1024"]
    fixed = ["data.decoder=pillow", "data.resize=pillow", "data.samples=1e6"]
    old = read_sweep(SWEEPS / "model_scaling.yaml", [*fixed, *before]).runs[0].config
    stored = resolve_auto(old, H100_NODE, dataset_facts(old))
    record = identity(stored, "")
    assert record["hash"][:16] == "bc4146982055f42f", "the identity is unchanged since then"
    run = tmp_path / "baseline"
    run.mkdir()
    lines = [line for line in dump(stored).splitlines() if line.strip().split(":")[0] not in BEFORE]
    (run / "config.yaml").write_text("\n".join(lines))
    write_json(run / "identity.json", record)
    new = read_sweep(SWEEPS / "model_scaling.yaml", fixed).runs[0].config
    facts = dataset_facts(new)
    assert not is_same_run(record, resolve_auto(new, H100_NODE, facts))
    assert is_same_run(record, resolve_auto_as_stored(new, H100_NODE, facts, [run]))


BEFORE = ("compile", "replicate", "loss_tile")
"""Keys that are missing in the configuration of such a run."""


def test_baselines_need_no_run(sweep):
    assert sweep("runs: {a: }\nbaselines: {near: {x: 48.0}}\n").baselines == {"near": {"x": 48.0}}


def test_quickstart_scores_unseen_names_first():
    """The first test set leads the headline of the report; training never has the names of ``unseen``."""
    (first, *_) = [item for item in sweep_file.read_sweep(SWEEPS / "quickstart.yaml").runs[0].config.evaluate.sets
                   if item.role == "test"]  # fmt: skip
    assert first.name == "unseen"
