"""Small images compared with masks at equal cost: docs/cheapest.md."""

from lab.studies.arms import Arm, ArmStudy, Round, SmallImages
from lab.studies.masking import STEPS

STUDY = ArmStudy(
    "cheapest",
    """\
# A small study: which road to a model is the cheapest?

`make study STUDY=cheapest` writes this page (`python -m lab.study --study cheapest`, from the runs). At equal measured
cost it compares CLIP without masking, FLIP at two mask ratios, and a training in the manner of CLIPA: images of 24 px
and 8 tokens for 80 % of the seconds, then 48 px and 16 tokens at a tenth of the learning rate. The pictures, the model
and the rules are those of [study.md](study.md): two CPU cores, less than an hour, 1,172 classes of emoji, six sets of
drawings to train on. No arm reaches the nearest training picture at 16 x 16 pixels (48.0 % on twemoji): this is a study
of early training.

The published differences are between models a hundred to a thousand times larger, trained for a hundred thousand times
more samples: [reproduce.md](reproduce.md#recipes-that-followed-the-paper). What does not show here may show there. On
pictures of 48 px a patch of 8 px is a sixth of the side, so that 24 px leave 9 patches of larger parts, while a mask
leaves 9 or 18 sharp ones. Emoji remain recognisable at 24 px, photographs less so.

The arm clipa differs from the others in three ways at once: smaller images, half of the tokens of a caption in its \
first part, and a schedule that warms up and decays twice. "small images" stands for all three; none is isolated. Its
last fifth, at the full size, gains nothing here: the mean on validation is 13.7 before it and 13.1 at the end
(cheapest/course.csv). The masked arms end without unmasked tuning, whose effect study.md does not determine.""",
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
        ("small images, short texts", "clipa", "clip"),
        ("small images, short texts", "clipa", "mask50"),
        ("small images, short texts", "clipa", "mask75"),
        ("masking", "mask50", "clip"),
        ("masking", "mask75", "clip"),
    ),
    about=STEPS,
)
