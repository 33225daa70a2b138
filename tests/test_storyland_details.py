"""The kite that no caption tells: what a picture shows of it is measured, and written as a task of two images."""

import json
import random

from PIL import Image as pil

from mgp5.data import load_data
from mgp5.prompts import TASK_PROMPTS
from mgp5.storyland.details import Detail, all_details, kept, read_detail
from mgp5.storyland.draw import draw
from mgp5.storyland.language import mentions
from mgp5.storyland.world import random_scene
from mgp5.storyland.write import read_scenes, write


def test_every_kite_is_read_off_whatever_the_scene():
    source = random.Random(0)
    for detail in source.sample(all_details(), 12):
        image = draw(random_scene(source), source.randrange(99), detail=detail)
        assert read_detail(image) == detail
        noisy = pil.blend(image, image.resize((40, 40)).resize((128, 128)), 0.5)
        assert read_detail(noisy).colour == detail.colour and read_detail(noisy).corner == detail.corner
    kite, other = Detail("orange", "dots", "large", "low left"), Detail("teal", "dots", "small", "low left")
    image = draw(random_scene(source), 1, detail=other)
    assert kept(image, kite) == {"colour": False, "pattern": True, "size": False, "corner": True}


def test_a_sample_shows_the_kite_twice_and_tells_nothing_of_it(tmp_path):
    write(tmp_path, "train", 0, 0, 0, seed=3, details=4)
    data, scenes = load_data("jsonl", tmp_path / "details"), dict(read_scenes(tmp_path / "details"))
    rows = [json.loads(line) for line in (tmp_path / "details/attributes.jsonl").read_text().splitlines()]
    kites = {row["image"]: Detail(**row["detail"]) for row in rows}
    assert len(data) == 4 and len({tuple(vars(kite).values()) for kite in kites.values()}) > 1
    for sample in data:
        given, drawn = sample.images
        one, other = (kites[str(image.path.relative_to(tmp_path / "details"))] for image in (given, drawn))
        assert one == other == read_detail(given.load()) == read_detail(drawn.load())
        assert "kite" not in sample.messages[0].text and sample.messages[1].images == (drawn,)
        first, second = (scenes[image.path.resolve()] for image in (given, drawn))
        assert first != second and (first.species, first.colour) == (second.species, second.colour)


def test_a_narration_tells_all_that_its_picture_shows(tmp_path):
    write(tmp_path, "test", 0, 0, 0, seed=3, narrations=5)
    data, scenes = load_data("jsonl", tmp_path / "narrations", "test"), dict(read_scenes(tmp_path / "narrations"))
    for sample in data:
        (image,), asked = sample.images, sample.messages[-2].text
        said = {"wears": "nothing", "prop": "nothing"} | mentions(sample.messages[-1].text)
        assert said == scenes[image.path.resolve()].attributes() and asked in TASK_PROMPTS["narrate"]
    assert len(data) == 5
