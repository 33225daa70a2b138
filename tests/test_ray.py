"""More than one machine: two nodes of a real Ray cluster here, whose workers are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner
from serve_process import HELLO, serving
from tiny import picture, same_pixels

from mgp5.cli import main
from mgp5.views.files import StoryFolder

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
REPO = Path(__file__).parents[1]
MGP5 = str(Path(sys.executable).with_name("mgp5"))


@pytest.fixture(scope="module", autouse=True)
def token():
    """Ray's token, of these tests alone; read when ray is imported."""
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    settings |= {"RAY_worker_niceness": "0", "RAY_worker_register_timeout_seconds": "300"}
    settings["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "300"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def cluster(token):
    """Two machines of one core each, as far as Ray can tell."""
    from ray.cluster_utils import Cluster

    running = Cluster()
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    with in_time():
        running.add_node(**node)
        running.add_node(**node)
    yield running.address
    running.shutdown()


@contextmanager
def in_time() -> Iterator[None]:
    """Start Ray, or skip: it gives itself 15 and 30 seconds, which are not enough where all cores are taken."""
    try:
        yield
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        pytest.skip("the machine is too busy to start Ray in time")


def processes(parent: int, kind: str) -> list:
    """Ray's workers of a kind, below a process of ours."""
    import psutil  # accelerate brings it

    below = psutil.Process(parent).children(recursive=True)
    return [one for one in below if one.status() != psutil.STATUS_ZOMBIE and one.name().startswith(f"ray::{kind}")]


def until(true, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lines_done(out: Path) -> list[int]:
    """Of results.jsonl, in order."""
    file = out / "results.jsonl"
    rows = file.read_bytes().splitlines(True) if file.exists() else []
    return [json.loads(row)["line"] for row in rows if row.endswith(b"\n")]


def same(one: Path, other: Path) -> bool:
    """Whether two stories are the same but for rounding of their pictures."""
    (a, facts), (b, others) = StoryFolder.open(one).load(), StoryFolder.open(other).load()
    assert [(m.role, m.text) for m in a.messages] == [(m.role, m.text) for m in b.messages]
    assert facts["seed"] == others["seed"] and len(a.images) == len(b.images)
    return all(same_pixels(x.load(), y.load()) for x, y in zip(a.images, b.images, strict=True))


@pytest.mark.slow  # Ray takes both cores of a small machine for minutes
def test_a_batch_survives_its_workers_and_its_driver(cluster, small_folder, tmp_path):
    picture("red").save(tmp_path / "a.png")
    story = {"story": [{"path": "a.png", "text": "A day."}, {"path": "a.png"}, {"text": "It snows."}]}
    options = {"image": "always"}
    chats = [{"messages": [{"role": "user", "content": f"number {n}"}], "options": options} for n in range(20)]
    lines = [*chats[:8], story, {"story": [{"path": "no.png"}]}, *chats[8:]]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--steps", "40", "--set", "max_tokens=6", "--backend", "eager", "--seed", "3", "--at-once", "2"]
    command = [MGP5, "story", "--batch", "b.jsonl", "--model", str(small_folder), *flags]
    clustered = [*command, "--out", "out", "--ray", cluster]
    out = tmp_path / "out"
    driver = subprocess.Popen(clustered, cwd=tmp_path, stderr=subprocess.DEVNULL)
    until(lambda: lines_done(out))
    workers = processes(os.getpid(), "Worker")
    assert len(workers) == 2  # one for each machine
    workers[0].kill()
    killed = len(lines_done(out))
    until(lambda: len(lines_done(out)) >= killed + 3)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    done = lines_done(out)
    assert len(done) < len(lines) - 1
    told = subprocess.run(clustered, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert told.returncode == 1 and "1 of 22 lines failed, line 10" in told.stderr and "2 workers" in told.stderr
    rows = lines_done(out)
    assert rows[: len(done)] == done and sorted(rows) == [n for n in range(1, 23) if n != 10]
    alone = subprocess.run([*command, "--out", "alone"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    assert alone.returncode == 1
    assert all(same(out / f"{n:06d}", tmp_path / "alone" / f"{n:06d}") for n in rows)


class Deadly:
    """Ends the process that receives it."""

    def __reduce__(self) -> tuple:
        return os._exit, (1,)


@pytest.mark.slow
def test_what_kills_every_worker_fails_alone(cluster, small_folder):
    from mgp5.errors import Mgp5Error
    from mgp5.messages import Conversation
    from mgp5.options import ModelRequest, Options
    from mgp5.serving.cluster import connected, resources
    from mgp5.serving.cluster.spread import spread

    class Dying:
        """A request whose reading ends the process."""

        device = property(lambda _: os._exit(1))

    with connected(cluster) as own:
        assert not own and resources(None, "auto") == (2, 2, {"num_cpus": 1})
        assert resources(4, "cpu") == (4, 4, {"num_cpus": 0.5}) and resources(3, "auto")[2] == {"num_cpus": 0.5}
        request = ModelRequest(model=str(small_folder), device="cpu", backend="eager")
        with spread(1, {"num_cpus": 0.5}, request) as answer:
            (why,) = answer([(Conversation(), Deadly())])
        assert "3 workers died over it" in str(why)
        with (
            spread(1, {"num_cpus": 0.5}, Dying()) as answer,
            pytest.raises(Mgp5Error, match="no worker of the cluster"),
        ):
            answer([(Conversation(), Options())])


@pytest.mark.slow
def test_a_server_of_two_replicas_loses_one(cluster, small_folder, tmp_path):
    openai = pytest.importorskip("openai")
    flags = "--ray", cluster, "--replicas", "2", "--rows", "1", "--model", str(small_folder), "--drain", "60"
    flags += "--max-steps", "900"  # seconds of the tiny model: what happens in the middle shall not come too late
    with serving(tmp_path, *flags) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)

        def stream(steps: int):
            more = {"stream": True, "max_tokens": 3, "extra_body": {"image": "always", "steps": steps}}
            return client.chat.completions.create(model="tiny", messages=HELLO, **more)

        def pictures(chunks) -> int:
            return sum(bool(getattr(chunk.choices[0].delta, "images", None)) for chunk in chunks)

        next(gone := stream(900))
        gone.close()
        server.until("mgp5_cancelled_total", 1)
        both = [stream(900), stream(900)]
        for chunks in both:
            next(chunks)
        assert {server.metric("mgp5_running") for _ in range(10)} == {1}  # each on a replica of its own
        replicas = processes(os.getpid(), "ServeReplica")
        assert len(replicas) == 2
        replicas[0].kill()
        ended = []
        for chunks in both:
            try:
                ended.append(pictures(chunks))
            except openai.APIError:
                ended.append(None)
        assert sorted(ended, key=str) == [1, None]  # a cut stream is an error, the other is whole
        assert server.post("/v1/chat/completions", messages=HELLO, max_tokens=2)[0] == 200
        status, answer = server.post("/v1/chat/completions", messages=HELLO, logprobs=True)
        assert status == 400 and answer["error"]["type"] == "invalid_request_error"
        last = stream(400)
        next(last)
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(pictures, last)
            server.process.terminate()
            assert whole.result() == 1
        assert server.process.wait(timeout=120) == 0
        assert " POST /v1/chat/completions 400 " in (tmp_path / "serve.err").read_text()  # a replica's log


@pytest.mark.slow
def test_a_cluster_of_our_own_does_not_see_this_folder(token, monkeypatch):
    import ray

    from mgp5.serving.cluster import connected

    monkeypatch.chdir(REPO)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # which names this folder where mgp5 is not installed
    with ExitStack() as stack:
        with in_time():
            own = stack.enter_context(connected("local"))
        assert own and ray._raylet.get_authentication_mode() == ray._raylet.AuthenticationMode.TOKEN
        found = ray.get(ray.remote(lambda: (find_spec("kernels"), sys.path, os.nice(0))).remote())
    assert found[0] is None and str(REPO) not in found[1] and found[2] == os.nice(0)
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("story --ray", "--ray spreads the lines of a --batch"),
        ("serve --ray --replicas 0", "expected N or MIN:MAX"),
        ("serve --ray --replicas 3:2", "expected N or MIN:MAX"),
        ("serve --ray --host 0.0.0.0", "there is no API key"),
    ],
)
def test_wrong_uses_are_told(command, told):
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2 and told in result.stderr, result.output
