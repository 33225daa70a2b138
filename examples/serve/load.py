"""Load for a running `mgp5 serve`: one client, then many; every reply is compared with the one it had alone.

    python load.py --clients 8 --minutes 2

Needs the package openai. The last line of stdout is a JSON object with all numbers.
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

import openai
from PIL import Image, ImageChops

PLACES = (
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
    """What came of some clients in some time."""

    clients: int
    seconds: float = 0.0
    replies: int = 0
    images: int = 0
    differing: int = 0
    largest: int = 0  # difference of a pixel
    errors: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)  # seconds to the first token

    def report(self) -> dict[str, object]:
        """Its numbers."""
        parts = statistics.quantiles(self.first, n=20) if len(self.first) > 1 else [0.0] * 19
        return {
            "clients": self.clients,
            "seconds": round(self.seconds, 1),
            "replies": self.replies,
            "images": self.images,
            "replies per minute": round(60 * self.replies / self.seconds, 1),
            "first token, median s": round(parts[9], 3),
            "first token, p95 s": round(parts[18], 3),
            "errors": dict(self.errors),
            "unlike alone": self.differing,
            "largest difference of a pixel": self.largest,
        }


async def ask(client: openai.AsyncOpenAI, args: argparse.Namespace, number: int, phase: Phase) -> tuple[str, bytes]:
    """Request `number`, streamed: its text and the pixels of its pictures."""
    begun, text, pixels = time.monotonic(), "", b""
    stream = await client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": f"Tell me of a fox {PLACES[number % len(PLACES)]}."}],
        seed=number,
        max_tokens=args.tokens,
        stream=True,
        extra_body={"image": "always" if number % 4 else "never", "max_images": 1, "steps": args.steps},
    )
    async for chunk in stream:
        content = chunk.choices[0].delta.content if chunk.choices else None
        if isinstance(content, str) and content:
            if not text:
                phase.first.append(time.monotonic() - begun)
            text += content
        elif content:
            data = base64.b64decode(content[0]["image_url"]["url"].partition("base64,")[2])
            pixels += Image.open(BytesIO(data)).convert("RGB").tobytes()
            phase.images += 1
    return text, pixels


def compare(phase: Phase, found: tuple[str, bytes], alone: tuple[str, bytes]) -> None:
    """Note whether a reply is the one it was alone."""
    same = found[0] == alone[0] and len(found[1]) == len(alone[1])
    if same and found[1]:
        pair = (Image.frombytes("L", (len(pixels), 1), pixels) for pixels in (found[1], alone[1]))
        difference = ImageChops.difference(*pair).getextrema()[1]
        phase.largest = max(phase.largest, difference)
        same = difference <= TOLERANCE
    phase.differing += not same


async def run(client: openai.AsyncOpenAI, args: argparse.Namespace, clients: int, alone: dict, until: float) -> Phase:
    """Let clients ask one request after another until then; each request that has no reply yet leaves its own."""
    phase, begun, numbers = Phase(clients), time.monotonic(), iter(range(10**9))

    async def one() -> None:
        while time.monotonic() < until:
            number = next(numbers) % args.requests
            try:
                found = await ask(client, args, number, phase)
            except openai.APIError as error:
                phase.errors[str(getattr(error, "status_code", type(error).__name__))] += 1
                await asyncio.sleep(0.5)
                continue
            phase.replies += 1
            compare(phase, found, alone.setdefault(number, found))

    await asyncio.gather(*(one() for _ in range(clients)))
    phase.seconds = time.monotonic() - begun
    return phase


def memory(args: argparse.Namespace) -> int:
    """Megabytes of the server."""
    address = args.url.removesuffix("/v1") + "/metrics"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {args.key}"})
    with urllib.request.urlopen(request) as answer:
        lines = answer.read().decode().splitlines()
    return int(next(line for line in lines if line.startswith("process_resident")).split()[1]) // 2**20


async def main() -> None:
    """One client for a third of the time (at least each request once), all of them for the rest, in two halves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--key", default="none")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--requests", type=int, default=16, help="different ones")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    client = openai.AsyncOpenAI(base_url=args.url, api_key=args.key, max_retries=0, timeout=600)
    alone, warm = {}, Phase(1)
    for number in range(args.requests):
        alone[number] = await ask(client, args, number, warm)
    third, found = args.minutes * 20, {"memory MB": [memory(args)]}
    for name, clients in (("one", 1), ("many", args.clients), ("many again", args.clients)):
        phase = await run(client, args, clients, alone, time.monotonic() + third)
        found[name] = phase.report()
        found["memory MB"].append(memory(args))
        print(f"{name}: {found[name]}", flush=True)
    rates = [found[name]["replies per minute"] for name in ("one", "many again")]
    found["gain"] = round(rates[1] / rates[0], 2)
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main())
