"""Appends the packages of FLIP_STUB_PACKAGES, the project's own environment, after those of the CUDA build.

With FLIP_STUB_CUDNN, cuDNN is replaced when torch has been imported (``tests.cuda_stub.cudnn``).
"""

import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder


class AfterTorch(MetaPathFinder):
    """Finds torch as others do, and replaces cuDNN once it is executed."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            from tests.cuda_stub import cudnn

            cudnn.install()

        spec.loader.exec_module = exec_module
        return spec


if path := os.environ.get("FLIP_STUB_PACKAGES"):
    sys.path.append(path)
if os.environ.get("FLIP_STUB_CUDNN"):
    sys.meta_path.insert(0, AfterTorch())
