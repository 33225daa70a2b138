"""`mgp5 eval` as users run it: tiny models and the demo, real files and processes, the papers' data where it is."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from browser import Page
from click.testing import CliRunner
from tiny import same_pixels
from tiny_training import fork_two, fresh

from mgp5 import cli
from mgp5.config import ModelConfig
from mgp5.errors import Mgp5Error
from mgp5.evaluation import EvaluateRequest, run
from mgp5.evaluation.encoders import Encoders
from mgp5.evaluation.replies import Replies
from mgp5.evaluation.run import Replied, answer, reply_by
from mgp5.evaluation.storyland import METRICS
from mgp5.evaluation.systems import Entry, NoHead
from mgp5.evaluation.tasks import load
from mgp5.heads import Head
from mgp5.loading import load_backbone, save_checkpoint
from mgp5.messages import Image, Message, Text
from mgp5.model import InterleavedModel
from mgp5.options import ModelRequest, reply_options
from mgp5.storyland.draw import draw
from mgp5.storyland.language import mentions
from mgp5.storyland.metrics import acceptance
from mgp5.storyland.world import ATTRIBUTES
from mgp5.storyland.write import write
from mgp5.training.presets import preset

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
REAL = Path(__file__).parents[2] / "shared/data/real"
QUICK = ["--steps", "2", "--set", "max_tokens=6", "--backend", "eager", "--batch", "2"]


@pytest.fixture(scope="module")
def trained(llava_folder, diffusion_folder, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("trained")
    model = fresh(llava_folder, diffusion_folder)
    model.prepare(preset("pretrain", "demo"))
    save_checkpoint(model, folder)
    return str(folder)


def evaluate(out: Path, *args: str) -> dict:
    result = CliRunner().invoke(cli.main, ["eval", "--out", str(out), *QUICK, *args])
    assert result.exit_code == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    if "--json" in args:
        assert json.loads(result.stdout.splitlines()[-1])["tables"] == report["tables"]
    else:
        assert all(table in result.stdout for table in report["tables"]) and "replies" in result.stdout
        assert str(out / "report.html") in result.stderr.splitlines()[-1]
    assert "What the words mean" in Page(out / "report.html").text
    return report


def refused(out: Path, *args: str) -> str:
    result = CliRunner().invoke(cli.main, ["eval", "--out", str(out), *QUICK, *args])
    assert result.exit_code == 2
    return result.stderr


def numbers(report: dict) -> dict:
    """Tables without what depends on the clock."""
    return {
        table: {name: entry | {"seconds": 0} for name, entry in systems.items()}
        for table, systems in report["tables"].items()
    }


def pictures(page: Page) -> int:
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links("img"))
    return len(page.links("img"))


def test_tasks_ask_what_the_papers_ask(storyland):
    data = load("mmdialog", storyland / "mmdialog", "train", history=1)
    assert {len(sample.load().messages) for sample in data.samples} == {3}  # the system's, one before, the reply
    data = load("vist", storyland / "vist", "train")
    by_key = {sample.key: sample for sample in data.samples}
    assert len(by_key) == len(data.samples) == 5 + 4 + 1 + 3
    last = by_key["0/4/illustrate/full"]
    assert last.tables == ("illustrate, full", "last, full")  # one picture, which counts in both
    shown = {context: by_key[f"0/4/illustrate/{context}"].load() for context in ("none", "text", "image", "full")}
    assert [len(c.images) for c in shown.values()] == [1, 1, 5, 5]  # the last is the true reply's
    first = by_key["0/0/illustrate/full"].words
    assert [first in conversation.messages[1].text for conversation in shown.values()] == [False, True, False, True]
    assert all(conversation.messages[-1].content == (last.load().images[-1],) for conversation in shown.values())
    assert by_key["0/3/narrate/full"].load().messages[-1].content[0].text == by_key["0/3/illustrate/full"].words
    (whole,) = load("storyland", storyland, "train", tasks=("story",)).samples
    assert whole.rounds == 4 and len(whole.load().messages[-1].content) == 8
    assert [type(part) for part in whole.load().messages[-1].content[:2]] == [Text, Image]
    silent = answer(lambda asks: [Message("assistant", (Text("She waves."),)) for _ in asks], [whole], 0)
    assert [reply.content for reply in silent] == [(Text("She waves."),)]  # without a picture a story ends
    for wrong in ({"tasks": ("caption",)}, {"tasks": ("dialogue",)}):
        with pytest.raises(Mgp5Error, match="has no task"):
            load("vist", storyland / "vist", "train", **wrong)
    with pytest.raises(Mgp5Error, match="--context with format mmdialog"):
        load("mmdialog", storyland / "mmdialog", "train", contexts=("none",))


def test_first_pictures_and_other_characters_count_by_what_is_asked_for(tmp_path):
    write(tmp_path / "data", "test", 0, 2, 12, seed=0)
    data = load("storyland", tmp_path / "data", "test", tasks=("first", "subject"))
    first = [sample for sample in data.samples if sample.tables == ("first, none",)]
    assert len(first) == 2 and all(len(sample.load().images) == 1 for sample in first)
    assert {len(sample.open | mentions(sample.words).keys()) for sample in first} == {7}
    others = [sample for sample in data.samples if sample.tables == ("subject",)]
    assert others and len(first) + len(others) == len(data.samples)
    for sample in others:
        *_, before, drawn = [data.scenes[image.path.resolve()] for image in sample.load().images]
        assert (before.colour, before.species) != (drawn.colour, drawn.species)
        assert sample.open <= {"colour", "place"} - mentions(sample.words).keys()
        assert "again" not in sample.words or not sample.open  # whoever comes back looks as before
    both = load("storyland", tmp_path / "data", "test", tasks=("dialogue", "subject")).samples
    assert [sample.key for sample in both if "subject" in sample.tables] == [sample.key for sample in others]
    sample = first[0]
    (image,), said = sample.load().images, mentions(sample.words)
    scene = data.scenes[image.path.resolve()]

    def right(names: Iterable[str]) -> float:  # of a drawing in which attributes of these names are others
        changed = {n: next(v for v in ATTRIBUTES[n] if v != getattr(scene, n)) for n in names}
        reply = Message("assistant", (Image(pixels=draw(replace(scene, **changed), 3)),))
        replies = Replies([(sample, sample.load().messages[-1], reply)])
        return (
            METRICS["attributes"]
            .measure(replies, Encoders({}, torch.device("cpu"), data.scenes), torch.Generator())
            .value
        )

    assert right(sample.open) == 1 and right(["species"]) == pytest.approx(1 - 1 / len(said))


def test_a_name_that_two_samples_have_is_made_unique(storyland, tmp_path):
    shutil.copytree(storyland / "cc3m", tmp_path / "cc3m")
    table = tmp_path / "cc3m/cc3m_train.tsv"
    table.write_text(table.read_text() + table.read_text().splitlines()[1] + "\n")
    keys = [sample.key for sample in load("cc3m", tmp_path / "cc3m", "train").samples]
    assert len(set(keys)) == len(keys) == 7 and keys[1] == f"{keys[0]}#2"


@pytest.mark.skipif(not REAL.is_dir(), reason="the samples of the papers' data are not here")
def test_the_papers_data_by_the_papers_metrics(trained, clip_folder, tmp_path):
    """On CC3M, VIST and MMDialog themselves; CLIP is tiny and random, other weights are missing and say so."""
    weights = ["--model", trained, *(f"--weights=clip-{size}={clip_folder}" for size in "lb")]
    for format, expected, measured in (
        ("cc3m", {"caption": 2}, ["CLIP-I", "CLIP-T"]),
        ("vist", {"illustrate, full": 5, "narrate, full": 4, "continue, full": 1, "last, none": 1}, ["CLIP-I"]),
        ("mmdialog", {"dialogue": 5}, ["MM-Relevance", "MM-Relevance, pooled", "pictures when due"]),
    ):
        folder = {"cc3m": "CC3M", "vist": "VIST", "mmdialog": "MMDialog"}[format]
        report = evaluate(tmp_path / format, "--format", format, "--data", str(REAL / folder), *weights)
        found = {table: systems["model"] for table, systems in report["tables"].items()}
        if format != "mmdialog":
            assert expected.items() <= {table: entry["replies"] for table, entry in found.items()}.items()
        first = found[next(iter(expected))]
        assert first["asked"] == first["replies"] + first["failed"] and first["replies"] > 0
        for name in measured:
            number = first["metrics"][name]
            assert number["low"] <= number["value"] <= number["high"] and number["n"] > 0
        assert "torch_fidelity" in report["left_out"]["IS"] and report["published"]
        page = Page(tmp_path / format / "report.html")
        assert pictures(page) >= 2 and "theirs" in page.text and report["settings"]["weights"] in page.text
    assert "last, image" in json.loads((tmp_path / "vist/report.json").read_text())["tables"]


def test_baselines_reply_beside_the_model(trained, storyland, llava_folder, diffusion_folder, tmp_path):
    given = ["--model", trained, "--format", "vist", "--data", str(storyland / "vist"), "--split", "train"]
    given += ["--metric", "BLEU-1"]
    alone = evaluate(tmp_path / "out", *given)
    made = {file: file.read_bytes() for file in (tmp_path / "out").glob("*/model*/*")}
    assert evaluate(tmp_path / "out", *given, "--json")["tables"] == alone["tables"]  # a second call tells them too
    baselines = ["t2i", f"t2i-tuned={diffusion_folder}", f"two-stage={llava_folder}", f"gill={trained}", "text-only"]
    report = evaluate(tmp_path / "out", *given, *(f"--baseline={name}" for name in baselines))
    assert {file: file.read_bytes() for file in made} == made  # the model has not replied again
    who = {table: list(systems) for table, systems in report["tables"].items()}
    assert who["illustrate, full"] == ["model", "t2i", "t2i-tuned", "two-stage", "gill"]
    assert who["last, image"] == ["model", "two-stage", "gill"]  # text-to-image sees no pictures
    assert who["narrate, full"] == ["model", "gill", "text-only"]
    for table, systems in numbers(alone).items():
        assert systems["model"] == report["tables"][table]["model"] | {"seconds": 0} == numbers(report)[table]["gill"]
    pictures = [sorted((tmp_path / f"out/pictures/{name}").iterdir()) for name in ("t2i", "t2i-tuned", "gill")]
    same = [same_pixels(one, other) for one, other in zip(*pictures[:2], strict=True)]
    assert len(same) == 5 + 2 and all(same)  # the same weights, by a path
    other = refused(tmp_path / "out", *given, "--baseline", f"two-stage={diffusion_folder}")
    assert "another baseline two-stage" in other


def test_what_cannot_be_answered_is_counted(trained, storyland, tmp_path):
    """A picture is broken: what asks for it or shows it fails, the neighbours in the batch do not."""
    shutil.copytree(storyland / "vist", tmp_path / "vist")
    (tmp_path / "vist/train_images/000000002.jpg").write_bytes(b"no picture")
    given = ["--model", trained, "--format", "vist", "--data", str(tmp_path / "vist"), "--split", "train"]
    entry = evaluate(tmp_path / "out", *given, "--task", "illustrate")["tables"]["illustrate, full"]["model"]
    assert (entry["asked"], entry["failed"], entry["replies"]) == (5, 3, 2)
    assert all("000000002.jpg is not an image" in reason for reason in entry["failures"])
    rows = [json.loads(line) for line in (tmp_path / "out/replies/model-0.jsonl").read_text().splitlines() if line]
    assert sorted(row["key"] for row in rows if "error" in row) == [f"0/{k}/illustrate/full" for k in (2, 3, 4)]
    assert "model, failed: 0/2/illustrate/full" in Page(tmp_path / "out/report.html").text


@pytest.fixture(scope="module")
def usual(trained, storyland) -> list[str]:
    return ["--model", trained, "--format", "storyland", "--data", str(storyland), "--split", "train"]


@pytest.fixture(scope="module")
def whole(usual, tmp_path_factory) -> Path:
    """An evaluation in one piece and one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    evaluate(out, *usual)
    return out


def agree(out: Path, whole: Path) -> None:
    """The same numbers and pictures."""
    found, expected = (json.loads((folder / "report.json").read_text()) for folder in (out, whole))
    assert numbers(found) == numbers(expected) and found["acceptance"] == expected["acceptance"]
    names = sorted(file.relative_to(whole) for file in whole.glob("pictures/*/*.png"))
    assert len(names) > 20 and names == sorted(file.relative_to(out) for file in out.glob("pictures/*/*.png"))
    assert all(same_pixels(out / name, whole / name) for name in names)


def test_an_evaluation_that_ended_early_goes_on(usual, whole, tmp_path):
    """From Python, ended by the third reply, within a line of the file; and only with the same settings."""
    out = tmp_path / "out"
    values = {"format": "storyland", "data": Path(usual[5]), "split": "train", "batch": 2, "out": out}
    values |= {"options": reply_options(steps=2, max_tokens=6)}
    request = EvaluateRequest(model=ModelRequest(model=usual[1], backend="eager"), **values)

    def stop(replied: Replied) -> None:
        if replied.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.evaluate(request, progress=stop)
    assert not (out / "report.json").exists()
    with (out / "replies/model-0.jsonl").open("a") as file:
        file.write('{"key": "0/1/ill')
    lines = []
    assert run.evaluate(request, lines.append) == json.loads((out / "report.json").read_text())
    agree(out, whole)
    for more, expected in ((["--seed", "1"], "options"), (["--limit", "1"], "limit"), (["--task", "last"], "tasks")):
        assert f"is an evaluation with another {expected}" in refused(out, *usual, *more)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    assert "is not empty" in refused(tmp_path / "full", *usual)


def test_two_processes_reply_as_one(usual, whole, tmp_path):
    for worker in fork_two(["eval", "--out", str(tmp_path / "out"), *QUICK, *usual], tmp_path):
        worker.join()
        assert worker.exitcode == 0
    assert all((tmp_path / f"out/replies/model-{rank}.jsonl").stat().st_size for rank in (0, 1))
    agree(tmp_path / "out", whole)


def test_the_demo_on_storyland(tmp_path):
    """It writes its own test split, replies to every task, and measures what is asked of it."""
    report = evaluate(tmp_path / "out", "--format", "storyland", "--limit", "1", "--set", "max_tokens=40")
    tables = report["tables"]
    assert list(tables["illustrate, full"]) == ["model", "oracle", "VAE", "VAE-anew"] and report["data"]["groups"] == 1
    assert tables["story, full"]["model"]["metrics"].keys() == {"grammar", "identity"}
    assert tables["continue, full"]["two-stage"]["metrics"]["coherence"]["n"] == 1
    missing = [row["what"] for row in report["acceptance"] if row["found"] is None]
    assert len(report["acceptance"]) == 12 and "GILL" in missing[-1]
    assert len(missing) == 2  # nobody else is asked for in the one dialogue
    assert tables["illustrate, full"]["VAE"]["metrics"]["attributes"]["value"] > 0.9
    page = Page(tmp_path / "out/report.html")
    assert pictures(page) > 20 and "attributes right in pictures" in page.text
    tables["illustrate, full"].pop("oracle")
    assert [row["holds"] for row in acceptance(tables)].count(None) == 3


def test_all_that_is_wrong_is_told_before_anything_is_made(trained, storyland, tmp_path):
    given = ["--model", trained, "--format", "vist", "--data", str(storyland / "vist")]
    assert "is not CLIP ViT-L/14" in refused(tmp_path / "out", *given, "--weights", f"clip-l={tmp_path}")
    wrong = ["--metric", "CLIP", "--weights", "clip=x", "--task", "caption", "--baseline", "sd"]
    told = refused(tmp_path / "out", "--model", trained, "--format", "vist", *wrong)
    for expected in ("without --data", "no metric 'CLIP'", "give NAME=PATH", "has no task caption", "no baseline 'sd'"):
        assert expected in told
    assert "gill without a path" in refused(tmp_path / "out", *given, "--baseline", "gill")
    assert not (tmp_path / "out").exists()


class CodesHead(Head):
    """A head without a text-to-image model."""

    def draw(self, context):
        return torch.zeros(3, 16, 16)
        yield


def test_a_head_without_text_to_image_is_evaluated_without_those_baselines(storyland, llava_folder, tmp_path):
    backbone, head = load_backbone(str(llava_folder), torch.float32), CodesHead()
    head.spec = replace(NoHead.spec, name="codes", new_tokens=("[CODE]",))
    model = InterleavedModel(backbone, head, ModelConfig(mllm=str(llava_folder), diffusion="", head_config=None))
    data = load("storyland", storyland, "train", tasks=("illustrate", "narrate"))
    request = SimpleNamespace(out=tmp_path, batch=2, options=reply_options(max_tokens=4))
    lines: list[str] = []
    for name in ("model", "oracle", "text-only"):
        entry, load_other = Entry(name, implied=name == "oracle"), None
        replied = [*reply_by(entry, request, data, PartialState(), lambda: model, load_other, lines.append)]
        assert len(replied) == {"model": 8, "oracle": 0, "text-only": 4}[name]
        assert all("error" not in one.row for one in replied)
    assert lines == ["oracle is left out: the head codes draws by no text-to-image model: leave oracle out"]
