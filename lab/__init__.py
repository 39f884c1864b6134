"""What do we publish about the product, and how is it proved?

Users never need this folder, and a wheel does not contain it. Each program is ``python -m lab.NAME``, in a checkout:

- ``study``: trains the studies on the demonstration data and writes their pages; ``studies`` are their designs.
- ``records``: the fewest core-seconds to an accuracy, and their page.
- ``icons``: the data of the scaling study, drawings with their names.
- ``recordings``: records files of other programs, which tests of parsers read.
- ``documentation``: the site, the references from the code, and the figures of the README.
- ``audit``: known vulnerabilities of the installed packages.

May import ``flip``, ``jobs`` and ``tools``: the public interface, and the modules that tests/test_imports.py lists with
a reason. Nothing of those three imports ``lab``. Measurements against peers are in ``benchmarks/``.
"""
