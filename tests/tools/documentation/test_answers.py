"""Tests that docs/index.md answers nine questions of new users, each within 400 words from its first line on."""

import re

import pytest

from tests.harness.common import ROOT

INDEX = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
#: Question in the table of docs/index.md -> words that the linked section has to contain.
ANSWERS = {
    "for transformers": "--to transformers",
    "64 GPUs": "--dry-run resources.nodes=8",
    "number of the paper": "flip submit sweeps/masking.yaml --cluster mine",
    "after a kill": "it resumes from the newest commit",
    "open_clip": "--model open_clip:FOLDER",
    "augmentation": "`AugmentationStep`, `AUGMENTATIONS` in `flip/data/augment.py`",
    "cost before": "`--dry-run` shows the plan and writes nothing",
    "number of ranks": "extend: true",
    "8 GPUs": "gpus_per_node: 8",
}
LONGEST = 400


def read_until(question: str, answer: str) -> int:
    """The words that somebody reads: the index up to the row of the question, and the section up to the answer."""
    (row,) = [line for line in INDEX.splitlines() if line.startswith("| ") and question in line]
    page, _, anchor = re.search(r"\]\(([^)]+)\)", row)[1].partition("#")
    section = section_of((ROOT / "docs" / page).read_text(encoding="utf-8"), anchor)
    end = section.index(answer) + len(answer)
    return len(INDEX[: INDEX.index(row) + len(row)].split()) + len(section[:end].split())


def section_of(text: str, anchor: str) -> str:
    """The text from the heading of an anchor on."""
    for heading in re.finditer(r"^#+ (.*)$", text, re.MULTILINE):
        if re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-") == anchor:
            return text[heading.start() :]
    raise AssertionError(f"no heading #{anchor}")


@pytest.mark.parametrize("question, answer", ANSWERS.items())
def test_question_is_answered_within_400_words(question, answer):
    assert read_until(question, answer) <= LONGEST


if __name__ == "__main__":
    for question, answer in ANSWERS.items():
        print(question, read_until(question, answer))
