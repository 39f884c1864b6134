"""Messages as libraries write them, and what they are taken for."""

import pytest

from jobs.host import symptoms

CRASHES = {
    "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be": "HARDWARE",
    "RuntimeError: CUDA error: uncorrectable NVLink error detected during the execution": "HARDWARE",
    "RuntimeError: CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error": "HARDWARE",
    "RuntimeError: CUDA error: no CUDA-capable device is detected": "HARDWARE",
    "RuntimeError: No CUDA GPUs are available": "HARDWARE",
    "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable": "HARDWARE",
    "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized": "HARDWARE",
    "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU": "HARDWARE",
    "NVMLError_GpuIsLost: GPU is lost": "HARDWARE",
    "RuntimeError: CUDA error: an illegal memory access was encountered": "",
    "RuntimeError: CUDA error: device-side assert triggered": "",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of": "",
    "DistNetworkError: The server socket has failed to listen on any local network address. port: 29500, useIpv6: "
    "false, code: -98, name: EADDRINUSE, message: address already in use": "PORT_TAKEN",
    "OSError: [Errno 98] Address already in use (while attempting to bind on address ('127.0.0.1', 17211))":
    "PORT_TAKEN",
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4":
    "PEER_GONE",
    "DistBackendError: NCCL error: remote process exited or there was a network error": "PEER_GONE",
}  # fmt: skip


@pytest.mark.parametrize("text", CRASHES)
def test_a_message_is_taken_for_what_it_is(text):
    known = [name for name in ("HARDWARE", "PORT_TAKEN", "PEER_GONE") if getattr(symptoms, name).search(text)]
    assert known == ([CRASHES[text]] if CRASHES[text] else [])
