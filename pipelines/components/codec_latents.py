"""The codec's acoustic encoder and quantiser: latents that hold mel frames, then codebooks set from them.

Legend: B clips, N codec frames, Z latent channels, C channels, F mel frames of 10 ms, M mel bins, R rows of latents,
P width of a sub-codebook, G its entries, D semantic width, S samples, T samples of a convolution.

First the encoder learns without a quantiser, judged by mel frames read out of its latents, once directly and once
behind the decoder's front: far cheaper than going through the upsampler, and the gradient is good from the first step.
Then every level of the quantiser is set from the latents that occur (principal axes, k-means), and encoder and front
go on learning through these fixed codebooks, levels left out at random: latents move to where little is lost. Then all
is frozen, as the report's stage 2 takes it. A quantiser trained by gradient gave acoustic codebooks that said no more
than the semantic one (from a random start) or diverged (from a fitted one); fitting it anew undid what was learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.models.audio_tokenizer import AcousticEncoder
from omni_ray.models.codec import Codec
from omni_ray.models.codec_blocks import BRANCH_GAIN, ResidualUnit
from omni_ray.models.quantizer import Quantizer
from pipelines.components.codec_stages import Cropper, Cut, StageRecipe, dropped_levels, front_end, optimise

FBANK_PER_FRAME = 6
SCALE_SHARE = 0.02
"""Weight of the latents' mean square: nothing else holds their scale, and the look-up by cosine does not feel it."""
NEAR_SHARE = 0.2
"""Weight of the distance from latents to what the codebooks make of them."""
START_CROPS, FIT_CROPS = 32, 384
"""Crops that set the first scales, and crops that set the codebooks."""
KMEANS_ROUNDS = 20


class MelReadout(nn.Module):
    """Mel frames read from latents and semantic ids, directly and behind the decoder's front; thrown away then."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        config = codec.config
        self.codec = (codec,)  # a tuple, so that the codec's weights are not this module's
        out = FBANK_PER_FRAME * config.num_mels
        self.direct = nn.Conv1d(config.semantic_dim + config.latent_dim, out, 1)
        self.behind = nn.Conv1d(config.decoder_dim, out, 1)

    def target(self, wave_BS: Tensor) -> Tensor:
        """Normalised mel frames of a clip, [B, F, M]."""
        (codec,) = self.codec
        with torch.no_grad():
            return (codec.fbank(wave_BS) - codec.semantic.mean_C) * codec.semantic.scale_C

    def forward(self, semantic_BN: Tensor, latents_BZN: Tensor, target_BFM: Tensor) -> Tensor:
        """Sum of both read-outs' mean distance."""
        (codec,) = self.codec
        embedded_BDN = codec.decoder.semantic(semantic_BN).transpose(1, 2)
        direct = self.direct(torch.cat([embedded_BDN, latents_BZN], dim=1))
        behind = self.behind(front_end(codec, semantic_BN, latents_BZN))
        return self._far(direct, target_BFM) + self._far(behind, target_BFM)

    @staticmethod
    def _far(read_BRN: Tensor, target_BFM: Tensor) -> Tensor:
        made_BFM = read_BRN.transpose(1, 2).reshape(len(read_BRN), -1, target_BFM.shape[-1])
        return (made_BFM[:, : target_BFM.shape[1]] - target_BFM).abs().mean()


def train_latents(
    codec: Codec, cropper: Cropper, recipe: StageRecipe, coded: StageRecipe, *, seed: int, log: Callable[[str], None]
) -> None:
    """Acoustic encoder and decoder's front against mel frames, then the quantiser from the latents, then ``coded``."""
    readout = MelReadout(codec)
    trained = [codec.acoustic, codec.decoder.semantic, codec.decoder.glstm, codec.decoder.conv_in, readout]
    with torch.no_grad():
        unit_start(codec.acoustic, cropper.draw(START_CROPS, recipe.frames).input_BS.unsqueeze(1))

    def free(step: int) -> Tensor:
        return torch.stack([*readout_terms(codec, readout, cropper.draw(recipe.batch, recipe.frames)).values()]).sum()

    weights = [weight for part in trained for weight in part.parameters()]
    optimise("latents", weights, recipe, free, log)
    chance = torch.Generator().manual_seed(seed)
    shares = fit_quantizer(codec.quantizer, _latents(codec, cropper, recipe.frames), chance)
    log(
        f"quantiser set from data; share of the variance left after each level: {[round(share, 3) for share in shares]}"
    )

    def through_codebooks(step: int) -> Tensor:
        cut = cropper.draw(coded.batch, coded.frames)
        levels_B = dropped_levels(coded.batch, len(codec.quantizer.levels), chance)
        return torch.stack([*readout_terms(codec, readout, cut, levels_B).values()]).sum()

    optimise("coded", weights, coded, through_codebooks, log)


def readout_terms(codec: Codec, readout: MelReadout, cut: Cut, levels_B: Tensor | None = None) -> dict[str, Tensor]:
    """Both read-outs' distance, a little of the latents' size, and how far the codebooks move them.

    Args:
        levels_B: Levels of the quantiser that each crop may use; None leaves the quantiser out.
    """
    latents_BZN = codec.acoustic(cut.input_BS.unsqueeze(1))
    read_BZN = latents_BZN if levels_B is None else codec.quantizer(latents_BZN, levels_B).values_BZT
    terms = {"mel": readout(cut.codes_BNK[..., 0], read_BZN, readout.target(cut.input_BS))}
    if levels_B is not None:
        terms["near"] = NEAR_SHARE * (latents_BZN - read_BZN.detach()).square().mean()
    return {**terms, "size": SCALE_SHARE * latents_BZN.square().mean()}


@torch.no_grad()
def unit_start(encoder: AcousticEncoder, wave_B1S: Tensor) -> None:
    """Scale and shift every convolution so that its outputs on real speech have mean 0 and deviation 1.

    Speech enters near 0.1, where Snake is all but linear, and a linear encoder cannot compute energies. Branches of
    residual units end at their own start strength.
    Source: data-dependent start of weight normalisation (Salimans and Kingma 2016, section 3).
    """
    branches = {id(unit.point) for unit in encoder.modules() if isinstance(unit, ResidualUnit)}

    def rescale(conv: Any, _: Any, out_BCT: Tensor) -> Tensor:
        wanted = BRANCH_GAIN if id(conv) in branches else 1.0
        mean_C, scale_C = out_BCT.mean(dim=(0, 2)), wanted / out_BCT.std(dim=(0, 2)).clamp_min(1e-4)
        conv.parametrizations.weight.original0.mul_(scale_C.view(-1, 1, 1))
        conv.bias.copy_((conv.bias - mean_C) * scale_C)
        return (out_BCT - mean_C.view(1, -1, 1)) * scale_C.view(1, -1, 1)

    hooks = [m.register_forward_hook(rescale) for m in encoder.modules() if isinstance(m, nn.Conv1d)]
    encoder(wave_B1S)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def fit_quantizer(quantizer: Quantizer, latents_BZN: Tensor, chance: torch.Generator) -> list[float]:
    """Set every level from real latents; returns the share of their variance that is left after each.

    A group's projection is the principal axes of its half of what the levels before left over, at unit scale; its
    entries are k-means centres by cosine, its way back the projection's transpose.
    """
    residual_BZN, shares = latents_BZN, []
    whole = _variance(latents_BZN)
    levels: Iterable[Any] = quantizer.levels
    for level in levels:
        first = 0
        for project, book, back in zip(level.project_in, level.codebooks, level.project_out, strict=True):
            width = back.weight.shape[0]
            rows_RZ = residual_BZN[:, first : first + width].transpose(1, 2).reshape(-1, width)
            mean_Z = rows_RZ.mean(dim=0)
            axes_PZ = torch.linalg.svd(rows_RZ - mean_Z, full_matrices=False)[2][: book.entries_GP.shape[1]]
            inside_RP = (rows_RZ - mean_Z) @ axes_PZ.t()
            scale = float(inside_RP.std().clamp_min(1e-6))
            weight = torch.zeros_like(project.weight)
            weight[:, first : first + width, 0] = axes_PZ / scale
            project.weight, back.weight = weight, (axes_PZ.t() * scale).unsqueeze(-1).contiguous()
            project.bias.copy_(-(axes_PZ @ mean_Z) / scale)
            back.bias.copy_(mean_Z)
            book.entries_GP.copy_(cosine_kmeans(inside_RP / scale, len(book.entries_GP), chance))
            first += width
        residual_BZN = residual_BZN - level(residual_BZN)[0]
        shares.append(_variance(residual_BZN) / whole)
    return shares


def cosine_kmeans(rows_RP: Tensor, entries: int, chance: torch.Generator) -> Tensor:
    """Centres [G, P]: rows go to the centre of greatest cosine, a centre is the mean of its rows as they are."""
    unit_RP = F.normalize(rows_RP, dim=1)
    chosen = [int(torch.randint(0, len(rows_RP), (), generator=chance))]
    far_R = 1.0 - unit_RP @ unit_RP[chosen[0]]
    for _ in range(entries - 1):
        chosen.append(int(torch.multinomial(far_R.clamp_min(1e-9), 1, generator=chance)))
        far_R = torch.minimum(far_R, 1.0 - unit_RP @ unit_RP[chosen[-1]])
    centres_GP = rows_RP[chosen]
    for _ in range(KMEANS_ROUNDS):
        owner_R = (unit_RP @ F.normalize(centres_GP, dim=1).t()).argmax(dim=1)
        count_G1 = torch.bincount(owner_R, minlength=entries).unsqueeze(1)
        sums_GP = torch.zeros_like(centres_GP).index_add_(0, owner_R, rows_RP)
        centres_GP = torch.where(count_G1 > 0, sums_GP / count_G1.clamp_min(1), centres_GP)
    return centres_GP


@torch.no_grad()
def _latents(codec: Codec, cropper: Cropper, frames: int) -> Tensor:
    cuts: Iterable[Cut] = (cropper.draw(START_CROPS, frames) for _ in range(FIT_CROPS // START_CROPS))
    return torch.cat([codec.acoustic(cut.input_BS.unsqueeze(1)) for cut in cuts])


def _variance(latents_BZN: Tensor) -> float:
    return float((latents_BZN - latents_BZN.mean(dim=(0, 2), keepdim=True)).square().mean())
