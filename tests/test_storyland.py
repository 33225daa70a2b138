"""Storyland: determinism, disjoint splits, the grammar, the need for history, and the formats on disk."""

import csv
import json
import math
import random
import re
from dataclasses import replace
from itertools import pairwise, product

import pytest
from PIL import Image

from mgp5.errors import Mgp5Error
from mgp5.files import digest
from mgp5.storyland.draw import draw
from mgp5.storyland.language import accepts, mentions
from mgp5.storyland.talk import dialog
from mgp5.storyland.tell import Story, caption, story
from mgp5.storyland.world import ATTRIBUTES, Scene, held_out, random_scene, rng
from mgp5.storyland.write import write

SPLITS = ("train", "test")
COLOURS, SPECIES = ("|".join(ATTRIBUTES[name]) for name in ("colour", "species"))
SOMEBODY = rf"[^?]*\b(?:an? |(?:{COLOURS}) |an? (?:{COLOURS}) )(?:{SPECIES})\b"
DUE = (
    r"(now|next|and|back|show|draw|take|give|put|let|make|please draw|can you show|can you draw|could you draw|paint|"
    rf"i would like to see|what does)\b|{SOMEBODY}"
)
FIRST = Scene.from_indices((0,) * 7)


@pytest.fixture(scope="module")
def stories() -> dict[str, list[Story]]:
    return {split: [story(rng(split, 3, index), split) for index in range(300)] for split in SPLITS}


def test_the_world_has_more_than_100000_scenes_which_are_checked() -> None:
    assert math.prod(map(len, ATTRIBUTES.values())) == 129_024
    scene = random_scene(random.Random(0))
    assert Scene.from_indices(scene.indices()) == scene
    with pytest.raises(ValueError, match="colour 'pink'"):
        replace(scene, colour="pink")


def test_an_eighth_is_held_out_and_training_still_sees_every_value() -> None:
    triples = list(product(ATTRIBUTES["species"], ATTRIBUTES["colour"], ATTRIBUTES["place"]))
    held = {t for t in triples if held_out(replace(FIRST, species=t[0], colour=t[1], place=t[2]))}
    assert len(held) * 8 == len(triples)
    train = set(triples) - held
    for pair in (slice(2), slice(1, 3), slice(0, 3, 2)):
        assert {t[pair] for t in train} == {t[pair] for t in triples}


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_keep_to_their_split(split: str) -> None:
    assert all(held_out(random_scene(rng(split, 0, i), split)) == (split == "test") for i in range(500))


def test_seeds_of_the_splits_never_coincide() -> None:
    train, test = ({rng(split, 0, i).getrandbits(64) for i in range(500)} for split in SPLITS)
    assert not train & test
    assert rng("train", 0, 1).random() == rng("train", 0, 1).random()


def test_drawing_is_deterministic_and_the_seed_moves_things() -> None:
    scene = random_scene(random.Random(4))
    assert draw(scene, 1).tobytes() == draw(scene, 1).tobytes() != draw(scene, 2).tobytes()
    assert (draw(scene, 1).size, draw(scene, 1).mode, draw(scene, 1, size=64).size) == ((128, 128), "RGB", (64, 64))


def test_what_the_demo_has_learned_is_drawn_and_said_to_the_pixel_and_letter() -> None:
    """Trained weights depend on it."""
    scenes = [random_scene(random.Random(seed)) for seed in range(200)]
    told = [step.text for split in SPLITS for k in range(50) for step in story(rng(split, 5, k), split).steps]
    told += [turn.text for split in SPLITS for k in range(50) for turn in dialog(rng(split, 5, k), split).turns]
    told += [caption(scene, random.Random(seed)) for seed, scene in enumerate(scenes)]
    assert digest(b"".join(draw(scene, seed).tobytes() for seed, scene in enumerate(scenes)), 8) == "eb9c90b283ff986f"
    assert digest("\n".join(told), 8) == "5cfd94b5a9dc38d5"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_value_changes_the_picture(name: str) -> None:
    base = replace(FIRST, weather="snowy", wears="bow", prop="lantern")
    pictures = {draw(replace(base, **{name: value}), 0).tobytes() for value in ATTRIBUTES[name]}
    assert len(pictures) == len(ATTRIBUTES[name])


@pytest.mark.parametrize("split", SPLITS)
def test_captions_name_everything(split: str) -> None:
    words: set[str] = set()
    for i in range(600):
        source = rng(split, 1, i)
        scene = random_scene(source, split)
        text = caption(scene, source)
        assert text == text.lower() and accepts(text)
        assert {"wears": "nothing", "prop": "nothing", **mentions(text)} == scene.attributes()
        words |= set(text.split())
    assert len(words) < 120


@pytest.mark.parametrize("split", SPLITS)
def test_each_scene_follows_from_the_last_and_the_sentence(stories, split: str) -> None:
    for tale in stories[split]:
        first = tale.steps[0]
        assert mentions(first.text).items() <= first.scene.attributes().items()
        for before, after in pairwise(tale.steps):
            assert replace(before.scene, **mentions(after.text)) == after.scene
            assert sum(x != y for x, y in zip(before.scene.indices(), after.scene.indices(), strict=True)) in (1, 2)
        held = [held_out(step.scene) for step in tale.steps]
        assert sum(held[1:]) >= 2 if split == "test" else not any(held)


def test_later_sentences_need_the_history(stories) -> None:
    later = [mentions(step.text) for tale in stories["test"] for step in tale.steps[1:]]
    assert not any({"species", "colour"} & said.keys() or len(said) > 4 for said in later)
    first = [mentions(tale.steps[0].text) for tale in stories["test"]]
    for name in ("colour", "place", "weather"):  # visible in the first picture only
        assert 0.2 < sum(name not in said for said in first) / len(first) < 0.5


def test_the_grammar_accepts_what_is_told_and_nothing_else(stories) -> None:
    sentences = [step.text for split in SPLITS for tale in stories[split] for step in tale.steps]
    assert len(sentences) == 3000 and all(map(accepts, sentences))
    assert all(accepts(text.upper()) and accepts(text.rstrip(".")) for text in sentences[:500])
    shuffler, wrong = random.Random(0), 0
    for text in sentences:
        words = text.lower().rstrip(".").split()
        mixed = shuffler.sample(words, len(words))
        wrong += mixed != words and accepts(" ".join(mixed))
    assert wrong < 0.05 * len(sentences)  # a few shuffles are sentences again: "she ... and ..."
    wrongs = ("", "She.", "A fox", "She she jumps.", "A pink fox jumps.", "An fox jumps.", "She jumps and", "He sing.")
    assert not any(map(accepts, wrongs))


@pytest.mark.parametrize("split", SPLITS)
def test_dialogs_are_truthful_and_images_come_when_asked_for(split: str) -> None:
    replies = images = 0
    for i in range(200):
        talk, seen, known = dialog(rng(split, 2, i), split), None, {}
        assert len(talk.turns) in (4, 6, 8)
        assert [turn.role for turn in talk.turns] == ["user", "assistant"] * (len(talk.turns) // 2)
        for asked, given in zip(talk.turns[::2], talk.turns[1::2], strict=True):
            assert bool(re.match(DUE, asked.text, re.IGNORECASE)) == (given.scene is not None)
            if given.scene:
                several = re.search(r"\b(?:two|three|four|five) (\w+?)(?:e?s)?\b", asked.text)  # of which one is drawn
                said, drawn = {"species": several[1]} if several else mentions(asked.text), given.scene
                back = said.keys() == {"colour", "species"} and re.search("Back|again", asked.text)
                before = known[said["colour"], said["species"]] if back else seen
                if "species" in said and not back:  # somebody new: what is not said is plain, or named by the reply
                    left = {name: getattr(drawn, name) for name in ("colour", "place") if name not in said}
                    assert left.items() <= mentions(given.text).items()
                    plain = {"wears": "nothing", "prop": "nothing", "weather": "sunny", "action": "stands"}
                    before = replace(drawn, **plain, **left)
                assert replace(before, **said) == drawn
            seen = given.scene or asked.scene or seen
            assert seen is None or mentions(given.text).items() <= seen.attributes().items()
            known |= {(seen.colour, seen.species): seen} if seen else {}
            assert seen is None or split == "test" or not held_out(seen)
            replies, images = replies + 1, images + (given.scene is not None)
        assert split == "train" or any(turn.scene and held_out(turn.scene) for turn in talk.turns)
    assert 0.4 < images / replies < 0.65


@pytest.mark.parametrize(("split", "name"), [("train", "train"), ("test", "val")])
def test_the_three_formats(tmp_path, split: str, name: str) -> None:
    calls: list[tuple[int, int]] = []
    write(tmp_path / "a", split, 3, 2, 4, seed=7, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(k, 9) for k in range(1, 10)]
    root = tmp_path / "a"
    with (root / f"cc3m/cc3m_{name}.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [list(row) for row in rows] == [["caption", "image_path"]] * 3
    assert rows[2]["image_path"] == f"{name}/000000002.jpg" and (root / "cc3m" / rows[2]["image_path"]).exists()
    told = json.loads((root / f"vist/{name}_cleaned.json").read_text())
    mapping = json.loads((root / f"vist/{name}_image_mapping.json").read_text())
    assert [len(steps) for steps in told.values()] == [5, 5]
    for step in told["1"]:
        assert list(step) == ["caption", "image_id", "sequence_index"]
        with Image.open(root / "vist" / mapping[step["image_id"]]) as image:
            assert image.size == (128, 128)
    for folder in ("cc3m", "vist", "mmdialog"):
        facts = [json.loads(line) for line in (root / folder / "attributes.jsonl").read_text().splitlines()]
        images = {path.relative_to(root / folder).as_posix() for path in root.glob(f"{folder}/*/*.jpg")}
        assert {fact["image"] for fact in facts} == images
        assert all(list(fact["attributes"]) == list(ATTRIBUTES) for fact in facts)
    talks = root / "mmdialog" / split
    rows = [json.loads(line) for line in (talks / f"{split}_conversations.txt").read_text().splitlines()]
    for index, row in enumerate(rows):
        negatives = {"negative_candidate_media_keys": [], "negative_candidate_texts": []}
        assert row == {"conversation_id": index, "conversation": row["conversation"]} | negatives
        for turn in row["conversation"]:
            keys = [key for element in turn["turn"] for key in element]
            assert keys in (["__TEXT__"], ["__TEXT__", "__MEDIA__"])
            assert all((talks / f"{part['__MEDIA__']}.jpg").exists() for part in turn["turn"][1:])
    assert len(rows) == 4


def test_writing_is_reproducible_and_refuses_what_is_there(tmp_path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder, "train", 2, 1, 1, seed=1)
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert all((tmp_path / "a" / p).read_bytes() == (tmp_path / "b" / p).read_bytes() for p in files)
    for folder, split, message in (("a", "train", "not empty"), ("c", "valid", "split")):
        with pytest.raises(Mgp5Error, match=message):
            write(tmp_path / folder, split, 1, 0, 0, seed=1)
    assert not (tmp_path / "c").exists()
