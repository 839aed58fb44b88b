"""The FSMN memory: gradients are those of the plain sum over taps, and a row's bits do not depend on its company."""

from __future__ import annotations

import pytest
import torch

from omni_ray.config.model import AudioConfig, model_preset
from omni_ray.models.fsmn import FsmnLayer

ROWS = 60


@pytest.fixture(params=["tiny", "small"])
def layer(request: pytest.FixtureRequest) -> FsmnLayer:
    torch.manual_seed(0)
    config: AudioConfig = model_preset(request.param).audio
    return FsmnLayer(config, config.right_order).eval()


def test_gradients_are_those_of_the_plain_sum_over_taps(layer: FsmnLayer) -> None:
    weight_P1K = layer.memory.weight
    size, _, taps = weight_P1K.shape
    x_BGP = torch.randn(2, ROWS, size, requires_grad=True)
    out_BNP = layer._remember(x_BGP)
    plain_BNP = torch.stack([x_BGP[:, k : k + out_BNP.shape[1]] * weight_P1K[:, 0, k] for k in range(taps)]).sum(dim=0)
    gradient = torch.randn_like(out_BNP)
    ours = torch.autograd.grad(out_BNP, (x_BGP, weight_P1K), gradient)
    theirs = torch.autograd.grad(plain_BNP, (x_BGP, weight_P1K), gradient)
    torch.testing.assert_close(out_BNP, plain_BNP, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 33], ids="{}-rows".format)
@torch.no_grad()
def test_a_row_has_the_same_bits_whatever_the_rows_and_streams_beside_it(layer: FsmnLayer, count: int) -> None:
    window = layer.memory.weight.shape[2] - 1
    x_GP = torch.randn(ROWS, layer.memory.weight.shape[0])
    whole_NP = layer._remember(x_GP)
    for start in (0, 1, 5, 9):
        piece_GP = x_GP[start : start + count + window]
        beside = torch.stack([torch.randn_like(piece_GP), piece_GP])
        assert torch.equal(layer._remember(piece_GP), whole_NP[start : start + count])
        assert torch.equal(layer._remember(beside)[1], whole_NP[start : start + count])
