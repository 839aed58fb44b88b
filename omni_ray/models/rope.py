"""Rotary position embedding over interleaved pairs."""

# T packed tokens, R rotary dim (even), P = R/2 pairs

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions_T: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, fp32 whatever the model's dtype.

    Args:
        positions_T: [T] integer positions inside each sequence.
        dim: Rotary dim R, even.
        base: theta; the curriculum raises it per stage.
    Returns:
        cos, sin: [T, R/2].
    Source: networks.md section 4: pair i of (2i, 2i+1) turns by position * base^(-2i/R).
    """
    exponent_P = torch.arange(0, dim, 2, dtype=torch.float32, device=positions_T.device) / dim
    angle_TP = positions_T.float().unsqueeze(-1) * (1.0 / (base**exponent_P))
    return angle_TP.cos(), angle_TP.sin()


class Turn:
    """Cosine and sine of rows to rotate; rotates pairs (2i, 2i+1) of the last dim, in fp32 at least."""

    def __init__(self, cos_RP: Tensor, sin_RP: Tensor) -> None:
        self.cos_RP, self.sin_RP = cos_RP.contiguous(), sin_RP.contiguous()
        self._phase_RP = torch.complex(cos_RP, sin_RP)

    def select(self, rows: Tensor) -> Turn:
        """The turn of chosen rows, in their order."""
        return Turn(self.cos_RP.index_select(0, rows), self.sin_RP.index_select(0, rows))

    def part(self, rows: slice) -> Turn:
        """The turn of consecutive rows."""
        return Turn(self.cos_RP[rows], self.sin_RP[rows])

    def turned(self, x_SLhR: Tensor, back: bool = False) -> Tensor:
        """Rotate S sequences of L of these rows, every head alike: [S, L, h, 2P] to a new tensor, differentiable."""
        wide = x_SLhR.to(torch.promote_types(x_SLhR.dtype, torch.float32)).contiguous()
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self._phase(x_SLhR, back)).flatten(-2).to(x_SLhR.dtype)

    def turn_into(self, out_SLhR: Tensor, x_SLhR: Tensor, back: bool = False) -> None:
        """:meth:`turned`, written to ``out_SLhR`` without a graph and, in fp32, in one pass over memory."""
        if x_SLhR.dtype == torch.float32 and _pairs_aligned(x_SLhR) and _pairs_aligned(out_SLhR):
            pairs, into = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in (x_SLhR, out_SLhR))
            torch.mul(pairs, self._phase(x_SLhR, back), out=into)
        else:
            out_SLhR.copy_(self.turned(x_SLhR, back))

    def _phase(self, x_SLhR: Tensor, back: bool) -> Tensor:
        phase = self._phase_RP.view(*x_SLhR.shape[:2], 1, -1)
        return phase.conj() if back else phase


def _pairs_aligned(x: Tensor) -> bool:
    """Whether pairs of the last dim can be seen as complex numbers without a copy."""
    outer = (x.storage_offset(), *x.stride()[:-1])
    return x.stride(-1) == 1 and not any(int(step) % 2 for step in outer)
