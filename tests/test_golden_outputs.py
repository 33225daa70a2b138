"""What people get, held against files in tests/golden through every rebuilding of the house.

Texts are equal, images within 2 of 255, numbers within 1e-4. After a change that is meant to change them:
MGP5_UPDATE_GOLDEN=1 pytest tests/test_golden_outputs.py, and look at what it wrote.
"""

import json
import os
from base64 import b64decode
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image as pil
from safetensors.torch import load_file
from serve_process import serving_here

from mgp5 import cli

pytestmark = pytest.mark.usefixtures("loads_once")
ROOT, GOLDEN = Path(__file__).parents[1], Path(__file__).parent / "golden"
UPDATE = os.environ.get("MGP5_UPDATE_GOLDEN") == "1"
EAGER = ("--backend", "eager", "--device", "cpu", "--steps", "8")
TOLERANCE = 2  # of 255


def run(*args: object) -> str:
    """Standard output of a command that succeeds."""
    result = CliRunner().invoke(cli.main, list(map(str, args)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def check_value(name: str, value: object) -> None:
    path = GOLDEN / f"{name}.json"
    if UPDATE:
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    expected = json.loads(path.read_text())
    assert json.loads(json.dumps(value)) == expected


def check_image(name: str, image: pil.Image) -> None:
    path = GOLDEN / f"{name}.png"
    if UPDATE:
        image.save(path)
    with pil.open(path) as expected:
        assert image.size == expected.size
        found, told = (np.asarray(picture.convert("RGB"), dtype=int) for picture in (image, expected))
    assert abs(found - told).max() <= TOLERANCE, f"{name} differs by {abs(found - told).max()} of 255"


def check_folder(name: str, folder: Path) -> None:
    """A folder's story.json: its texts in order, and the images that the assistant made."""
    chat = json.loads((folder / "story.json").read_text())["messages"]
    told = [[message["role"], *(part.get("text", "(image)") for part in message["content"])] for message in chat]
    check_value(name, told)
    made = [part["path"] for m in chat if m["role"] == "assistant" for part in m["content"] if part["type"] == "image"]
    for number, path in enumerate(made):
        with pil.open(folder / path) as image:
            check_image(f"{name}-{number}", image)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_story(tmp_path, seed):
    run("story", "--images", ROOT / "examples/picnic", "--scenes", 2, "--seed", seed, "--out", tmp_path / "s", *EAGER)
    check_folder(f"story-{seed}", tmp_path / "s")


def test_a_chat_of_three_turns(tmp_path):
    words = ("draw a red fox in the forest", "now it snows", "what do you see?")
    said = [flag for text in words for flag in ("--message", text)]
    run("chat", *said, "--seed", 3, "--out", tmp_path / "c", *EAGER)
    check_folder("chat", tmp_path / "c")


def test_a_batch_of_three_lines(tmp_path):
    (tmp_path / "1.png").write_bytes((ROOT / "examples/picnic/1.png").read_bytes())
    own = {"steps": 5, "image_seed": 4}
    lines = (
        {"messages": [{"role": "user", "content": "draw a blue owl with a kite"}]},
        {"story": [{"path": "1.png", "text": "A day in the meadow."}], "scenes": 1},
        {"story": [{"text": "The green frog sits at the lake."}], "scenes": 0, "options": own},
    )
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("story", "--batch", tmp_path / "lines.jsonl", "--seed", 5, "--out", tmp_path / "b", *EAGER)
    for number in (1, 2, 3):
        check_folder(f"batch-{number}", tmp_path / f"b/{number:06d}")


def test_a_served_reply():
    with serving_here("demo") as server:
        fields = {"model": "tiny", "messages": [{"role": "user", "content": "draw a grey cat at the beach"}], "seed": 2}
        body = json.dumps(fields | {"steps": 8, "stream": True, "max_tokens": 40, "image": "always"}).encode()
        status, answer = server.ask("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    assert status == 200
    events = [json.loads(e[6:]) for e in answer.decode().split("\n\n") if e.startswith("data: {")]
    text, steps, images = "", 0, []
    for choice in (event["choices"][0] for event in events if event["choices"]):
        text += choice["delta"].get("content", "")
        images += [image["image_url"]["url"] for image in choice["delta"].get("images", [])]
    steps = [event["progress"] for event in events if "progress" in event]
    check_value("served", {"text": text, "images": len(images), "last": steps[-1], "steps": len(steps)})
    for number, url in enumerate(images):
        check_image(f"served-{number}", pil.open(BytesIO(b64decode(url.partition(",")[2]))))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_three_updates(tmp_path, llava_folder, diffusion_folder, stage, fresh_accelerator):
    run("data", "storyland", "--out", tmp_path / "data", "--pairs", 8, "--stories", 2, "--dialogs", 0, "--seed", 1)
    kind = {"pretrain": "cc3m", "finetune": "vist"}[stage]
    data = next(tmp_path.glob(f"data/**/{kind}"))
    settings = ("batch=2", "accumulation=2", "warmup=0", "precision=fp32", "lr=1e-3", "log_every=1")
    flags = [flag for text in settings for flag in ("--set", text)]
    out = run(
        *("train", "--stage", stage, "--model", f"{llava_folder}+{diffusion_folder}", "--data", data, "--format", kind),
        *("--preset", "demo", "--max-steps", 3, "--device", "cpu", "--json", "--out", tmp_path / "run", *flags),
    )
    rows = [json.loads(line) for line in out.splitlines()]
    losses = [{name: row[name] for name in ("text", "ldm", "caption") if name in row} for row in rows]
    tensors = load_file(tmp_path / "run/mgp5/model.safetensors")
    weights = {name: [float(t.double().sum()), float(t.double().square().sum())] for name, t in sorted(tensors.items())}
    path = GOLDEN / f"train-{stage}.json"
    if UPDATE:
        path.write_text(json.dumps({"losses": losses, "weights": weights}, indent=1) + "\n")
    expected = json.loads(path.read_text())
    assert weights.keys() == expected["weights"].keys() and len(losses) == 3
    for found, told in zip(losses, expected["losses"], strict=True):
        assert found == pytest.approx(told, rel=1e-4, abs=1e-4)
    for name, sums in weights.items():
        assert sums == pytest.approx(expected["weights"][name], rel=1e-4, abs=1e-3), name


def test_the_exported_unet(small_export):
    import onnx

    counts = {}
    for name in ("unet", "denoiser"):
        graph = onnx.load(small_export / name / "model.onnx", load_external_data=False).graph
        counts[name] = dict(sorted(Counter(node.op_type for node in graph.node).items()))
    check_value("export", counts)


def test_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    told = {"mgp5": run("--help")}
    for name, command in sorted(cli.main.commands.items()):
        told[name] = run(name, "--help")
        for inner in sorted(getattr(command, "commands", {})):
            told[f"{name} {inner}"] = run(name, inner, "--help")
    assert not [line for name in ("mgp5", "data") for line in told[name].splitlines()[1:] if line.endswith("...")]
    check_value("help", {name: text.splitlines() for name, text in told.items()})
