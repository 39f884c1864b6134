"""The studies: which arms train, what is compared, and the beginning of each page."""

from __future__ import annotations

from tools.studies.design import Arm, Round, SmallImages, StudyDesign

MASKING = StudyDesign(
    "study",
    """\
# A small study: what does masking gain at equal cost?

`make study` writes this page (`flip study`, from the runs). It asks the paper's questions at a size that two CPU
cores train in less than 100 minutes (slower or shared cores need longer for the same result), on the pictures and
captions of `flip demo_data`: 1,172 classes of emoji, six sets of drawings to train on. It is not a replication of
the paper: its model, data and lengths are smaller by factors of a hundred to a hundred thousand.

    flip demo_data
    make study                          # ordinary runs; if interrupted, run it again to continue

Another machine trains the same step counts at the same learning rates (study/choices.json), regardless of its own
trials, which it runs last. Its means should lie within the intervals below widened by the square root of two, because
they are a second draw of as many seeds. The same kind of processor with the same packages gives the same bits.
`flip study --page` writes the page from the runs that are complete. `flip study --calibrate`
measures step times again and so defines another study.""",
    (
        Round("arms", "Masking at equal cost", (Arm("clip", "0"), Arm("mask50", "0.5"), Arm("mask75", "0.75"))),
        Round(
            "tuning",
            "Unmasked tuning, and the same time masked",
            (
                Arm("mask50-unmasked", "0", after="mask50"),
                Arm("mask50-masked", "0.5", after="mask50"),
                Arm("mask75-unmasked", "0", after="mask75"),
                Arm("mask75-masked", "0.75", after="mask75"),
            ),
        ),
        Round("batch", "The batch at equal cost", (Arm("mask75-b64", "0.75", 64), Arm("mask75-b256", "0.75", 256))),
    ),
    (
        ("masking", "mask50", "clip"),
        ("masking", "mask75", "clip"),
        ("masking", "mask75", "mask50"),
        ("unmasked tuning", "mask50-unmasked", "mask50-masked"),
        ("unmasked tuning", "mask75-unmasked", "mask75-masked"),
        ("tuned or not", "mask50-unmasked", "mask50"),
        ("tuned or not", "mask75-unmasked", "mask75"),
        ("batch", "mask75-b64", "mask75"),
        ("batch", "mask75-b256", "mask75"),
    ),
)

CHEAPEST = StudyDesign(
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
fifth of clipa is at the full size. Half of the tokens of a caption are cut in clipa's first part, and in no other
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
)

STUDIES = {"masking": MASKING, "cheapest": CHEAPEST}
