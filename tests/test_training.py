"""The two stages on tiny models: trained and frozen weights, and the losses."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny import picture
from tiny_training import VOKENS, batch_of, config, finish, fresh

from mgp5 import Conversation, Image, Mgp5Error
from mgp5.config import LoraConfig, PrefixConfig
from mgp5.model import InterleavedModel
from mgp5.prompts import CHAT_SYSTEM, IGNORE
from mgp5.training.distributed import LossModule
from mgp5.training.loop import _batches, num_workers, rate, total_steps
from mgp5.training.presets import preset

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def llava(llava_folder, diffusion_folder) -> InterleavedModel:
    return fresh(llava_folder, diffusion_folder)


# What trains


def test_own_data_is_trained_with_the_system_text_that_replies_begin_with(llava):
    bare = Conversation().add("user", "A ball.").add("assistant", Image(pixels=picture(), caption="A ball."))
    own = Conversation().add("system", "Be kind.").add("user", "A ball.").add("assistant", *bare.messages[-1].images)
    for stage, system in (("pretrain", ""), ("finetune", CHAT_SYSTEM)):
        loaded = _batches([bare, own], llava, config(stage, workers=0), Accelerator(cpu=True), 0, None)
        batch = next(loaded)
        loaded.close()
        rows = [row[mask.bool()] for row, mask in zip(batch.ids, batch.mask, strict=True)]
        texts = llava.backbone.tokenizer.batch_decode(rows)
        assert sum("Be kind." in text for text in texts) == 1
        assert sum(CHAT_SYSTEM in text for text in texts) == bool(system)


@pytest.mark.parametrize(
    "stage, family, adapter, trained",
    [
        ("pretrain", "llava", {}, "head.mapper."),
        ("pretrain", "qwen", {}, "head.mapper."),
        ("finetune", "llava", {"lora": LoraConfig()}, "head.mapper.transformer."),
        ("finetune", "qwen", {"lora": LoraConfig()}, "head.mapper.transformer."),
        ("finetune", "llava", {"lora": None, "prefix": PrefixConfig(tokens=2, hidden=8)}, "head.mapper.transformer."),
    ],
)
def test_a_stage_changes_its_weights_and_no_others(
    stage, family, adapter, trained, llava_folder, qwen_folder, diffusion_folder, tales, tmp_path
):
    model = fresh({"llava": llava_folder, "qwen": qwen_folder}[family], diffusion_folder)
    model.head.generator.read_text_encoders()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())  # peft puts its own beside them
    before = {name: value.detach().clone() for name, value in tensors.items()}
    settings = config(stage, steps=6, batch=1, save_every=100, weight_decay=0.5, **adapter)
    finish(model, tales, settings, tmp_path / "run")
    changed = {name for name, value in tensors.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith(trained)}
    assert all(p.requires_grad == name.startswith(trained) for name, p in model.named_parameters() if name in before)
    if "prefix" in adapter:
        return
    assert not model.backbone.capturable  # rows and LoRA beside the weights are found by the host
    model.merge()
    assert model.backbone.capturable
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    rows = ("embed_tokens.weight", "lm_head.weight")
    merged = {name for name in after if not torch.equal(after[name], before[name])} - changed
    layers = ("q_proj.weight", "v_proj.weight") if adapter else rows
    assert merged == {n for n in before if n.endswith(rows) or ("language_model" in n and n.endswith(layers))}
    for name in (name for name in merged if name.endswith(rows)):  # only the new rows, although weight decay is on
        same = (after[name] == before[name]).all(dim=1)
        assert set((~same).nonzero().flatten().tolist()) == {*model.head.ids}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_trained_weights_stay_in_float32_with_a_half_precision_llm(
    stage, llava_folder, diffusion_folder, tales, tmp_path
):
    model = fresh(llava_folder, diffusion_folder, dtype=torch.bfloat16)
    (last,) = finish(model, tales, config(stage, steps=1, precision="bf16", checkpointing=True), tmp_path / "run")
    assert last.losses.keys() == {"text", "ldm"}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.backbone.parameters() if not p.requires_grad} == {torch.bfloat16}
    saved = load_file(tmp_path / "run/mgp5/model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


def test_missing_hardware_and_packages_are_reported(llava, pairs, tmp_path):
    for values, words in (
        ({"precision": "fp16"}, "precision is fp16, but a CPU cannot"),
        ({"optimizer": "adamw8bit"}, "optimizer is adamw8bit"),
        ({"trackers": ("telegraph",)}, r"no tracker telegraph: pip install 'mgp5\[track\]'"),
    ):
        with pytest.raises(Mgp5Error, match=words):
            finish(llava, pairs, config("pretrain", **values), tmp_path / "run")


def test_every_weight_has_a_gradient_whatever_a_batch_holds(llava, tales):
    llava.prepare(config("finetune"))
    step = LossModule(llava.train())
    empty = batch_of(llava)
    for batch in (empty, batch_of(llava, Conversation().add("user", "hi").add("assistant", "hello"))):
        loss, terms = step(batch, config("finetune"), torch.Generator().manual_seed(0))
        loss.backward()
        assert all(p.grad is not None for p in llava.parameters() if p.requires_grad)
        assert terms.keys() == (set() if batch is empty else {"text"})
        if batch is empty:
            assert loss == 0
            assert not any(p.grad.any() for p in llava.parameters() if p.requires_grad)


def test_embedding_rows_have_no_weight_decay(llava):
    llava.prepare(config("pretrain"))
    rows, rest = llava.parameter_groups(config("pretrain", rows_lr=5e-5))
    assert (rows["lr"], rows["weight_decay"]) == (5e-5, 0.0)
    assert rest["weight_decay"] == 0.1
    assert sum(p.numel() for p in rows["params"]) == 2 * VOKENS * llava.backbone.width
    assert {id(p) for p in rest["params"]} == {id(p) for p in llava.head.mapper.parameters()}


def test_losses_fall_when_one_batch_is_repeated(llava, pairs, tmp_path):
    batch = batch_of(llava, *(pairs[i] for i in range(4)))
    settings = config("pretrain", steps=30, batch=4, lr=3e-3, rows_lr=1e-2, guidance_dropout=0.0)

    @torch.no_grad()
    def losses() -> dict[str, float]:
        draws = [llava.eval()(batch, settings, torch.Generator().manual_seed(i)).terms for i in range(8)]
        return {name: sum(terms[name].item() for terms in draws) / 8 for name in draws[0]}

    before = losses()
    finish(llava, torch.utils.data.Subset(pairs, range(4)), settings, tmp_path / "run")
    after = losses()
    assert after["text"] < 0.9 * before["text"]
    assert after["caption"] < 0.5 * before["caption"]
    assert after["ldm"] < before["ldm"]


def test_how_an_update_is_split_does_not_matter(llava_folder, diffusion_folder, tmp_path):
    images = {1: "a fox", 5: "a hen", 6: ""}
    shown = {i: [Image(pixels=picture(), caption=caption)] for i, caption in images.items()}
    hi = Conversation().add("user", "hi")
    data = [hi.add("assistant", "ha " * i, *shown.get(i, [])) for i in range(1, 9)]
    terms = {"text_weight": 1.0, "ldm_weight": 0.0, "caption_weight": 1.0, "guidance_dropout": 0.0}  # nothing random
    found = []
    for batch in (8, 2, 1):
        settings = config("pretrain", steps=1, batch=batch, accumulation=8 // batch, **terms)
        (last,) = finish(fresh(llava_folder, diffusion_folder), data, settings, out := tmp_path / str(batch))
        state = load_file(out / "checkpoints/step-000001/state/tensors.safetensors")
        found.append((last.losses, {name: value for name, value in state.items() if "exp_avg." in name}))
    for losses, gradients in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=2e-5) and losses.keys() == {"text", "caption"}
        for name, value in found[0][1].items():
            torch.testing.assert_close(gradients[name], value, atol=1e-6, rtol=1e-3, msg=name)


# The losses


@pytest.fixture
def recorder(llava, monkeypatch):
    """Return a model, and a record of the mapper's inputs and the captions that are targets."""
    recorded, real = {}, llava.head.generator.encode_text

    def encode_text(texts: list[str]) -> torch.Tensor:
        recorded["texts"] = texts
        return real(texts)

    monkeypatch.setattr(llava.head.generator, "encode_text", encode_text)
    llava.head.mapper.mlp.register_forward_pre_hook(lambda _, args: recorded.update(states=args[0]))
    return llava, recorded


def samples(*captions: str) -> list[Conversation]:
    return [Conversation().add("user", "draw").add("assistant", Image(pixels=picture(), caption=c)) for c in captions]


def test_guidance_dropout_puts_zeros_before_the_mlp_and_takes_the_empty_caption(recorder):
    model, recorded = recorder
    batch = batch_of(model, *samples(*"abcdefgh"))
    model(batch, config("pretrain", guidance_dropout=0.5), torch.Generator().manual_seed(0))
    dropped = [not states.any() for states in recorded["states"]]
    assert True in dropped and False in dropped
    assert recorded["texts"] == ["" if zero else caption for zero, caption in zip(dropped, "abcdefgh", strict=True)]
    model(batch, config("pretrain", guidance_dropout=0.0), torch.Generator().manual_seed(0))
    assert recorded["states"].flatten(1).any(dim=1).all()


def test_caption_loss_only_where_there_are_captions(recorder):
    model, recorded = recorder
    plain = config("pretrain", guidance_dropout=0.0)
    model(batch_of(model, *samples("a fox", "", "a hen")), plain, torch.Generator().manual_seed(0))
    assert recorded["texts"] == ["a fox", "a hen"]
    losses = model(batch_of(model, *samples("", "")), plain, torch.Generator().manual_seed(0))
    assert "caption" not in losses.terms and "ldm" in losses.terms


def test_only_the_first_voken_of_a_run_has_a_label(model, tales):
    samples = [tales[i] for i in range(len(tales))]
    batch = batch_of(model, *samples)
    assert len(batch.target_starts) == sum(len(sample.messages[-1].images) for sample in samples) > 4
    for row, at in zip(batch.target_rows, batch.target_starts, strict=True):
        run = batch.ids[row, at : at + VOKENS + 1].tolist()
        labels = batch.labels[row, at : at + VOKENS + 1].tolist()
        assert tuple(run[:VOKENS]) == model.head.ids
        assert labels == [run[0], *[IGNORE] * (VOKENS - 1), run[-1]]
        assert run[-1] in model.backbone.stop_ids
    assert (batch.labels[batch.mask == 0] == IGNORE).all()


def test_the_rate_warms_up_and_decays():
    settings = config("pretrain", warmup=10)
    rates = [rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.02
    assert rate(config("pretrain", warmup=0), 0, 5) == 1.0
    assert rate(config("pretrain", warmup=1000), 99, 100) == pytest.approx(0.1)  # obeyed in a short run too
    cosine = [rate(config("pretrain", warmup=10, schedule="cosine"), step, 100) for step in range(100)]
    assert cosine[:10] == rates[:10] and cosine[55] == pytest.approx(0.5) and cosine[-1] < 0.001
    assert total_steps(preset("pretrain"), range(4800)) == 200
    assert total_steps(preset("finetune"), range(320)) == 40
    assert total_steps(preset("finetune"), range(320), processes=4) == 10
    with pytest.raises(Mgp5Error, match="is not known: give --max-steps"):
        total_steps(preset("finetune"), SimpleNamespace(stream=None, size=None))


@pytest.mark.parametrize(("cores", "processes", "count"), [(4, 1, 3), (32, 1, 8), (8, 4, 1), (1, 1, 1)])
def test_on_a_gpu_all_cores_but_one_read_data(monkeypatch, cores, processes, count):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    settings = config("pretrain", workers=None)
    assert [num_workers(settings, torch.device(device)) for device in ("cuda", "cpu")] == [count, 0]
