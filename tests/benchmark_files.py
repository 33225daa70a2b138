"""Ten made-up lines of each public benchmark, with the oddities that the real files have."""

import json
from collections.abc import Callable
from pathlib import Path

from tiny import picture

COLORS = ("red", "green", "blue", "yellow", "white", "black")


def images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(COLORS[number % len(COLORS)]).save(folder / name)


def opening(folder: Path) -> None:
    """Marks with and without an image, a line without total_uid, one whose image is gone, a broken and an empty one."""
    images(folder, [f"images/Gift Cards/{n}-{side}-1.jpg" for n in range(1, 9) for side in "io"])

    def row(n: int, **more) -> dict:
        asked = [{"text": f"<BEGIN> Make card {n}. <image> For her.", "image": f"./images/Gift Cards/{n}-i-1.jpg"}]
        asked += [{"text": "In two steps. <image>", "image": None}]
        parts = {"Fold it.": f"./images/Gift Cards/{n}-o-1.jpg", "Send it.": None, "": "./images/Gift Cards/gone.jpg"}
        output = [{"text": text, "image": image} for text, image in parts.items()]
        ids = {"meta_task_id": "3", "meta_task_name": "Completion", "subtask_id": "2", "subtask_name": "Gift Cards"}
        talk = [{"input": asked}, {"output": output}]
        return ids | {"total_uid": f"03020{n:02}", "data_id": str(n), "conversations": talk} | more

    rows = [row(n) for n in range(1, 9)]
    del rows[1]["total_uid"]
    rows[2]["meta_task_name"] = "Storytelling"
    rows[7]["conversations"][0]["input"][0]["image"] = "./images/Gift Cards/gone.jpg"
    lines = [json.dumps(r) for r in rows] + ["", '{"total_uid": "9', '{"total_uid": "0302099"}']
    (folder / "test_data.jsonl").write_text("\ufeff" + "\n".join(lines))


def interleavedbench(folder: Path) -> None:
    """All images in one list, marks before a full stop, an editing task, two turns, no mark, no true reply."""
    images(folder, [f"zipped_images/wiki/{n}_{k}.png" for n in range(10) for k in range(4)])
    rows = []
    for n in range(10):
        names = [f"wiki/{n}_{k}.png" for k in range(3)]
        chat = [{"from": "human", "value": "<BEGIN> It starts so: <image>. Go on. <image>"}]
        chat += [{"from": "gpt", "value": "So: <image>"}]
        rows.append({"id": f"wiki_{n}", "image": names, "task_name": "wikihow_next_step", "conversations": chat})
    rows[1]["task_name"] = "image_editing"
    rows[2]["conversations"][1]["value"] = "without a mark"
    rows[3]["conversations"] += [{"from": "human", "value": "More."}, {"from": "gpt", "value": "<image>"}]
    rows[3]["image"].append("wiki/3_3.png")
    rows[4]["conversations"] = rows[4]["conversations"][:1]
    (folder / "interleaved_bench.json").write_text(json.dumps(rows))


def mmie(folder: Path) -> None:
    """Either of text and image is null, an answer is a bare text, kinds stand in ids."""
    images(folder, [f"images/{n}.png" for n in range(10)])
    rows = []
    for n in range(10):
        question = [{"text": "What follows?", "image": None}, {"text": None, "image": f"images/{n}.png"}]
        true = [{"text": "The next.", "image": f"images/{9 - n}.png"}]
        kind = ("SA", "PBL", "MSR")[n % 3]
        rows.append({"id": f"{kind}-{n}", "question": question, "answer": "", "model": "gt", "gt_answer": true})
    rows[3]["gt_answer"] = [{"text": "Words alone.", "image": None}]
    rows[4]["question"][1]["image"] = "../out.png"
    (folder / "data.json").write_text(json.dumps(rows))


def isg(folder: Path) -> None:
    """Questions about images in a list, in an object, or not there; a pair of blocks without a subject; captions."""
    images(folder, [f"images/{n:04}_{kind}1.png" for n in range(10) for kind in "qg"])
    rows = []
    for n in range(10):
        said = [{"type": "text", "content": "Then?"}, {"type": "image", "content": f"images/{n:04}_q1.png"}]
        golden = [{"type": "text", "content": "So."}]
        golden += [{"type": "image", "content": f"images/{n:04}_g1.png", "caption": "a hand"}]
        asked = [{"image": "<gen_img1>", "Question": "A hand?", "id": 0, "Preliminary": []}]
        asked += [{"image": "<gen_img1>", "Question": "Is it wet?", "id": 1, "Preliminary": [0]}]
        pair = {"subject": "<gen_text1>", "object": "<query_img1>", "Question": "Does <gen_text1> fit?"}
        predict = {"block_qa": {"questions": [pair, {"Question": "?"}]}, "image_qa": {"questions": asked}}
        category = ("Prediction", "HowTo")[n % 2]
        rows.append({"id": f"{n:04}", "Category": category, "Query": said, "Golden": golden, "predict": predict})
    rows[1]["predict"]["image_qa"] = rows[1]["predict"]["image_qa"]["questions"]
    del rows[2]["predict"]["image_qa"]
    rows[3]["Golden"].reverse()
    (folder / "ISG-Bench.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def comm(folder: Path) -> None:
    """Steps of several images or none, no title, an odd number of steps."""
    images(folder, [f"images/{n}_{k}.jpg" for n in range(10) for k in range(4)])
    rows = []
    for n in range(10):
        steps = [
            [{"type": "text", "content": f" Dig hole {k}.\n"}, {"type": "image", "image_path": f"{n}_{k}.jpg"}]
            for k in range(3)
        ]
        rows.append({"data_id": f"garden_{n}", "dataset_type": "wikihow", "title": "Gardens", "step_info": steps})
    rows[1]["title"] = None
    rows[2]["step_info"][1].append({"type": "image", "image_path": "2_3.jpg"})
    rows[3]["step_info"][2].pop()
    (folder / "test_data.json").write_text(json.dumps(rows))


def weave(folder: Path) -> None:
    """Images counted from 1, one that the assistant draws and later turns name, a turn of words, key points of both."""
    images(folder, [f"imgs/{n}_{k}.jpg" for n in range(10) for k in range(1, 4)])
    rows = []
    for n in range(10):
        chats = [
            {"role": "user", "type": "text", "content": "Make Image #1 red, as Image #1 was."},
            {"role": "assistant", "type": "image", "content": "Image #2", "key_point": {"Image #1": "red", "a": "b"}},
            {"role": "user", "type": "text", "content": "Now Image #2 with Image #1, please"},
            {"role": "assistant", "type": "image", "content": "Image #3", "key_point": {"GT #3": "x", "Image #2": "y"}},
            {"role": "user", "type": "text", "content": "What is in Image #3?"},
            {"role": "assistant", "type": "text", "content": "A hat.", "key_point": None},
        ]
        names = [f"imgs/{n}_{k}.jpg" for k in range(1, 4)]
        rows.append({"idx": n, "domain": ("edit", "chess_game")[n % 2], "images": names, "chats": chats})
    rows[1]["chats"] = rows[1]["chats"][4:]
    rows[2]["chats"].pop()
    (folder / "test.json").write_text(json.dumps(rows))


MAKE: dict[str, Callable[[Path], None]] = {
    make.__name__: make for make in (opening, interleavedbench, mmie, isg, comm, weave)
}
