"""Tests of pages as Markdown."""

import re

from jobs.pages.document import Table, Text
from jobs.pages.markdown import markdown


def test_markdown_escapes_hostile_texts():
    harm = "a|b <script>x</script> [l](javascript:y) *b* `c` # ~ $z$\n\n# head"
    rendered = markdown([Table([{"run": harm, "why": "x"}], long=["why"]), Text(harm)])
    assert "<script" not in rendered and "\n# head" not in rendered and "](" not in rendered.replace("\\](", "")
    (row,) = [line for line in rendered.splitlines() if "script" in line and line.startswith("|")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
