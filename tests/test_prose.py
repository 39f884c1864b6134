"""Tests that README, CONTRIBUTING and docs/ keep simple rules of plain English, and their limits of length.

Each rule has a budget, the number of places that are left, which may only fall. ``python tests/test_prose.py`` lists
every place, and the words of each page.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("records", *(path.parent.name for path in (ROOT / "docs").glob("*/calibration.json")))
"""Pages that ``python -m lab.records`` and ``python -m lab.study`` write; a study has the folder of its page's name."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [path for path in sorted((ROOT / "docs").glob("*.md")) if path.stem not in GENERATED]

LONGEST_SENTENCE = 35
RULES = {
    "long sentence": None,
    "semicolons": re.compile(r";.*;"),
    "that of": re.compile(r"\b(?:that|those) of\b", re.IGNORECASE),
    # Questions are allowed ("What is a stage?"), also after some verbs, in headings and in cells of tables.
    "what as a noun": re.compile(
        r"(?<!\bsay )(?<!says )(?<!show )(?<!shows )(?<!see )(?<!explain )(?<!explains )(?<!describes )(?<!decide )"
        r"(?<!decides )(?<!defines )(?<!lists )(?<!list )(?<!know )(?<!and )(?<!^\| )(?<! \| )(?<!# )"
        r"\bwhat\b(?! happens)(?!.*\?)",
        re.IGNORECASE,
    ),
    "predicate before its verb": re.compile(
        r"^(?:Also |Not )?(?:[A-Z]?[a-z]+(?:ed|own|ept)|Made|Left out),? (?:is|are|was|were)\b"
        r"|^So (?:is|are|has|have|does|do)\b"
    ),
    "private word": re.compile(
        r"\b(?:told(?!\.json)|beside|theirs|ours|mend|those that|the (?:found|said|made)|leash|foreign)\b",
        re.IGNORECASE,
    ),
    "picture": re.compile(r"^(?!.*(?:\breports?\b|\bpages?\b|Test pictures)).*\bpictures?\b", re.IGNORECASE),
}
PRINTED = re.compile(r"<!-- printed by .*?<!-- end -->", re.DOTALL)
"""Tables that a program prints, as it writes the pages of GENERATED."""
MARKUP = re.compile(r"<!--.*?-->|</?(?:picture|source|img)\b[^>]*>")
WHOLE_SENTENCES = ("long sentence", "semicolons")
"""Rules that tables and headings need not keep."""
BUDGET = {name: 0 for name in RULES}
LONGEST_PAGE = 2500


def sentences(text: str) -> Iterator[tuple[int, str, bool]]:
    """Return (line, sentence, whether it is prose) without code. Table rows and headings are not prose."""
    text = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    text = MARKUP.sub(lambda tag: "\n" * tag[0].count("\n"), text)
    paragraph: list[tuple[int, str]] = []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        is_table = line.lstrip().startswith(("|", "#"))
        starts = re.match(r"\s*(?:[-*]|\d+\.)\s", line)
        if paragraph and (not line.strip() or is_table or starts):
            yield from split(paragraph)
            paragraph = []
        if not line.strip():
            continue
        if is_table:
            yield number, plain(line), False
        elif starts or paragraph or not line.startswith("    "):
            paragraph.append((number, re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "", line).strip()))


def split(paragraph: list[tuple[int, str]]) -> Iterator[tuple[int, str, bool]]:
    text = " ".join(line for _, line in paragraph)
    starts = [0]
    for _, line in paragraph:
        starts.append(starts[-1] + len(line) + 1)
    position = 0
    for sentence in re.split(r"(?<=[.!?])[*_)\"]* (?=[\"`(\[*]*[A-Z0-9`])", text):
        position = text.index(sentence, position)
        index = max(i for i, start in enumerate(starts[:-1]) if start <= position)
        if sentence:
            yield paragraph[index][0], plain(sentence), True


def plain(text: str) -> str:
    """Return the text with code as one word, and links as their titles."""
    text = re.sub(r"`[^`]*`", "CODE", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return text.replace("*", "").strip()


def violations(rule: str) -> list[str]:
    pattern = RULES[rule]
    places = []
    for page in PAGES:
        for line, sentence, is_prose in sentences(page.read_text(encoding="utf-8")):
            if rule in WHOLE_SENTENCES and not is_prose:
                continue
            broken = pattern.search(sentence) if pattern else len(sentence.split()) > LONGEST_SENTENCE
            if broken:
                places.append(f"{page.relative_to(ROOT)}:{line}: {sentence}")
    return places


def words() -> dict[str, int]:
    """Words of each page, without printed tables, comments and tags of HTML."""
    texts = {page.stem: PRINTED.sub("", page.read_text(encoding="utf-8")) for page in PAGES}
    return {name: len(MARKUP.sub("", text).split()) for name, text in texts.items()}


@pytest.mark.parametrize("rule", RULES)
def test_prose_rule_is_within_its_budget(rule):
    places = violations(rule)
    assert len(places) <= BUDGET[rule], "\n".join([f"{rule}: rewrite these sentences", *places])


def test_pages_are_within_their_length():
    counted = words()
    longer = {name: count for name, count in counted.items() if count > LONGEST_PAGE}
    assert not longer, f"{longer}: shorten these pages to {LONGEST_PAGE} words, or split them by task"


if __name__ == "__main__":
    for name in RULES:
        found = violations(name)
        print(f"== {name}: {len(found)}", *found, sep="\n")
    print(words(), sum(words().values()))
