"""Tests that the JSON Schemas for editors accept and refuse the same files as the loader."""

import dataclasses
import difflib
import json
import re

import jsonschema
import pytest

from flip.common.option import option
from flip.common.yaml_io import parse_yaml, read_yaml
from flip.config import json_schema, schema
from flip.runs.errors import ConfigError
from jobs.commands.schema import KINDS, schema_json
from jobs.common.cluster_profile import load_profile
from jobs.common.paths import SWEEPS
from jobs.sweeps import command_file, sweep_file
from jobs.sweeps.json_schemas import SCHEMAS

FOLDERS = {"sweep": SWEEPS, "recipe": SWEEPS / "recipes", "profile": SWEEPS / "clusters"}
FILES = [(kind, path) for kind, folder in FOLDERS.items() for path in sorted(folder.glob("*.yaml"))]


@pytest.fixture(scope="module")
def validators():
    schemas = {kind: json.loads(schema_json(SCHEMAS[kind]())) for kind in KINDS}
    for node in schemas.values():
        jsonschema.Draft7Validator.check_schema(node)
    return {kind: jsonschema.Draft7Validator(node) for kind, node in schemas.items()}


@pytest.mark.parametrize("kind, path", FILES, ids=[path.name for _, path in FILES])
def test_shipped_file_matches_schema_and_names_it(validators, kind, path):
    validators[kind].validate(plain(read_yaml(path)))
    first = path.read_text().splitlines()[0]
    named = path.parent / first.removeprefix("# yaml-language-server: $schema=")
    assert named.resolve() == SWEEPS / "schemas" / f"{kind}.json"


@pytest.mark.parametrize("kind", KINDS)
def test_written_schemas_match_code(kind):
    """A profile that was added here, such as that of ``flip doctor``, is in no shipped schema."""
    written = (SWEEPS / "schemas" / f"{kind}.json").read_text(encoding="utf-8")
    profiles = ["h100", "local", "pair"]
    options = {"sweep": {"profiles": profiles}, "recipe": {"profiles": profiles}, "profile": {}}[kind]
    assert written == schema_json(SCHEMAS[kind](**options)), "run `flip schema --write`"


@pytest.mark.parametrize("values", [
    "runs: {a: {model.size: L/16, stages.pretrain.mask: 0.75}}",
    "runs: {a: }\nset: {stages: {pretrain: {samples: 400e6, batch: 40_000}}, model: {embed: 64}}",
    "set: {stages: {pretrain.batch: 512}, model: {image.size: 48}}\ngrid: {seed: [0, 1]}",
    "grid: {optim.beta2: [0.9, 0.95], length: {runs: {short: {stages.pretrain.samples: 1e6}, long: }}}",
    "zip: {stages.pretrain.mask: [0.5, 0.75], stages.pretrain.batch: [256, 512]}\nwhere: seed == 0",
    "list: [{name: a, model.embed: 64, runs: {b: {seed: 1}}}]",
    "runs: {a: {data.sets: [{name: x, manifest: cache:x, weight: 2}]}}",
    "recipe: [portable, emoji]\ncluster: local\nruns: {a: {model: {size: tiny}, stages.pretrain.mask: 5e-1}}",
    "cluster: my/far.yaml\nruns: {a: {stages: {pretrain: {mask: .5, text_mask: '0.25'}}, resources.cluster: h100}}",
    "runs: {a: {evaluate.sets.emoji.role: validation}}\nset: {evaluate.sets: [{name: emoji}]}",
])  # fmt: skip
def test_loader_and_schema_accept_valid_sweep(validators, values, tmp_path):
    (tmp_path / "some.yaml").write_text(values)
    sweep_file.read_sweep(tmp_path / "some.yaml")
    validators["sweep"].validate(plain(parse_yaml(values, "some.yaml")))


PROGRAM = "command: [python, train.py, --lr, '{lr}']\n"


@pytest.mark.parametrize("values", [
    PROGRAM + "set: {lr: 0.1}",
    PROGRAM + "grid: {lr: [0.1, 0.2]}\nresources: {processes: 2}\nresume: {folder: out, arguments: [--resume]}",
    PROGRAM + "set: {lr: 0.1}\ntitle: Mine\nmetrics: {total: 10, names: {loss: a}}\nstop: {signal: USR1}",
])  # fmt: skip
def test_loader_and_schema_accept_valid_program(validators, values, tmp_path):
    (tmp_path / "some.yaml").write_text(values)
    command_file.load(tmp_path / "some.yaml")
    validators["sweep"].validate(plain(parse_yaml(values, "some.yaml")))
    entry = "\n".join(f"    {line}" for line in values.splitlines() if not line.startswith("title"))
    validators["sweep"].validate(plain(parse_yaml(f"runs: {{a: }}\ncommands:\n  other:\n{entry}", "some.yaml")))


@pytest.mark.parametrize("values", [
    "command: 5", PROGRAM + "set: 5", PROGRAM + "set: {lr: 1}\nresources: {nodes: 0}",
    PROGRAM + "set: {lr: 1}\nresume: {folders: out}", PROGRAM + "set: {lr: 1}\nrecipe: portable",
    PROGRAM + "set: {lr: 1}\nstop: {signal: HUP}",
])  # fmt: skip
def test_loader_and_schema_refuse_broken_program(validators, values, tmp_path):
    (tmp_path / "some.yaml").write_text(values)
    with pytest.raises(ConfigError):
        command_file.load(tmp_path / "some.yaml")
    with pytest.raises(jsonschema.ValidationError):
        validators["sweep"].validate(plain(parse_yaml(values, "some.yaml")))


BROKEN = [
    "runs: {a: {model.size: 5}}\nsets: {}", "run: {a: }", "runs: [a, b]", "grid: [seed]", "seeds: 3", "title: [a]",
    "runs: {a: 3}", "runs: {a: {modle.size: L/16}}", "runs: {a: {model.image.patches: 8}}", "runs: {a: {seed: -1}}",
    "runs: {a: {seed: 1.5}}", "runs: {a: {seed: one}}", "runs: {a: {model.embed: 0}}",
    "runs: {a: {model.image.pool: mean}}", "runs: {a: {model: L/16}}", "runs: {a: {optim.beta1: 1}}",
    "runs: {a: {optim.eps: 0}}", "runs: {a: {data.max_replaced: 2}}", "runs: {a: {data.captions: txt}}",
    "runs: {a: {data.decoder: opencv}}", "runs: {a: {augment.flip: often}}", "runs: {a: {compute.precision: fp16}}",
    "runs: {a: {stages.pretrain.maks: 0.5}}", "runs: {a: {stages: {pretrain: {batch: 0}}}}",
    "runs: {a: {stages.pretrain.text_masking: some}}", "runs: {a: {stages.pretrain: 5}}",
    "runs: {a: {evaluate.sets: [{name: x, role: train}]}}", "runs: {a: {resources.nodes: 0}}",
    "runs: {a: {checkpoint.keep: 0}}", "runs: {a: {monitor.spike_window: 2}}", "grid: {seed: [-1, 0]}",
    "grid: {compute.precision: [fp16]}", "set: {data: {workers: -2}}\nruns: {a: }", "list: [{set: 5, name: a}]",
]  # fmt: skip


@pytest.mark.parametrize("values", BROKEN)
def test_loader_and_schema_refuse_broken_sweep(validators, values, tmp_path):
    from flip.config.validate import check_fields

    (tmp_path / "some.yaml").write_text(values)
    with pytest.raises(ConfigError):
        for run in sweep_file.read_sweep(tmp_path / "some.yaml").runs:
            check_fields(run.config)
    with pytest.raises(jsonschema.ValidationError):
        validators["sweep"].validate(plain(parse_yaml(values, "some.yaml")))


@pytest.mark.parametrize("values", [
    "runs: {a: {model.size: L/15}}", "set: {model: {size: large}}\nruns: {a: }", "recipe: papre\nruns: {a: }",
    "recipe: [paper, papre]\nruns: {a: }", "cluster: h1000\nruns: {a: }", "runs: {a: {resources.cluster: h1000}}",
    "runs: {a: {stages.pretrain.mask: 50}}", "runs: {a: {stages.pretrain.mask: -0.5}}",
    "runs: {a: {stages.pretrain.mask: '1.0'}}", "set: {stages: {pretrain: {text_mask: half}}}\nruns: {a: }",
    "grid: {model.size: [B/16, B/61]}", "grid: {stages.pretrain.mask: [0.5, 75]}",
])  # fmt: skip
def test_schema_knows_sizes_recipes_clusters_and_bounds_of_masks(validators, values):
    with pytest.raises(jsonschema.ValidationError):
        validators["sweep"].validate(plain(parse_yaml(values, "some.yaml")))


@pytest.mark.parametrize("line", [
    "kinds: slurm", "hours: long", "env: HOME", "parallel: []", "options: [a]", "kind: pbs", "hours: 0",
    "gpus_per_node: -1", "utilisation: 40", "container_runtime: docker",
])  # fmt: skip
def test_loader_and_schema_refuse_broken_profile(validators, line, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"{line}\n")
    with pytest.raises(ConfigError):
        load_profile(str(tmp_path / "mine.yaml"))
    with pytest.raises(jsonschema.ValidationError):
        validators["profile"].validate(plain(parse_yaml(line, "mine.yaml")))


def test_schema_takes_descriptions_and_limits_from_config_fields(validators):
    definitions = validators["sweep"].schema["definitions"]
    assert "Side of the square input, pixels." in definitions["ImageTower"]["properties"]["size"]["description"]
    data = definitions["Data"]["properties"]
    assert data["timeout"]["maximum"] == 3600 and data["decoder"]["enum"][0] == "auto"


@pytest.mark.parametrize("name", ["Optim", "ImageTower", "Stage"])
def test_new_field_changes_few_lines(name, monkeypatch):
    """Its section defines it, and each place in which it may be written refers to that."""
    before = schema_json(SCHEMAS["sweep"]()).splitlines()
    old = getattr(schema, name)
    new = dataclasses.make_dataclass(name, [("sway", float, option(0.0, ge=0, lt=1))], bases=(old,))
    monkeypatch.setattr(schema, name, new)
    described = json_schema.descriptions
    monkeypatch.setattr(json_schema, "descriptions", lambda kind: described(old if kind is new else kind))
    after = schema_json(SCHEMAS["sweep"]()).splitlines()
    changed = [line for line in difflib.unified_diff(before, after, n=0) if re.match(r"[-+] ", line)]
    assert sum("sway" in line for line in changed) >= 4
    assert len(changed) <= 12


def plain(value):
    """Mappings and lists as plain JSON values."""
    return json.loads(json.dumps(value))
