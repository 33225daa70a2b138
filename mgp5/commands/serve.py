"""mgp5 serve: a model behind HTTP."""

from __future__ import annotations

from typing import Any

import click

from ..errors import Mgp5Error
from .flags import COUNT, PATH, fill, generation_options, ray_option, say, without


@click.command()
@click.option("--host", default="127.0.0.1", help="Address to listen at; a public one needs an API key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen at; 0 takes a free one.")
@click.option("--name", help="Name of the model for clients.  [default: as --model]")
@click.option("--web", is_flag=True, help="Also a page for browsers, at /ui/; the key is its password.")
@click.option("--api-key-file", "key_file", type=PATH, help="File with the API key; else MGP5_API_KEY is.")
@click.option("--insecure", is_flag=True, help="Serve a public address without a key.")
@click.option("--allow-remote-images", "remote_images", is_flag=True, help="Fetch pictures from public http addresses.")
@click.option("--rows", type=COUNT, default=8, help="Replies that are made at the same time.")
@click.option("--waiting", type=click.IntRange(0), default=64, help="Requests that may wait; more are answered 429.")
@click.option("--connections", type=COUNT, default=512, help="Open connections; more are answered 503.")
@click.option("--tokens", type=COUNT, default=1024, help="Longest text of a reply, in tokens.")
@click.option("--images", type=click.IntRange(0), default=8, help="Most pictures in a reply.")
@click.option("--max-steps", "steps", type=COUNT, default=100, help="Most denoising steps of a picture.")
@click.option("--side", type=COUNT, default=1024, help="Longest side of a picture that is drawn.")
@click.option("--pixels", type=COUNT, default=16_000_000, help="Most pixels of a picture that is sent.")
@click.option("--body-megabytes", type=COUNT, default=32, help="Largest request, in MB.")
@click.option("--seconds", type=click.FloatRange(1), default=600.0, help="Longest time that a reply may take.")
@click.option(
    "--patience",
    "body_seconds",
    type=click.FloatRange(0.1),
    default=30.0,
    help="Seconds for a request to come.",
)
@click.option("--drain", type=click.IntRange(0), default=60, help="Seconds that replies may still take after SIGTERM.")
@ray_option("Serve by a Ray cluster: at ADDRESS, RAY_ADDRESS, or of this machine.")
@click.option("--replicas", metavar="N|MIN:MAX", help="With --ray.  [default: 1 to one for each GPU, else machine]")
@without("seed", "steps", "guidance", "guidance_until", "reuse", "settings", "as_json", "show")
@generation_options
def serve(**flags: Any) -> None:
    """Serve a model as OpenAI's API does: /v1/responses and /v1/chat/completions with text and images in order, in and
    out, /v1/images; /v1/models, /health and /metrics beside them.

    Requests are decoded and denoised together. See examples/serve/README.md.
    """
    from ..options import ModelRequest
    from ..serving.request import Limits, ServeRequest
    from ..serving.server import serve as run

    limits = fill(Limits, flags, body_bytes=flags["body_megabytes"] * 2**20)
    model, replicas = fill(ModelRequest, flags), _replicas(flags["replicas"])
    flags["name"] = flags["name"] or ""
    run(fill(ServeRequest, flags, model=model, limits=limits, replicas=replicas), say)


def _replicas(text: str | None) -> tuple[int, int | None]:
    """Return the smallest and largest number of N or MIN:MAX."""
    if text is None:
        return 1, None
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal()):
        raise Mgp5Error(f"--replicas is {text}", "expected N or MIN:MAX, from 1", usage=True)
    return int(least), int(most or least)
