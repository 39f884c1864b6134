"""JPEG files of many encoders: ``corpus.tar.xz``, listed in ``corpus.json``, recorded by ``record``."""
