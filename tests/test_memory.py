"""Models without weights have the published numbers of parameters; the estimate of a training run is exact where it
counts, and near the allocator's record where it rehearses."""

import json
import shutil
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from tiny import LENGTH, WIDTH, allocated
from torch.utils.flop_counter import FlopCounterMode

from mgp5 import Conversation, Image
from mgp5.cli import main
from mgp5.config import LoraConfig, ModelConfig, PrefixConfig
from mgp5.device import HostMemory
from mgp5.errors import Mgp5Error
from mgp5.files import GiB
from mgp5.heads import Head
from mgp5.hub import DEMO, REPOS
from mgp5.loading import assemble, build
from mgp5.memory.estimate import dry_run_step, estimate, step, story_length, table
from mgp5.memory.skeletons import backbone_shape, generator_shape, known_models, skeleton
from mgp5.training.batch import Collator
from mgp5.training.presets import preset
from mgp5.training.run import TrainRequest, train_stage

PICTURE = DEMO.parents[1] / "examples/picnic/1.png"
MLLMS, GENERATORS = known_models("mllm"), known_models("generator")
# Parameters as the hub shows them, width, of one adapted layer (q and v, rank 8), layers, tied embeddings.
PUBLISHED = {
    "llava-1.5-7b": (7_063_427_072, 4096, 8 * (2 * 4096 + 2 * 4096), 32, False),
    "qwen2.5-vl-3b": (3_754_622_976, 2048, 8 * (2 * 2048 + 2048 + 256), 36, True),
    "qwen2.5-vl-7b": (8_292_166_656, 3584, 8 * (2 * 3584 + 3584 + 512), 28, False),
    "qwen3-vl-4b": (4_437_815_808, 2560, 8 * (2560 + 4096 + 2560 + 1024), 36, True),
    "qwen3-vl-8b": (8_767_123_696, 4096, 8 * (2 * 4096 + 4096 + 1024), 36, False),
    # BLIP-2's vision tower and Q-Former, a linear layer, Vicuna and one token.
    "minigpt4": (985_952_256 + 105_137_664 + 4096 * 769 + 32 * 768 + 6_738_423_808, 4096, 131_072, 32, False),
}
# Denoiser, VAE, text encoders; rows and width of the condition.
DRAWN = {
    "sd-1.5": (859_520_964, 83_653_863, 123_060_480, 77, 768),
    "sd-2.1-base": (865_910_724, 83_653_863, 340_387_840, 77, 1024),
    "sd-2.1": (865_910_724, 83_653_863, 340_387_840, 77, 1024),
    "sd-3": (2_028_328_000, 83_819_683, 123_650_304 + 694_659_840 + 4_762_310_656, 334, 4096),
    "sd-3.5-medium": (2_243_171_520, 83_819_683, 123_650_304 + 694_659_840 + 4_762_310_656, 334, 4096),
}


@pytest.fixture
def shape(llava_folder, diffusion_folder):
    """Makes a tiny model without weights, on a real device with random ones."""
    return lambda config, device="meta": skeleton(str(llava_folder), str(diffusion_folder), config, device=device)


def allocated_by_step(model, losses):
    """The most bytes that a step held at once, gradients of weights apart."""
    for parameter in model.train().parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return allocated(lambda: losses().total.backward())


@pytest.mark.parametrize(
    "stage, length, checkpointing", [("pretrain", 60, True), ("pretrain", 60, False), ("finetune", 120, True)]
)
def test_a_rehearsed_step_weighs_what_the_allocator_sees(shape, stage, length, checkpointing):
    config = replace(preset(stage), batch=2, checkpointing=checkpointing)
    told, flops = dry_run_step(shape(config), config, length)
    model = shape(config, "cpu")
    assert told == pytest.approx(allocated_by_step(model, lambda: step(model, config, length)), rel=0.1)
    with FlopCounterMode(display=False) as counter:
        step(shape(config).train(), config, length).total.backward()  # torch counts no attention on a CPU
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_made_up_step_weighs_what_the_loops_forward_does():
    config = replace(preset("pretrain"), batch=2, checkpointing=False, guidance_dropout=0.0)
    parts = str(DEMO / "mllm"), str(DEMO / "diffusion")
    model = skeleton(*parts, config, device="cpu")
    talk = Conversation().add("user", "the red fox sees the ball " * 12)
    talk = talk.add("assistant", Image(path=PICTURE, caption="a fox"))
    batch = Collator(model.backbone, model.head, 1000)([talk] * 2)
    real = allocated_by_step(model, lambda: model(batch, config, torch.Generator()))
    assert dry_run_step(skeleton(*parts, config), config, batch.ids.shape[1])[0] == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("adapter", [{"lora": LoraConfig()}, {"lora": None, "prefix": PrefixConfig(hidden=32)}])
def test_weights_gradients_and_optimizer_are_exact(shape, adapter):
    config = replace(preset("finetune"), batch=1, ema=0.999, **adapter)
    model = shape(config, "cpu")
    total = estimate(shape(config), config, length=40).total
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    assert total.parameters == sum(p.numel() for p in parameters)
    assert total.trained == sum(p.numel() for p in trained)
    assert total.weights == sum(p.nbytes for p in parameters)
    optimizer = torch.optim.AdamW(model.parameter_groups(config))
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert total.gradients == sum(p.grad.nbytes for p in trained)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert total.optimizer == sum(value.nbytes for value in moments) + sum(p.nbytes for p in trained)  # and the average


@cache
def needs(**changes):
    config = replace(preset("pretrain"), **changes)
    return estimate(skeleton("llava-1.5-7b", "sd-2.1-base", config, dtype=torch.bfloat16), config)


def test_the_defaults_fit_the_cards_they_are_meant_for(monkeypatch):
    assert preset("pretrain").batch * preset("pretrain").accumulation == 48
    assert 16 * GiB < needs().total.total < 22 * GiB  # LLaVA-1.5-7B with Stable Diffusion 2.1 on a card of 24 GiB
    monkeypatch.setattr("mgp5.memory.estimate.dry_run_step", lambda *_: (needs().rows[-2].other, 0))  # the same
    small = needs(quantize="4bit")
    assert small.total.total < 14 * GiB  # and of 16 GiB
    kept = 2 * (2 * 32064 * 4096 + 65 * 4096)  # embedding, LM head and norms
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    weights = {row.part: row.weights for row in small.rows}
    assert weights["LLM"] == pytest.approx(kept + layers * (4 + 0.127) / 8, rel=1e-3)  # QLoRA, section 3
    assert {row.part: row.weights for row in needs().rows}["LLM"] == kept + 2 * layers


def test_what_costs_memory_costs_it(shape):
    config = replace(preset("pretrain"), batch=2)
    kept, one = replace(config, checkpointing=False), replace(config, checkpointing=False, generator_batch=1)
    usual, kept, one = (estimate(shape(own), own) for own in (config, kept, one))
    assert one.rows[-2].other < 0.9 * kept.rows[-2].other and one.flops == kept.flops
    assert kept.rows[-2].other > 1.6 * usual.rows[-2].other
    assert 0.7 < kept.flops / usual.flops < 0.85  # one forward less
    assert table(kept).row_count == len(kept.rows) + 1


def test_text_encoders_take_memory_where_captions_are_encoded(shape):
    for stage in ("pretrain", "finetune"):
        parts = [row.part for row in estimate(shape(preset(stage)), preset(stage)).rows]
        assert ("text encoders" in parts) == (stage == "pretrain")


def write_sample(folder):
    message = {"role": "assistant", "content": [{"type": "image", "path": "fox.png", "caption": "a fox"}]}
    shutil.copy(PICTURE, folder / "fox.png")
    (folder / "train.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "fox"}, message]}))


def test_a_dry_run_tells_it_without_weights_or_network(tmp_path, monkeypatch):
    write_sample(tmp_path)
    other = needs().rows[-2].other
    monkeypatch.setattr("mgp5.memory.estimate.dry_run_step", lambda *_: (other, 0))  # the same: 80 tokens
    command = ["train", "--stage", "pretrain", "--model", "llava-1.5-7b+sd-2.1-base", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(main, [*command, "--data", str(tmp_path), "--format", "jsonl", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["samples"], told["tokens"]) == (1, 80)
    assert told["bytes"] == needs().total.total and told["host"]["loading"] == needs().total.weights
    assert {row["part"] for row in told["parts"]} >= {"LLM", "vision tower", "mapper", "adapter", "activations"}
    assert not (tmp_path / "run").exists()


def test_a_story_is_as_long_as_its_pictures():
    """Of a phone's pictures, five in a story; max_pixels says how large they are seen."""
    config = preset("finetune")
    limited = replace(config, data=replace(config.data, max_pixels=300 * 300))
    head = Head()
    head.spec = SimpleNamespace(positions=8)
    with torch.device("meta"):
        for name, length in {"llava-1.5-7b": 576, "qwen2.5-vl-3b": 27 * 20, "qwen3-vl-4b": 24 * 18}.items():
            backbone = backbone_shape(name)
            backbone.limit_pixels(ModelConfig.max_pixels)
            assert story_length(SimpleNamespace(backbone=backbone, head=head)) == 400 + 5 * length
    assert story_length(skeleton("qwen2.5-vl-3b", "sd-2.1-base", limited)) == 400 + 5 * 12 * 9


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


def test_a_run_tells_what_it_takes_of_the_machines_memory():
    """On a GPU all weights are loaded through it but those that bitsandbytes reads to the GPU; FSDP gathers a state."""
    config = replace(preset("pretrain"), ema=0.999)
    told, total = needs().host(config, on_gpu=True, workers=4), needs().total
    assert told.loading == total.weights and told.most == told.loading
    assert told.saving - told.running == total.trained * 12  # moments and the trained weights themselves
    picture = 4 * 3 * 512 * 512
    assert told.running == pytest.approx(9 * config.batch * picture, rel=0.01)  # two of each worker, one pinned
    assert told.times(8).loading == 8 * total.weights
    small = needs().host(replace(config, quantize="4bit"), on_gpu=True, workers=0)
    assert small.loading == total.weights - next(row.weights for row in needs().rows if row.part == "LLM")
    on_cpu = needs().host(config, on_gpu=False, workers=0)
    assert on_cpu.running > total.total - 2 * GiB and on_cpu.saving == 0


def test_weights_that_the_machine_cannot_hold_are_not_begun_to_load(tmp_path, monkeypatch):
    write_sample(tmp_path)
    monkeypatch.setattr("mgp5.memory.host.host_memory", lambda: HostMemory(GiB, GiB // 50, True))
    monkeypatch.setattr("mgp5.training.run.initial_model", lambda *_, **__: pytest.fail("it reads weights"))
    parts, data = f"{DEMO}/mllm+{DEMO}/diffusion", (("jsonl", tmp_path),)
    request = TrainRequest(stage="pretrain", data=data, out=tmp_path / "run", model=parts, device="cpu")
    with pytest.raises(Mgp5Error, match=r"takes 0\.\d GiB of this machine's memory to load, and 0\.0 GiB are free of"):
        list(train_stage(request))
