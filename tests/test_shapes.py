"""Published configurations on the meta device: numbers of parameters as published, and what both stages train."""

from __future__ import annotations

import pytest
import torch
from tiny import LENGTH, WIDTH

from mgp5.config import preset
from mgp5.hub import REPOS
from mgp5.loading import assemble, build
from mgp5.memory.skeletons import backbone_shape, generator_shape, known_models, skeleton

MLLMS, GENERATORS = known_models("mllm"), known_models("generator")
# Parameters as the hub shows them, width, of one adapted layer (q and v, rank 8), layers, tied embeddings.
PUBLISHED = {
    "llava-1.5-7b": (7_063_427_072, 4096, 8 * (2 * 4096 + 2 * 4096), 32, False),
    "qwen2.5-vl-3b": (3_754_622_976, 2048, 8 * (2 * 2048 + 2048 + 256), 36, True),
    "qwen2.5-vl-7b": (8_292_166_656, 3584, 8 * (2 * 3584 + 3584 + 512), 28, False),
    "qwen3-vl-4b": (4_437_815_808, 2560, 8 * (2560 + 4096 + 2560 + 1024), 36, True),
    "qwen3-vl-8b": (8_767_123_696, 4096, 8 * (2 * 4096 + 4096 + 1024), 36, False),
    # BLIP-2's vision tower and Q-Former, a linear layer, Vicuna and one token.
    "minigpt4": (
        985_952_256 + 105_137_664 + 4096 * 769 + 32 * 768 + 6_738_415_616 + 2 * 4096,
        4096,
        131_072,
        32,
        False,
    ),
}
# Denoiser, VAE, text encoders; rows and width of the condition.
DRAWN = {
    "sd-1.5": (859_520_964, 83_653_863, 123_060_480, 77, 768),
    "sd-2.1-base": (865_910_724, 83_653_863, 340_387_840, 77, 1024),
    "sd-2.1": (865_910_724, 83_653_863, 340_387_840, 77, 1024),
    "sd-3": (2_028_328_000, 83_819_683, 123_650_304 + 694_659_840 + 4_762_310_656, 334, 4096),
    "sd-3.5-medium": (2_243_171_520, 83_819_683, 123_650_304 + 694_659_840 + 4_762_310_656, 334, 4096),
}


def size(module):
    return sum(p.numel() for p in module.parameters())


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def transformer(width):
    """Four pre-norm encoder layers and four decoder layers with a feed-forward layer of 4 W, and two final norms."""
    attention, feed, norm = 4 * (width * width + width), 8 * width * width + 5 * width, 2 * width
    return 4 * (attention + feed + 2 * norm) + 4 * (2 * attention + feed + 3 * norm) + 2 * norm


@pytest.fixture(scope="module")
def generators():
    with torch.device("meta"):
        return {name: generator_shape(name) for name in GENERATORS}


def test_every_name_to_train_from_has_a_shape():
    names = {name for name, repo in REPOS.items() if repo.kind != "part"}
    assert names == (MLLMS.keys() | GENERATORS.keys()) - {"minigpt4"}
    assert PUBLISHED.keys() == MLLMS.keys() and DRAWN.keys() == GENERATORS.keys()


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_have_the_published_parts(name, generators):
    generator = generators[name]
    denoiser, vae, texts, rows, width = DRAWN[name]
    assert (size(generator.denoiser), size(generator.vae)) == (denoiser, vae)
    assert size(generator) == denoiser + vae + texts
    assert generator.condition_shape == (rows, width)
    assert generator.native_size == {"sd-2.1": 768, "sd-3": 1024, "sd-3.5-medium": 1024}.get(name, 512)
    assert all(p.is_meta for p in generator.parameters())


@pytest.mark.parametrize("name", MLLMS)
def test_what_both_stages_train(name, generators):
    """With two generators for each LLM, and every generator for some of them."""
    total, width, adapted, layers, tied = PUBLISHED[name]
    turn, choices = [*MLLMS].index(name), [*generators.values()]
    with torch.device("meta"):
        backbone = backbone_shape(name)
        assert size(backbone) == total
        for generator in (choices[turn % len(choices)], choices[(turn + 3) % len(choices)]):
            length, out = generator.condition_shape
            model = assemble(backbone, generator, name, "", num_vokens=8)
            inner = out if out <= 2048 else 1024
            mlp, queries = width * inner + inner + inner * inner + inner, length * inner
            ends = 0 if inner == out else inner * out + out + inner * 2048 + 2048  # to the condition; pooled vector
            rows = 8 * width * (1 if tied else 2)
            model.prepare(preset("pretrain"))
            assert trained(model) == rows + mlp + queries + transformer(inner) + ends
            model.merge()
        model.prepare(preset("finetune"))
        assert trained(model) == rows + layers * adapted + transformer(inner) + ends


def test_the_papers_numbers():
    pretrain = skeleton("llava-1.5-7b", "sd-2.1-base", preset("pretrain"))
    assert trained(pretrain) == 2 * 8 * 4096 + 5_244_928 + 117_575_680 + 77 * 1024
    finetune = skeleton("llava-1.5-7b", REPOS["sd-2.1-base"].id, preset("finetune"))
    assert trained(finetune) == 2 * 8 * 4096 + 4_194_304 + 117_575_680
    prefix = skeleton(REPOS["llava-1.5-7b"].id, "sd-2.1-base", preset("finetune", "prefix"))
    keys = 5 * 4096 + 4096 * 1024 + 1024 + 1024 * 64 * 4096 + 64 * 4096  # embedding and MLP: 5 virtual tokens
    assert trained(prefix) == 2 * 8 * 4096 + keys + 117_575_680


def test_a_folder_has_the_shape_of_what_it_loads(mllm_folder, diffusion_folder):
    config = preset("finetune")
    real = build(str(mllm_folder), str(diffusion_folder))
    real.prepare(config)
    model = skeleton(str(mllm_folder), str(diffusion_folder), config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in real.parameters()]
    assert all(p.is_meta for p in model.parameters())
    assert model.head.generator.condition_shape == (LENGTH, WIDTH)
