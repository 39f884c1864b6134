"""Small images compared with masks at equal cost: docs/cheapest.md."""

from tools.studies.arms import Arm, ArmStudy, Round, SmallImages
from tools.studies.masking import ABOUT

STUDY = ArmStudy(
    "cheapest",
    """\
# A small study: which road to a model is the cheapest?

`make study STUDY=cheapest` writes this page (`flip study --study cheapest`, from the runs). At equal measured cost
it compares CLIP without masking, FLIP at two mask ratios, and a training in the manner of CLIPA: images of 24 px and 8
tokens for 80 % of the seconds, then 48 px and 16 tokens at a tenth of the learning rate. The pictures, the model and
the rules are those of [study.md](study.md): two CPU cores, less than an hour, 1,172 classes of emoji, six sets of
drawings to train on.

The published differences are between models a hundred to a thousand times larger, trained for a hundred thousand times
more samples: [reproduce.md](reproduce.md#recipes-that-followed-the-paper). What does not show here may show there. On
pictures of 48 px a patch of 8 px is a sixth of the side, so that 24 px leave 9 patches of larger parts, while a mask
leaves 9 or 18 sharp ones. Emoji remain recognisable at 24 px, photographs less so.

The masked arms end without unmasked tuning, which gained nothing in study.md (comparisons 4 to 7), whereas the last
fifth of clipa is at the full size. Half of the tokens of a caption are cut in clipa's first part, and in no other \
arm.""",
    (
        Round(
            "arms",
            "Small images, masks and CLIP at equal cost",
            (
                Arm("clip", "0"),
                Arm("mask50", "0.5"),
                Arm("mask75", "0.75"),
                Arm("clipa", "0", small=SmallImages(24, 8, 0.8)),
            ),
        ),
    ),
    (
        ("small images", "clipa", "clip"),
        ("small images", "clipa", "mask50"),
        ("small images", "clipa", "mask75"),
        ("masking", "mask50", "clip"),
        ("masking", "mask75", "clip"),
    ),
    about=ABOUT,
)
