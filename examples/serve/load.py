"""Load for a running `mgp5 serve`: one client, then many; every reply is compared with the one it had alone.

    python load.py --clients 64 --minutes 10 --requests 64
    python load.py --first-token 20

A client that is told 429 asks again after the seconds of Retry-After. Needs the package openai. The last line of stdout
is a JSON object with all numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO

import httpx
import openai
from PIL import Image, ImageChops

SCENES = (
    "in the snow",
    "at the beach",
    "in the forest",
    "on a hill",
    "by the lake",
    "in the rain",
    "at night",
    "at home",
)
TOLERANCE = 4  # of 255: pictures are drawn together with others, which rounds differently


@dataclass
class Phase:
    """Counts and times of the requests of some clients."""

    clients: int
    seconds: float = 0.0
    sent: int = 0
    images: int = 0
    differing: int = 0
    largest: int = 0  # difference of a pixel
    answers: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)  # seconds to the first token

    def report(self) -> dict[str, object]:
        """Return the numbers as JSON values."""
        parts = statistics.quantiles(self.first, n=20) if len(self.first) > 1 else [0.0] * 19
        return {
            "clients": self.clients,
            "seconds": round(self.seconds, 1),
            "sent": self.sent,
            "answers": dict(self.answers),
            "without answer": self.sent - self.answers.total(),
            "images": self.images,
            "replies per minute": round(60 * self.answers["200"] / self.seconds, 1),
            "first token, median s": round(parts[9], 3),
            "first token, p95 s": round(parts[18], 3),
            "unlike alone": self.differing,
            "largest difference of a pixel": self.largest,
        }


async def ask(client: openai.AsyncOpenAI, args: argparse.Namespace, number: int, phase: Phase) -> tuple[str, bytes]:
    """Send request `number`, streamed; return its text and the pixels of its images."""
    begun, text, pixels, complete = time.monotonic(), "", b"", False
    stream = await client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": f"Tell me of a fox {SCENES[number % len(SCENES)]}."}],
        seed=number,
        max_tokens=args.tokens,
        stream=True,
        extra_body={"image": "always" if number % 4 else "never", "max_images": 1, "steps": args.steps},
    )
    async for chunk in stream:
        delta = chunk.choices[0].delta if chunk.choices else None
        complete |= bool(chunk.choices and chunk.choices[0].finish_reason)
        if delta and delta.content:
            if not text:
                phase.first.append(time.monotonic() - begun)
            text += delta.content
        for image in getattr(delta, "images", ()):
            data = base64.b64decode(image["image_url"]["url"].partition("base64,")[2])
            pixels += Image.open(BytesIO(data)).convert("RGB").tobytes()
            phase.images += 1
    if not complete:
        raise httpx.RemoteProtocolError("the stream ended early")
    return text, pixels


def compare(phase: Phase, found: tuple[str, bytes], alone: tuple[str, bytes]) -> None:
    """Count a reply that differs from the one that the same request had alone."""
    same = found[0] == alone[0] and len(found[1]) == len(alone[1])
    if same and found[1]:
        pair = (Image.frombytes("L", (len(pixels), 1), pixels) for pixels in (found[1], alone[1]))
        difference = ImageChops.difference(*pair).getextrema()[1]
        phase.largest = max(phase.largest, difference)
        same = difference <= TOLERANCE
    phase.differing += not same


async def run(client: openai.AsyncOpenAI, args: argparse.Namespace, clients: int, alone: dict, until: float) -> Phase:
    """Let clients send one request after another until a time (`time.monotonic`), each request at least once."""
    phase, begun, numbers = Phase(clients), time.monotonic(), iter(range(10**9))

    async def one() -> None:
        while (number := next(numbers)) < args.requests or time.monotonic() < until:
            await insist(number % args.requests)

    async def insist(number: int) -> None:
        while True:
            phase.sent += 1
            try:
                found = await ask(client, args, number, phase)
            except openai.RateLimitError as error:
                phase.answers["429"] += 1
                await asyncio.sleep(float(error.response.headers["Retry-After"]))
                continue
            except (openai.APIError, httpx.HTTPError) as error:
                phase.answers[str(getattr(error, "status_code", None) or repr(error.__cause__ or error))] += 1
                return
            phase.answers["200"] += 1
            compare(phase, found, alone.setdefault(number, found))
            return

    await asyncio.gather(*(one() for _ in range(clients)))
    phase.seconds = time.monotonic() - begun
    return phase


def metric(args: argparse.Namespace, name: str) -> float:
    """Return a number of the server's /metrics; 0 where there is none."""
    address = args.url.removesuffix("/v1") + "/metrics"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {args.key}"})
    with urllib.request.urlopen(request) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines())
    return float(lines.get(name, 0))


async def watch(args: argparse.Namespace, samples: list[tuple[float, float]]) -> None:
    """Append the minutes since the start and the server's memory in MiB, every two seconds."""
    begun = time.monotonic()
    while True:
        size = await asyncio.to_thread(metric, args, "process_resident_memory_bytes")
        samples.append(((time.monotonic() - begun) / 60, size / 2**20))
        await asyncio.sleep(2)


def memory(samples: list[tuple[float, float]]) -> dict[str, object]:
    """Summarise the server's memory; the first third of the time counts as warm-up."""
    late = samples[len(samples) // 3 :]
    sizes = [size for _, size in late]
    return {
        "at the start": round(samples[0][1]),
        "after warm-up": round(sizes[0]),
        "least and most since": [round(min(sizes)), round(max(sizes))],
        "at the end": round(sizes[-1]),
        "growth a minute since": round(statistics.linear_regression(*zip(*late, strict=True)).slope, 3),
        "every so often": [round(size) for _, size in samples[:: max(1, len(samples) // 20)]],
    }


async def main() -> None:
    """Run one client alone, each request twice; then all clients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--key", default="none")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=2.0, help="of many clients")
    parser.add_argument("--requests", type=int, default=16, help="different ones")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--first-token", type=int, help="so many requests by one client, and nothing else")
    args = parser.parse_args()
    args.requests = args.first_token or args.requests
    client = openai.AsyncOpenAI(base_url=args.url, api_key=args.key, max_retries=0, timeout=1200)
    alone, report, samples = {}, {}, []
    for name in ("one, cold", "one"):
        report[name] = (await run(client, args, 1, alone, 0)).report()
        print(f"{name}: {report[name]}", flush=True)
    if not args.first_token:
        before, watcher = metric(args, "mgp5_finished_total"), asyncio.create_task(watch(args, samples))
        report["many"] = (await run(client, args, args.clients, alone, time.monotonic() + args.minutes * 60)).report()
        watcher.cancel()
        report["finished, as the server counts"] = metric(args, "mgp5_finished_total") - before
        report["left at the end"] = metric(args, "mgp5_running") + metric(args, "mgp5_waiting")
        report["gain"] = round(report["many"]["replies per minute"] / report["one"]["replies per minute"], 2)
        report["memory MB"] = memory(samples)
    print(json.dumps(report))


if __name__ == "__main__":
    asyncio.run(main())
