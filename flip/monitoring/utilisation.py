"""Device utilisation: the arithmetic of training as a share of what the devices could do."""

import time

import torch

from flip import model_costs


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of a large product of random matrices on this device, measured now."""
    side = 4096 if device.type == "cuda" else 1024
    source = torch.Generator(device).manual_seed(0)  # leaves the random state of training alone
    left, right = (torch.randn(side, side, device=device, generator=source).to(dtype) for _ in range(2))

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    left @ right
    start_time = clock()
    count = 0
    repeats = 20 if device.type == "cuda" else 1  # the host's wait for a GPU must not count
    while (now := clock()) - start_time < seconds:
        for _ in range(repeats):
            left @ right
        count += repeats
    return count * 2 * side**3 / (now - start_time)


class Utilisation:
    """Share of the devices' arithmetic that a training speed uses.

    ``mfu`` is a share of the datasheet peak; None if that is unknown, as on CPUs. ``matmul_utilisation`` is a share of
    a matrix product that the constructor measures.
    """

    def __init__(self, device: torch.device, precision: str, world_size: int) -> None:
        if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
            precision = "tf32"
        name = ""
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        self._datasheet = model_costs.peak_flops(name, precision)
        self._world_size = world_size
        self._measured = measure_matmul_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)

    def of(self, speed: float) -> dict[str, float | None]:
        """Both shares for ``speed``, the FLOP/s of all ranks together."""
        each = speed / self._world_size
        mfu = None
        if self._datasheet is not None:
            mfu = each / self._datasheet
        return {"mfu": mfu, "matmul_utilisation": each / self._measured}
