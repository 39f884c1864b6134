"""How do texts, tables and charts look as an HTML page, as Markdown and as files?

A page is a list of blocks, which know no format and no run. Reports of runs, measurements, records and studies build
blocks; this package shows them. Every text is escaped, because names and errors come from files of other people.

- ``document.py``: the blocks: ``Text``, ``Table``, ``Figure``, ``CaptionedImages`` and ``Fold``.
- ``html.py``: one self-contained page without scripts (``page.css``: its style). ``markdown.py``: the same as Markdown.
- ``charts.py``: ``Plot``, a chart of a figure, drawn as SVG or PNG. ``chart_files.py``: the files of all charts.

May import ``jobs.common``, and no other package of ``jobs``.
"""
