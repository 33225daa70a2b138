"""The image tokenizer: quantization against its definition, dead codes, training, files, the published weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mgp5.errors import Mgp5Error
from mgp5.generators.var_weights import read_vqvae
from mgp5.generators.vqvae import VQVAE, MultiScaleQuantizer, VQVAEConfig

TINY = VQVAEConfig(patch_nums=(1, 2, 3), num_codes=16, code_width=4, channels=(8, 8), layers_per_block=1, norm_groups=4)


@pytest.fixture
def quantizer() -> MultiScaleQuantizer:
    torch.manual_seed(0)
    return MultiScaleQuantizer(TINY).eval()


@pytest.fixture
def vqvae() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(TINY).eval()


def test_the_published_shape():
    quantizer = MultiScaleQuantizer(VQVAEConfig())
    codes = torch.randint(4096, (1, sum(quantizer.config.sizes)))
    assert codes.shape == (1, 680)
    assert quantizer.teacher_inputs(codes).shape == (1, 679, 32)
    assert quantizer.f_hat(codes).shape == (1, 32, 16, 16)
    assert quantizer.config.image_size == 256
    phis = list(quantizer.phis)
    assert [phis.index(quantizer.phi(scale)) for scale in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_nums": (1, 3, 3)}, "rising"),
        ({"num_codes": 0}, "num_codes is 0"),
        ({"channels": (8, 6)}, "multiples of norm_groups 4"),
    ],
)
def test_a_wrong_configuration_is_told(change, message):
    with pytest.raises(Mgp5Error, match=message):
        VQVAEConfig(**{**vars(TINY), **change})


def by_definition(quantizer: MultiScaleQuantizer, features):
    """Quantize as the paper writes it: interpolate, look all codes up, convolve, subtract. Returns also each f_hat."""
    rest, codes, sums, losses = features.clone(), [], [], []
    for scale, side in enumerate((1, 2, 3)):
        small = F.interpolate(rest, (side, side), mode="area").permute(0, 2, 3, 1)
        distances = (small[..., None, :] - quantizer.codebook.weight).square().sum(-1)
        chosen = distances.argmin(-1)
        maps = F.interpolate(quantizer.codebook.weight[chosen].permute(0, 3, 1, 2), (3, 3), mode="bicubic")
        maps = 0.5 * maps + 0.5 * quantizer.phis[(0, 2, 3)[scale]](maps)
        rest = rest - maps
        codes.append(chosen.flatten(1))
        sums.append(features - rest)
        losses.append(1.25 * rest.square().mean())
    return codes, sums, sum(losses) / 3


@torch.no_grad()
def test_features_are_quantized_as_defined(quantizer):
    features = torch.randn(5, 4, 3, 3)
    found = quantizer(features)
    codes, sums, loss = by_definition(quantizer, features)
    assert torch.equal(found.codes, torch.cat(codes, 1))
    torch.testing.assert_close(found.f_hat, sums[-1])
    torch.testing.assert_close(found.loss, loss)
    assert found.residuals.shape == (5 * 14, 4)


@torch.no_grad()
def test_inputs_of_a_teacher_are_those_of_drawing(quantizer):
    features = torch.randn(2, 4, 3, 3)
    codes, sums, _ = by_definition(quantizer, features)
    f_hat, inputs = quantizer.start(2), []
    for scale, chosen in enumerate(codes):
        f_hat, vectors = quantizer.next_input(f_hat, scale, chosen)
        torch.testing.assert_close(f_hat, sums[scale])
        inputs.append(vectors)
    assert inputs.pop() is None
    pairs = zip(sums, (2, 3), strict=False)
    expected = [F.interpolate(s, (p, p), mode="area").flatten(2).transpose(1, 2) for s, p in pairs]
    torch.testing.assert_close(torch.cat(inputs, 1), torch.cat(expected, 1))
    torch.testing.assert_close(quantizer.teacher_inputs(torch.cat(codes, 1)), torch.cat(expected, 1))
    torch.testing.assert_close(quantizer.f_hat(torch.cat(codes, 1)), f_hat)


def test_gradients_go_straight_through_and_to_the_codebook(quantizer):
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    found = quantizer(features)
    found.f_hat.sum().backward()
    torch.testing.assert_close(features.grad, torch.ones_like(features))
    assert quantizer.codebook.weight.grad is None
    features.grad = None
    found.loss.backward()
    _, sums, _ = by_definition(quantizer, features.detach())
    commitment = sum(0.25 * 2 * (features.detach() - s) / features.numel() for s in sums) / 3
    torch.testing.assert_close(features.grad, commitment)
    used = found.codes.unique()
    assert set(quantizer.codebook.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == set(used.tolist())


def test_dead_codes_are_restarted_from_the_data(quantizer):
    quantizer.train()
    features = torch.randn(8, 4, 3, 3)
    found = quantizer(features)
    hits = found.codes.flatten().bincount(minlength=16)
    torch.testing.assert_close(quantizer.usage, 0.01 * hits / hits.float().mean())
    restarted = quantizer.restart_dead_codes(found.residuals, torch.Generator().manual_seed(1))
    assert restarted == (hits / hits.float().mean() < 3).sum() > 12
    first = quantizer.codebook.weight.detach().clone()
    assert (first[:, None] == found.residuals).all(-1).any(1).sum() == restarted
    assert quantizer.codebook_use() == 1
    quantizer.usage[3] = 0.01
    assert quantizer.restart_dead_codes(found.residuals, torch.Generator().manual_seed(2)) == 1
    assert (quantizer.codebook.weight != first).any(1).nonzero().flatten().tolist() == [3]
    assert quantizer.restart_dead_codes(found.residuals, torch.Generator()) == 0
    quantizer.eval()(features)
    assert quantizer.usage[3] == 1  # only training counts


def test_a_tokenizer_trains(vqvae):
    vqvae.train()
    rng = torch.Generator().manual_seed(0)
    pixels = torch.rand(8, 3, 1, 1, generator=rng).expand(-1, -1, 6, 6) * 2 - 1
    optimizer = torch.optim.Adam(vqvae.parameters(), 3e-3)
    seen = []
    for _ in range(60):
        terms, quantized = vqvae.losses(pixels, lambda made, true: (made - true).mean().abs())
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        vqvae.quantizer.restart_dead_codes(quantized.residuals, rng)
        seen.append(terms["reconstruction"].item())
    assert set(terms) == {"reconstruction", "vq", "perceptual"}
    assert seen[-1] < 0.5 * seen[0]
    vqvae.eval()
    codes = vqvae.encode(pixels)
    assert len({tuple(row) for row in codes.tolist()}) > 4
    grey = (pixels - pixels.mean(0)).abs().mean()  # the best without codes
    assert F.l1_loss(vqvae.decode(vqvae.quantizer.f_hat(codes)), pixels) < 0.8 * grey


@torch.no_grad()
def test_a_stored_tokenizer_is_the_same(vqvae, tmp_path):
    vqvae.save(tmp_path / "vqvae")
    pixels = torch.rand(2, 3, 6, 6) * 2 - 1
    other = VQVAE.load(tmp_path / "vqvae").eval()
    assert other.config == TINY
    assert torch.equal(other.encode(pixels), vqvae.encode(pixels))
    half = VQVAE.load(tmp_path / "vqvae", torch.bfloat16)
    assert half.decode(half.quantizer.f_hat(vqvae.encode(pixels))).dtype == torch.bfloat16
    assert torch.equal(half.quantizer.codebook.weight, vqvae.quantizer.codebook.weight)
    (tmp_path / "vqvae" / "model_index.json").write_text('{"num_codes": 8}')
    with pytest.raises(Mgp5Error, match="holds no image tokenizer"):
        VQVAE.load(tmp_path / "vqvae")
    with pytest.raises(Mgp5Error, match=r"no .*model_index\.json"):
        VQVAE.load(tmp_path)


# --- published weights: a tiny file of their layout, computed by hand below ---

WIDTHS = (32, 32, 64)


def published() -> dict[str, torch.Tensor]:
    """Random tensors under the names of vae_ch160v4096z32.pth, with 2 halvings instead of 4."""
    shapes: dict[str, tuple[int, ...]] = {"quantize.embedding.weight": (16, 4), "quantize.ema_vocab_hit_SV": (3, 16)}

    def conv(name, wide, out, kernel=3):
        shapes.update({f"{name}.weight": (out, wide, kernel, kernel), f"{name}.bias": (out,)})

    def resnet(name, wide, out):
        shapes.update({f"{name}.norm{i}.{p}": (w,) for i, w in ((1, wide), (2, out)) for p in ("weight", "bias")})
        conv(f"{name}.conv1", wide, out)
        conv(f"{name}.conv2", out, out)
        if wide != out:
            conv(f"{name}.nin_shortcut", wide, out, 1)

    def attention(name, wide):
        shapes.update({f"{name}.norm.{p}": (wide,) for p in ("weight", "bias")})
        conv(f"{name}.qkv", wide, 3 * wide, 1)
        conv(f"{name}.proj_out", wide, wide, 1)

    for side, blocks, wide in (("encoder", "down", WIDTHS[0]), ("decoder", "up", WIDTHS[-1])):
        conv(f"{side}.conv_in", *((3, wide) if side == "encoder" else (4, wide)))
        for level in (0, 1, 2) if side == "encoder" else (2, 1, 0):
            for block in range(1 if side == "encoder" else 2):
                resnet(f"{side}.{blocks}.{level}.block.{block}", wide, WIDTHS[level])
                wide = WIDTHS[level]
                if level == 2:
                    attention(f"{side}.{blocks}.{level}.attn.{block}", wide)
            if level != (2 if side == "encoder" else 0):
                conv(f"{side}.{blocks}.{level}.{'downsample' if side == 'encoder' else 'upsample'}.conv", wide, wide)
        resnet(f"{side}.mid.block_1", 64, 64)
        attention(f"{side}.mid.attn_1", 64)
        resnet(f"{side}.mid.block_2", 64, 64)
        shapes.update({f"{side}.norm_out.{p}": (wide,) for p in ("weight", "bias")})
        conv(f"{side}.conv_out", wide, 4 if side == "encoder" else 3)
    for name in ("quant_conv", "post_quant_conv", *(f"quantize.quant_resi.qresi_ls.{i}" for i in range(4))):
        conv(name, 4, 4)
    rng = torch.Generator().manual_seed(3)
    scale = {1: 0.5, 2: 1.0, 4: 0.08}
    return {name: torch.randn(shape, generator=rng) * scale[len(shape)] for name, shape in shapes.items()}


class Release:
    """The published modules, computed from their tensors by name."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def resnet(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        short = f"{name}.nin_shortcut"
        return h + (self.conv(short, x) if f"{short}.weight" in self.state else x)

    def attention(self, name, x):
        q, k, v = self.conv(f"{name}.qkv", self.norm(f"{name}.norm", x)).flatten(2).chunk(3, 1)
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def middle(self, side, x):
        x = self.attention(f"{side}.mid.attn_1", self.resnet(f"{side}.mid.block_1", x))
        return self.resnet(f"{side}.mid.block_2", x)

    def end(self, side, x):
        return self.conv(f"{side}.conv_out", F.silu(self.norm(f"{side}.norm_out", x)), padding=1)

    def encode(self, x):
        x = self.conv("encoder.conv_in", x, padding=1)
        for level in range(3):
            x = self.resnet(f"encoder.down.{level}.block.0", x)
            if level == 2:
                x = self.attention("encoder.down.2.attn.0", x)
            else:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        return self.conv("quant_conv", self.end("encoder", self.middle("encoder", x)), padding=1)

    def decode(self, x):
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", x, padding=1), padding=1)
        x = self.middle("decoder", x)
        for level in (2, 1, 0):
            for block in range(2):
                x = self.resnet(f"decoder.up.{level}.block.{block}", x)
                x = self.attention(f"decoder.up.2.attn.{block}", x) if level == 2 else x
            if level:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, padding=1)
        return self.end("decoder", x)


@torch.no_grad()
def test_published_weights_compute_what_they_did(tmp_path):
    state = published()
    torch.save(state, tmp_path / "vae.pth")
    config, ours = read_vqvae(tmp_path / "vae.pth", (1, 2, 3))
    assert (config.num_codes, config.code_width, config.channels, config.image_size) == (16, 4, WIDTHS, 12)
    vqvae = VQVAE(config).eval()
    vqvae.load_state_dict(ours)
    release, pixels = Release(state), torch.rand(2, 3, 12, 12) * 2 - 1
    features = release.encode(pixels)
    torch.testing.assert_close(vqvae.quant_conv(vqvae.encoder(pixels)), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vqvae.paint(features), release.decode(features), rtol=1e-4, atol=1e-4)
    assert torch.equal(vqvae.quantizer.codebook.weight, state["quantize.embedding.weight"])
    phi = vqvae.quantizer.phi(1)
    assert isinstance(phi, nn.Conv2d)
    assert torch.equal(phi.weight, state["quantize.quant_resi.qresi_ls.2.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("quantize.embedding.weight"), "holds no quantize.embedding.weight"),
        (lambda s: s.pop("decoder.conv_out.bias"), r"decoder.conv_out.bias is missing, expected \(3,\)"),
        (lambda s: s.update(extra=torch.zeros(2)), r"extra is \(2,\), expected none"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    state = published()
    change(state)
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(Mgp5Error, match=message):
        read_vqvae(tmp_path / "vae.pth", (1, 2, 3))
