"""Fused decoding: the module against real classes of transformers, by the operations' references; where it plugs in."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from mgp5.kernels import registry
from test_decode import TALKS, WAYS, assert_same, finished
from toy_heads import CodesConfig, CodesHead, CodesOptions, with_head

from mgp5.apps.open_model import load, set_backend
from mgp5.backbones.adapters import add_prefix
from mgp5.backbones.hf import HFBackbone
from mgp5.backbones.kv_cache import KVCache, read
from mgp5.config import LoraConfig
from mgp5.engines import decode
from mgp5.hub import resolve
from mgp5.inference.decoder import Decoder
from mgp5.inference.reply import generate
from mgp5.inference.session import Session
from mgp5.loading import build
from mgp5.memory.skeletons import generating_skeleton
from mgp5.options import reply_options

# In float64 too: transformers computes norms, angles and scores in float32.
NEAR = {torch.float64: {"atol": 3e-6, "rtol": 3e-6}, torch.float32: {"atol": 2e-5, "rtol": 2e-5}}
SHAPES = {
    "Llama": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "Llama-grouped": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "mlp_bias": True},
    "Llama-biased": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6, "attention_bias": True},
    "Qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "Qwen3": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12},
    "Mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None},
}


def tiny(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> SimpleNamespace:
    """What fused decoding asks of a backbone, around a random causal LM; norms and biases are random too."""
    kind = name.partition("-")[0]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=37, hidden_size=40, intermediate_size=56, num_hidden_layers=2, **SHAPES[name]
    )
    torch.manual_seed(2)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(mean=float("norm" in parameter_name), std=0.3)
    model.to(device, dtype)
    return SimpleNamespace(
        language=model.model, lm_head=model.lm_head, device=torch.device(device), width=40, capturable=True, biases={}
    )


def forward(backbone, embeds, positions, mask, cache, side=None):
    options = {"position_ids": positions, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    return backbone.language(inputs_embeds=embeds, **options).last_hidden_state


@torch.no_grad()
def states(backbone, rows: list[int], tokens: int, engine=None) -> tuple[torch.Tensor, torch.Tensor]:
    """States and logits of tokens behind prompts of different lengths in some rows of a cache of 9."""
    dtype, device = backbone.lm_head.weight.dtype, backbone.device
    cache = KVCache(2, 9)
    plain = lambda *inputs: forward(backbone, *inputs)  # noqa: E731
    starts = [3 * row % 7 for row in rows]
    for row, start in zip(rows, starts, strict=True):
        random = torch.Generator().manual_seed(row)
        embeds = torch.randn(1, max(start, 1), 40, generator=random).to(device, dtype)
        read(plain, cache, [row], [0], embeds, torch.arange(embeds.shape[1], device=device)[None])
    embeds = torch.randn(len(rows), tokens, 40, generator=torch.Generator().manual_seed(99)).to(device, dtype)
    positions = torch.tensor(starts, device=device)[:, None] + torch.arange(tokens, device=device)
    hidden = read(engine or plain, cache, rows, starts, embeds, positions)
    return hidden, (engine.logits if engine else backbone.lm_head)(hidden[:, -1])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_it_equals_the_classes_of_transformers(name, dtype):
    """One to nine rows, one or several tokens of each; weights that were joined are still the LLM's own."""
    backbone = tiny(name, dtype)
    assert decode.unknown(backbone) == ""
    cases = ([3], 1), ([0], 8), ([4, 1], 3), (list(range(9)), 1)
    expected = [states(backbone, *case) for case in cases]
    engine = decode.FusedDecode(backbone, decode.REFERENCES)
    attention = backbone.language.layers[0].self_attn
    assert attention.k_proj.weight.data_ptr() > attention.q_proj.weight.data_ptr() == engine.layers[0].qkv[0].data_ptr()
    for case, before in zip(cases, expected, strict=True):
        for found in (states(backbone, *case, engine), states(backbone, *case)):
            torch.testing.assert_close(found, before, **NEAR[dtype])


def with_engine(backbone) -> Decoder:
    """A decoder that works as on a GPU, with buffers for graphs, and by the references of fused kernels."""
    backbone.engine = decode.FusedDecode(backbone, decode.REFERENCES)
    decoder = Decoder(backbone, 3, tokens_per_sync=4, bucket=32)
    decoder.on_gpu = True
    return decoder


@pytest.mark.parametrize("kind", ["llava", "qwen", "qwen3", "minigpt4"])
def test_replies_are_the_same(kind, request, diffusion_folder):
    """Text, and the run of vokens up to the condition of an image, of every backbone, twice by the same buffers."""
    folder = request.getfixturevalue(f"{kind}_folder")
    model = build(str(folder), str(diffusion_folder), num_vokens=4, guidance=3.0)
    assert decode.unknown(model.backbone) == ""
    if kind == "minigpt4":
        add_prefix(model.backbone, 3, 8)
    alone = [finished(generate(model, talk, way)) for talk, way in zip(TALKS[:4], WAYS, strict=False)]
    decoder, calls = with_engine(model.backbone), []
    run = model.backbone.engine.__class__.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode.FusedDecode, "__call__", lambda *inputs: calls.append(inputs[1].shape) or run(*inputs))
        for _ in range(2):
            for row, (talk, way, expected) in enumerate(zip(TALKS[:4], WAYS, alone, strict=False)):
                session = Session(model, decoder=decoder, row=row % 3, reuse=False)
                assert_same(finished(generate(model, talk, way, session)), expected)
    # All rows for a token of text; one for its vokens, and for its last token where an image must come.
    assert {shape[:2] for shape in calls} == {(3, 1), (1, 4), (1, 1)}


def test_runs_that_come_again_are_replayed(llava_folder):
    """Tokens that begin and end an image, of a head whose codes are sampled between them (SEED)."""
    model = with_head(llava_folder, CodesHead(CodesConfig()))
    way = reply_options(CodesOptions, seed=4, steps=1, max_tokens=2, image="always")
    alone, decoder = finished(generate(model, TALKS[1], way)), with_engine(model.backbone)
    assert decoder.backbone.engine is not None and not decoder._graphs
    for _ in range(2):
        session = Session(model, decoder=decoder, reuse=False)
        assert_same(finished(generate(model, TALKS[1], way, session)), alone)
    assert {key[:2] for key in decoder._graphs if len(key) == 4} == {(1, 1), (1, 2)}


def test_lora_is_fused_when_it_is_merged(llava_folder, diffusion_folder):
    model = build(str(llava_folder), str(diffusion_folder), num_vokens=4)
    model.adapt(LoraConfig(), None)
    model.eval()  # LoRA has dropout
    for name, weight in model.backbone.model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    assert "adapter" in decode.unknown(model.backbone)
    expected = [finished(generate(model, TALKS[1], way)) for way in WAYS[:2]]
    model.merge()
    assert decode.unknown(model.backbone) == ""
    decoder = with_engine(model.backbone)
    for way, before in zip(WAYS, expected, strict=False):
        assert_same(finished(generate(model, TALKS[1], way, Session(model, decoder=decoder, reuse=False))), before)


def test_what_is_not_known_keeps_its_path(llava_folder):
    backbone = HFBackbone.load(llava_folder)
    on_card = torch.device("cuda"), torch.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_triton_refusal", lambda device, dtype: "")
        assert decode.refusal(backbone, *on_card) == ""
        assert "not all torch.float16" in decode.refusal(backbone, on_card[0], torch.float16)
        patch.setenv("MGP5_KERNELS", "torch")
        assert "MGP5_KERNELS=torch" in decode.refusal(backbone, *on_card)
    assert decode.fused_decode(backbone) is None  # on a CPU
    layer = backbone.language.layers[0]
    hook = layer.self_attn.register_forward_hook(lambda *_: None)
    assert "hooks" in decode.unknown(backbone)
    hook.remove()
    backbone.biases[3] = lambda: torch.ones(())
    assert "logits" in decode.unknown(backbone)
    backbone.biases.clear()
    layer.mlp.up_proj = type("Linear8bit", (torch.nn.Linear,), {})(32, 64, bias=False)
    assert "plain weights" in decode.unknown(backbone)
    backbone.language.config.hidden_act, layer.mlp.up_proj = "gelu", torch.nn.Linear(32, 64, bias=False)
    assert "gelu" in decode.unknown(backbone)
    backbone.language.__class__ = type("Phi3Model", (type(backbone.language),), {})
    assert "Phi3Model" in decode.unknown(backbone)


@pytest.mark.parametrize("operation", decode.OPERATIONS)
def test_kernels_that_err_are_not_taken(operation):
    """Nor those that do not run; for one token and for several, which kernels of their own may run."""
    backbone, (right, kernels) = tiny("Qwen3"), (getattr(decode.REFERENCES, operation), vars(decode.REFERENCES).copy())
    kernels[operation] = lambda *inputs: right(*inputs) * (1.1 if len(inputs[0]) > 1 else 1)
    engine = decode.FusedDecode(backbone, SimpleNamespace(**kernels))
    assert [engine.takes(tokens) for tokens in (1, 2, 16)] == [True, False, False] and "err by" in engine.faults[2]
    del kernels[operation]
    engine.faults.clear()
    engine.ops = SimpleNamespace(**kernels, **{operation: lambda *inputs: right(*inputs, None, None, None, None, None)})
    assert not engine.takes(1) and "kernels for 1 tokens fail" in engine.faults[1]
    engine.ops, engine.faults = decode.REFERENCES, {}
    assert [engine.takes(tokens) for tokens in (1, 16, 17)] == [True, True, False]


def test_kernels_are_tried_without_weights():
    backbone = generating_skeleton(resolve("demo"), torch.float32).backbone
    assert decode.fault(decode.FusedDecode(backbone, decode.REFERENCES), 2, torch.device("cpu"), torch.float32) == ""
    wrong = SimpleNamespace(**vars(decode.REFERENCES) | {"row_norm": lambda x, gain, eps: torch.zeros_like(x)})
    assert decode.fault(decode.FusedDecode(backbone, wrong), 1, torch.device("cpu"), torch.float32)


def test_a_mapper_in_bfloat16_leaves_images_within_one_of_255():
    """Of the demo, in the mean over pixels; on a GPU the LLM is in bfloat16 then, and the mapper follows it."""
    model, images = load("demo", backend=None), []
    set_backend(model, "eager")
    assert model.backbone.engine is None
    head = SimpleNamespace(weight=model.backbone.lm_head.weight.bfloat16())
    on_card = SimpleNamespace(device=torch.device("cuda"), capturable=True, lm_head=head)
    for half in (False, True):
        if half:
            decode.map_in_half(model.head, on_card)
            assert model.head.mapper(torch.zeros(1, 8, model.backbone.width)).dtype == torch.bfloat16
        for seed, text in enumerate(("A red fox reads a book in the snow.", "A blue cat with a hat at the beach.")):
            options = reply_options(seed=seed, steps=6, max_tokens=0, image="always")
            talk = TALKS[0].add("assistant", text).add("user", "Draw it.")
            (image,) = finished(generate(model, talk, options)).message.images
            images.append(torch.frombuffer(bytearray(image.load().tobytes()), dtype=torch.uint8).float())
    for before, after in zip(images[:2], images[2:], strict=True):
        assert 0 < (before - after).abs().mean() < 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_fused_kernels_on_a_gpu(name):
    """Greedy tokens and states, in CUDA graphs, as the LLM gives them alone in float32."""
    backbone = tiny(name, device="cuda")
    engine = decode.fused_decode(backbone)
    assert engine is not None, decode.why_not(backbone, backbone.device, torch.float32)
    for case in (([3], 1), ([0], 8), ([4, 1], 3), (list(range(9)), 1)):
        torch.testing.assert_close(states(backbone, *case, engine), states(backbone, *case), atol=1e-3, rtol=1e-3)
