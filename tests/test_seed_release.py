"""Files in the layout of SEED's release: the names stand here as the public classes have them, the shapes are tiny."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import TEXT
from tiny_mllm import llama_tokenizer, save_blip2
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from mgp5 import Mgp5Error
from mgp5.backbones.hf import HFBackbone
from mgp5.generators.seed_tokenizer import SeedTokenizer
from mgp5.heads.seed_release import code_words, compose_seed_llama, read_seed_tokenizer, seed_llama_ids

V, W, K, E, CODES = 12, 16, 4, 6, 20  # as in seed_stages, and the size of the codebook


def linear(name: str, out: int, inside: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inside)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int = W) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def bert(name: str, layers: int, reads: int, text: bool) -> dict[str, tuple[int, ...]]:
    shapes = norm(f"{name}.bert.embeddings.LayerNorm")
    if text:
        shapes |= {f"{name}.bert.embeddings.word_embeddings.weight": (30, W)}
        shapes |= {f"{name}.bert.embeddings.position_embeddings.weight": (9, W)}
        shapes |= {f"{name}.bert.embeddings.position_ids": (1, 9)} | linear(f"{name}.cls.predictions.decoder", 30, W)
    for index in range(layers):
        layer = f"{name}.bert.encoder.layer.{index}"
        for kind, width in (("attention", W), ("crossattention", reads))[: 2 - index % 2]:
            shapes |= linear(f"{layer}.{kind}.self.query", W, W)
            shapes |= linear(f"{layer}.{kind}.self.key", W, width) | linear(f"{layer}.{kind}.self.value", W, width)
            shapes |= linear(f"{layer}.{kind}.output.dense", W, W) | norm(f"{layer}.{kind}.output.LayerNorm")
        for end in ("", "_query")[0 if text else 1 :]:
            shapes |= linear(f"{layer}.intermediate{end}.dense", 4 * W, W)
            shapes |= linear(f"{layer}.output{end}.dense", W, 4 * W) | norm(f"{layer}.output{end}.LayerNorm")
    return shapes


def blocks(end: str) -> dict[str, tuple[int, ...]]:
    shapes = {f"pos_embed{end}": (1, K, W)}
    for index in range(2):
        name = f"blocks{end}.{index}"
        shapes |= norm(f"{name}.norm1") | norm(f"{name}.norm2")
        shapes |= linear(f"{name}.attn.qkv", 3 * W, W) | linear(f"{name}.attn.proj", W, W)
        shapes |= linear(f"{name}.mlp.fc1", 4 * W, W) | linear(f"{name}.mlp.fc2", W, 4 * W)
    return shapes


STAGE_1 = norm("ln_vision", V) | {"query_tokens": (1, K, W), "temp": ()} | bert("Qformer", 3, V, True)
STAGE_1 |= linear("vision_proj", 7, W) | linear("text_proj", 7, W)
STAGE_2 = {"quantize.embedding.weight": (CODES, E)}
STAGE_2 |= linear("encode_task_layer.0", W, W) | linear("encode_task_layer.2", E, W)
STAGE_2 |= linear("decode_task_layer.0", E, E) | linear("decode_task_layer.2", W, E)
REVERSE = bert("Reverse_Qformer", 2, W, False)
MLP = {f"image_down.{2 * index}.weight": shape for index, shape in enumerate(((9, W), (8, 9), (5, 8)))}
QUERIES = norm("ln_vision", V) | {"query_tokens": (1, K, W)} | bert("Qformer", 3, V, False)
EXTRA = {"visual_encoder.cls_token": (1, 1, V)}
CONDITION_1 = linear("distill_text_proj", 10, W) | {"reverse_tokens": (1, 5, W)}
CONDITION_2 = linear("distill_image_proj", 10, W) | {"reverse_tokens": (1, 1, W)}
# Kind -> the shapes in each of its files.
FILES = {
    "text": [STAGE_1 | EXTRA, STAGE_2 | blocks("_text") | REVERSE | CONDITION_1],
    "image": [QUERIES | STAGE_2 | blocks("") | blocks("_image") | REVERSE | CONDITION_2],
    "image-mlp": [QUERIES | STAGE_2 | blocks("") | blocks("_image") | MLP | linear("distill_image_proj", 10, K * 5)],
}


def written(folder: Path, shapes: list[dict[str, tuple[int, ...]]], wrapped: bool) -> tuple[list[Path], dict]:
    """Files of random tensors, and all that is in them."""
    generator, paths, tensors = torch.Generator().manual_seed(4), [], {}
    for index, file in enumerate(shapes):
        state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in file.items()}
        state |= {"temp": torch.tensor(0.05)} if "temp" in state else {}
        paths.append(folder / f"{index}.pth")
        torch.save({"model": state, "epoch": 9} if wrapped else state, paths[-1])
        tensors |= state
    return paths, tensors


def run_block(state: dict, name: str, states: torch.Tensor) -> torch.Tensor:
    """A pre-norm block of a ViT, with the release's tensors."""

    def part(kind):
        return state[f"{name}.{kind}.weight"], state[f"{name}.{kind}.bias"]

    query, key, value = F.linear(F.layer_norm(states, (W,), *part("norm1"), eps=1e-6), *part("attn.qkv")).chunk(3, -1)
    split = [each.unflatten(-1, (2, W // 2)).transpose(1, 2) for each in (query, key, value)]
    mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    states = states + F.linear(mixed, *part("attn.proj"))
    inner = F.gelu(F.linear(F.layer_norm(states, (W,), *part("norm2"), eps=1e-6), *part("mlp.fc1")))
    return states + F.linear(inner, *part("mlp.fc2"))


@pytest.mark.parametrize("kind", FILES)
def test_a_released_tokenizer_is_read(kind, tmp_path):
    paths, tensors = written(tmp_path, FILES[kind], wrapped=kind == "text")
    config, state, unused = read_seed_tokenizer(paths, heads=2)
    assert config.detokenizer == kind and config.quantizer_loss == "legacy"
    assert (config.causal_layers, config.block_layers, config.codes, config.code_width) == (3, 2, CODES, E)
    assert (config.condition_length, config.condition_width) == ((5, 10) if kind == "text" else (1, 10))
    assert (config.text_vocab, config.reconstruction) == ((30, False) if kind == "text" else (0, True))
    words = ("Qformer.bert.embeddings.position_ids", "Qformer.cls.predictions.decoder.bias")
    left = (*words, "Qformer.cls.predictions.decoder.weight", "visual_encoder.cls_token") if kind == "text" else ()
    assert unused == left
    model = SeedTokenizer(config).eval()
    model.load_state_dict(state)
    codes = model.encode(torch.randn(2, 7, V))
    assert codes.shape == (2, K)
    with torch.no_grad():
        entries = tensors["quantize.embedding.weight"][codes]
        first, second = ([tensors[f"decode_task_layer.{i}.{part}"] for part in ("weight", "bias")] for i in (0, 2))
        decoded = F.linear(F.linear(entries, *first).tanh(), *second)
        end = "_text" if kind == "text" else "_image"
        states = decoded + tensors[f"pos_embed{end}"]
        for index in range(2):
            states = run_block(tensors, f"blocks{end}.{index}", states)
        torch.testing.assert_close(model.generation(model.decode_layer(entries)), states, atol=1e-4, rtol=1e-4)
        if kind == "image-mlp":
            layers = [nn.Linear(out, inside, bias=False) for out, inside in ((W, 9), (9, 8), (8, 5))]
            for index, layer in enumerate(layers):
                layer.weight = nn.Parameter(tensors[f"image_down.{2 * index}.weight"])
            narrow = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])(states).reshape(2, K * 5)
            wanted = F.linear(narrow, tensors["distill_image_proj.weight"], tensors["distill_image_proj.bias"])
            torch.testing.assert_close(model.condition(codes), wanted[:, None], atol=1e-4, rtol=1e-4)
    if kind == "text":
        torch.testing.assert_close(model.causal.log_temperature.exp(), torch.tensor(0.05))
    for ours, theirs in (
        ("causal.transformer.encoder.layer.0.crossattention.attention.key.weight", "crossattention.self.key.weight"),
        ("causal.transformer.encoder.layer.0.output_query.LayerNorm.bias", "output_query.LayerNorm.bias"),
    ):
        assert torch.equal(model.state_dict()[ours], tensors[f"Qformer.bert.encoder.layer.0.{theirs}"])


def test_what_lacks_or_does_not_fit_is_named(tmp_path):
    stage1, stage2 = FILES["text"]
    paths, _ = written(tmp_path, [stage2], wrapped=True)
    with pytest.raises(Mgp5Error, match=r"no query_tokens, ln_vision.weight, Qformer.bert.*causal_qformer.pth"):
        read_seed_tokenizer(paths, heads=2)
    paths, _ = written(tmp_path, [stage1], wrapped=True)
    with pytest.raises(Mgp5Error, match=r"no quantize.embedding.weight, distill_\{text,image\}_proj.weight"):
        read_seed_tokenizer(paths, heads=2)
    cut = {name: shape for name, shape in stage2.items() if not name.startswith("encode_task_layer")}
    paths, _ = written(tmp_path, [stage1, cut], wrapped=True)
    with pytest.raises(Mgp5Error, match=r"no encode_task_layer.0.weight, encode_task_layer.0.bias, enc.* encode_task"):
        read_seed_tokenizer(paths, heads=2)
    paths, _ = written(tmp_path, [stage1, stage2 | {"pos_embed_text": (1, K + 1, W)}], wrapped=True)
    with pytest.raises(Mgp5Error, match=r"pos_embed_text is \(1, 5, 16\), expected \(1, 4, 16\)"):
        read_seed_tokenizer(paths, heads=2)
    torch.save({"model": Path("x")}, tmp_path / "code.pth")  # anything but tensors and plain data
    with pytest.raises(Mgp5Error, match="it holds pathlib"):
        read_seed_tokenizer([tmp_path / "code.pth"])


def test_a_seed_llama_has_the_words_of_images():
    vocabulary = {f"<img_{code:05d}>": 100 + code for code in range(16)} | {"<img>": 116, "</img>": 117, "a": 3}
    assert code_words(2) == ["<img>", "<img_00000>", "<img_00001>", "</img>"]
    assert seed_llama_ids(vocabulary, 118, codes=16) == (116, *range(100, 116), 117)
    with pytest.raises(Mgp5Error, match="has 117 rows, expected at least 118"):
        seed_llama_ids(vocabulary, 117, codes=16)
    with pytest.raises(Mgp5Error, match=r"lacks 2 of the 20 words of images \(<img_00016>, <img_00017>\)"):
        seed_llama_ids(vocabulary, 118, codes=18)
    mixed = vocabulary | {"<img_00000>": 101, "<img_00001>": 100}
    with pytest.raises(Mgp5Error, match="not in order"):
        seed_llama_ids(mixed, 118, codes=16)


PROMPTS = {"8b": "<s>USER: {}what?\nASSISTANT:", "14b": "<s>[INST] {}what? [/INST]\n"}


@pytest.mark.parametrize("size", PROMPTS)
def test_a_seed_llama_becomes_a_backbone(size, tmp_path):
    torch.manual_seed(0)
    tokenizer, (first, *codes, last) = llama_tokenizer(), code_words(16)
    words = [*codes, first, last]  # in the release's order, added to a vocabulary or a part of it
    if size == "8b":
        tokenizer.add_tokens(words)
    else:
        known = tokenizer.get_vocab()
        tokenizer = LlamaTokenizer(vocab=known | {w: len(known) + i for i, w in enumerate(words)}, merges=[])
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TEXT))
    llama.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "words")
    LlamaConfig(vocab_size=len(tokenizer) - 18, **TEXT).save_pretrained(tmp_path / "plain")
    parts = (str(save_blip2(tmp_path / "blip2")), str(tmp_path / "llm"), str(tmp_path / "words"), tmp_path / "out")
    with pytest.raises(Mgp5Error, match="unknown SEED-LLaMA '7b'"):
        compose_seed_llama(*parts, "7b")
    with pytest.raises(Mgp5Error, match="rows, expected at least"):
        compose_seed_llama(parts[0], str(tmp_path / "plain"), *parts[2:], size, codes=16)
    ids = compose_seed_llama(*parts, size, codes=16, dtype=torch.float32)
    backbone = HFBackbone.load(tmp_path / "out")
    assert backbone.add_tokens([first, *codes, last]) == list(ids)  # as a head does, which keeps their rows
    assert torch.equal(backbone.lm_head.weight[list(ids)], llama.lm_head.weight[list(ids)])
    assert backbone.stop_ids == {tokenizer.eos_token_id}
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    prompt = backbone.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt == PROMPTS[size].format("<ImageHere>")
