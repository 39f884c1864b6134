"""cuDNN on the stub: it plans on a real device, so the operations that use it are replaced."""

import ctypes

import torch
from torch.utils._pytree import tree_map_only

_library = ctypes.CDLL(None)
_cudnn = torch.library.Library("aten", "IMPL")


def install():
    """Replace the attention of cuDNN, and convolutions, by outputs of their shapes."""

    def replace(name, count):
        operation = getattr(torch.ops.aten, name).default

        def empty(*values, **options):
            _library.stub_count(count)
            metas, others = tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="meta"), (values, options))
            outputs = operation(*metas, **others)
            return tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="cuda"), outputs)

        _cudnn.impl(name, empty, "CUDA", allow_override=True)

    replace("_scaled_dot_product_cudnn_attention", b"cudnn attention")
    replace("_scaled_dot_product_cudnn_attention_backward", b"cudnn backward")
    replace("convolution", b"convolution")  # the patch embedding of other trainers
    replace("convolution_backward", b"convolution backward")
