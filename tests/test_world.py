"""What a model of one world says of words and images that are not of it."""

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as pil

from mgp5.storyland.draw import draw
from mgp5.storyland.judge import is_foreign
from mgp5.storyland.talk import dialog
from mgp5.storyland.tell import story as told_story
from mgp5.storyland.words import unknown_words
from mgp5.storyland.world import random_scene, rng

HERE = Path(__file__).parents[1]
PHOTOS = sorted((HERE.parent / "shared/data/real").rglob("*.jpg"))


def render(number: int, size: int = 128) -> pil.Image:
    """Of a held-out scene."""
    return draw(random_scene(rng("test", 9, number), "test"), number, size)


def as_jpeg(picture: pil.Image, quality: int) -> pil.Image:
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return pil.open(buffer)


def photo_like(seed: int, side: int = 128) -> pil.Image:
    """Noise whose strength falls with its frequency, alike in all colours, as in photos of nature."""
    drawn, frequency = np.random.default_rng(seed), np.hypot(*np.meshgrid(*[np.fft.fftfreq(side)] * 2))
    frequency[0, 0] = 1
    waves = np.fft.fft2(drawn.normal(size=(3, side, side))) / frequency ** drawn.uniform(1, 1.6)
    layers = np.fft.ifft2(waves).real
    layers /= layers.std(axis=(1, 2), keepdims=True)
    mixed = np.tensordot([[0.9, 0.2, 0.1], [0.9, 0, -0.2], [0.9, -0.2, 0.1]], layers, 1) * drawn.uniform(0.15, 0.28)
    values = (mixed + drawn.uniform(0.3, 0.65)).clip(0, 1) * 255
    return pil.fromarray(values.transpose(1, 2, 0).astype(np.uint8))


SETS = {
    "renders": lambda: map(render, range(60)),
    "twice as large": lambda: (render(number, 256) for number in range(60, 90)),
    "JPEGs": lambda: (as_jpeg(render(number), 30 + number % 65) for number in range(90, 155)),
    "of the examples": lambda: map(pil.open, sorted((HERE / "examples/picnic").glob("*.png"))),
}


@pytest.mark.parametrize("kind", SETS)
def test_no_image_of_storyland_is_called_foreign(kind):
    assert [number for number, image in enumerate(SETS[kind]()) if is_foreign(image.convert("RGB"))] == []


def test_images_like_photos_are_foreign():
    found = [is_foreign(photo_like(seed)) for seed in range(20)]
    assert np.mean(found) >= 0.95
    assert is_foreign(pil.new("RGB", (300, 200), "red"))


@pytest.mark.skipif(not PHOTOS, reason="no photos in ../shared/data/real")
def test_photos_are_foreign():
    assert [path.name for path in PHOTOS if not is_foreign(pil.open(path).convert("RGB"))] == []


def test_no_sentence_of_storyland_has_an_unknown_word():
    draws = [rng("train", 1, number) for number in range(40)]
    texts = [turn.text for draw in draws for turn in dialog(draw, "train").turns]
    texts += [text for draw in draws for text in [step.text for step in told_story(draw, "train").steps]]
    assert [word for text in texts for word in unknown_words(text)] == []
    assert unknown_words("A purple dragon flies over two castles.") == ["dragon", "flies", "castles"]
    assert unknown_words("Draw two foxes.") == []


COMMANDS = {
    "story": "story --images fox.png photo.png photo.png --text lines.txt --scenes 1 --out",
    "chat": "chat --image photo.png --message dragons --out",
    "batch": "story --batch lines.jsonl --out",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_of_one_world_says_what_is_not_of_it(mgp5, small_model, tmp_path, monkeypatch, command):
    (tmp_path / "lines.txt").write_text("A fox.\nA dragon.\n")
    photo_like(0).save(tmp_path / "photo.png")
    render(0).save(tmp_path / "fox.png")
    scenes = [{"path": "photo.png", "text": "A fox."}], [{"path": "fox.png"}, {"text": "A dragon."}], [{"text": "Fox"}]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"story": own, "scenes": 0}) + "\n" for own in scenes))
    said = COMMANDS[command].split()
    assert "Storyland" not in mgp5(*said, "out").stderr
    monkeypatch.setattr(small_model, "config", replace(small_model.config, world="storyland"))
    monkeypatch.setattr("mgp5.apps.batch.world", lambda _: "storyland")
    told = mgp5(*said, "again").stderr
    start = "this model knows one drawn world only, Storyland: it has "
    if command == "batch":
        assert f"line 1: {start}never seen a picture like this (1 more line so)" in told
        return
    assert told.count("no word for dragon") == told.count("never seen a picture like this") == 1 and start in told
    events = [json.loads(line) for line in mgp5(*said, "json", "--json").stdout.splitlines()]
    assert [event["event"] for event in events].count("note") == (1 if command == "chat" else 2)
