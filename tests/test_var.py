"""The next-scale decoder: teacher forcing against scale by scale, guidance, sampling, batches, published weights."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mgp5.errors import Mgp5Error
from mgp5.generators.var import VARConfig, VARDecoder, guidance_scale, guide, join_caches, sample_codes, split_cache
from mgp5.generators.var_weights import read_var, read_vargpt
from mgp5.generators.vqvae import MultiScaleQuantizer, VQVAEConfig

TINY = VARConfig(
    patch_nums=(1, 2, 3), num_codes=16, code_width=4, width=16, depth=2, heads=2, mlp_ratio=2, drop_path=0.0
)
QUANTIZER = VQVAEConfig(patch_nums=(1, 2, 3), num_codes=16, code_width=4)


def new(config: VARConfig = TINY) -> VARDecoder:
    """A decoder whose every parameter counts: fresh ones have modulations of zero."""
    torch.manual_seed(0)
    decoder = VARDecoder(config).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return decoder


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_680_embeddings_of_679_vectors():
    config = VARConfig(width=8, heads=2, depth=1, num_codes=8)
    decoder, classes = new(config), torch.zeros(1, dtype=torch.long)
    embeds = decoder.embed_all(torch.randn(1, 679, 32), classes)
    assert embeds.shape == (1, 680, 8)
    assert decoder(embeds, classes).shape == (1, 680, 8)
    assert [config.part(scale) for scale in (0, 1, 9)] == [slice(0, 1), slice(1, 5), slice(424, 680)]


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, replace(TINY, positions_twice=True), replace(TINY, patch_nums=(2, 3))])
def test_teacher_forced_logits_are_those_of_the_cache(config):
    decoder, classes = new(config), torch.tensor([0, 1, 0])
    vectors = torch.randn(3, sum(config.sizes[1:]), 4)
    embeds = decoder.embed_all(vectors, classes)
    whole, cache = decoder(embeds, classes), None
    for scale in range(len(config.sizes)):
        part, before = config.part(scale), config.sizes[0]
        own = vectors[:, part.start - before : part.stop - before] if scale else None
        inputs = decoder.embed(own, scale) if scale else decoder.start(classes)
        torch.testing.assert_close(inputs, embeds[:, part])
        logits, cache = decoder.decode_scale(inputs, scale, classes, cache)
        torch.testing.assert_close(logits, whole[:, part], rtol=1e-4, atol=1e-5)
    assert cache.shape == (2, 2, 3, 2, sum(config.sizes), 8)
    assert (whole[0] - whole[1]).abs().max() > 0.1  # classes and inputs count


@torch.no_grad()
def test_a_scale_sees_itself_and_those_before():
    decoder, classes = new(), torch.zeros(1, dtype=torch.long)
    inputs = torch.randn(1, 14, 16)
    base = decoder(inputs, classes)
    for scale in range(3):
        changed = inputs.clone()
        changed[:, TINY.part(scale).start] += torch.randn(16)  # one position changes all of its scale
        differs = (decoder(changed, classes) - base).abs().amax(-1)[0] > 1e-4
        assert differs.tolist() == [place >= TINY.part(scale).start for place in range(14)]


@torch.no_grad()
def test_queries_have_at_most_a_length_of_100():
    decoder, inputs, classes = new(), torch.randn(1, 14, 16), torch.zeros(1, dtype=torch.long)
    results = []
    for length in (99.0, 100.0, 1e4):
        for block in decoder.blocks:
            block.attention.log_scale.fill_(math.log(length))
        results.append(decoder(inputs, classes))
    torch.testing.assert_close(results[1], results[2])
    assert not torch.equal(results[0], results[1])


def test_a_fresh_block_is_an_ordinary_one_and_its_condition_learns():
    decoder = VARDecoder(TINY)
    inputs = torch.randn(2, 14, 16)
    torch.testing.assert_close(*decoder(inputs[:1].expand(2, -1, -1), torch.tensor([0, 1])))
    F.cross_entropy(decoder(inputs, torch.tensor([0, 1])).flatten(0, 1), torch.zeros(28, dtype=torch.long)).backward()
    assert decoder.blocks[0].modulation.weight.grad.abs().max() > 0
    assert decoder.blocks[0].attention.to_q.weight.grad.abs().max() > 0


def test_checkpointing_and_drop_path():
    decoder, inputs, classes = new(), torch.randn(1, 14, 16), torch.zeros(1, dtype=torch.long)
    grads = []
    for decoder.checkpointing in (False, True):
        decoder.train()(inputs, classes).square().sum().backward()
        grads.append(decoder.blocks[0].mlp[0].weight.grad)
        decoder.zero_grad()
    torch.testing.assert_close(*grads)
    dropping = new(replace(TINY, drop_path=0.9))
    torch.testing.assert_close(dropping(inputs, classes), decoder.eval()(inputs, classes))
    first, second = (dropping.train()(inputs.expand(32, -1, -1), classes.expand(32)).detach() for _ in range(2))
    assert not torch.equal(first, second)
    assert [block.drop_path for block in dropping.blocks] == pytest.approx([0, 0.9])


def test_classes_of_both_modes():
    decoder = new()
    assert decoder.sampling_classes(2, "trained", True).tolist() == [0, 0, 1, 1]
    assert decoder.sampling_classes(2, "released", True).tolist() == [1, 1, 1, 1]
    assert decoder.sampling_classes(2, "trained", False).tolist() == [0, 0]
    classes = decoder.training_classes(2000, rng(1))
    assert 0.07 < classes.float().mean() < 0.13
    assert torch.equal(classes, decoder.training_classes(2000, rng(1)))
    assert decoder.training_classes(9, rng(1), dropout=0).sum() == 0


def test_guidance_rises_from_1_and_is_off_at_1():
    ramp = [guidance_scale(scale, 10, 2.5) for scale in range(10)]
    assert ramp == pytest.approx([1 + 1.5 * scale / 9 for scale in range(10)])
    conditional, unconditional = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.equal(guide(conditional, unconditional, ramp[0]), conditional)
    t = 1.5
    torch.testing.assert_close(guide(conditional, unconditional, 1 + t), (1 + t) * conditional - t * unconditional)
    rows = torch.tensor([1.0, 2.5]).view(2, 1, 1)
    torch.testing.assert_close(guide(conditional, unconditional, rows)[0], conditional[0])


def test_codes_are_sampled_from_the_nucleus():
    probabilities = torch.tensor([0.05, 0.4, 0.25, 0.3])
    logits = probabilities.log().expand(1, 4000, 4)

    def shares(top_k, top_p):
        return (sample_codes(logits, top_k, top_p, [rng(0)]).flatten().bincount(minlength=4) / 4000).tolist()

    assert shares(0, 1.0) == pytest.approx(probabilities.tolist(), abs=0.03)
    assert shares(2, 1.0) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    assert shares(0, 0.6) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    assert shares(3, 0.72) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)  # top_p counts within the top_k
    assert shares(9, 0.0) == shares(1, 1.0) == [0, 1, 0, 0]


@torch.no_grad()
def draw(decoder, quantizer, seeds, guidance=2.5, mode="trained"):
    """Draw images as VARGPT's head does, with an LLM that returns what it reads, each image with its own cache."""
    count, generators = len(seeds), [rng(seed) for seed in seeds]
    classes = decoder.sampling_classes(count, mode, True)
    noise = [torch.randn(14, 16, generator=rng(100 + seed)) for seed in seeds]
    f_hat, inputs, caches, drawn = quantizer.start(count), decoder.start(classes[:count]), [None] * count, []
    for scale in range(3):
        other = torch.stack([rows[TINY.part(scale)] for rows in noise])
        logits, cache = decoder.decode_scale(torch.cat([inputs, other]), scale, classes, join_caches(caches))
        caches = split_cache(cache, count)
        guided = guide(*logits.chunk(2), guidance_scale(scale, 3, guidance))
        drawn.append(sample_codes(guided, 12, 0.96, generators))
        f_hat, vectors = quantizer.next_input(f_hat, scale, drawn[-1])
        inputs = decoder.embed(vectors, scale + 1) if vectors is not None else None
    torch.testing.assert_close(f_hat, quantizer.f_hat(torch.cat(drawn, 1)))
    return torch.cat(drawn, 1), f_hat


def test_an_image_is_its_seed_whatever_the_batch():
    decoder, quantizer = new(), MultiScaleQuantizer(QUANTIZER)
    codes, f_hat = draw(decoder, quantizer, (1, 2, 3))
    for row, seed in enumerate((1, 2, 3)):
        alone, alone_f_hat = draw(decoder, quantizer, (seed,))
        assert torch.equal(alone[0], codes[row])
        torch.testing.assert_close(alone_f_hat[0], f_hat[row])
    assert len({tuple(row) for row in codes.tolist()}) == 3
    assert not torch.equal(codes, draw(decoder, quantizer, (1, 2, 3), mode="released")[0])


@torch.no_grad()
def test_guidance_of_1_is_the_conditional_row_alone():
    decoder, quantizer = new(), MultiScaleQuantizer(QUANTIZER)
    guided = draw(decoder, quantizer, (4,), guidance=1.0)[0]
    f_hat, inputs, cache, drawn, generator = quantizer.start(1), None, None, [], rng(4)
    classes = decoder.sampling_classes(1, "trained", False)
    inputs = decoder.start(classes)
    for scale in range(3):
        logits, cache = decoder.decode_scale(inputs, scale, classes, cache)
        drawn.append(sample_codes(logits, 12, 0.96, [generator]))
        f_hat, vectors = quantizer.next_input(f_hat, scale, drawn[-1])
        inputs = decoder.embed(vectors, scale + 1) if scale < 2 else None
    assert torch.equal(torch.cat(drawn, 1), guided)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"heads": 3}, "not a multiple of heads 3"), ({"depth": 0}, "depth is 0"), ({"drop_path": 1.0}, "drop_path is 1")],
)
def test_a_wrong_configuration_is_told(change, message):
    with pytest.raises(Mgp5Error, match=message):
        replace(TINY, **change)


# --- published weights: a tiny file of their layout, computed by hand below ---


def published(num_classes: int) -> dict[str, torch.Tensor]:
    """Random tensors under the names of var_d30.pth: 2 blocks of width 16, scales of 1, 2 and 3."""
    shapes = {
        "word_embed.weight": (16, 4), "word_embed.bias": (16,), "class_emb.weight": (num_classes + 1, 16),
        "pos_start": (1, 1, 16), "pos_1LC": (1, 14, 16), "lvl_embed.weight": (3, 16),
        "head_nm.ada_lin.1.weight": (32, 16), "head_nm.ada_lin.1.bias": (32,), "head.weight": (16, 16),
        "head.bias": (16,),
    }  # fmt: skip
    for block in range(2):
        shapes |= {
            f"blocks.{block}.{name}": shape
            for name, shape in {
                "attn.scale_mul_1H11": (1, 2, 1, 1), "attn.q_bias": (16,), "attn.v_bias": (16,),
                "attn.mat_qkv.weight": (48, 16), "attn.proj.weight": (16, 16), "attn.proj.bias": (16,),
                "ffn.fc1.weight": (64, 16), "ffn.fc1.bias": (64,), "ffn.fc2.weight": (16, 64), "ffn.fc2.bias": (16,),
                "ada_lin.1.weight": (96, 16), "ada_lin.1.bias": (96,),
            }.items()
        }  # fmt: skip
    generator = rng(3)
    state = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    levels = torch.tensor([0] + [1] * 4 + [2] * 9)
    masked = torch.where(levels[:, None] >= levels, 0.0, -torch.inf)[None, None]
    state |= {f"blocks.{block}.attn.zero_k_bias": torch.zeros(16) for block in range(2)}
    return state | {"lvl_1L": levels[None], "attn_bias_for_masking": masked}


def release(state, vectors, label):
    """The published forward, computed from its tensors by name; without an LLM."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    levels = state["lvl_1L"][0]
    condition = state["class_emb.weight"][label]
    x = torch.cat([(condition + state["pos_start"][0]).expand(len(vectors), -1, -1), linear("word_embed", vectors)], 1)
    x = x + state["lvl_embed.weight"][levels] + state["pos_1LC"]
    for i in range(2):
        name = f"blocks.{i}"
        six = linear(f"{name}.ada_lin.1", F.silu(condition)).view(6, 16)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six
        h = F.layer_norm(x, (16,), eps=1e-6) * (1 + scale1) + shift1
        bias = torch.cat([state[f"{name}.attn.q_bias"], torch.zeros(16), state[f"{name}.attn.v_bias"]])
        q, k, v = F.linear(h, state[f"{name}.attn.mat_qkv.weight"], bias).view(-1, 14, 3, 2, 8).permute(2, 0, 3, 1, 4)
        length = state[f"{name}.attn.scale_mul_1H11"].clamp(max=math.log(100)).exp()
        weights = F.normalize(q, dim=-1) * length @ F.normalize(k, dim=-1).transpose(2, 3)
        h = ((weights + state["attn_bias_for_masking"]).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + gamma1 * linear(f"{name}.attn.proj", h)
        h = F.layer_norm(x, (16,), eps=1e-6) * (1 + scale2) + shift2
        x = x + gamma2 * linear(f"{name}.ffn.fc2", F.gelu(linear(f"{name}.ffn.fc1", h), approximate="tanh"))
    scale, shift = linear("head_nm.ada_lin.1", F.silu(condition)).view(2, 16)
    return linear("head", F.layer_norm(x, (16,), eps=1e-6) * (1 + scale) + shift)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["var", "vargpt"])
def test_published_weights_compute_what_they_did(tmp_path, kind):
    state, vectors = published(5), torch.randn(2, 13, 4)
    if kind == "var":
        torch.save(state, tmp_path / "var.pth")
        config, ours = read_var(tmp_path / "var.pth")
    else:
        shards = {f"vargpt_gen.{name}": value for name, value in state.items()}
        for side, (wide, out) in {"": (16, 24), "_out": (24, 16)}.items():
            shapes = {"ln_q.weight": (wide,), "ln_q.bias": (wide,), "mlp.0.weight": (wide, wide), "mlp.0.bias": (wide,)}
            shapes |= {"mlp.2.weight": (out, wide), "mlp.2.bias": (out,)}
            shards |= {f"image_gen_projector{side}.{name}": torch.ones(shape) for name, shape in shapes.items()}
        shards["language_model.lm_head.weight"] = torch.zeros(3, 3)
        for number, names in enumerate((sorted(shards)[::2], sorted(shards)[1::2])):
            save_file({name: shards[name].contiguous() for name in names}, tmp_path / f"model-{number}.safetensors")
        found = read_vargpt(tmp_path)
        config, ours = found.var
        assert found.vqvae is None
        shapes = {side: part["mlp.2.weight"].shape for side, part in found.projectors.items()}
        assert shapes == {"in": (24, 16), "out": (16, 24)}
        names = {f"{n}.{p}" for n in ("norm", "mlp.0", "mlp.2") for p in ("weight", "bias")}
        assert found.projectors["in"].keys() == names
    assert (config.patch_nums, config.heads, config.depth, config.mlp_ratio) == ((1, 2, 3), 2, 2, 4)
    assert config.num_classes == (5 if kind == "var" else 1)
    decoder = VARDecoder(config).eval()
    decoder.load_state_dict(ours)
    classes = torch.full((2,), config.num_classes - 1)
    expected = release(state, vectors, 4)
    torch.testing.assert_close(decoder(decoder.embed_all(vectors, classes), classes), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lvl_1L"), "holds no lvl_1L"),
        (lambda s: s.pop("blocks.1.attn.q_bias"), "blocks.1.attention.to_q.bias is missing"),
        (lambda s: s.update({"blocks.0.ada_gss": torch.zeros(1)}), "shares its AdaLN"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    state = published(5)
    change(state)
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(Mgp5Error, match=message):
        read_var(tmp_path / "var.pth")
    with pytest.raises(Mgp5Error, match="holds no lvl_1L"):
        read_vargpt(tmp_path)
