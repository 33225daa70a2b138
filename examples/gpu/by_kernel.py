"""Profile by kernel what makes up a reply and training: a step, the VAE, a token, a condition, an update of training.

    python examples/gpu/by_kernel.py --out DIR

Each gets a table in DIR: microseconds and calls of every kernel (on a CPU, of every operation), and their sum.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import profile, supported_activities

from mgp5.bench import decoding, drawing, training
from mgp5.bench.timing import Bench, reason, release_memory, timed
from mgp5.device import pick_device, quiet_libraries
from mgp5.hub import Parts, resolve

STEPS = 5
Work = tuple[Callable[[], object], int]  # what is run, and of how many parts it consists


@contextmanager
def drawn(bench: Bench, parts: Parts, pixels: int | None) -> Iterator[dict[str, Work]]:
    """Yield the steps of an image and its VAE, by the first backend of the benchmark."""
    scene = drawing.make_scene(bench, parts, pixels, 1, STEPS)
    steps, vae = drawing.ways(scene, bench, compiled=False)[bench.backends[0]]()
    yield {"step": (steps, STEPS), "vae": (vae, 1)}


@contextmanager
def written(bench: Bench, parts: Parts) -> Iterator[dict[str, Work]]:
    """Yield the tokens of a reply, and all between a text and the first step of its image."""
    model, works = decoding.make_model(parts, bench), {}
    for name, ways, count in (("token", decoding.ways, decoding.REPLY), ("condition", decoding.condition_ways, 1)):
        found = ways(model, bench.backends)
        (work,) = found.get("triton", found["eager"])()
        works[name] = work, count
    yield works


@contextmanager
def trained(bench: Bench, parts: Parts, micro: int) -> Iterator[dict[str, Work]]:
    """Yield an update of the first stage of training on one micro-batch with live features."""
    config, make = training.setting(bench, parts, "minigpt5")
    config = replace(config, checkpointing=True, batch=micro, accumulation=1)
    model = make(config, device=bench.device)
    with training.updates(model, config, training.random_batch(model, config), bench) as update:
        yield {"update": (update, 1)}


def table(work: Callable[[], object], parts: int, on_gpu: bool) -> list[str]:
    """Run a work thrice, profile the last run (a VAE's graph is recorded in the second); return a line for each kernel,
    the longest first, behind their sum."""
    for _ in range(2):
        timed(work)
    with profile(activities=supported_activities()) as profiler:
        timed(work)
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events():
        if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU):
            spent[event.name][0] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / parts
            spent[event.name][1] += 1 / parts
    total, calls = (sum(column) for column in zip(*spent.values(), strict=True))
    lines = [f"{total:10.1f} us {100:5.1f} % {calls:8.1f} x  all"]
    for name, (time, count) in sorted(spent.items(), key=lambda item: -item[1][0]):
        lines.append(f"{time:10.1f} us {100 * time / max(total, 1e-9):5.1f} % {count:8.1f} x  {name[:120]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="llava-1.5-7b+sd-2.1-base")
    parser.add_argument("--pixels", type=int, help="of an image; the model's if not given")
    parser.add_argument("--micro", type=int, default=16, help="samples of an update")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    quiet_libraries()
    (device, dtype), parts = pick_device(args.device), resolve(args.model)
    on_gpu = device.type == "cuda"
    bench = Bench(device=device, dtype=dtype, backends=("triton" if on_gpu else "eager",))
    args.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for prepared in (
        lambda: drawn(bench, parts, args.pixels),
        lambda: written(bench, parts),
        lambda: trained(bench, parts, args.micro),
    ):
        try:
            with prepared() as works:
                for name, (work, count) in works.items():
                    lines = table(work, count, on_gpu)
                    (args.out / f"{name}.txt").write_text("\n".join(lines) + "\n")
                    print(name, *lines[:12], sep="\n", flush=True)
        except Exception as error:  # of any library or kernel: the other works still tell something
            failed = True
            print(f"failed: {reason(error)}", flush=True)
        release_memory()
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
