"""mgp5 serve: a model behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import Mgp5Error
from .flags import generation_options, model_request, ray_option, without


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="A public one needs an API key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="Of the model, as clients say it.  [default: as --model]")
@click.option("--web", is_flag=True, help="Also a page for browsers, at /ui/; the key is its password.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="Its one line; else MGP5_API_KEY.")
@click.option("--insecure", is_flag=True, help="Serve a public address without a key.")
@click.option("--allow-remote-images", is_flag=True, help="Fetch pictures from public http addresses.")
@click.option("--rows", type=click.IntRange(1), default=8, show_default=True, help="Replies at a time.")
@click.option("--waiting", type=click.IntRange(0), default=64, show_default=True, help="Queue; beyond it 429.")
@click.option("--connections", type=click.IntRange(1), default=512, show_default=True, help="Beyond them 503.")
@click.option("--tokens", type=click.IntRange(1), default=1024, show_default=True, help="Most of a reply.")
@click.option("--images", type=click.IntRange(0), default=8, show_default=True, help="Most of a reply.")
@click.option("--max-steps", "steps", type=click.IntRange(1), default=100, show_default=True, help="Most of an image.")
@click.option("--side", type=click.IntRange(1), default=1024, show_default=True, help="Longest of an image drawn.")
@click.option("--pixels", type=click.IntRange(1), default=16_000_000, show_default=True, help="Most of one sent.")
@click.option("--body-megabytes", type=click.IntRange(1), default=32, show_default=True, help="Most of a request.")
@click.option("--seconds", type=click.FloatRange(1), default=600.0, show_default=True, help="Most of a reply.")
@click.option("--patience", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Seconds of a request.")
@click.option("--drain", type=click.IntRange(0), default=60, show_default=True, help="Seconds to finish on SIGTERM.")
@ray_option("Serve by a Ray cluster: at ADDRESS, RAY_ADDRESS, or of this machine.")
@click.option("--replicas", metavar="N|MIN:MAX", help="With --ray.  [default: 1 to one for each GPU, else machine]")
@without("seed", "steps", "guidance", "guidance_until", "reuse", "settings", "as_json", "show")
@generation_options
def serve(**flags: Any) -> None:
    """Serve a model as OpenAI's API does: /v1/chat/completions with text and images in order, in and out, and
    /v1/images/generations; /v1/models, /health and /metrics beside them.

    Requests are decoded and denoised together. See examples/serve/README.md.
    """
    from ..serving.limits import Limits
    from ..serving.request import ServeRequest
    from ..serving.server import serve as run

    limits = Limits(
        remote_images=flags["allow_remote_images"],
        body_bytes=flags["body_megabytes"] * 2**20,
        body_seconds=flags["patience"],
        **{name: flags[name] for name in ("tokens", "images", "steps", "side", "pixels", "seconds")},
    )
    same = ("host", "port", "insecure", "rows", "waiting", "connections", "drain", "web", "ray")
    request = ServeRequest(
        model=model_request(flags),
        name=flags["name"] or "",
        key_file=flags["api_key_file"],
        limits=limits,
        replicas=_replicas(flags["replicas"]),
        **{name: flags[name] for name in same},
    )
    run(request, lambda line: click.echo(line, err=True))


def _replicas(text: str | None) -> tuple[int, int | None]:
    """Return the smallest and largest number of N or MIN:MAX."""
    if text is None:
        return 1, None
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal()):
        raise Mgp5Error(f"--replicas is {text}", "expected N or MIN:MAX, from 1", usage=True)
    return int(least), int(most or least)
