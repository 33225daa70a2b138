"""VIST stories: the three tasks of the paper, their prompts, and what happens to stories that are malformed."""

import json
from pathlib import Path

import pytest
from test_data import roles, shape, story, write_vist

from mgp5.data import vist
from mgp5.errors import Mgp5Error
from mgp5.messages import Image, Text
from mgp5.prompts import STORY_SYSTEM, TASK_PROMPTS, continue_, illustrate, narrate


def test_vist_has_the_three_tasks_of_the_paper(tmp_path: Path) -> None:
    data = vist.load(write_vist(tmp_path, {"s": story()}))
    keys = [data.key(index) for index in range(len(data))]
    assert keys[:4] == ["s/0/illustrate", "s/1/illustrate", "s/1/continue", "s/1/narrate"] and len(keys) == 13
    samples = dict(zip(keys, data, strict=True))
    assert {tuple(roles(sample)) for sample in data} == {("system", "user", "assistant")}
    assert {sample.messages[0].text for sample in data} == {STORY_SYSTEM}
    assert shape(samples["s/0/illustrate"]) == ["t", "i"]
    assert shape(samples["s/2/illustrate"]) == ["titit", "i"]
    assert shape(samples["s/2/continue"]) == ["titit", "ti"]
    assert shape(samples["s/2/narrate"]) == ["tititi", "t"]
    user, answer = samples["s/2/continue"].messages[1:]
    assert user.content[:3] == (Text("step 0"), Image(tmp_path / "images/0.jpg"), Text("step 1"))
    assert user.content[-1].text in TASK_PROMPTS["continue"]
    assert answer.content == (Text("step 2"), Image(tmp_path / "images/2.jpg"))
    assert "step 3" in samples["s/3/illustrate"].messages[1].content[-1].text
    assert samples["s/3/narrate"].messages[1].content[-1] == Image(tmp_path / "images/3.jpg")


def test_vist_options(tmp_path: Path) -> None:
    folder = write_vist(tmp_path, {"s": story()})
    assert len(vist.load(folder, tasks=("narrate",))) == 4
    first = vist.load(folder, tasks=("narrate",), narrate_first=True)
    assert len(first) == 5 and shape(first[0]) == ["ti", "t"]
    assert shape(vist.load(folder, tasks=("continue",), context="text")[-1]) == ["ttttt", "ti"]
    assert shape(vist.load(folder, tasks=("narrate",), context="none")[-1]) == ["ti", "t"]


WORDINGS = (2, 1, 2, 1, 0, 0)  # what seed 0 chose when this was written: training data must not drift


def test_vist_wording_is_stable_and_varied(tmp_path: Path) -> None:
    data = vist.load(write_vist(tmp_path, {f"story {n}": story() for n in range(20)}), tasks=("continue",))
    wordings = [sample.messages[1].content[-1].text for sample in data]
    assert set(wordings) == set(TASK_PROMPTS["continue"])
    assert wordings[:6] == [TASK_PROMPTS["continue"][choice] for choice in WORDINGS]
    assert wordings != [s.messages[1].content[-1].text for s in vist.load(tmp_path, tasks=("continue",), seed=1)]


def test_story_prompts() -> None:
    image = Image(Path("a.png"))
    asked = illustrate([("one", image)], "a {cat}")
    texts = [part.text for part in asked.messages[1].content if isinstance(part, Text)]
    assert texts == ["one", "Generate an image with the scene description: a {cat}"]
    assert continue_([], 2).messages[1].content == (Text("What should happen then?"),)
    assert narrate([("", image)], image).messages[1].content == (image, Text(TASK_PROMPTS["narrate"][0]), image)
    alone = narrate([("one", image)], image, 1, context="none").messages[1].content
    assert alone == (Text(TASK_PROMPTS["narrate"][1]), image)
    with pytest.raises(Mgp5Error, match="unknown context"):
        continue_([], context="some")


def test_vist_counts_what_it_skips(tmp_path: Path) -> None:
    mapping = {"0": "images/0.jpg", "1": "images/1.jpg", "2": "images/gone.jpg"}
    bad = {
        "none": [], "text": "x", "steps": ["x"], "key": [{"caption": "a"}], "caption": [{**story()[0], "caption": 1}],
    }  # fmt: skip
    data = vist.load(write_vist(tmp_path, {"s": story(), "unmapped": story()[:1], **bad}, mapping))
    assert data.problems == {"missing image": 2, "bad story": 5}
    assert [len(read.scenes) for read in data.stories] == [2] and len(data) == 2 + 1 + 1


def official(story: str, order: int, photo: str, text: str, original: str | None = None) -> list[dict]:
    """An annotation as the data set has them: a list of one."""
    own = {"original_text": original} if original else {}
    row = {"story_id": story, "worker_arranged_photo_order": order, "photo_flickr_id": photo, "text": text, **own}
    return [row | {"storylet_id": f"{story}{order}", "album_id": "7", "tier": "story-in-sequence"}]


@pytest.mark.parametrize("folder", ["images", "train", "images/train", "sis", ""])
def test_official_annotations(folder: str, tmp_path: Path) -> None:
    for part in ("sis", folder):
        (tmp_path / part).mkdir(parents=True, exist_ok=True)
    for name in ("11.jpg", "12.png", "13.jpg"):
        (tmp_path / folder / name).touch()
    rows = [official("9", 2, "13", "[male] left ."), official("8", 0, "11", "alone"), [{"story_id": "9"}]]
    rows += [official("9", 0, "12", "[male] came .", "Tom came."), official("9", 1, "11", "he sat .")]
    rows += [official("9", 3, "99", "lost"), official("7", 0, "98", "y")]
    table = tmp_path / ("sis" if folder else "") / "train.story-in-sequence.json"
    table.write_text(json.dumps({"images": [{"id": "11", "album_id": "7"}], "albums": [], "annotations": rows}))
    data = vist.load(tmp_path, tasks=("illustrate",))
    told = {story.name: [text for text, _ in story.scenes] for story in data.stories}
    assert told == {"9": ["Tom came.", "he sat .", "[male] left ."], "8": ["alone"]}
    files = [image.path.resolve() for image in data[2].images]
    assert files == [tmp_path / folder / name for name in ("12.png", "11.jpg", "13.jpg")]
    assert data.problems == {"bad annotation": 1, "missing image": 2}
    assert data.problems.first["missing image"] == "train.story-in-sequence.json story 9 99"


def test_a_story_that_is_listed_twice_is_one_story(tmp_path: Path) -> None:
    data = vist.load(write_vist(tmp_path, {"s": story() + story()}))
    assert [len(s.scenes) for s in data.stories] == [5] and data.problems == {"scene listed twice": 1}


@pytest.mark.parametrize(
    ("text", "match"), [("{\n]", r"train_cleaned.json:2 is not JSON"), ("[]", "holds a JSON list")]
)
def test_vist_malformed_files(text: str, match: str, tmp_path: Path) -> None:
    write_vist(tmp_path, {})
    (tmp_path / "train_cleaned.json").write_text(text)
    with pytest.raises(Mgp5Error, match=match):
        vist.load(tmp_path)
    (tmp_path / "train_cleaned.json").write_text("{}")
    (tmp_path / "train_image_mapping.json").unlink()
    with pytest.raises(Mgp5Error, match=r"no .*train_image_mapping\.json"):
        vist.load(tmp_path)
