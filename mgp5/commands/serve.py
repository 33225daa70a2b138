"""mgp5 serve: a model behind HTTP."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ..errors import Mgp5Error
from .flags import generation_options, model_of, ray_option, without


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
    for name, extra in (("fastapi", "serve"), ("uvicorn", "serve"), *([("gradio", "web")] if flags["web"] else [])):
        if find_spec(name) is None:
            raise Mgp5Error(f"serve needs {name}", f"pip install 'mgp5[{extra}]'")
    from ..device import quiet_libraries

    quiet_libraries()
    if flags["ray"]:
        return _by_cluster(flags)
    from ..serving.run import run

    run(flags, lambda: model_of(flags), lambda line: click.echo(line, err=True))


def _by_cluster(flags: dict[str, Any]) -> None:
    from ..serving.cluster import needs_ray

    needs_ray()
    from ..serving.cluster.serve import run

    if flags["web"]:
        raise Mgp5Error(
            "--web does not go with --ray", "a page keeps to one replica: serve it without --ray", usage=True
        )
    run(flags, model_of, lambda line: click.echo(line, err=True))
