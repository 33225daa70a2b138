"""The scripts of examples/eval on tiny models: people's votes, and the ablations."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from browser import browser_page
from test_eval import evaluate

from mgp5.errors import Mgp5Error
from mgp5.storyland.write import write

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"


def script(name: str) -> ModuleType:
    spec = spec_from_file_location(f"eval_{name}", Path(__file__).parents[1] / f"examples/eval/{name}.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


votes = script("votes")


@pytest.fixture(scope="module")
def ablations() -> ModuleType:
    return script("ablations")


@pytest.fixture(scope="module")
def evals(small_folder, tmp_path_factory) -> tuple[str, str]:
    """Two evaluations of the same three stories; a reply of the second is hostile."""
    root = tmp_path_factory.mktemp("evals")
    write(root / "data", "train", pairs=0, stories=3, dialogs=0, seed=0)
    given = ["--model", str(small_folder), "--format", "vist", "--data", str(root / "data/vist"), "--split", "train"]
    given += ["--metric", "BLEU-1", "--task", "continue", "--task", "illustrate"]
    found = root / "run-zebra", root / "run-yak"
    for seed, out in enumerate(found):
        evaluate(out, *given, "--seed", str(seed))
    file = found[1] / "replies/model-0.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    row = next(row for row in rows if row["key"].startswith("0/") and "continue" in row["key"])
    row["reply"]["content"][0]["text"] = HOSTILE
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{found[0]}/model", str(found[1])


@pytest.fixture(scope="module")
def key(evals, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "out"
    votes.make_page(*map(votes.Replied.read, evals), out)
    return out / "key.json"


def test_people_vote_in_a_browser(evals, key, tmp_path):
    known = json.loads(key.read_text())
    with browser_page() as page:
        page.goto((key.parent / "compare.html").as_uri())
        page.fill("#rater", "Ann")
        page.keyboard.press("Enter")
        assert page.locator("#next").is_disabled()
        for press in ("1", "3", "2", "Enter", *"111", "Enter"):
            page.keyboard.press(press)
        page.reload()  # goes on where it was
        assert page.inner_text("#count") == "2 of 3 done" and page.title() == "Which reply is better?"
        for press in (*"222", "Enter"):
            page.keyboard.press(press)
        shown = json.loads(page.get_attribute("#results", "data-rates"))
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(tmp_path / "ann.jsonl")
    found = votes.win_rates(votes.read_votes([tmp_path / "ann.jsonl"], known), known)
    for name, label in product(votes.CRITERIA, ("A", "B", "tie")):  # the page's own numbers are those of the script
        page_rate = shown[name][label]
        assert (page_rate["share"], page_rate["low"], page_rate["high"]) == pytest.approx(found[name][label])


def test_the_page_tells_no_names_and_is_made_the_same_again(evals, key, tmp_path):
    page = (key.parent / "compare.html").read_text()
    assert "run-" not in page and page.count("<script") == 2 and "://" not in page and "\\u003c/script>" in page
    first, second = map(votes.Replied.read, evals)
    votes.make_page(first, second, tmp_path / "again")
    assert (tmp_path / "again/compare.html").read_text() == page
    keys = [votes.make_page(first, second, tmp_path / str(seed), limit=1, seed=seed) for seed in range(6)]
    assert {next(iter(one["systems"])) for one in keys} == {"A", "B"}  # chance says who is A, not the command line
    images = votes.make_page(first, second, tmp_path / "images", kinds=["illustrate"])
    assert {tuple(one["criteria"]) for one in images["questions"].values()} == {("image", "coherence")}
    for one, other, message in ((first, first, "nothing to compare"), (first, second, "exists")):
        with pytest.raises(Mgp5Error, match=message):
            votes.make_page(one, other, key.parent if other is second else tmp_path / "none")
    with pytest.raises(Mgp5Error, match="no evaluation"):
        votes.Replied.read(str(tmp_path))


QUESTIONS = {f"q{n}": {"group": f"g{n}", "criteria": list(votes.CRITERIA)} for n in range(4)}
KEY = {"page": "p", "systems": {"B": "runs/ours", "A": "runs/theirs"}, "questions": QUESTIONS}


def line(question: str, rater: str, better: str, left: str = "A", time: str = "10:00", **other: str) -> str:
    right = "B" if left == "A" else "A"
    row = {"page": "p", "question": question, "rater": rater, "criterion": "language", "left": left, "right": right}
    row |= {"choice": {left: "left", right: "right"}.get(better, "tie"), "time": f"2026-01-01T{time}:00.000Z"}
    return json.dumps(row | other) + "\n"


def test_votes_are_counted(tmp_path):
    """By hand: B wins 3 of 6, A 1, ties 2; Ann and Bob agree on one of two questions."""
    ann = [line("q0", "Ann", "B"), line("q1", "Ann", "tie", left="B"), line("q2", "Ann", "B", left="B")]
    bob = [line("q0", "Bob", "B", left="B"), line("q1", "Bob", "A"), line("q3", "Bob", "tie")]
    late = [line("q2", "Ann", "A", left="B", time="09:59")]  # an older file, given last
    files = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for file, lines in zip(files, (ann, bob, late), strict=True):
        file.write_text("".join(lines))
    row = votes.win_rates(votes.read_votes(files, KEY), KEY)["language"]
    assert (row["B"][0], row["A"][0], row["tie"][0]) == pytest.approx((3 / 6, 1 / 6, 2 / 6))
    assert row["votes"] == 6 and row["agreement"] == 0.5
    for bad in (
        "{",
        "[]",
        line("q9", "Ann", "A"),
        line("q0", "Ann", "A", page="x"),
        line("q0", "Ann", "A", time="noon"),
    ):
        files[0].write_text(ann[0] + bad)
        with pytest.raises(Mgp5Error, match="line 2 is no vote"):
            votes.read_votes(files, KEY)


def test_intervals_are_wilsons():
    """Published values (Newcombe, 1998, table I), and groups that say the same."""
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        share, *ends = votes.share_interval([True] * hits + [False] * (count - hits), range(count))
        assert share == hits / count and ends == pytest.approx([low, high], abs=5e-5)
    alike = votes.share_interval([True, True, False, False, False, False], list("aabbcc"))
    assert alike == pytest.approx(votes.share_interval([True, False, False], list("abc")))


def test_differences_over_seeds_get_a_verdict(ablations):
    """Standard deviation 1, quantile 4.303; an interval that holds zero is within chance."""
    found = ablations.interval([1.0, 2.0, 3.0])
    assert found == {"value": 2.0, "half": pytest.approx(4.303 / 3**0.5)}
    for values, sign, expected in (
        ([-0.1, -0.11, -0.12], -1, "agrees"),
        ([-0.1, -0.11, -0.12], 0, "disagrees"),
        ([0.1, 0.11, 0.12], -1, "disagrees"),
        ([-0.1, 0.11, -0.12], -1, "within chance"),
        ([-0.5], -1, "within chance"),
    ):
        assert ablations.verdict(ablations.interval(values), sign) == expected


@pytest.mark.slow
def test_ablations_train_and_go_on(ablations, llava_folder, diffusion_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "PAIRS", 4)
    monkeypatch.setattr(ablations, "STORIES", 2)
    sizes = {"updates": {"pretrain": 2, "finetune": 1}, "samples": 2, "steps": 2, "backend": "eager"}
    work = ablations.Ablations(tmp_path / "out", f"{llava_folder}+{diffusion_folder}", 3.0, **sizes)
    *_, table = ablations.run(work, ["prefix tuning", "guidance 1"], seeds=1)
    assert [row["row"] for row in table] == ["baseline", "prefix tuning", "guidance 1"]
    assert table[1]["ours"] == ["within chance"] * 2 and table == json.loads((work.out / "ablations.json").read_text())
    assert sorted(path.name for path in (work.out / "runs").iterdir()) == ["baseline", "prefix-tuning"]
    assert not (work.out / "runs/prefix-tuning/seed-0/pretrain").exists()  # the baseline's
    monkeypatch.setattr(ablations, "train_stage", None)  # all is there
    assert [*ablations.run(work, ["prefix tuning", "guidance 1"], seeds=1)][-1] == table
