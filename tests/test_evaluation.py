"""Metrics against computations that share no code with them: closed forms, other libraries, cases worked by hand."""

import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU

from mgp5.errors import Mgp5Error
from mgp5.evaluation import metrics, words
from mgp5.evaluation.measure import METRICS
from mgp5.evaluation.metrics import mean_interval
from mgp5.evaluation.replies import Replies, align
from mgp5.evaluation.systems import BASELINES, BOUNDS
from mgp5.evaluation.tasks import CONTEXTS, TASKS, Sample
from mgp5.messages import Conversation, Image, Message, Text
from mgp5.storyland import metrics as storyland
from mgp5.storyland.draw import draw
from mgp5.storyland.judge import load_judge, look
from mgp5.storyland.tell import story
from mgp5.storyland.world import rng

REAL = Path(__file__).parents[2] / "shared/data/real"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(rows: int, width: int, seed: int) -> torch.Tensor:
    """Features whose sample mean is 0 and whose sample covariance is 1, exactly."""
    draws = torch.randn(rows, width, generator=generator(seed), dtype=torch.float64)
    draws -= draws.mean(0)
    return draws @ torch.linalg.cholesky(torch.linalg.inv(draws.T.cov()))


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=generator(9), dtype=torch.float64)).Q


@pytest.mark.parametrize("distance", [metrics.fid, metrics.frechet_distance])
def test_frechet_distance_of_gaussians_is_the_closed_form(distance):
    """Of covariances that commute it is |m1 - m2|^2 + sum (s1 - s2)^2."""
    turn, width = rotation(4), torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    a = sample(50, 4, 0) * width @ turn
    b = sample(30, 4, 1) * torch.tensor([1.0, 1.0, 1.5, 0.0]).double() @ turn + 2.0
    assert distance(a, b) == pytest.approx(4 * 4 + 0 + 1 + 1 + 9, rel=1e-6)
    assert distance(a, a) == pytest.approx(0, abs=1e-6)
    with pytest.raises(Mgp5Error, match="1 image:"):
        distance(a, b[:1])


def test_our_frechet_distance_agrees_with_torchmetrics_on_fewer_images_than_features():
    real, made = (torch.randn(5, 16, generator=generator(seed)).double() for seed in (2, 3))
    assert metrics.frechet_distance(real, 2 * made) == pytest.approx(metrics.fid(real, 2 * made), rel=1e-4)


def test_inception_score_of_known_distributions():
    """All alike: 1. Sure, and spread over c of the classes in every split: c. The same seed: the same score."""
    assert metrics.inception_score(torch.zeros(20, 7), 0) == pytest.approx((1, 0))
    sure = 100.0 * torch.eye(4).repeat(5, 1)
    assert metrics.inception_score(sure, 0, splits=1)[0] == pytest.approx(4)
    logits = 3 * torch.randn(30, 6, generator=generator(1))
    before = torch.get_rng_state()
    first, again, other = (metrics.inception_score(logits, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(Mgp5Error, match="9 images"):
        metrics.inception_score(logits[:9], 0)


def captions() -> list[str]:
    """Sentences that people wrote, where the folder of real samples is here, and some more."""
    own = ["The cat sat on the mat.", "A bear, in a hat, walks to the beach.", "It's raining; they don't mind!", "No."]
    table = REAL / "VIST/val_cleaned.json"
    read = json.loads(table.read_text()).values() if table.is_file() else []
    return own + [step["caption"] for tale in read for step in tale]


@pytest.mark.parametrize("order", [1, 2])
def test_bleu_agrees_with_sacrebleu(order):
    references = captions()
    predictions = [" ".join(text.split()[::-1]) + "." for text in references[:-1]] + [""]
    predictions[0] = "The cat sat on a mat ."
    oracle = BLEU(max_ngram_order=order, smooth_method="none").corpus_score(predictions, [references])
    assert 0.1 < oracle.score / 100 < 1
    assert metrics.bleu_words(predictions, references, order) == pytest.approx(oracle.score / 100, abs=1e-6)


def test_bleu_of_characters_is_another_number():
    """Clipped counts of "aab" against "ab": 2 of 3 and 1 of 2."""
    assert metrics.bleu_characters(["aab", "xy", ""], ["ab"] * 3, 2).tolist() == pytest.approx([math.sqrt(1 / 3), 0, 0])
    made, real = "My brother plays the guitar in a band.", "We could not see the bottom of that lake."
    assert metrics.bleu_characters([made], [real], 1) > 0.5
    assert metrics.bleu_words([made], [real], 2) == 0


def test_rouge_l_by_hand():
    """Longest common subsequence: the, cat, on, mat; 4 of 6 words and 4 of 5."""
    scores = metrics.rouge_l(["The cat sat on the mat", ""], ["the cat, on a mat!", "Something."])
    assert scores.tolist() == pytest.approx([2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5), 0])


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    """nltk's data folder with a WordNet of one noun, which is two words, in the format of its dict files."""
    lines = {f"{table}.{kind}": "" for table in ("data", "index") for kind in ("noun", "verb", "adj", "adv")}
    lines |= {f"{kind}.exc": "" for kind in ("noun", "verb", "adj", "adv")} | {"cntlist.rev": ""}
    lines["lexnames"] = "00\tnoun.person\t1\n"
    lines["data.noun"] = "00000000 00 n 02 boy 0 lad 0 000 | a young man  \n"
    lines["index.noun"] = "boy n 1 0 1 0 00000000  \nlad n 1 0 1 0 00000000  \n"
    lines["index.sense"] = "boy%1:00:00:: 00000000 1 0\nlad%1:00:00:: 00000000 1 0\n"
    (tmp_path / "corpora").mkdir()
    with zipfile.ZipFile(tmp_path / "corpora/wordnet.zip", "w") as archive:
        for name, text in lines.items():
            archive.writestr(f"wordnet/{name}", text)
    monkeypatch.setattr("nltk.data.path", [])
    return tmp_path


def test_meteor_by_hand(wordnet):
    """With m matches in c chunks: F, here P = R, times 1 - 0.5 (c / m)^3; a synonym and a stem count as matches."""
    made = ["the lad runs", "the boy run", "the dog runs", ""]
    expected = [1 - 0.5 / 27, 1 - 0.5 / 27, 2 / 3 * 0.5, 0]
    assert metrics.meteor(made, ["the boy runs"] * 4, wordnet).tolist() == pytest.approx(expected)


def test_mm_relevance_by_hand():
    """Aligned from the left whatever the kind, the sum is divided by either length."""
    x, y, mid = torch.eye(2)[0], torch.eye(2)[1], torch.tensor([0.6, 0.8])
    one = metrics.mm_relevance(torch.stack([mid]), torch.stack([x, y]))
    assert (one.precision, one.recall, one.f1) == pytest.approx((0.6, 0.3, 0.4))
    more = metrics.mm_relevance(torch.stack([mid, y, y]), torch.stack([x, y]))
    assert (more.precision, more.recall, more.f1) == pytest.approx((1.6 / 3, 0.8, 2 * 1.6 / 5))
    swapped = metrics.mm_relevance(torch.stack([x, y]), torch.stack([y, x]))
    nothing = metrics.mm_relevance(torch.zeros(0, 2), torch.stack([x]))
    assert swapped.f1 == nothing.f1 == 0


def test_mm_relevance_of_the_release_pools_a_dialogue():
    """Turn 1: a picture is missing; turn 2: one is too much. Sum 0.6 + 0.8 of 3 generated and 3 true parts."""
    x, y, mid = torch.eye(2)[0], torch.eye(2)[1], torch.tensor([0.6, 0.8])
    made, real = [{"text": mid}, {"text": mid, "image": x}], [{"text": x, "image": x}, {"text": y}]
    found = metrics.mm_relevance_pooled(made, real)
    assert (found.precision, found.recall, found.f1) == pytest.approx((1.4 / 3,) * 3)


def test_parts_are_aligned_within_their_kind():
    """The example in MMDialog's repository."""
    u, v = [Text(name) for name in "abc"], [Image(caption=name) for name in "def"]
    pairs = align([u[0], v[0], u[1], v[1], v[2]], [v[2], u[2], u[1], v[1], u[0]])
    assert pairs == [(u[0], u[2]), (u[1], u[1]), (None, u[0]), (v[0], v[2]), (v[1], v[1])]


@pytest.mark.parametrize(("kind", "value", "n"), [("dialogue", 0.5, 2), ("narrate", 0.1, 10)])
def test_texts_of_dialogues_count_as_the_release_counts_them(kind, value, n):
    """One turn of a dialogue is right, none of nine of the other: the release takes the mean of the dialogues'."""
    right, wrong = Message("assistant", (Text("a fox"),)), Message("assistant", (Text("one owl"),))
    samples = [Sample(key=str(k), group="ab"[k > 0], kind=kind, tables=(), load=Conversation) for k in range(10)]
    replies = Replies([(one, right, wrong if one.group == "b" else right) for one in samples])
    number = METRICS["ROUGE-L"].measure(replies, None, generator())
    assert (number.value, number.n) == (pytest.approx(value), n)


def test_the_page_says_what_its_words_mean():
    assert words.TASKS.keys() == {task for each in TASKS.values() for task in each}
    assert words.CONTEXTS.keys() == {*CONTEXTS} and words.METRICS.keys() == METRICS.keys()
    assert words.SYSTEMS.keys() == {"model", *BASELINES, *BOUNDS}


def test_images_when_due():
    """One of two replies that need an image has one, so has one of the other."""
    drawn, plain = Message("assistant", (Image(),)), Message("assistant", (Text("no"),))
    rows = [(drawn, drawn), (drawn, plain), (plain, drawn)]  # the true reply, and the reply
    samples = [Sample(key=str(k), group=str(k), kind="dialogue", tables=(), load=Conversation) for k in range(3)]
    replies = Replies([(one, *pair) for one, pair in zip(samples, rows, strict=True)])
    number = METRICS["pictures when due"].measure(replies, None, generator())
    assert (number.value, number.n, number.detail) == (0.5, 2, {"not due": 1})
    assert METRICS["pictures when due"].measure(Replies(replies.rows[:1]), None, generator()).detail["not due"] is None


def test_an_interval_knows_that_steps_of_a_story_belong_together():
    """For independent samples it is the textbook's; five copies of each add no certainty."""
    values = torch.randn(200, generator=generator(5))
    mean, low, high = mean_interval(values, range(200), generator())
    half = 1.96 * values.std().item() / math.sqrt(200)
    assert mean == pytest.approx(values.mean().item())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.2 * half)
    groups = np.repeat(np.arange(200), 5).tolist()
    assert mean_interval(values.repeat_interleave(5), groups, generator()) == pytest.approx((mean, low, high))


def test_storyland_metrics_on_true_and_on_wrong_pictures():
    tale = story(rng("test", 7, 0), "test")
    scenes, words = [step.scene for step in tale.steps], [step.text for step in tale.steps]
    other = replace(scenes[2], species=next(kind for kind in ("fox", "owl") if kind != scenes[2].species))
    shown = [*scenes[:2], other, *scenes[3:]]
    pixels = torch.stack([torch.from_numpy(np.array(draw(scene, tale.seed + k))) for k, scene in enumerate(shown)])
    read, features = look(load_judge(), pixels.permute(0, 3, 1, 2) / 127.5 - 1)
    right = torch.ones(5, 7, dtype=torch.bool)
    right[2, 0] = False
    assert torch.equal(storyland.attributes_right(read, scenes), right) and features.shape == (5, 256)
    assert torch.equal(storyland.coherence(read[1:], words[1:], scenes[:-1]), right[1:])
    assert not storyland.coherence(read[1:2], ["A dragon!"], scenes[:1]).any()
    assert storyland.identity_kept(torch.stack([read, read]), [scenes[0], other]).tolist() == [False, False]
    assert storyland.identity_kept(read[None, :2], scenes[:1]).all()
    assert storyland.narration_right(words[1:3], scenes[:2], [scenes[1], other]).tolist() == [True, False]
    assert storyland.grammatical([words, [*words, "A dragon!"]]).tolist() == [True, False]
