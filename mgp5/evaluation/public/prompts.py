"""What judges are asked, in words of our own; a report has the hash of this file, as other words make other scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...files import digest
from ...messages import Part, Text

SYSTEM = "You are a fair judge of texts and images."  # to a model in this process
_JUDGE = "You judge an answer that may hold texts and images in any order. The question stands first."

OPENING = (
    f"{_JUDGE} Give each of these a whole number from 0 (useless) to 10 (could not be better):\n"
    "Correctness: it does what was asked, and what it says and shows is true.\n"
    "Image-Text Coherency: each image shows what the text beside it says.\n"
    "Multi-step Consistency: steps follow from one another; people, things and style stay the same.\n"
    "Content Quality: texts read well, images are clear and without faults.\n"
    "Human Preference Alignment: a person who asked this would be glad of it, and nobody is harmed.\n"
    "Completeness: no step, text or image that was asked for is missing.\n"
    "Content Richness: it is varied, with details that help."
)
INTERLEAVEDBENCH = (
    f"{_JUDGE} Give each of the aspects named at the end a whole number from 0 to 5: 0 where the answer has nothing of "
    "the kind, 1 very bad, 5 without fault. Text quality: fluent, without repetition, of use. Text-image coherence: "
    "texts and images belong together. Perceptual quality: images look real, without faults. Image coherence: images "
    "fit one another, and those of the question, in style and in what they show. Helpfulness: it does what was asked."
)
MMIE = (
    f"{_JUDGE} Give it one whole number from 0 to 6: a point each for a text that fits the question, images that fit "
    "it, texts and images that belong together, being complete, being right, and being inventive or well arranged. "
    "If a true answer is given, what contradicts it is wrong."
)
ISG_IMAGE = "Look at the image and answer the question with Yes or No only. {question}"
ISG_BLOCK = (
    "Two parts follow: first {subject}, then {object}. How far can the question about them be answered with yes? Give "
    "a whole number from 1 (not at all) to 10 (fully), as a line Score: NUMBER. {question}"
)
ISG_HOLISTIC = (
    f"{_JUDGE} Give it one whole number from 1 to 10 for how well it does what was asked, in texts, in images and in "
    "their order. A true answer is given for comparison; another that does as well deserves as much."
)
COMM = (
    f"{_JUDGE} Both are steps of an instruction. Give each criterion named at the end a whole number from 0 (very bad) "
    "to 10 (without fault). Completeness: the steps lead to the goal, and none is missing. Text fidelity to images: "
    "texts say what the images show. Image quality: clear, real, without faults. Style consistency: all images look "
    "as if made by one hand. Entity consistency: people and things stay the same. Trend consistency: what changes from "
    "image to image changes as the steps say. Overall consistency: all of these together."
)
WEAVE_IMAGE = (
    "You judge an image that was asked for in a dialogue. What was asked stands first, then images to compare with, "
    "the image itself last. Give three whole numbers from 0 to 10. key_point: how many of the points below it "
    "fulfils, and how well. visual_consistency: what was not to change is as before. image_quality: clear, natural, "
    "without faults.\nPoints:\n{points}"
)
WEAVE_ACCURACY = (
    "You judge an answer in words. What was asked stands first, then the answer, then the true answer. Give one whole "
    "number for accuracy from 0 (wrong) to 10 (says the same as the true answer, in whatever words)."
)
PAIR = (
    "You compare two answers, A and B, to one question. They may hold texts and images in any order. Judge which of "
    "them helps more: whether it is right, complete, consistent, texts and images belong together, and all is of good "
    "quality. Which stands first must not matter."
)
PAIR_END = 'Say only one of: "A is better", "B is better", "Tie(A is better)", "Tie(B is better)".'
NOTHING = (Text("(nothing)"),)
HASH = digest(Path(__file__).read_bytes())


def about(
    task: str, said: Sequence[Part], reply: Sequence[Part], names: Sequence[str], true: Sequence[Part] = ()
) -> tuple[Part, ...]:
    """Return a question about a reply: the task, what was asked, the reply, the true one if it is shown, and the names
    of what is scored."""
    end = Text(f"\nWrite a line NAME: NUMBER, and nothing else, for each of: {', '.join(names)}.")
    truth = (Text("\nTrue answer:"), *true) if true else ()
    return (Text(f"{task}\n\nQuestion:"), *said, Text("\nAnswer:"), *(reply or NOTHING), *truth, end)


def pair(said: Sequence[Part], a: Sequence[Part], b: Sequence[Part]) -> tuple[Part, ...]:
    """Return the question which of two replies is better."""
    answers = (Text("\nAnswer A:"), *(a or NOTHING), Text("\nAnswer B:"), *(b or NOTHING))
    return (Text(f"{PAIR}\n\nQuestion:"), *said, *answers, Text(f"\n{PAIR_END}"))
