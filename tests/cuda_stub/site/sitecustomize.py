"""Appends the packages of FLIP_STUB_PACKAGES, the project's own environment, after those of the CUDA build."""

import os
import sys

if path := os.environ.get("FLIP_STUB_PACKAGES"):
    sys.path.append(path)
