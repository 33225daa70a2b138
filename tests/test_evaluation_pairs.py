"""People judge two evaluations: the page in a real browser, the votes it saves, and what is counted of them."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
from browser import browser_page, overflow
from click.testing import CliRunner

from mgp5 import cli
from mgp5.evaluation.intervals import share_interval
from mgp5.evaluation.run import read_replies
from mgp5.evaluation.votes import CRITERIA, agreement, read_votes
from mgp5.storyland.write import write

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli.main, list(map(str, args)))
    assert result.exit_code == code, result.stderr
    return result.stderr if code else result.stdout


@pytest.fixture(scope="module")
def evals(small_folder, tmp_path_factory) -> tuple[Path, Path]:
    """Two evaluations of the same three stories; a reply of the second is hostile."""
    root = tmp_path_factory.mktemp("evals")
    write(root / "data", "train", pairs=0, stories=3, dialogs=0, seed=0)
    given = ["--model", small_folder, "--format", "vist", "--data", root / "data/vist", "--split", "train"]
    given += ["--steps", 2, "--set", "max_tokens=6", "--backend", "eager", "--metric", "BLEU-1"]
    found = root / "run-zebra", root / "run-yak"
    for seed, out in enumerate(found):
        run("eval", *given, "--out", out, "--seed", seed, "--task", "continue", "--task", "illustrate")
    file = found[1] / "replies/model-0.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    row = next(row for row in rows if row["key"].startswith("0/") and "continue" in row["key"])
    row["reply"]["content"][0]["text"] = HOSTILE
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


@pytest.fixture(scope="module")
def folder(evals, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "out"
    run("compare", evals[0] / "model", evals[1], "--out", out)
    return out


def begin(page, rater: str) -> None:
    page.fill("#rater", rater)
    page.keyboard.press("Enter")


def save(page, path: Path) -> list[dict]:
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(path)
    assert download.value.suggested_filename.startswith("votes-")
    return [json.loads(line) for line in path.read_text().splitlines()]


def agrees(page, found: dict) -> None:
    """The page's own numbers are those of the command."""
    shown = json.loads(page.get_attribute("#results", "data-rates"))
    assert shown.keys() == found["criteria"].keys()
    for name, label in product(shown, ("A", "B", "tie")):
        assert shown[name][label] == pytest.approx(found["criteria"][name][label])


def test_people_vote_in_a_browser(evals, folder, tmp_path):
    key = json.loads((folder / "key.json").read_text())
    said = {}
    for label, name in key["systems"].items():
        rows = read_replies(evals[0] if "zebra" in name else evals[1], "model")
        said[label] = {k: row["reply"]["content"][0]["text"] for k, row in rows.items() if "continue" in k}
    with browser_page() as page:
        page.goto((folder / "compare.html").as_uri())
        begin(page, "Ann")
        seen = [{side: page.inner_text(f"#{side} p") for side in ("left", "right")}]
        assert page.locator("#next").is_disabled()
        page.keyboard.press("1")
        page.keyboard.press("3")
        page.keyboard.press("Backspace")
        page.click("#image [data-choice=tie]")
        page.keyboard.press("ArrowRight")
        page.reload()  # goes on where it was
        assert page.inner_text("#count") == "1 of 3 done"
        seen.append({side: page.inner_text(f"#{side} p") for side in ("left", "right")})
        for name in CRITERIA:
            page.click(f"#{name} [data-choice=left]")
        page.click("#next")
        seen.append({side: page.inner_text(f"#{side} p") for side in ("left", "right")})
        page.set_viewport_size({"width": 390, "height": 844})
        assert overflow(page) == 0
        images = "[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)"
        assert page.locator("img").count() >= 3 and page.evaluate(images)
        for press in ("2", "2", "3", "Enter"):
            page.keyboard.press(press)
        assert overflow(page) == 0 and page.title() == "Which reply is better?"
        mine = save(page, tmp_path / "ann.jsonl")
        agrees(page, json.loads(run("votes", tmp_path / "ann.jsonl", "--key", folder / "key.json", "--json")))
        page.click("text=Another rater")
        begin(page, "Bob")
        for _ in range(3):
            for press in ("2", "2", "3", "Enter"):
                page.keyboard.press(press)
        other = save(page, tmp_path / "bob.jsonl")
    order = list(dict.fromkeys(vote["question"] for vote in sorted(mine, key=lambda vote: vote["time"])))
    choices = {(order.index(vote["question"]), vote["criterion"]): vote["choice"] for vote in mine}
    expected = ["left", "tie", "right", "left", "left", "left", "tie", "tie", "right"]
    assert [choices[number, name] for number, name in product(range(3), CRITERIA)] == expected
    for vote in mine:  # what stood on a side is what its system has said
        shown = seen[order.index(vote["question"])]
        for side in ("left", "right"):
            assert shown[side].split() == said[vote[side]][vote["question"]].split()
    assert any(HOSTILE in shown.values() for shown in seen)
    assert len({(vote["question"], vote["left"]) for vote in mine + other}) > 3  # raters see other sides
    both = json.loads(
        run("votes", tmp_path / "ann.jsonl", tmp_path / "bob.jsonl", "--key", folder / "key.json", "--json")
    )
    assert (both["raters"], both["questions"], both["votes"], both["replaced"]) == (2, 3, 18, 0)
    assert both["criteria"]["language"]["agreement"] == pytest.approx(1 / 3)


def test_pictures_are_judged_as_pictures(evals, tmp_path):
    """Questions of one story are one group, in the page as in the command."""
    run("compare", *evals, "--task", "illustrate", "--out", tmp_path / "out")
    with browser_page(390, 844, dark=True) as page:
        page.goto((tmp_path / "out/compare.html").as_uri())
        begin(page, "Ann")
        assert page.locator("#language").count() == 0
        for number in range(15):
            for press in (str(1 + number % 3), "1", "Enter"):
                page.keyboard.press(press)
        save(page, tmp_path / "ann.jsonl")
        found = json.loads(run("votes", tmp_path / "ann.jsonl", "--key", tmp_path / "out/key.json", "--json"))
        agrees(page, found)
    assert list(found["criteria"]) == ["image", "coherence"] and found["questions"] == found["of"] == 15


def test_the_page_tells_no_names_and_is_made_the_same_again(evals, folder, tmp_path):
    page, key = (folder / "compare.html").read_text(), json.loads((folder / "key.json").read_text())
    assert "run-" not in page and page.count("<script") == 2 and "://" not in page
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert "model" not in json.dumps(data | {"pictures": []})
    run("compare", evals[0] / "model", evals[1], "--out", tmp_path / "again")
    assert (tmp_path / "again/compare.html").read_text() == page
    run("compare", *evals, "--out", tmp_path / "two", "--limit", 2, "--seed", 3)
    two = json.loads((tmp_path / "two/key.json").read_text())
    assert len(two["questions"]) == 2 and two["page"] != key["page"]
    labels = {}
    for seed in range(6):
        run("compare", *evals, "--out", tmp_path / f"seed-{seed}", "--limit", 1, "--seed", seed)
        labels[seed] = next(iter(json.loads((tmp_path / f"seed-{seed}/key.json").read_text())["systems"]))
    assert set(labels.values()) == {"A", "B"}  # chance says who is A, not the command line


def test_what_cannot_be_compared(evals, folder, tmp_path):
    first, second = evals
    shutil.copytree(second, tmp_path / "failed")
    file = tmp_path / "failed/replies/model-0.jsonl"
    name = next(row for row in read_replies(second, "model") if "continue" in row)
    file.write_text(file.read_text() + json.dumps({"key": name, "error": "no memory"}) + "\n")
    run("compare", first, tmp_path / "failed", "--out", tmp_path / "out")
    key = json.loads((tmp_path / "out/key.json").read_text())
    assert key["left_out"] == {str(tmp_path / "failed"): 1} and key["of"] == 2 and name not in key["questions"]
    shutil.copytree(second, tmp_path / "other")
    write(tmp_path / "data", "train", pairs=0, stories=3, dialogs=0, seed=1)
    settings = json.loads((second / "config.json").read_text()) | {"data": str(tmp_path / "data/vist")}
    (tmp_path / "other/config.json").write_text(json.dumps(settings))
    for args, expected in (
        ((first, first / "model"), "are one system"),
        ((first, first / "gill"), "has no replies by 'gill': it has model"),
        ((first, tmp_path), f"no evaluation at {tmp_path}"),
        ((first, second, "--task", "story"), "not both have replied to story: they have "),
        ((first, tmp_path / "other"), "is another in"),
    ):
        assert expected in run("compare", *args, "--out", tmp_path / "none", code=2)
    assert not (tmp_path / "none").exists()
    assert "compare.html exists" in run("compare", *evals, "--out", folder, code=2)


QUESTIONS = {f"q{n}": {"group": f"g{n}", "criteria": list(CRITERIA)} for n in range(4)}
KEY = {"page": "p", "systems": {"B": "runs/ours", "A": "runs/theirs"}, "questions": QUESTIONS}


def line(question: str, rater: str, better: str, left: str = "A", time: str = "10:00", **other: str) -> str:
    right = "B" if left == "A" else "A"
    row = {"page": "p", "question": question, "rater": rater, "criterion": "language", "left": left, "right": right}
    row |= {"choice": {left: "left", right: "right"}.get(better, "tie"), "time": f"2026-01-01T{time}:00.000Z"}
    return json.dumps(row | other) + "\n"


@pytest.fixture
def key(tmp_path) -> Path:
    (tmp_path / "key.json").write_text(json.dumps(KEY))
    return tmp_path / "key.json"


def test_votes_are_counted(key, tmp_path):
    """By hand: B wins 3 of 6, A 1, ties 2; Ann and Bob agree on one of two questions."""
    ann = [line("q0", "Ann", "B"), line("q1", "Ann", "tie", left="B"), line("q2", "Ann", "B", left="B")]
    bob = [line("q0", "Bob", "B", left="B"), line("q1", "Bob", "A"), line("q3", "Bob", "tie")]
    late = [line("q2", "Ann", "A", left="B", time="09:59")]  # an older file, given last
    for name, lines in (("ann", ann), ("bob", [*bob, "\n"]), ("old", late)):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    files = [tmp_path / f"{name}.jsonl" for name in ("ann", "bob", "old")]
    found = json.loads(run("votes", *files, "--key", key, "--json"))
    row = found["criteria"]["language"]
    assert {label: row[label]["votes"] for label in ("A", "B", "tie")} == {"A": 1, "B": 3, "tie": 2}
    assert row["B"]["share"] == 0.5 and row["agreement"] == 0.5 and found["replaced"] == 1
    assert found["left"] == pytest.approx(3 / 4)
    told = run("votes", *files, "--key", key)
    assert "ours better, %" in told and told.index("ours better") < told.index("theirs better")
    assert "50.0 (" in told and "1 votes were replaced" in told and "raters: 2; questions with a vote: 4 of 4" in told


def test_agreement_is_krippendorffs(key, tmp_path):
    from nltk.metrics.agreement import AnnotationTask

    said = {"Ann": "ABtA", "Bob": "AAtB", "Cid": "AtB "}
    rows = [(rater, f"q{n}", better) for rater, all_ in said.items() for n, better in enumerate(all_) if better != " "]
    (tmp_path / "votes.jsonl").write_text("".join(line(question, rater, better) for rater, question, better in rows))
    votes, _ = read_votes([tmp_path / "votes.jsonl"], KEY)
    found = agreement(votes)
    assert found["alpha"] == pytest.approx(AnnotationTask(rows).alpha())
    assert found["agreement"] == pytest.approx(4 / 10)  # pairs: 3 of 3, 0 of 3, 1 of 3, 0 of 1
    assert agreement([vote for vote in votes if vote.rater == "Ann"]) == {"agreement": None, "alpha": None}


def test_bad_votes_are_refused_by_line(key, tmp_path):
    file = tmp_path / "votes.jsonl"
    good = line("q0", "Ann", "A")
    for bad, expected in (
        ("{", "line 2: Expecting property name"),
        ("[]", "line 2: no text in one of its fields"),
        (line("q0", "", "A"), "line 2: no text in one of its fields"),
        (line("q0", "Ann", "A", page="x"), "line 2: a vote on another page, x"),
        (line("q9", "Ann", "A"), "line 2: no question 'q9' with criterion 'language'"),
        (line("q0", "Ann", "A", criterion="taste"), "line 2: no question 'q0' with criterion 'taste'"),
        (line("q0", "Ann", "A", right="A"), "line 2: choice 'left' between 'A' and 'A'"),
        (line("q0", "Ann", "A", choice="both"), "line 2: choice 'both' between"),
        (line("q0", "Ann", "A", time="noon"), "line 2: Invalid isoformat string"),
    ):
        file.write_text(good + bad)
        told = run("votes", file, "--key", key, code=1)
        assert f"{file}, {expected}" in told and "expected a vote" in told and told.count("\n") == 1
    assert "cannot read" in run("votes", file, "--key", file, code=1)
    assert "cannot read" in run("votes", tmp_path / "none", "--key", key, code=1)


def test_intervals_are_wilsons():
    """Published values (Newcombe, 1998, table I), the definition, and groups."""
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        values = [True] * hits + [False] * (count - hits)
        share, *ends = share_interval(values, range(count))
        assert share == hits / count and ends == pytest.approx([low, high], abs=5e-5)
        for end in ends:  # the shares from which the one that was seen is 1.96 standard errors away
            assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, abs=1e-9)
    values, groups = [True, True, False, True, False], list("abcde")
    assert share_interval(values * 3, groups * 3) == pytest.approx(share_interval(values, groups))  # raters agree
    alike = share_interval([True, True, False, False, False, False], list("aabbcc"))
    assert alike == pytest.approx(share_interval([True, False, False], list("abc")))
    unlike = share_interval([True, False, False, True, False, False], list("aabbcc"))
    assert unlike == pytest.approx(share_interval([True, True, False, False, False, False], range(6)))
    assert share_interval([True] * 6, list("aabbcc")) == pytest.approx(share_interval([True] * 3, list("abc")))
