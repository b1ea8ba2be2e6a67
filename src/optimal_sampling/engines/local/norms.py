"""RMS norms in one call instead of the seven of Transformers, a tenth of a small model's time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["RMSNorm", "fuse_norms"]


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, computed in float32."""

    def __init__(self, weight: Float[Tensor, " dim"], eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.eps = eps

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """The normalised rows, as from the norm that it replaces."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@torch.inference_mode()
def fuse_norms(model: nn.Module) -> int:
    """Replace RMS norms by equal ones (to the bit in float32 on a CPU). Returns how many."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused = _fused(child)
            if fused is not None:
                setattr(parent, name, fused)
                count += 1
    return count


def _fused(module: Any) -> RMSNorm | None:
    """The replacement of an RMS norm that gives the same (Gemma's scales by 1 + weight)."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    is_norm = type(module).__name__.endswith("RMSNorm") and not isinstance(module, RMSNorm)
    if not is_norm or eps is None or weight is None:
        return None
    fused = RMSNorm(weight, eps)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(64, weight.shape[-1], generator=generator).to(weight)
    expected, found = module(sample), fused(sample)
    if weight.dtype == torch.float32 and weight.device.type == "cpu":
        return fused if torch.equal(found, expected) else None
    tolerance = 4 * torch.finfo(weight.dtype).eps
    return fused if torch.allclose(found, expected, rtol=tolerance, atol=tolerance) else None
