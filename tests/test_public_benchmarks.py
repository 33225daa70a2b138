"""`mgp5 eval` on public benchmarks: their files read, answers in their layouts, judges, wins, reports."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from benchmark_files import MAKE
from browser import Page
from click.testing import CliRunner
from tiny import picture
from tiny_training import fresh

from mgp5 import cli
from mgp5.errors import Mgp5Error
from mgp5.evaluation.public import BENCHMARKS, prompts, score, similarity
from mgp5.evaluation.public.cases import Case, interleave, load, steps
from mgp5.evaluation.public.request import PublicRequest
from mgp5.evaluation.public.run import evaluate, reply_to
from mgp5.loading import save_checkpoint
from mgp5.messages import Image, Message, Part, Text
from mgp5.options import ModelRequest, reply_options
from mgp5.training.presets import preset

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
FORMATS = tuple(BENCHMARKS)
QUICK = {"options": reply_options(steps=1, max_tokens=4, max_images=2), "batch": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in MAKE}
    for name, make in MAKE.items():
        make(folders[name])
    return folders


@pytest.fixture(scope="module")
def trained(llava_folder, diffusion_folder, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("trained")
    model = fresh(llava_folder, diffusion_folder)
    model.prepare(preset("pretrain", "demo"))
    save_checkpoint(model, folder)
    return str(folder)


def cases_of(data: dict[str, Path], format: str, limit: int | None = None) -> list[Case]:
    return load(BENCHMARKS[format], data[format], limit)[0]


def kinds(parts: Sequence[Part]) -> str:
    return "".join("t" if isinstance(part, Text) else "i" for part in parts)


def answers(case: Case, parts: tuple[Part, ...] | None = None) -> list[Message]:
    """Made-up replies, of a text and an image where a benchmark has no say in it."""
    made = parts or (Text("It goes on."), Image(pixels=picture("purple")))
    due = ["text" if t.options.get("image") == "never" else "any" for t in case.turns]
    return [Message("assistant", made[:1] if kind == "text" else made) for kind in due]


@pytest.mark.parametrize("format", FORMATS)
def test_files_are_read_with_their_oddities(data, format):
    cases, problems = load(BENCHMARKS[format], data[format])
    found = {case.key: case for case in cases}
    left_out = {"opening": {"cannot be asked": 1, "is not of this benchmark's form": 2}, "mmie": {"cannot be asked": 1}}
    left_out["weave"] = {"is not of this benchmark's form": 1}
    assert dict(problems) == left_out.get(format, {})
    assert len(cases) == {"opening": 7, "mmie": 9, "comm": 40, "weave": 9}.get(format, 10)
    shapes = {
        "opening": {"0302001": [("titt", "tit")], "0302002": [("titt", "tit")]},
        "interleavedbench": {"wiki_0": [("titi", "ti")], "wiki_2": [("titi", "ti")], "wiki_4": [("titi", "i")]},
        "mmie": {"SA-0": [("ti", "ti")], "SA-3": [("ti", "t")]},
        "isg": {"0000": [("ti", "ti")], "0003": [("ti", "it")]},
        "comm": {f"garden_0_task{k}": [s] for k, s in enumerate((("tititit", "t"), ("t", "tititi")), 1)},
        "weave": {"0": [("tit", "i"), ("tit", "i"), ("tit", "t")], "1": [("tit", "t")]},
    }[format]
    shapes |= {"wiki_3": [("titi", "ti"), ("t", "i")]} if format == "interleavedbench" else {}
    shapes |= {"garden_2_task3": [("tit", "tiiti")]} if format == "comm" else {}
    for key, expected in shapes.items():
        turns = [
            (kinds(found[key].said(answers(found[key]), n)), kinds(t.true)) for n, t in enumerate(found[key].turns)
        ]
        assert turns == expected, key


@pytest.mark.parametrize("format", FORMATS)
def test_answers_are_read_back_as_they_were_written(data, format, tmp_path):
    cases, benchmark = cases_of(data, format), BENCHMARKS[format]
    parts = (Text("First."), Image(pixels=picture("purple")), Text("Then."))
    written = [(case, answers(case, parts)) for case in cases]
    back = benchmark.read(benchmark.write(tmp_path / "answers", "tiny", written), cases)
    for case, replies in written:
        kept = back[case.key]
        if format == "weave":  # a turn has one file, of an image or a text
            replies = [Message("assistant", m.images or m.content) for m in replies]
        assert [kinds(m.content) for m in kept] == [kinds(m.content) for m in replies]
        assert [m.text for m in kept] == [m.text for m in replies]
        assert all(image.load().size == (40, 30) for message in kept for image in message.images)


def test_layouts_are_those_that_the_benchmarks_read(data, tmp_path):
    """Field by field what their own scripts open."""
    for name in FORMATS:
        cases = cases_of(data, name, 2)
        BENCHMARKS[name].write(tmp_path / name, "tiny", [(case, answers(case)) for case in cases])
    row = json.loads((tmp_path / "opening/tiny_output/0302002.jsonl").read_text())
    assert row == json.loads((tmp_path / "opening/tiny_output/0302002.json").read_text())
    assert row["total_uid"] == "0302002" and row["conversations"][0]["input"][0]["text"].startswith("<BEGIN>")
    assert row["conversations"][1]["output"] == [{"text": "It goes on.", "image": "0302002-o-0.jpg"}]
    (row, _) = json.loads((tmp_path / "mmie/data.json").read_text())
    assert row["model"] == "tiny" and row["gt_answer"][0]["text"] == "The next." and row["question"][1]["text"] is None
    assert all((tmp_path / "mmie" / part["image"]).is_file() for part in (row["question"][1], row["answer"][0]))
    row = json.loads((tmp_path / "isg/tiny.jsonl").read_text().splitlines()[0])
    assert {"id", "Category", "Query", "Golden", "output"} <= row.keys() and Path(row["output"][1]["content"]).is_file()
    (first, _) = json.loads((tmp_path / "interleavedbench/predictions.json").read_text())
    assert first["conversations"][1] == {"from": "gpt", "value": "It goes on. <image>"} and len(first["image"]) == 3
    row = json.loads((tmp_path / "comm/garden_0_task3/results.json").read_text())
    assert row["input_image_list"] == ["input_1.jpg"] and row["output_gt_image_list"][0] == "output_gt_2.jpg"
    assert row["prediction_image_list"] == ["predict_2.jpg"] and row["model_output"] == "It goes on. <IMAGE>"
    begins = "Here are step-by-step instructions with images about Gardens: (1) Dig hole 0."
    assert row["model_input"].startswith(begins)
    assert {path.name for path in (tmp_path / "weave").iterdir()} == {"0_2.jpg", "0_3.jpg", "0_1_2.txt", "1_1_0.txt"}
    again = load(BENCHMARKS["comm"], tmp_path / "comm")[0]  # folders of results are themselves a table
    assert {case.key for case in again} >= {"garden_0_task1", "garden_1_task4"} and again[0].turns[0].said


@pytest.mark.parametrize("suffix", ["jsonl", "pth"])
def test_a_table_of_comm_in_other_files_is_the_same(data, suffix, tmp_path):
    rows = json.loads((data["comm"] / "test_data.json").read_text())
    shutil.copytree(data["comm"] / "images", tmp_path / "images")
    file = tmp_path / f"test_data.{suffix}"
    if suffix == "pth":
        torch.save(rows, file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    tables = load(BENCHMARKS["comm"], tmp_path, limit=1)[0], cases_of(data, "comm", 1)
    found, expected = ([(case.key, kinds(case.turns[0].said)) for case in cases] for cases in tables)
    assert found == expected


def test_texts_and_images_are_paired_in_order():
    one, two = Image(Path("1.png")), Image(Path("2.png"))
    assert interleave("a <image> b <IMAGE>", [one]) == (Text("a"), one, Text("b"))
    assert interleave("a", [None, two]) == (Text("a"), two)
    assert steps((one, Text("a"), two, one, Text("b"))) == [("", one), ("a", two), ("", one), ("b", None)]


def test_a_reply_goes_on_and_later_turns_see_earlier_images(data, trained):
    model = fresh_model(trained)
    case = cases_of(data, "weave", 1)[0]
    (replies,) = reply_to(model, [case], QUICK["options"])
    assert [len(m.images) for m in replies] == [1, 1, 0]
    assert case.said(replies, 2)[1] is replies[1].images[0]  # "Image #3" is the model's own
    (opening,) = cases_of(data, "opening", 1)
    for rounds, images in ((1, 1), (3, 3), (0, 2)):  # the true answer has two steps
        drawn = reply_options(steps=1, max_tokens=2, max_images=1, image="always")
        (reply,) = reply_to(model, [opening], drawn, rounds)[0]
        assert len(reply.images) == images


def fresh_model(trained: str):
    from mgp5.apps.open_model import load as open_

    return open_(trained, backend="eager")


def request_of(format: str, data: dict[str, Path], trained: str, out: Path, **more) -> PublicRequest:
    model = ModelRequest(model=trained, backend="eager", device="cpu")
    return PublicRequest(format=format, data=data[format], out=out, model=model, **QUICK | more)


class Scripted:
    """A judge that says the same to all; of pairs that the side with purple words wins."""

    name, at_once = "scripted", 1

    def __init__(self, says: str) -> None:
        self.says, self.asked = says, 0

    def __call__(self, parts: Sequence[Part]) -> str:
        self.asked += 1
        return self.says


SAYS = "Yes. " + "".join(f"{name}: 5\n" for name in (
    *("Correctness", "Image-Text Coherency", "Multi-step Consistency", "Content Quality", "Content Richness"),
    *("Human Preference Alignment", "Completeness", "text quality", "text-image coherence", "perceptual quality"),
    *("image coherence", "helpfulness", "Score", "key_point", "visual_consistency", "image_quality", "accuracy"),
    *("text fidelity to images", "image quality", "style consistency", "entity consistency", "trend consistency"),
    *("overall consistency",),
))  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_two_lines_of_each_are_answered_judged_and_reported(data, trained, format, tmp_path, monkeypatch):
    """And a run that was killed goes on: nothing is asked twice, of the model nor of the judge."""
    scripted = Scripted(SAYS)
    monkeypatch.setattr(score, "open_judge", lambda *_: scripted)
    request = request_of(format, data, trained, tmp_path / "out", limit=2, judge="scripted", batch=1)

    def stop(replied) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(request, progress=stop)
    kept = (tmp_path / "out/replies/model-0.jsonl").read_bytes()
    rows = []
    report = evaluate(request, progress=rows.append)
    assert (tmp_path / "out/replies/model-0.jsonl").read_bytes().startswith(kept)
    entry = report["tables"]["all"]["model"]
    count = 8 if format == "comm" else 2
    assert entry["replies"] == count and entry["failed"] == 0
    assert sum(row.system == "model" for row in rows) == count - kept.count(b"\n")
    assert any((tmp_path / "out/answers").rglob("*"))
    expected = {"opening": "Overall", "interleavedbench": "helpfulness", "mmie": "Score", "isg": "structural"}
    number = entry["metrics"][expected.get(format, "accuracy" if format == "weave" else "completeness")]
    assert number["low"] <= number["value"] <= number["high"]
    assert report["judge"]["prompts"] == prompts.HASH and report["judge"]["not readable"] == 0
    page = Page(tmp_path / "out/report.html").text
    assert prompts.HASH in page and ("MiniGPT-5 theirs" in page) == (format == "opening")
    asked = scripted.asked
    assert evaluate(request)["tables"] == report["tables"] and scripted.asked == asked > 0


@pytest.mark.parametrize(
    ("says", "won", "lost"),  # ties 0, ties .5, by leaning, no ties, where the model is A and where it is B
    [
        ("A is better", (1, 1, 1, 1), (0, 0, 0, 0)), ("Tie(B is better)", (0, 0.5, 0), (0, 0.5, 1)),
        ("Tie", (0, 0.5), (0, 0.5)), ("neither", (), ()),
    ],
)  # fmt: skip
def test_wins_count_ties_both_ways(data, trained, says, won, lost, tmp_path, monkeypatch):
    cases, benchmark = cases_of(data, "opening"), BENCHMARKS["opening"]
    theirs = benchmark.write(tmp_path / "theirs", "GILL", [(case, answers(case)) for case in cases])
    monkeypatch.setattr(score, "open_judge", lambda *_: Scripted(says))
    request = request_of("opening", data, trained, tmp_path / "out", judge="x", against=(theirs,), limit=2)
    for side, expected in enumerate((won, lost)):
        monkeypatch.setattr(score, "pick", lambda *_, side=side: side)
        found = evaluate(request)["tables"]["all"]["against GILL"]
        assert [number["value"] for number in found["metrics"].values()] == list(expected)
        assert found["replies"] == 2 and list(found["metrics"])[:1] == ["wins, ties 0"] * bool(expected)


def test_scores_are_the_benchmarks_own(data):
    isg = BENCHMARKS["isg"]
    case = cases_of(data, "isg")[0]
    good, wrong = answers(case), [Message("assistant", (Text("No picture."),))]
    assert {q.key for q in isg.questions(case, good)} == {"image 0", "image 1", "block 0", "holistic"}
    no_hand = {"image 0": {"yes": 0.0}, "image 1": {"yes": 1.0}, "block 0": {"Score": 4.0}, "holistic": {"Score": 6.0}}
    assert dict(isg.scores(case, good, no_hand)) == {"block": 4.0, "image": 0.0, "holistic": 6.0}  # no wet hand either
    assert dict(isg.scores(case, wrong, {"holistic": {"Score": 2.0}})) == {"block": 1.0, "image": 0.0, "holistic": 2.0}
    assert dict(isg.local(case, wrong))["structural"] == 0.0 and dict(isg.local(case, good))["structural"] == 1.0
    weave = BENCHMARKS["weave"]
    case = cases_of(data, "weave")[0]
    replies = answers(case)
    ten = dict.fromkeys(("key_point", "visual_consistency", "image_quality"), 10.0)
    judged = {"image 0": ten, "image 1": ten, "accuracy 2": {"accuracy": 5.0}}
    assert dict(weave.scores(case, replies, judged))["Overall"] == pytest.approx(0.4 + 0.1 + 0.2 + 0.3 * 0.5)
    (first, second, _) = weave.questions(case, replies)
    assert kinds(first.parts).count("i") == 2 and kinds(second.parts).count("i") == 3  # named, then drawn
    assert any(part is replies[0].images[0] for part in second.parts)  # "Image #2" is the model's own
    edit = cases_of(data, "interleavedbench")[1]
    (asked,) = BENCHMARKS["interleavedbench"].questions(edit, answers(edit))
    assert "text quality" not in asked.parts[-1].text and "helpfulness" in asked.parts[-1].text


def test_metrics_of_comm_by_hand():
    texts = ["a red fox runs", "it snows on the hill", "a boat"]
    assert similarity.cider(texts, texts).tolist() == pytest.approx([10, 10, 5])  # two words have no 3-grams
    apart = similarity.cider(["a red fox", *texts[1:]], texts)[0]
    assert 0 < apart < 10 and similarity.cider(["snow", *texts[1:]], texts)[0] == 0
    a, b = (torch.rand(1, 3, 7, 7, generator=torch.Generator().manual_seed(s)).double() * 255 for s in (0, 1))
    channels = []
    for x, y in zip(a[0].flatten(1), b[0].flatten(1), strict=True):  # one window: the formula itself
        cov, mx, my = torch.cov(torch.stack([x, y])), x.mean(), y.mean()
        c1, c2 = 2.55**2, 7.65**2
        above = (2 * mx * my + c1) * (2 * cov[0, 1] + c2)
        channels.append(above / ((mx**2 + my**2 + c1) * (cov[0, 0] + cov[1, 1] + c2)))
    assert similarity.ssim(a, b).item() == pytest.approx(sum(channels).item() / 3)
    assert similarity.ssim(a, a).item() == pytest.approx(1) and similarity.psnr(a, a).item() == 100
    assert similarity.psnr(a * 0, a * 0 + 25.5).item() == pytest.approx(20)
    made, real = similarity.all_pairs(a.repeat(2, 1, 1, 1), b.repeat(3, 1, 1, 1))
    assert len(made) == len(real) == 6


def test_comm_is_measured_without_a_judge(data):
    from mgp5.evaluation.encoders import Encoders

    comm = BENCHMARKS["comm"]
    answered = [(case, [Message("assistant", case.turns[0].true)]) for case in cases_of(data, "comm", 2)]
    encoders = Encoders({}, torch.device("cpu"), {})
    numbers, left_out = comm.measure(answered, encoders, torch.Generator())
    assert {"LPIPS", "FID", "IS"} <= left_out.keys()  # no weights here
    for name in ("BLEU-1, steps", "BLEU-4, whole", "ROUGE-L, steps"):
        assert numbers[name].value == pytest.approx(1, abs=1e-6), name
    assert 0 < numbers["CIDEr, steps"].value <= 10 and numbers["SSIM"].value < 1 and numbers["PSNR"].value < 100


def test_lpips_is_of_the_weights_that_are_named(tmp_path):
    from mgp5.evaluation.encoders import Encoders

    make, file = pytest.importorskip("torchvision").models.squeezenet1_1, tmp_path / "weights.pth"
    a, b = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(make(weights=None).state_dict(), file)
        encoders = Encoders({"squeezenet": file}, torch.device("cpu"), {})
        assert encoders.lpips(a, a).tolist() == [0, 0] and (encoders.lpips(a, b) > 0).all()
        found.append(encoders.lpips(a, b))
    assert not torch.allclose(*found)
    torch.save({}, file)
    with pytest.raises(Mgp5Error, match="SqueezeNet"):
        Encoders({"squeezenet": file}, torch.device("cpu"), {}).lpips(a, b)


def refused(*args: str) -> str:
    result = CliRunner().invoke(cli.main, ["eval", *args])
    assert result.exit_code == 2
    return result.stderr


def test_what_is_wrong_is_told_before_anything_is_made(data, trained, tmp_path):
    out = ["--out", str(tmp_path / "out"), "--model", trained]
    told = refused("--format", "weave", "--judge", "default", *out)
    assert "without --data" in told and "weave has no published judge" in told
    out += ["--format", "opening"]
    told = refused("--data", str(data["opening"]), "--against", str(tmp_path), *out)
    assert "--against without --judge" in told
    assert "--format opening with --task, --metric" in refused("--task", "last", "--metric", "FID", *out)
    assert "--format storyland with --rounds" in refused(*out, "--format", "storyland", "--rounds", "2")
    with pytest.raises(Mgp5Error, match=r"holds no test\.json"):
        load(BENCHMARKS["weave"], tmp_path)
    row = {"id": "../../mine", "question": [{"text": "?", "image": None}], "gt_answer": "!"}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    with pytest.raises(Mgp5Error, match="leaves its folder"):  # its answer would be written there
        load(BENCHMARKS["mmie"], tmp_path)
    assert not (tmp_path / "out").exists()
