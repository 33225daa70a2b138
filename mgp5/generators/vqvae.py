"""The image tokenizer of VAR and VARGPT: a multi-scale residual VQ-VAE (Tian et al., arXiv 2404.02905; VARGPT, 7.2).

An image becomes square maps of codes, from coarse to fine. Each scale codes what the scales before it left of the
encoder's features; `f_hat` is the sum of all scales so far, which is painted and predicts the next scale.

Letters: B batch, H and W pixels, Z width of a code, h and w size of the features, V codes of the codebook, p and q side
of a scale's map, K codes of an image, M vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import Mgp5Error, raise_all
from ..files import read_json, replacing, write_json

CONFIG, WEIGHTS = "model_index.json", "model.safetensors"  # files of a stored VQVAE
PHIS = 4  # convolutions that all scales share (VAR, section 3.2)
PHI_RATIO = 0.5  # share of the convolution in what a scale adds; the rest is the interpolated map itself
DEAD = 0.03  # a code with fewer hits, in units of the mean over all codes, is dead
USAGE_DECAY = 0.99  # of the moving average of hits, per batch


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """The shape of a VQVAE; the defaults are the published one's, which codes 256x256 pixels in 680 codes."""

    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # side of each scale's map, the last one that of h
    num_codes: int = 4096  # V; the VARGPT paper says 4090, its code and weights have 4,096
    code_width: int = 32  # Z
    channels: tuple[int, ...] = (160, 160, 320, 320, 640)  # of each resolution; every one after the first halves it
    layers_per_block: int = 2  # residual blocks of each resolution of the encoder, one more in the decoder
    norm_groups: int = 32  # of GroupNorm; must divide all channels
    attention: bool = True  # at the lowest resolution
    beta: float = 0.25  # weight of the commitment loss

    def __post_init__(self) -> None:
        counts = ("num_codes", "code_width", "layers_per_block", "norm_groups")
        problems = [
            f"{name} is {getattr(self, name)}, expected at least 1" for name in counts if getattr(self, name) < 1
        ]
        if not self.patch_nums or any(p >= q for p, q in zip((0, *self.patch_nums), self.patch_nums, strict=False)):
            problems.append(f"patch_nums are {self.patch_nums}, expected positive numbers in rising order")
        if not self.channels or any(width % max(1, self.norm_groups) for width in self.channels):
            problems.append(f"channels are {self.channels}, expected multiples of norm_groups {self.norm_groups}")
        raise_all(f"vqvae: {problem}" for problem in problems)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the number of codes of each scale; their sum is K."""
        return tuple(side * side for side in self.patch_nums)

    @property
    def image_size(self) -> int:
        """Return the side of an image in pixels."""
        return self.patch_nums[-1] * 2 ** (len(self.channels) - 1)


class Quantized(NamedTuple):
    """The result of quantizing features."""

    f_hat: Tensor  # (B, Z, h, w); its gradient goes to the features as they are (straight through)
    codes: Tensor  # (B, K), integers
    loss: Tensor  # (), codebook loss and commitment loss
    residuals: Tensor  # (M, Z), the vectors that were coded


class MultiScaleQuantizer(nn.Module):
    """Code features scale by scale (VAR, algorithms 1 and 2); it computes in float32."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook = nn.Embedding(config.num_codes, config.code_width)
        self.phis = nn.ModuleList(nn.Conv2d(config.code_width, config.code_width, 3, padding=1) for _ in range(PHIS))
        # Moving average of hits, in units of their mean. From zeros the first restart draws all codes from the data.
        self.register_buffer("usage", torch.zeros(config.num_codes))

    def phi(self, scale: int) -> nn.Conv2d:
        """Return the convolution of a scale. Of ten scales the published weights have 2, 3, 2 and 3 on one."""
        # numpy as published: scales 2 and 7 of ten are halfway between two, and its rounding decides.
        places = np.linspace(1 / (3 * PHIS), 1 - 1 / (3 * PHIS), PHIS)
        return self.phis[int(np.abs(places - scale / max(1, len(self.config.patch_nums) - 1)).argmin())]

    def start(self, count: int) -> Tensor:
        """Return f_hat (B, Z, h, w) before the first scale, zeros."""
        side = self.config.patch_nums[-1]
        return self.codebook.weight.new_zeros(count, self.config.code_width, side, side)

    def add(self, f_hat: Tensor, scale: int, codes: Tensor) -> Tensor:  # (B, Z, h, w)
        """Return f_hat (B, Z, h, w) with the codes (B, p * p) of a scale added."""
        side = self.config.patch_nums[scale]
        maps = self.codebook(codes).transpose(1, 2).unflatten(2, (side, side))
        maps = F.interpolate(maps, f_hat.shape[-2:], mode="bicubic")
        return f_hat + (1 - PHI_RATIO) * maps + PHI_RATIO * self.phi(scale)(maps)

    def vectors(self, features: Tensor, scale: int) -> Tensor:  # (B, p * p, Z)
        """Return features (B, Z, h, w), averaged over areas, as the vectors of a scale's map."""
        return F.adaptive_avg_pool2d(features, self.config.patch_nums[scale]).flatten(2).transpose(1, 2)

    def next_input(self, f_hat: Tensor, scale: int, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add the codes (B, p * p) of a scale to f_hat (B, Z, h, w).
        Return f_hat and the vectors (B, q * q, Z) that the next scale is predicted from; None after the last."""
        f_hat = self.add(f_hat, scale, codes)
        last = scale + 1 == len(self.config.patch_nums)
        return f_hat, None if last else self.vectors(f_hat, scale + 1)

    def teacher_inputs(self, codes: Tensor) -> Tensor:
        """Return the vectors that all scales but the first are predicted from, for true codes (B, K).
        They are (B, K - first, Z), 679 for 680 codes: nothing was drawn before the first scale."""
        f_hat, inputs = self.start(len(codes)), []
        for scale, part in enumerate(codes.split(self.config.sizes, 1)[:-1]):
            f_hat, vectors = self.next_input(f_hat, scale, part)
            inputs.append(vectors)
        return torch.cat(inputs, 1)

    def f_hat(self, codes: Tensor) -> Tensor:  # (B, Z, h, w)
        """Return the sum of all scales of codes (B, K)."""
        f_hat = self.start(len(codes))
        for scale, part in enumerate(codes.split(self.config.sizes, 1)):
            f_hat = self.add(f_hat, scale, part)
        return f_hat

    def forward(self, features: Tensor) -> Quantized:
        """Quantize features (B, Z, h, w) by the nearest codes; in training mode their hits are counted.
        The loss is the mean over scales of `|f_hat - sg(f)|^2 + beta * |sg(f_hat) - f|^2` (VAR, equation 5)."""
        features = features.float()
        target = features.detach()
        f_hat, codes, residuals, losses = torch.zeros_like(target), [], [], []
        with torch.autocast("cpu" if features.is_meta else features.device.type, enabled=False):  # none on meta
            for scale in range(len(self.config.patch_nums)):
                residuals.append(self.vectors(target - f_hat.detach(), scale))
                codes.append(torch.cdist(residuals[-1], self.codebook.weight.detach()).argmin(-1))
                f_hat = self.add(f_hat, scale, codes[-1])
                losses += [F.mse_loss(f_hat, target), self.config.beta * F.mse_loss(f_hat.detach(), features)]
        chosen, vectors = torch.cat(codes, 1), torch.cat(residuals, 1).flatten(0, 1)
        if self.training:
            hits = torch.bincount(chosen.flatten(), minlength=self.config.num_codes).float()
            self.usage.lerp_(hits / hits.mean(), 1 - USAGE_DECAY)
        return Quantized(features + (f_hat - features).detach(), chosen, 2 * torch.stack(losses).mean(), vectors)

    @torch.no_grad()
    def restart_dead_codes(self, residuals: Tensor, rng: torch.Generator) -> int:
        """Set codes that are hardly used to random ones of the vectors (M, Z) that were coded; return how many.
        `rng` is on the CPU. A restarted code counts as used, and has some hundred batches to get hits."""
        dead = self.usage < DEAD
        rows = torch.randint(len(residuals), (int(dead.sum()),), generator=rng)
        self.codebook.weight[dead] = residuals[rows.to(residuals.device)].to(self.codebook.weight)
        self.usage[dead] = 1.0
        return len(rows)

    def codebook_use(self) -> float:
        """Return the share of codes that recent training batches used."""
        return float((self.usage >= DEAD).float().mean())


class VQVAE(nn.Module):
    """An image tokenizer: pixels <-> codes of several scales. Encoder and decoder are those of latent diffusion."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        from diffusers.models.autoencoders.vae import Decoder, Encoder  # takes seconds, the rest of this file none

        self.config, self.native_size = config, config.image_size
        width, higher, kind = config.code_width, len(config.channels) - 1, "Attn" * config.attention
        shape = {
            "block_out_channels": config.channels,
            "layers_per_block": config.layers_per_block,
            "norm_num_groups": config.norm_groups,
            "mid_block_add_attention": config.attention,
        }
        down = ("DownEncoderBlock2D",) * higher + (f"{kind}DownEncoderBlock2D",)
        up = (f"{kind}UpDecoderBlock2D",) + ("UpDecoderBlock2D",) * higher
        self.encoder = Encoder(out_channels=width, down_block_types=down, double_z=False, **shape)
        self.quant_conv = nn.Conv2d(width, width, 3, padding=1)
        self.quantizer = MultiScaleQuantizer(config)
        self.post_quant_conv = nn.Conv2d(width, width, 3, padding=1)
        self.decoder = Decoder(in_channels=width, up_block_types=up, **shape)

    def quantize(self, pixels: Tensor) -> Quantized:
        """Encode and quantize images (B, 3, H, W) in [-1, 1]."""
        return self.quantizer(self.quant_conv(self.encoder(pixels.to(self.quant_conv.weight.dtype))))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:  # (B, K)
        """Return the codes of images (B, 3, H, W) in [-1, 1], the scales one after the other."""
        return self.quantize(pixels).codes

    def paint(self, f_hat: Tensor) -> Tensor:  # (B, 3, H, W)
        """Return the images of f_hat (B, Z, h, w), not clamped yet."""
        return self.decoder(self.post_quant_conv(f_hat.to(self.post_quant_conv.weight.dtype)))

    def decode(self, f_hat: Tensor) -> Tensor:  # (B, 3, H, W)
        """Return the images in [-1, 1] of f_hat (B, Z, h, w), also of a sum that lacks scales yet."""
        return self.paint(f_hat).clamp(-1, 1)

    def losses(
        self, pixels: Tensor, perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> tuple[dict[str, Tensor], Quantized]:
        """Return the loss terms of images (B, 3, H, W) in [-1, 1], and how they were quantized: "reconstruction" is the
        mean absolute and the mean squared error, "vq" the quantizer's loss, "perceptual" what that module returns."""
        quantized = self.quantize(pixels)
        made = self.paint(quantized.f_hat)
        terms = {"reconstruction": F.l1_loss(made, pixels) + F.mse_loss(made, pixels), "vq": quantized.loss}
        return terms | ({"perceptual": perceptual(made, pixels)} if perceptual else {}), quantized

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write configuration and weights to a folder, the weights in `dtype`; None keeps theirs."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, {"_class_name": "VQVAE"} | asdict(self.config))
        with replacing(folder / WEIGHTS) as part:
            save_file({name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}, part)

    @classmethod
    def from_index(cls, index: Mapping[str, Any]) -> VQVAE:
        """Build the VQVAE that model_index.json describes, with random weights."""
        index = {key: tuple(v) if isinstance(v, list) else v for key, v in index.items() if key[0] != "_"}
        return cls(VQVAEConfig(**index))

    @classmethod
    def load(cls, name: str | Path, dtype: torch.dtype | None = None, revision: str | None = None) -> VQVAE:
        """Read a folder that `save` wrote; `dtype` is of all but the quantizer. Raises Mgp5Error if it is no such."""
        hint, folder = "give a folder that VQVAE.save wrote", Path(name)
        try:
            vqvae = cls.from_index(read_json(folder / CONFIG, hint))
            vqvae.load_state_dict(load_file(folder / WEIGHTS))
        except (TypeError, OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise Mgp5Error(f"{folder} holds no image tokenizer ({reason})", hint) from None
        for name, module in vqvae.named_children():
            module.to(None if name == "quantizer" else dtype)
        return vqvae
