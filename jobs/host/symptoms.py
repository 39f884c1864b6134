"""What the words of a crash tell of its origin: a plain table. Standard library, Python >= 3.6.

Whoever meets a message that belongs here adds it, with the message itself as an example to the test.
"""

import re

#: The port of the rendezvous was free when the launcher looked, and taken when rank 0 wanted it.
PORT_TAKEN = re.compile("EADDRINUSE|address already in use", re.IGNORECASE)

#: The cards of one node, or their driver (CUDA's and PyTorch's words): it may go well on another one. Errors that a
#: kernel's mistake causes as well, such as an illegal access or a launch failure, are not among them.
HARDWARE = re.compile(
    "uncorrectable (ECC|NVLink) error"
    "|or a hardware error"
    "|no CUDA-capable device is detected"
    "|No CUDA GPUs are available"
    "|CUDA-capable device\\(s\\) is/are busy or unavailable"
    "|system not yet initialized"
    "|CUDA driver initialization failed"
    "|Found no NVIDIA driver on your system"
    "|GPU is lost|fallen off the bus",
    re.IGNORECASE,
)

#: gloo's and NCCL's words for a peer that is gone.
PEER_GONE = re.compile(
    "Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited", re.IGNORECASE
)
