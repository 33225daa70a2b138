"""`mgp5 convert` of SEED's tokenizers and SEED-LLaMA, from files of the published layout with tiny shapes."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_unclip import IMAGE
from test_unclip import folder as unclip_folder  # noqa: F401 (a fixture)
from tiny import LAYERS, LENGTH, TEXT, WIDTH, picture
from tiny_mllm import llama_tokenizer, save_blip2
from transformers import LlamaConfig, LlamaForCausalLM

from mgp5 import Conversation, Image, cli
from mgp5.apps.open_model import load
from mgp5.generators.seed_stages import SeedTokenizerConfig
from mgp5.generators.seed_tokenizer import SeedTokenizer
from mgp5.heads.seed_release import _released, code_words
from mgp5.inference.reply import generate
from mgp5.inference.session import Session
from mgp5.options import SeedOptions, reply_options

K, CODES = 4, 16
SHAPE = {"queries": K, "width": 24, "causal_layers": 2, "codes": CODES, "code_width": 4, "block_layers": 1}
SHAPE |= {"reverse_layers": 1, "projection": 8, "dropout": 0.0, "vision_width": LAYERS["hidden_size"]}
VERSIONS = {
    "text": {"condition_length": LENGTH, "condition_width": WIDTH, "text_vocab": 30, "text_positions": 9},
    "image": {"condition_length": 1, "condition_width": IMAGE, "text_vocab": 0},
}


def tokenizer_file(version: str, folder: Path) -> tuple[Path, SeedTokenizer]:
    """A file with the release's names, and the tokenizer that it was made of."""
    torch.manual_seed(2)
    made = SeedTokenizer(SeedTokenizerConfig(detokenizer=version, **SHAPE | VERSIONS[version])).eval()
    torch.nn.init.normal_(made.quantizer.codebook.weight, std=0.3)
    state = {_released(name, version): value for name, value in made.state_dict().items()}
    if "temp" in state:
        state["temp"] = state["temp"].exp()
    torch.save(state | {"visual_encoder.cls_token": torch.ones(1)}, folder / f"{version}.pt")
    return folder / f"{version}.pt", made


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A BLIP-2, a SEED-LLaMA and its tokenizer."""
    folder, words, (first, *codes, last) = tmp_path_factory.mktemp("parts"), llama_tokenizer(), code_words(CODES)
    words.add_tokens([*codes, first, last])
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **TEXT)).save_pretrained(folder / "llm")
    words.save_pretrained(folder / "words")
    save_blip2(folder / "blip2")
    return folder


def convert(file: Path, parts: Path, generator: Path, out: Path):
    model = f"{parts / 'blip2'}+{parts / 'llm'}+{parts / 'words'}+{generator}"
    return CliRunner().invoke(cli.main, ["convert", str(file), "--model", model, "--out", str(out)])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_published_seed_becomes_a_model_that_reads_and_draws(version, parts, diffusion_folder, tmp_path, request):
    generator = diffusion_folder if version == "text" else request.getfixturevalue("unclip_folder")
    file, made = tokenizer_file(version, tmp_path)
    done = convert(file, parts, generator, tmp_path / "made")
    assert done.exit_code == 0 and "not used: visual_encoder.cls_token" in done.stderr, done.output
    moved = (tmp_path / "made").rename(tmp_path / "moved")
    model = load(moved)
    for name, value in made.state_dict().items():
        torch.testing.assert_close(model.head.tokenizer.state_dict()[name], value)
    assert model.config.guidance == {"text": 7.5, "image": 10.0}[version] and not model.config.system
    llama = LlamaForCausalLM.from_pretrained(parts / "llm")
    ids = list(model.head.ids)
    rows = model.backbone.core.get_input_embeddings().weight[ids]
    torch.testing.assert_close(rows, llama.model.embed_tokens.weight[ids], atol=0.01, rtol=0.01)  # written in bf16
    session, talk = Session(model), Conversation().add("user", Image(pixels=picture("blue")), "draw it")
    options = reply_options(SeedOptions, image="always", max_tokens=1, steps=1, max_images=1)
    assert list(generate(model, talk, options, session))[-1].message.images
    read = [token for token, _ in session.keys]
    inputs = model.backbone.preprocess([picture("blue")])
    assert not model.backbone.image_processor.do_center_crop and inputs["pixel_values"].shape[-2:] == (28, 28)
    codes = made.encode(model.backbone.vision_tokens(inputs))[0]
    start = read.index(ids[0])
    assert read[start : start + K + 2] == [ids[0], *(ids[1 + code] for code in codes), ids[-1]]


def test_parts_that_do_not_fit_are_named(parts, diffusion_folder, tmp_path):
    file, _ = tokenizer_file("image", tmp_path)
    done = convert(file, parts, diffusion_folder, tmp_path / "out")
    assert done.exit_code == 1 and f"image embeddings of 1x{IMAGE}" in done.stderr
    assert f"takes text states of {LENGTH}x{WIDTH}" in done.stderr and not (tmp_path / "out").exists()
    words = CliRunner().invoke(cli.main, ["convert", str(file), "--model", "a+b+c+d", "--out", str(tmp_path / "out")])
    assert words.exit_code == 2 and "expected BLIP2+LLM+WORDS+GENERATOR" in words.stderr
