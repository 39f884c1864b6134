"""A text classification head and Muon at equal cost: docs/head_muon.md."""

from collections.abc import Mapping
from typing import Any

from lab.studies.arms import Arm, ArmStudy, Round

SMALL: Mapping[str, Any] = {
    "model.image": {"size": 24, "patch": 12, "layers": 2, "width": 192, "heads": 3},
    "model.text.length": 8,
    "augment": {"crop_area": [0.95, 1.0], "crop_aspect": [0.9, 1.11], "rotate": 0, "translate": 0, "zoom": 0},
}
"""Learns in a minute of a core what the model of recipe emoji learns in several (docs/records.md)."""
HEAD: Mapping[str, Any] = {"data.token_table": "cache:emoji-tokens.json", "stages.pretrain.classification": 1.0}
UNSEEN = {"manifest": "cache:emoji/unseen", "classes": "cache:emoji/classes-unseen.json", "role": "test"}
"""Emoji that training never names, by all vendors."""

STUDY = ArmStudy(
    "head_muon",
    """\
# A small study: do a text classification head and Muon help?

`python -m lab.study --study head_muon` trains what has no committed result and writes this page. At equal measured cost
it compares three trainings that differ in one setting: AdamW, AdamW with the [text classification
head](variants.md#text-classification-head) at weight 1, and [Muon](variants.md#muon). None has a mask. The pictures and
the rules are those of [study.md](study.md).

The model is that of the recipe patch12 of [records.md](records.md), which learns in a minute: images of 24 px in
4 patches, 2 blocks of width 192, captions of 8 tokens, crops of nearly the whole image. That recipe was found with
Muon, on the validation vendor, which may favour Muon here. `unseen` are 1,489 pictures by all nine vendors of 199
classes that training never names; chance is 0.5 %. The classes of the other sets are in training.

No arm reaches the nearest training picture at 16 x 16 pixels (48.0 % on twemoji): this is a study of early training.
The published gains of the head are of models a hundred times larger, trained ten thousand times longer.

    flip demo_data
    cache="${FLIP_CACHE:-$HOME/.cache/flip}"
    flip tokenizer table "$cache/emoji/tokenizer.json" --captions "$cache/emoji/train" --out "$cache/emoji-tokens.json"
    python -m lab.study --study head_muon""",
    (
        Round(
            "arms",
            "A text classification head and Muon at equal cost",
            (
                Arm("adamw", "0", settings=SMALL),
                Arm("head", "0", settings={**SMALL, **HEAD}),
                Arm("muon", "0", settings={**SMALL, "optim.name": "muon"}),
            ),
        ),
    ),
    (("text classification head", "head", "adamw"), ("optimiser", "muon", "adamw")),
    seconds=45.0,
    rates=(1e-3, 2e-3, 4e-3),
    further=(2.5e-4, 5e-4, 8e-3, 1.6e-2),
    tests=("twemoji", "openmoji", "unseen"),
    added_sets={"unseen": UNSEEN},
)
