"""Reads the lines of a chart back from its SVG."""

import re


def lines_of(drawn):
    """The (title, number of points) of each line in an SVG."""
    paths = re.findall(r'<g><title>([^<]*)</title>\s*<path d="([^"]*)"', drawn)
    return [(title, path.count("L") + 1) for title, path in paths]
