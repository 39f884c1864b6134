"""Where do recorded files of other programs come from, and how are they recorded again?

- ``tars``: writes tests/parsers/foreign_tars.tar.xz with 22 tar writers, which machines of tests do not have. The
  programs that it builds are in tar_writers/.

The tests read the recorded files alone: no test runs these programs, and nothing imports them. May import ``flip``.
"""
