"""CoMM (Chen et al., CVPR 2025): four tasks on step-by-step instructions: texts of images (task1), images of texts
(task2), the second half of both (task3), all of a title (task4).

The table `test_data` (.json, .jsonl or .pth: data_id, title, step_info), of which a line makes all four; or folders of
NAME_taskN/results.json. Answers are such folders; steps are numbered "(1) ...", an image in a text is <IMAGE>.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import Mgp5Error
from ...files import write_json
from ...messages import Image, Message, Part, Text
from .. import metrics
from ..encoders import Encoders
from ..replies import Number, mean
from ..weights import locate, missing
from . import prompts, similarity
from .cases import Answered, Benchmark, Case, Numbers, Turn, interleave, known, pictures, save
from .judge import Question, scored

STEP = re.compile(r"\(\d+\)\s(.*?)\s*(?=\(\d+\)|$)", re.DOTALL)
MARK = "<IMAGE>"
# What the benchmark asks in each task: before the steps that are shown, and behind them.
ASKED = {
    "task1": (
        "Here are step-by-step instructions images sequence about {title}:",
        "According to the above images, can you generate text for each step?",
    ),
    "task2": (
        "Here are step-by-step instructions without images about {title}:",
        "According to the above steps, can you generate images for each step?",
    ),
    "task3": (
        "Here are step-by-step instructions with images about {title}:",
        "According to the above steps, can you generate the rest steps?",
    ),
    "task4": ("Can you generate step-by-step instructions with images about {title}?", ""),
}
OPTIONS = {"task1": {"image": "never"}}
CONSISTENCY = ("style consistency", "entity consistency", "trend consistency", "overall consistency")
CRITERIA = {
    "task1": ("completeness", "text fidelity to images"),
    "task2": ("completeness", "image quality", *CONSISTENCY),
}


class CoMM(Benchmark):
    """See the head of the file."""

    name = "comm"
    files = ("test_data.json", "test_data.jsonl", "test_data.pth", "*_task[1-4]/results.json")
    about = (
        "metrics of texts by steps and of whole texts, of images over all pairs of a reply's and the true ones; "
        "of two texts with other numbers of steps the first ones are compared, as the benchmark does"
    )

    def cases(self, row: Any, root: Path) -> Iterator[Case]:
        """Yield the four cases of a line, or the one of a results.json."""
        if "step_info" not in row:
            name, _, task = root.name.rpartition("_")
            yield _case(name, task, dict(row) | {"text": ""}, root / "origin")
            return
        for task in ASKED:
            yield _case(str(row["data_id"]), task, _task(task, row.get("title") or "", row["step_info"]), root)

    def write(self, folder: Path, name: str, answered: Answered) -> Path:
        """Write a folder NAME_taskN of each case."""
        for case, (reply,) in answered:
            out, turn = folder / case.key, case.turns[0]
            shown, true = (_images(parts) for parts in (turn.said, turn.true))
            first = len(shown) + 1
            names = {
                "input_image_list": _save_all(out / "origin", "input", 1, shown),
                "output_gt_image_list": _save_all(out / "origin", "output_gt", first, true),
                "prediction_image_list": _save_all(out, "predict", first, reply.images),
            }
            output = " ".join(part.text if isinstance(part, Text) else MARK for part in reply.content)
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "results.json", {"model_input": case.row["model_input"], "model_output": output, **names})
        return folder

    def read(self, folder: Path, cases: Sequence[Case]) -> dict[str, list[Message]]:
        """Read folders NAME_taskN."""
        found = {}
        for case in cases:
            if (file := folder / case.key / "results.json").is_file():
                row = json.loads(file.read_bytes())
                images = known(file.parent, row["prediction_image_list"])
                found[case.key] = [Message("assistant", interleave(row["model_output"], images))]
        return found

    def measure(self, answered: Answered, encoders: Encoders, generator: torch.Generator) -> Numbers:
        """Return BLEU, METEOR, ROUGE-L and CIDEr of steps and whole texts; SSIM, PSNR, LPIPS; FID and IS of images."""
        numbers, left_out = {}, {}
        for name, make in (*_of_texts(answered, encoders), *_of_images(answered, encoders)):
            try:
                found = make()
                numbers[name] = found if isinstance(found, Number) else mean(*found, generator)
            except Mgp5Error as error:
                left_out[name] = str(error)
        return numbers, left_out

    def questions(self, case: Case, replies: Sequence[Message]) -> Iterator[Question]:
        """Ask for the criteria of the task."""
        names = CRITERIA.get(case.table, CRITERIA["task2"])
        parts = prompts.about(prompts.COMM, case.said(()), replies[0].content, names)
        yield Question("criteria", parts, scored(names, 0, 10))


def _task(task: str, title: str, info: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return what a results.json has of a task, and the text of the true reply."""
    half = len(info) // 2
    begin, end = ASKED[task]
    kinds = {"task1": (("image",), ("text",)), "task2": (("text",), ("image",))}.get(task, (("text", "image"),) * 2)
    given = {"task3": range(half), "task4": range(0)}.get(task, range(len(info)))
    due = range(half, len(info)) if task == "task3" else range(len(info))
    asked, shown = _steps(info, given, kinds[0])
    true, images = _steps(info, due, kinds[1])
    text = " ".join(filter(None, (begin.format(title=title), asked, end)))
    return {"model_input": text, "input_image_list": shown, "output_gt_image_list": images, "text": true}


def _steps(info: Sequence[Sequence[Mapping[str, Any]]], which: range, kinds: Sequence[str]) -> tuple[str, list[str]]:
    """Return steps as "(1) text <IMAGE> (2) ...", with what they have of these kinds, and the paths of images."""
    words, images = [], []
    for number in which:
        parts = [part for part in info[number] if part["type"] in kinds]
        images += [part["image_path"] for part in parts if part["type"] == "image"]
        words += [f"({number + 1})", *(part["content"].strip() if part["type"] == "text" else MARK for part in parts)]
    return " ".join(words), images


def _case(name: str, task: str, row: Mapping[str, Any], root: Path) -> Case:
    if task not in ASKED:
        raise Mgp5Error(f"{name}_{task} is no task of CoMM", f"expected one of {', '.join(ASKED)}")
    said = interleave(row["model_input"], pictures(root, row["input_image_list"]))
    true = interleave(row["text"], known(root, row["output_gt_image_list"]))
    turn = Turn(said, true, OPTIONS.get(task, {}))
    return Case(key=f"{name}_{task}", group=name, table=task, turns=(turn,), row=row)


def _images(parts: Sequence[Any]) -> list[Image]:
    return [part for part in parts if isinstance(part, Image)]


def _save_all(folder: Path, kind: str, first: int, images: Sequence[Image]) -> list[str]:
    names = [f"{kind}_{number}.jpg" for number in range(first, first + len(images))]
    for name, image in zip(names, images, strict=True):
        save(image, folder / name)
    return names


Made = tuple[str, Callable[[], Number | tuple[Tensor, list[str]]]]  # name of a metric, and what makes it


def _text(parts: Sequence[Part]) -> str:
    return " ".join(part.text for part in parts if isinstance(part, Text))


def _of_texts(answered: Answered, encoders: Encoders) -> Iterator[Made]:
    """Yield metrics of texts, at both levels."""
    pairs = [(_text(replies[0].content), _text(case.turns[0].true), case.group) for case, replies in answered]
    pairs = [pair for pair in pairs if any(_split(pair[1]))]
    split = [(*both, g) for made, real, g in pairs for both in zip(_split(made), _split(real), strict=False)]
    split = [row for row in split if row[1]]
    for level, rows in (
        ("steps", split),
        ("whole", [(" ".join(_split(m)), " ".join(_split(r)), g) for m, r, g in pairs]),
    ):
        if not rows:
            continue
        made, real, groups = map(list, zip(*rows, strict=True))
        for order in (1, 4):
            yield f"BLEU-{order}, {level}", partial(_bleu, made, real, order)
        for name, values in (
            ("METEOR", partial(_meteor, made, real, encoders)),
            ("ROUGE-L", partial(metrics.rouge_l, made, real)),
            ("CIDEr", partial(similarity.cider, made, real)),
        ):
            yield f"{name}, {level}", lambda values=values, groups=groups: (values(), groups)


def _split(text: str) -> list[str]:
    """Return the steps of a text, or the text alone where it has no numbers."""
    return STEP.findall(text) or [text]


def _bleu(made: Sequence[str], real: Sequence[str], order: int) -> Number:
    return Number(metrics.bleu_words(made, real, order), len(made))


def _meteor(made: Sequence[str], real: Sequence[str], encoders: Encoders) -> Tensor:
    return metrics.meteor(made, real, locate("wordnet", encoders.paths))


def _of_images(answered: Answered, encoders: Encoders) -> Iterator[Made]:
    """Yield metrics of the images of replies and the true ones, where there are both."""
    rows = [(replies[0].images, _images(case.turns[0].true), case.group) for case, replies in answered]
    rows = [row for row in rows if row[0] and row[1]]
    if not rows:
        return
    functions = {"SSIM": similarity.ssim, "PSNR": similarity.psnr, "LPIPS": encoders.lpips}
    for name, function in functions.items():
        yield name, partial(_of_pairs, name, function, rows, encoders)
    made, real = ([image for row in rows for image in row[side]] for side in (0, 1))

    def fid() -> Number:
        return Number(metrics.fid(encoders.inception(real)[0], encoders.inception(made)[0]), len(made))

    def inception_score() -> Number:
        return Number(metrics.inception_score(encoders.inception(made)[1], 0)[0], len(made))

    if reason := missing(("torchmetrics", "torch_fidelity", "inception"), encoders.paths):
        yield "FID", partial(_refuse, reason)
        yield "IS", partial(_refuse, reason)
    else:
        yield "FID", fid
        yield "IS", inception_score


def _of_pairs(
    name: str, function: Callable[..., Tensor], rows: Sequence[tuple], encoders: Encoders
) -> tuple[Tensor, list[str]]:
    """Return the mean over all pairs of each reply."""
    if name == "LPIPS" and (reason := missing(("torchmetrics", "torchvision", "squeezenet"), encoders.paths)):
        _refuse(reason)
    squares = similarity.squares
    values = [function(*similarity.all_pairs(squares(made), squares(real))).mean() for made, real, _ in rows]
    return torch.stack(values), [group for _, _, group in rows]


def _refuse(reason: str) -> Number:
    raise Mgp5Error(reason)
