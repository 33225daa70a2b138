"""What `mgp5 bench` compiles beforehand, what it runs as processes, and what it tells of a report; check.sh."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_bench import on_cpu, run

from mgp5.bench import drawing, kernels, peers, shell
from mgp5.bench.peers import Work, compile_beforehand, compile_way
from mgp5.bench.run import GPU, read_reference, slower
from mgp5.bench.timing import Bench
from mgp5.errors import Mgp5Error
from mgp5.hub import resolve


@pytest.mark.slow
def test_what_a_user_waits_for(monkeypatch):
    monkeypatch.setattr(shell, "STEPS", 2)
    rows = [*shell.reply_rows(on_cpu(), resolve("demo")), *shell.server_rows(on_cpu(), resolve("demo"))]
    names = ["first token", "first image"] * 2 + ["server"]
    assert [row["name"] for row in rows] == names and rows[0]["provider"] == "auto, cold"
    assert all(first["median"] < image["median"] for first, image in zip(rows[0:4:2], rows[1:4:2], strict=True))
    assert rows[-1]["images_per_s"] > 0 and rows[-1]["tokens_per_s"] >= rows[-1]["images_per_s"]


def test_a_command_that_fails_says_so(tmp_path):
    with pytest.raises(Mgp5Error, match="no model 'x'"):
        command = [sys.executable, "-m", "mgp5", "chat", "--model", "x", "--message", "hello", "--json"]
        shell.first_events(command, str(tmp_path), {})


def test_peers_compile_side_by_side_within_their_share():
    """What did not finish counts its startup; what did counts none."""
    device, told, left = torch.device("cuda"), [], []
    bench = Bench(device=device, dtype=torch.bfloat16, backends=("eager", "compile"), minutes=10, tell=told.append)
    works = [Work("guided step", "demo", 512), Work("reply", "demo"), Work("decode", "demo", counts=(1, 4))]

    def run(command, seconds):
        way, work, _ = json.loads(command[-1])
        left.append(seconds)
        return int(way == "transformers static" and work[3] == [4])

    compile_beforehand(bench, works, run)
    assert bench.startup == {"transformers static": peers.STARTUP["transformers static"]}
    assert told[0].startswith("6 compilations") and len(left) == 6 and max(left) <= 0.4 * 600
    compile_beforehand(bench, [Work("condition", "demo")], run)
    assert len(left) == 6


def test_a_way_is_compiled_by_one_command(monkeypatch):
    done = []
    ways = {"compile": lambda: (lambda: done.append("steps"), lambda: done.append("VAE"))}
    monkeypatch.setattr(drawing, "ways", lambda *args, **options: ways)
    compile_way("compile", Work("guided step", "demo"), "cpu")
    assert done == ["steps", "VAE"]


def test_the_gpu_suite_begins_with_the_most_telling_rows():
    kinds = [(work.kind, work.pixels, work.counts) for work in GPU]
    assert kinds[:3] == [("condition", None, (1,)), ("guided step", 512, (1,)), ("decode", None, (1,))]
    assert {("guided step", 1024, (1,)), ("guided step", 512, (4, 8)), ("decode", None, (4, 8))} < set(kinds)
    conditions = [resolve(work.model).mllm for work in GPU if work.kind == "condition"]
    assert {resolve(work.model).mllm for work in GPU} == set(conditions)  # every image is counted whole


def test_what_got_slower_is_told(tmp_path):
    def row(median, provider="eager", **more):
        return {"name": "n", "size": "s", "provider": provider, "median": median, "unit": "ms"} | more

    before = {"tolerance": 0.2, "rows": [row(10.0, vae_ms=5.0), row(10.0, "loud", tolerance=0.5), row(1.0, "gone")]}
    now = [row(11.9, vae_ms=6.1), row(15.1, "loud"), row(9.0, "new"), row(0.1, "gone", skipped="out of time")]
    assert slower(now, before) == [
        "n, s, eager: 6.1 vae_ms, was 5 (+22%, tolerance 20%)",
        "n, s, loud: 15.1 ms, was 10 (+51%, tolerance 50%)",
    ]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(Mgp5Error, match="no report of mgp5 bench"):
        read_reference(tmp_path / "other.json")


@pytest.mark.parametrize("earlier, code", [(1e9, 0), (1e-9, 1)])
def test_against_an_earlier_report_slower_rows_fail(tmp_path, monkeypatch, earlier, code):
    row = {"name": "n", "size": "s", "provider": "p", "median": 1.0, "unit": "ms"}
    monkeypatch.setattr("mgp5.bench.run.kernel_rows", lambda bench: iter([row]))
    (tmp_path / "earlier.json").write_text(json.dumps({"rows": [row | {"median": earlier}]}))
    done, report = run(tmp_path / "new.json", "--suite", "kernels", "--against", str(tmp_path / "earlier.json"))
    assert done.exit_code == code and ("slower: n, s, p" in done.stdout) == bool(code), done.output
    assert report["tolerance"] == 0.1


def test_the_rows_of_the_references_are_rows_of_today():
    """Their sizes are written as the suites write them."""
    sizes = {"guided step": r"(sd-2\.1-base, 512|sd-2\.1, 768) px, batch 2"}
    sizes |= {
        "decode": r"llava-1\.5-7b, 128 tokens .* 64",
        "condition": r"llava-1\.5-7b, 8 positions behind 64",
        "limit": "bfloat16; bytes read and written",
    }
    sizes |= {"pretrain update": r"llava-1\.5-7b\+sd-2\.1-base, 512 px, 48 samples"}
    known = {f"{case.size} bfloat16" for pixels in (512, 768) for case in kernels.cases(pixels)}
    files = list((Path(kernels.__file__).parents[2] / "kernels" / "results").glob("*.json"))
    assert files
    for file in files:
        report = read_reference(file)
        assert {"gpu", "driver", "date", "commit", "torch"} <= report["machine"].keys()
        for row in report["rows"]:
            assert (
                row["size"] in known if row["name"] == "group_norm" else re.fullmatch(sizes[row["name"]], row["size"])
            )


@pytest.mark.slow
def test_the_script_for_a_card_runs_through_on_a_cpu(tmp_path, llava_folder, diffusion_folder):
    script = Path(__file__).parents[1] / "examples" / "gpu" / "check.sh"
    settings = {"MODEL": f"{llava_folder}+{diffusion_folder}", "DEVICE": "cpu", "BATCH": "4", "PYTHON": sys.executable}
    settings |= {"BENCH": "--backend eager --steps 1", "MINUTES": "8"}
    done = subprocess.run([script, tmp_path / "found"], env=os.environ | settings, capture_output=True, text=True)
    parts = [line.split(": ")[0:2] for line in (tmp_path / "found" / "summary.txt").read_text().splitlines()]
    assert [name for name, _ in parts] == ["doctor", "profile", "tests", "bench", "kernels", "train"], done.stderr
    assert all(told.startswith("exit 0 ") for name, told in parts if name != "kernels"), done.stdout
    for name in ("step", "vae", "token", "update"):
        total, *lines = (tmp_path / "found" / "profile" / f"{name}.txt").read_text().splitlines()
        assert total.endswith(" all") and float(total.split()[0]) > 0 and len(lines) > 5
    for name in ("gpu", "kernels", "train"):
        assert json.loads((tmp_path / "found" / f"{name}.json").read_text())["rows"]
