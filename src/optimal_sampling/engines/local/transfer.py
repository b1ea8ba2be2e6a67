"""From the host to the device without waiting for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor there. A copy from ordinary memory would wait until the device has done all its work."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
