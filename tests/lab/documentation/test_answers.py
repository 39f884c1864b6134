"""Tests that docs/index.md answers nine questions of new users completely, each within 400 words from its first line.

A reader starts at docs/index.md, which is the first page of the site, follows the link of a row of its table, and reads
from that heading on until the last part of the answer. Words are those that the site shows: no link targets, no borders
of tables.
"""

import re

import pytest

from tests.harness.common import ROOT

INDEX = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
#: Words of the row in the table of docs/index.md -> all parts of the answer, in their order in the linked section.
ANSWERS = {
    "for transformers": (
        "flip shards make birds --out data/birds",
        "flip tokenizer train --kind bpe",
        "flip new mine --data data/birds --recipe clip",
        "flip submit mine.yaml",
        "flip export mine/mask0.5 --to transformers",
        "prints the folder, which AutoModel loads",
    ),
    "64 GPUs": ("Name a cluster's profile", "flip submit data_scaling --cluster h100 --dry-run resources.nodes=8"),
    "number of the paper": (
        "flip submit sweeps/masking.yaml --dry-run",
        "[Inputs](#what-the-sweeps-read)",
        "flip submit sweeps/masking.yaml --cluster mine",
        "flip report masking",
        "| 1a | mask 0, 50, 75 %",
        "| 8 | model, data, schedule",
    ),
    "after a kill": ("repeat the submit command", "resume from their newest checkpoints", "| failed, crash or hang |"),
    "score an open_clip model": (
        "pip install open_clip_torch",
        "flip evaluate --model open_clip:FOLDER --sets imagenet1k --data /data/eval",
        "`open_clip_model.safetensors`",
        "[form](#data-sets)",
        "flip evaluate epoch_32.pt",
    ),
    "augmentation": (
        "`AugmentationStep`, `AUGMENTATIONS` in `flip/data/augment.py`",
        "option(0.0, ge=0, le=1, omit_if=0.0)",
        "class Erase(AugmentationStep)",
        "view.changes.append(erase)",
    ),
    "cost before": ("flip submit my.yaml --dry-run", "`--dry-run` shows the plan and writes nothing"),
    "number of ranks": ("flip cancel my/large", "--changed extend", "*world sizes allowed*"),
    "8 GPUs": ("gpus_per_node: 8", "flip new my", "--dry-run", "flip submit my\n"),
}
LONGEST = 400


def shown(text: str) -> int:
    """The number of words of a text as the site shows it."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)\s]*\)?", r"\1", text)
    text = re.sub(r"^```.*$|[|]|(?<= )-{3,}(?= )", " ", text, flags=re.MULTILINE)
    return len(text.split())


def read_until(question: str, parts: tuple[str, ...]) -> int:
    """The words that somebody reads: the index up to the row of the question, and the section up to the last part."""
    (row,) = [line for line in INDEX.splitlines() if line.startswith("| ") and question in line]
    page, _, anchor = re.search(r"\]\(([^)]+)\)", row)[1].partition("#")
    section = section_of((ROOT / "docs" / page).read_text(encoding="utf-8"), anchor)
    end = 0
    for part in parts:
        end = section.index(part, end) + len(part)
    return shown(INDEX[: INDEX.index(row) + len(row)]) + shown(section[:end])


def section_of(text: str, anchor: str) -> str:
    """The text from the heading of an anchor on."""
    for heading in re.finditer(r"^#+ (.*)$", text, re.MULTILINE):
        if re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-") == anchor:
            return text[heading.start() :]
    raise AssertionError(f"no heading #{anchor}")


@pytest.mark.parametrize("question, parts", ANSWERS.items())
def test_question_is_answered_completely_within_400_words(question, parts):
    assert read_until(question, parts) <= LONGEST


def test_index_says_how_to_get_the_command_before_the_first_question():
    beginning = INDEX[: INDEX.index("| I want to |")]
    assert "make install && source .venv/bin/activate" in beginning


if __name__ == "__main__":
    for question, parts in ANSWERS.items():
        print(question, read_until(question, parts))
