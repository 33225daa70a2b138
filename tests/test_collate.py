"""Conversations -> batches: what is left out and told, how history is cut, and several pictures in a turn."""

from pathlib import Path

import pytest
import torch
from PIL import Image as pil
from tiny import TargetHead, picture

from mgp5.backbones.hf import HFBackbone
from mgp5.data import Keyed, Skipped, load_data
from mgp5.heads.minigpt5 import to_pixels, voken_tokens
from mgp5.messages import Conversation, Image, Message, Text
from mgp5.prompts import TASK_PROMPTS, continue_, example, history_truncations, narrate
from mgp5.training.batch import Collator

REAL = Path(__file__).resolve().parents[2] / "shared/data/real"
STORIES = Path(__file__).resolve().parents[1] / "examples/train/stories"
VOKENS = voken_tokens(4)
RED, BLUE, GREEN = (Image(pixels=picture(color)) for color in ("red", "blue", "green"))


@pytest.fixture(scope="module")
def backbone(mllm_folder) -> HFBackbone:
    loaded = HFBackbone.load(mllm_folder)
    loaded.add_tokens(list(VOKENS))
    return loaded


@pytest.fixture
def collate(backbone):
    """Collates with a limit of tokens."""
    head = TargetHead(backbone, VOKENS, (8, 8))
    return lambda *samples, limit=1000, **more: Collator(backbone, head, limit, **more)(samples)


def talk(*turns: str | Image | tuple, system: str = "") -> Conversation:
    """Turns by user and assistant in turn, the last one by the assistant."""
    conversation = Conversation().add("system", system) if system else Conversation()
    for number, turn in enumerate(turns):
        parts = turn if isinstance(turn, tuple) else (turn,)
        conversation = conversation.add("user" if (len(turns) - number) % 2 == 0 else "assistant", *parts)
    return conversation


def same(one, other) -> bool:
    """Whether two batches hold the same tensors."""
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("ids", "mask", "labels")]
    for name in ("context_images", "targets"):
        ours, theirs = getattr(one, name), getattr(other, name)
        pairs += [(ours[key], theirs[key]) for key in ours.keys() | theirs.keys()]
    return one.target_starts == other.target_starts and all(
        left is right or (left.shape == right.shape and torch.equal(left, right)) for left, right in pairs
    )


# What cannot be used


def write_pictures(folder: Path) -> dict[str, Path]:
    """Files that are no usable picture."""
    picture().save(folder / "good.png")
    pil.effect_noise((64, 64), 90).save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<html>404</html>")
    return {name: folder / f"{name}.jpg" for name in ("cut", "empty", "page", "gone")}


def test_broken_samples_are_left_out_and_named_never_replaced(collate, tmp_path) -> None:
    broken = write_pictures(tmp_path)
    good = [talk("a", RED), talk(("b", BLUE), "c")]
    samples: list = [("one", good[0])]
    samples += [(f"drawn {name}", talk("x", Image(path=path))) for name, path in broken.items()]
    samples += [(f"seen {name}", talk(("x", Image(path=path)), "y")) for name, path in broken.items()]
    samples += [
        Skipped("broken shard", "00012.tar"), ("bytes", talk("x", Image(data=b"no picture"))),
        ("text", talk("half a character \ud800", "x")), ("two", good[1]),
    ]  # fmt: skip
    batch = collate(*samples)
    assert same(batch, collate(*good))
    kinds = [note.kind for note in batch.skipped]
    assert kinds == ["broken image"] * 8 + ["broken shard", "broken image", "unfit text"]
    places = [note.where for note in batch.skipped]
    assert [place.split(" (")[0] for place in places[:8]] == [key for key, _ in samples[1:9]]
    assert str(broken["cut"]) in places[0] and "truncated" in places[0] and "no image at" in places[3]
    assert not collate(*good).skipped


def test_a_row_that_fails_costs_that_row(collate, backbone, monkeypatch) -> None:
    real = backbone.preprocess

    def preprocess(images):
        if images[0].size == (7, 7):
            raise ZeroDivisionError("seven")
        return real(images)

    monkeypatch.setattr(backbone, "preprocess", preprocess)
    good, odd = talk(("a", RED), "b"), talk(("a", Image(pixels=picture().resize((7, 7)))), "b")
    spelt = talk("[IMG0]?", ("it begins with [IMG0]", RED)), talk("x", "[IM[IMG0]G0] [IMG0]")
    batch = collate(("odd", odd), ("good", good), *(("spelt", sample) for sample in spelt))
    assert [tuple(note) for note in batch.skipped] == [("unfit sample", "odd (ZeroDivisionError: seven)")]
    assert (len(batch.ids), batch.num_targets) == (3, 1)
    monkeypatch.setattr("mgp5.prompts._plain", lambda backbone, text: text)  # as if a spelling came through
    batch = collate(("good", good), *(("spelt", sample) for sample in spelt))
    assert len(batch.ids) == 1 and [note.kind for note in batch.skipped] == ["unfit sample"] * 2


def test_large_jpegs_are_decoded_smaller(tmp_path) -> None:
    pil.effect_noise((4200, 2100), 9).save(tmp_path / "large.jpg")
    image = Image(path=tmp_path / "large.jpg")
    assert [image.load(least).size for least in (None, 1024, 1051)] == [(4200, 2100), (2100, 1050), (4200, 2100)]


def test_nothing_left_is_an_empty_batch(collate, backbone) -> None:
    batch = collate(("k", talk("x", Image(data=b""))))
    assert batch.ids.shape == batch.labels.shape == batch.mask.shape == (0, 0) and batch.ids.dtype == torch.int64
    assert batch.target_starts == batch.target_rows == batch.captions == () and batch.num_targets == 0
    assert batch.targets == {}
    assert batch.to(torch.device("cpu")).skipped == batch.skipped == (Skipped("broken image", batch.skipped[0].where),)


def test_a_template_that_refuses_a_dialogue_leaves_it_out(collate, backbone, monkeypatch) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
    monkeypatch.setattr(backbone.tokenizer, "chat_template", strict + backbone.tokenizer.chat_template)
    batch = collate(("swapped", talk("a", "b", "c")), ("plain", talk("a", "b")))
    assert batch.skipped == (Skipped("unfit text", "swapped (the user begins)"),) and len(batch.ids) == 1


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 90), (270, 3), (3000, 40)])
@pytest.mark.parametrize("mode", ["RGB", "CMYK", "I;16", "P", "LA"])
def test_odd_pictures_do_not_stop_a_run(size, mode, collate) -> None:
    odd = Image(pixels=pil.new("RGB", size, "blue").convert(mode) if mode != "I;16" else pil.new(mode, size, 9000))
    batch = collate(("drawn", talk("x", odd)), ("seen", talk(("x", odd), "y")))
    assert batch.targets["pixels"].shape == (1, 3, 8, 8)
    assert len(batch.ids) + len(batch.skipped) == 2 and all(note.kind == "broken image" for note in batch.skipped)


def test_pictures_to_be_drawn_are_cropped_in_the_middle() -> None:
    wide = pil.new("RGB", (30, 10), "red")
    wide.paste(pil.new("RGB", (10, 10), "blue"), (10, 0))
    assert to_pixels(wide, (10, 10)).unique().tolist() == [-1.0, 1.0] and to_pixels(wide, (10, 10))[2].min() == 1
    tall = to_pixels(wide.rotate(90, expand=True), (5, 4))
    assert tall.shape == (3, 5, 4) and tall[2, 1:-1].min() > 0.9 > -0.9 > tall[0, 1:-1].max()


# History


def contents(conversation: Conversation) -> list[list]:
    return [[part.text if isinstance(part, Text) else part for part in m.content] for m in conversation.messages]


def test_cuts_are_whole_turns_then_scenes() -> None:
    chat = talk(("a", RED), "b", "c", ("d", BLUE), "one", RED, "two", BLUE, ("e", GREEN), ("f", RED), system="s")
    first = [["c"], ["one"], ["two"], ["e", GREEN]]
    assert [contents(cut)[:2] for cut in history_truncations(chat)] == [[["s"], turn] for turn in first]
    kept = [(cut.messages[-1], cut.messages[1].role) for cut in history_truncations(chat)]
    assert kept == [(chat.messages[-1], "user")] * len(first)
    story = narrate([("one", RED), ("two", BLUE), ("three", GREEN)], RED).add("assistant", "four")
    ends = [["two", BLUE, "three", GREEN], ["three", GREEN], []]
    cuts, asked = [contents(cut)[1] for cut in history_truncations(story)], [TASK_PROMPTS["narrate"][0], RED]
    assert cuts == [[*end, *asked] for end in ends]
    short = talk((RED, BLUE, "what is this?"), "x"), talk("hello", "x"), talk("x")
    assert not any(map(history_truncations, short))
    swapped = Conversation((*talk("a", "b").messages[::-1], Message("assistant", (Text("c"),))))  # the assistant begins
    assert [contents(cut) for cut in history_truncations(swapped)] == [[["a"], ["c"]]]


def test_long_history_is_cut_no_more_than_needed(collate, backbone) -> None:
    story = continue_([(f"scene {n} " + "x" * 20, image) for n, image in enumerate((RED, BLUE, GREEN))])
    chat = Conversation(
        (*talk("hello there", ("hi", RED), "and", "so", system="be kind").messages, *story.messages[1:])
    ).add("assistant", "the end", BLUE)
    forms = [collate(form) for form in (chat, *history_truncations(chat))]
    lengths = [form.ids.shape[1] for form in forms]
    assert len(forms) == 6 and lengths == sorted(lengths, reverse=True)
    assert len(forms[0].context_images["pixel_values"]) > len(forms[2].context_images["pixel_values"])
    for limit in range(lengths[-1] - 2, lengths[0] + 2, 3):
        batch = collate(("k", chat), limit=limit)
        fitting = [form for form in forms if form.ids.shape[1] <= limit]
        if not fitting:
            note = Skipped("too long", f"k ({lengths[0]} tokens, {limit} fit)")
            assert batch.skipped == (note,) and not len(batch.ids)
        else:
            assert same(batch, fitting[0])
            assert [note.kind for note in batch.skipped] == ["history cut"] * (fitting[0] is not forms[0])
    layouts = [([voken], [voken]) for voken in backbone.tokenizer.convert_tokens_to_ids(list(VOKENS[:1]))]
    instruction = example(backbone, forms_last := history_truncations(chat)[-1], VOKENS[0], layouts)
    assert "be kind" in backbone.tokenizer.decode(instruction.ids)
    assert contents(forms_last)[1] == [TASK_PROMPTS["continue"][0]]


# Several pictures in a turn


def test_several_pictures_in_a_turn_are_several_runs_and_several_seen(collate, backbone) -> None:
    dialog = talk(("look", RED, BLUE), ("mine", GREEN, RED))
    batch = collate(dialog, dialog)
    assert batch.target_rows == (0, 0, 1, 1) and batch.captions == ("",) * 4 and not batch.skipped
    trigger, *forced = backbone.tokenizer.convert_tokens_to_ids(list(VOKENS))
    for row, start in zip(batch.target_rows, batch.target_starts, strict=True):
        assert batch.ids[row, start : start + 4].tolist() == [trigger, *forced]
    assert batch.target_starts[1] == batch.target_starts[0] + 4  # nothing stands between two pictures
    expected = torch.stack([to_pixels(image.load(), (8, 8)) for image in (GREEN, RED)] * 2)
    assert torch.equal(batch.targets["pixels"], expected)
    together = backbone.preprocess([image.load() for image in (RED, BLUE)] * 2)
    assert all(torch.equal(batch.context_images[name], value) for name, value in together.items())
    slots = (batch.ids == backbone.image_token_id).sum(dim=1)
    assert slots.tolist() == [sum(backbone.slots(together)) // 2] * 2


# Data


def test_ten_lines_of_ones_own_stories(collate) -> None:
    data = Keyed([load_data("jsonl", STORIES)])
    batch = collate(*data)
    assert len((STORIES / "train.jsonl").read_text().splitlines()) == 10
    assert len(data) == 12 and not data.problems and not batch.skipped
    assert batch.ids.shape[0] == 12 and batch.num_targets == 10 and batch.captions[0].startswith("a yellow bear")
    assert sum(path.stat().st_size for path in STORIES.glob("*.png")) < 30_000


@pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not beside this repository")
def test_real_samples_fit_and_are_cut_where_they_must(collate) -> None:
    parts = [load_data("cc3m", REAL / "CC3M", "val"), load_data("vist", REAL / "VIST", "val")]
    parts.append(load_data("mmdialog", REAL / "MMDialog", "test"))
    data = Keyed(parts)
    batch = collate(*data, limit=4000)
    assert len(batch.ids) == len(data) == 19 and not batch.skipped and batch.targets["pixels"].abs().max() <= 1
    longest = int(batch.mask.sum(dim=1).max())
    tight = collate(*data, limit=longest - 1)
    assert len(tight.ids) == 19 and tight.ids.shape[1] < longest
    assert {note.kind for note in tight.skipped} == {"history cut"}
