"""Frozen work done once: same losses with it, nothing computed twice, nothing of another model read."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_training
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_shards import write_tar
from tiny_training import join

from mgp5 import Image, Mgp5Error, cli
from mgp5.data import Keyed, load_data
from mgp5.model import InterleavedModel
from mgp5.storyland.write import write
from mgp5.training import feature_cache as caches
from mgp5.training import make_cache as caching
from mgp5.training.batch import Collator
from mgp5.training.feature_cache import Caches
from mgp5.training.presets import preset


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "train"
    write(folder, "train", pairs=5, stories=1, dialogs=2, seed=0)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory, llava_folder, qwen_folder, diffusion_folder) -> dict[str, Path]:
    """Models as users have them."""
    folders = {"llava": llava_folder, "qwen": qwen_folder}
    return {name: join(tmp_path_factory.mktemp(name), mllm, diffusion_folder) for name, mllm in folders.items()}


SOURCES = {"pretrain": ("cc3m",), "finetune": ("vist", "mmdialog")}


def command(model: Path, world: Path, out: Path, *more: str, formats=("cc3m", "vist", "mmdialog")):
    data = [word for name in formats for word in ("--data", str(world / name), "--format", name)]
    words = ["data", "cache", "--model", str(model), *data, "--out", str(out), "--device", "cpu", *more]
    return CliRunner().invoke(cli.main, words)


def fresh(folder: Path, dtype: torch.dtype = torch.float32) -> InterleavedModel:
    return tiny_training.fresh(folder / "mllm", folder / "diffusion", dtype=dtype)


def collator(model: InterleavedModel, found: Caches | None = None) -> Collator:
    return Collator(model.backbone, model.head, model.backbone.context_length, caches=found)


def samples(world: Path, stage: str) -> list:
    data = Keyed([load_data(name, world / name) for name in SOURCES[stage]])
    return [data[i] for i in range(len(data))]


def losses(model: InterleavedModel, batch, stage: str) -> dict[str, torch.Tensor]:
    """Loss terms and gradients, with half of the pictures dropped for guidance."""
    config = replace(preset(stage, "demo"), guidance_dropout=0.5, caption_weight=0.1)
    torch.manual_seed(0)
    done = model(batch, config, torch.Generator().manual_seed(3))
    model.zero_grad()
    done.total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: term.detach() for name, term in done.terms.items()} | grads


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_losses_and_gradients_equal_those_without_a_cache(family, stage, folders, world, tmp_path, monkeypatch):
    result = command(folders[family], world, tmp_path / "c", "--dtype", "fp32", formats=SOURCES[stage])
    assert result.exit_code == 0, result.output
    model = fresh(folders[family])
    model.prepare(preset(stage, "demo"))
    found = Caches.open([tmp_path / "c"], model)
    some = samples(world, stage)[:6]
    live = collator(model)(some)
    monkeypatch.setattr(Image, "load", None)  # no picture is decoded any more
    cached = collator(model, found)(some)
    assert "pixels" not in cached.targets and "pixel_values" not in cached.context_images
    assert "moments" not in live.targets and not live.features
    expected, got = losses(model, live, stage), losses(model, cached, stage)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def items(root: Path, kind: str) -> dict[str, torch.Tensor]:
    """All that is in the shards; a key stands in one shard only."""
    shards = [load_file(path) for path in sorted(root.glob(f"{kind}-*/*.safetensors"))]
    assert sum(map(len, shards)) == len({key for shard in shards for key in shard})
    return {key: value for shard in shards for key, value in shard.items()}


def digests(images) -> set[str]:
    return {image.digest() for image in images}


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """How many items each call of the frozen parts computes."""
    calls, real = [], caching.compute
    monkeypatch.setattr(caching, "compute", lambda *args: (done := real(*args), calls.append(len(done)))[0])
    return calls


def test_each_picture_and_caption_is_cached_once(folders, world, tmp_path, counted):
    result = command(folders["qwen"], world, tmp_path)
    assert result.exit_code == 0, result.output
    everything = [conversation for stage in SOURCES for _, conversation in samples(world, stage)]
    drawn = [image for conversation in everything for image in conversation.messages[-1].images]
    seen = [image for conversation in everything for m in conversation.messages[:-1] for image in m.images]
    assert items(tmp_path, "latents").keys() == digests(drawn)
    features = items(tmp_path, "features")
    assert features.keys() == {name for key in digests(seen) for name in (key, f"{key}/image_grid_thw")}
    captions = items(tmp_path, "captions")
    assert len(captions) == len({image.caption for image in drawn} - {""})
    assert {value.dtype for value in captions.values()} == {torch.float16}
    assert sum(counted) == len(digests(drawn)) + len(digests(seen)) + len(captions)
    again = command(folders["qwen"], world, tmp_path)
    assert again.exit_code == 0 and sum(counted) == len(digests(drawn)) + len(digests(seen)) + len(captions)
    other = command(folders["qwen"], world, tmp_path, "--dtype", "fp32")
    assert other.exit_code == 2 and "holds fp16, not fp32" in other.output


def test_a_run_killed_while_it_writes_goes_on(folders, world, tmp_path, monkeypatch, counted):
    monkeypatch.setattr(caches, "SHARD_ITEMS", 3)

    def in_third_shard() -> bool:
        names = "[0-9]*.safetensors", ".*.safetensors.part"
        return [len([*tmp_path.glob(f"killed/*/{name}")]) for name in names] == [2, 1]

    if not (child := os.fork()):
        fsync = os.fsync
        os.fsync = lambda file: os._exit(9) if in_third_shard() else fsync(file)
        command(folders["llava"], world, tmp_path / "killed", "--batch", "2")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*/*.safetensors")}
    assert len(kept) == 2
    done = sum(len(load_file(path)) for path in kept)
    for name in ("killed", "whole"):
        assert command(folders["llava"], world, tmp_path / name, "--batch", "2").exit_code == 0
        counted.append(-1)
    middle = counted.index(-1)
    assert sum(counted[:middle]) == sum(counted[middle + 1 : -1]) - done
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(tmp_path.glob("killed/*/*.part"))
    for kind in caches.KINDS:
        assert items(tmp_path / "killed", kind).keys() == items(tmp_path / "whole", kind).keys()


def test_broken_pictures_and_copies(folders, world, tmp_path):
    shutil.copytree(world / "cc3m", tmp_path / "w" / "cc3m")
    table = tmp_path / "w" / "cc3m" / "cc3m_train.tsv"
    header, first, second, *rest = table.read_text().splitlines()
    (table.parent / first.split("\t")[1]).write_bytes(b"no picture")
    shutil.copy(table.parent / second.split("\t")[1], table.parent / "copy.png")
    table.write_text("\n".join([header, first, second, *rest, "a copy\tcopy.png"]) + "\n")
    result = command(folders["llava"], tmp_path / "w", tmp_path / "c", "--workers", "2", formats=("cc3m",))
    assert result.exit_code == 0, result.output
    assert f"1 x broken image (first: {table.parent / first.split()[-1]}" in result.output
    assert (len(items(tmp_path / "c", "latents")), len(items(tmp_path / "c", "captions"))) == (4, 6)


def test_shards_are_read_once(folders, world, tmp_path):
    table = (world / "cc3m" / "cc3m_train.tsv").read_text().splitlines()[1:]
    for name, rows in {"0.tar": table[:3], "1.tar": table[3:]}.items():
        members = []
        for number, row in enumerate(rows):
            caption, path = row.split("\t")
            image = (world / "cc3m" / path).read_bytes()
            members += [(f"{name[0]}{number}.txt", caption.encode()), (f"{name[0]}{number}.png", image)]
        write_tar(tmp_path / name, *members)
    words = ["data", "cache", "--model", str(folders["llava"]), "--data", str(tmp_path), "--format", "shards"]
    result = CliRunner().invoke(cli.main, [*words, "--out", str(tmp_path / "c"), "--workers", "2", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    pictures = [image for _, conversation in samples(world, "pretrain") for image in conversation.images]
    assert items(tmp_path / "c", "latents").keys() == digests(pictures)
    assert len(items(tmp_path / "c", "captions")) == len({image.caption for image in pictures})


def test_what_the_disk_cannot_hold_is_refused_early(folders, world, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = command(folders["llava"], world, tmp_path, "--batch", "1")
    assert result.exit_code == 1 and "has 1.0 kB free, the cache needs about" in result.output
    nothing = command(folders["llava"], world, tmp_path / "none", "--kinds", "features", formats=("cc3m",))
    assert nothing.exit_code == 2 and "the data has no features" in nothing.output
    assert not list(tmp_path.glob("none/*"))


# Which caches a model reads


def test_what_misses_is_computed_live(folders, world, tmp_path):
    assert command(folders["llava"], world, tmp_path / "a", "--dtype", "fp32", formats=("cc3m",)).exit_code == 0
    model = fresh(folders["llava"])
    found = Caches.open([tmp_path / "a"], model)
    pairs, stories = samples(world, "pretrain"), samples(world, "finetune")
    story = next(s for s in stories if s[1].messages[-1].images and len(s[1].images) > 1)
    mixed, live = (collator(model, some)([pairs[0], story, pairs[1]]) for some in (found, None))
    assert "moments" not in mixed.targets and torch.equal(mixed.targets["pixels"], live.targets["pixels"])
    assert torch.equal(mixed.context_images["pixel_values"], live.context_images["pixel_values"])
    whole = collator(model, found)(pairs[:4])
    assert len(whole.targets["moments"]) == len(whole.targets["encodings"]) == 4
    found.note(mixed)
    found.note(whole)
    needed = 4 + mixed.num_targets
    assert f"{400 / needed:.1f} % of {needed} latents" in str(found)
    assert command(folders["llava"], world, tmp_path / "b", formats=("vist", "mmdialog")).exit_code == 0
    both = Caches.open([tmp_path / "a", tmp_path / "b"], model)
    assert "moments" in collator(model, both)([pairs[0], story, pairs[1]]).targets


def variant(folder: Path, to: Path, part: str, change) -> Path:
    """A copy of a model with one file changed: values of a JSON file, or a weight whose name holds `change`."""
    for name in ("mllm", "diffusion"):
        shutil.copytree(folder / name, to / name)
    file = to / part
    if file.suffix == ".json":
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        tensors = load_file(file)
        tensors[next(name for name in sorted(tensors) if change in name)] += 1
        save_file(tensors, file, metadata={"format": "pt"})
    return to


VAE = "diffusion/vae/diffusion_pytorch_model.safetensors"
UNET = "diffusion/unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("part", "change", "refused"),
    [
        (VAE, "encoder.conv_in.weight", "latents.*differs in weights"),
        (VAE, "decoder.conv_in.weight", None),
        (UNET, "conv_in.weight", None),
        ("diffusion/unet/config.json", {"sample_size": 16}, r"latents.*transform \(size \[16, 16\], not \[32, 32\]"),
        ("diffusion/text_encoder/config.json", {"layer_norm_eps": 0.1}, "captions.*differs in config"),
        ("mllm/preprocessor_config.json", {"image_mean": [0, 0, 0]}, "features.*transform.*image_mean"),
        ("mllm/model.safetensors", "vision_tower", "features.*weights"),
        ("mllm/model.safetensors", "up_proj", None),
    ],
)
def test_a_cache_of_another_model_is_refused(part, change, refused, folders, cached, tmp_path):
    model = fresh(variant(folders["llava"], tmp_path, part, change))
    if refused is None:
        Caches.open([cached], model)
    else:
        with pytest.raises(Mgp5Error, match=refused) as error:
            Caches.open([cached], model)
        assert "\n" not in str(error.value)


def test_features_of_images_that_were_seen_smaller_are_refused(folders, world, tmp_path):
    more = ["--kinds", "features", "--set", "max_pixels=3136"]
    assert command(folders["qwen"], world, tmp_path, *more, formats=("vist",)).exit_code == 0
    model = fresh(folders["qwen"])
    with pytest.raises(Mgp5Error, match=r"features.*transform \(size .*3136"):
        Caches.open([tmp_path], model)
    model.limit_pixels(3136)
    Caches.open([tmp_path], model)
    assert model.config.max_pixels == 3136  # which the trained model keeps


@pytest.fixture(scope="module")
def cached(folders, world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cached")
    assert command(folders["llava"], world, out).exit_code == 0
    return out


def test_precision_of_the_weights_does_not_matter_and_broken_shards_are_told(folders, cached, tmp_path):
    model = fresh(folders["llava"], torch.bfloat16)
    Caches.open([cached], model)
    with pytest.raises(Mgp5Error, match="holds no cache"):
        Caches.open([tmp_path], model)
    shutil.copytree(cached, tmp_path / "copy")
    next((tmp_path / "copy").glob("latents-*/*.safetensors")).write_bytes(b"cut")
    with pytest.raises(Mgp5Error, match="cannot be read"):
        Caches.open([tmp_path / "copy"], model)


def train(model: Path, data: Path, out: Path, *more: str) -> str:
    """`mgp5 train` on a folder of data; returns what it says."""
    AcceleratorState._reset_state(True)
    words = ["train", "--preset", "demo", "--model", str(model), "--vokens", "4", "--data", str(data), "--format"]
    words += [data.name, "--device", "cpu", "--set", "batch=2", "--out", str(out), *more]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, result.output
    return result.output


def test_training_takes_everything_from_the_caches_and_gives_the_same_weights(folders, world, tmp_path):
    assert command(folders["llava"], world, tmp_path / "c", "--dtype", "fp32", formats=("cc3m",)).exit_code == 0
    more = ["--stage", "pretrain", "--max-steps", "2", "--set", "precision=fp32"]
    train(folders["llava"], world / "cc3m", tmp_path / "live", *more)
    told = train(folders["llava"], world / "cc3m", tmp_path / "cached", *more, "--cache", str(tmp_path / "c"))
    assert "taken from the caches: 100.0 % of 4 latents, 100.0 % of 4 captions" in told
    live, cached = (load_file(tmp_path / name / "mgp5" / "model.safetensors") for name in ("live", "cached"))
    assert live.keys() == cached.keys() and all(torch.equal(cached[name], value) for name, value in live.items())


def test_half_precision_caches_train_under_autocast(folders, world, tmp_path):
    """The defaults of both commands on a CPU, whose autocast refuses to join fp16 with anything."""
    assert command(folders["llava"], world, tmp_path / "c", formats=("vist",)).exit_code == 0
    more = ["--stage", "finetune", "--max-steps", "1", "--set", "precision=bf16", "--set", "caption_weight=0.1"]
    told = train(folders["llava"], world / "vist", tmp_path / "run", *more, "--cache", str(tmp_path / "c"))
    assert "taken from the caches: 100.0 %" in told
