"""WebDataset shards: the samples in them, who gets which, resuming bit for bit, damage, and reading over http."""

import gzip
import io
import json
import pickle
import tarfile
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import ClassVar

import pytest
from torch.utils.data import DataLoader

from mgp5.data import Skipped, load_data, shards
from mgp5.errors import Mgp5Error
from mgp5.prompts import CAPTION_INSTRUCTIONS, caption_to_image

Member = tuple[str, bytes]


def write_tar(path: Path, *members: Member) -> Path:
    """A shard with the pax headers that webdataset's writer leaves (times with fractions)."""
    with tarfile.open(path, "w") as tar:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(contents), 1700000000.5
            tar.addfile(info, io.BytesIO(contents))
    return path


def sample(key: int, suffix: str = "jpg") -> list[Member]:
    """As img2dataset writes it; that the picture is none comes out later."""
    name = f"{key:09d}"
    meta = json.dumps({"caption": "of the json", "key": name}).encode()
    caption = f"A dog, #{key}.".encode()
    return [(f"{name}.{suffix}", b"pixels" * (300 + key)), (f"{name}.txt", caption), (f"{name}.json", meta)]


def write_shards(folder: Path, *sizes: int, stats: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        write_tar(folder / f"{number:05d}.tar", *(m for key in range(size) for m in sample(1000 * number + key)))
        if stats:
            (folder / f"{number:05d}_stats.json").write_text(json.dumps({"count": size + 3, "successes": size}))
    return folder


def keys(items) -> list[str]:
    """Keys of samples, kinds of what was skipped."""
    return [f"{item.kind}!" if isinstance(item, Skipped) else item[0] for item in items]


def batches(data: shards.Shards, count: int, workers: int = 0, first: int = 0, *, rank=0, world=1, batch=2):
    stream = data.stream(rank=rank, world=world, batch=batch, first=first, seed=5)
    loader = DataLoader(stream, batch_size=batch, num_workers=workers, collate_fn=list)
    return [keys(each) for each in islice(loader, count)]


def test_samples_are_those_of_cc3m(tmp_path: Path) -> None:
    odd = [
        ("sub/a.PNG", b"1"),
        ("sub/a.txt", b"\xef\xbb\xbfTwo; words."),
        ("b.jpg", b"2"),
        ("b.json", b'\xef\xbb\xbf{"caption": "Of JSON"}'),
        ("c.txt", b"no picture"),
        ("d.jpg", b"3"),
        ("e.jpg", b"4"),
        ("e.txt", b"\xff"),
        ("f.webp", b"5"),
        ("f.cls", b"7"),
        ("f.txt", b"..."),
        ("g.jpg", b"8"),  # whose members are not side by side
        ("h.jpg", b"9"),
        ("h.txt", b""),
        ("h.json", b'{"caption": "in JSON"}'),
        ("g.txt", b"\xef\xbb\xbfLate"),
        ("i.jpg", b"10"),
        ("i.txt", b"nan"),
    ]
    write_tar(tmp_path / "0.tar", *odd, *sample(1))
    data = load_data("shards", tmp_path, instruct_every=0)
    found = list(data)
    assert data.size == len(found) == 10 and data.problems == {}
    lost, late = ["missing image!", *["no caption!"] * 3], ["0.tar/g", "0.tar/h", "no caption!"]
    assert keys(found) == ["0.tar/sub/a", "0.tar/b", *lost, *late, "0.tar/000000001"]
    assert [item[1].images[0].caption for item in found[6:8]] == ["late", "in json"]
    talk = found[0][1]
    assert talk == caption_to_image(talk.images[0])
    assert (talk.images[0].data, talk.images[0].caption) == (b"1", "two words")
    assert found[1][1].images[0].caption == "of json" and found[-1][1].messages[0].text == "a dog, 1"


def test_columns_are_named_and_compressed_shards_are_told(tmp_path: Path) -> None:
    members = [
        ("a.input.jpg", b"1"), ("a.outputs.txt", b"A dog"), ("a.jpg", b"2"), ("a.meta.json", b'{"caption": "x"}'),
    ]  # fmt: skip
    write_tar(tmp_path / "0.tar", *members)
    with pytest.raises(Mgp5Error, match=r"no caption \(first: 0.tar/a has input.jpg, jpg, meta.json, outputs.txt"):
        shards.load(tmp_path)
    for caption, words in (("outputs.txt", "a dog"), ("META.json", "x")):
        (found,) = shards.load(tmp_path, image_column="input.JPG", caption_column=caption, instruct_every=0)
        assert found[1].images[0].data == b"1" and found[1].images[0].caption == words
    (tmp_path / "0.tar").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    with pytest.raises(Mgp5Error, match=r"0.tar \(it is compressed: gunzip it"):
        shards.load(tmp_path)


def test_instructions_are_dealt_by_number(tmp_path: Path) -> None:
    data = shards.load(write_shards(tmp_path, 7, 7, 7, stats=True), instruct_every=3)
    found = keys(data)
    again = [key for key in found if key.endswith("#instruction")]
    assert data.size == len(found) == 21 + len(again) and 6 <= len(again) <= 9
    assert all(found[found.index(key) - 1] == key.removesuffix("#instruction") for key in again)
    texts = [item[1].messages[1].text for item in data if item[0] in again]
    assert {text.partition(" a dog")[0] for text in texts} < set(CAPTION_INSTRUCTIONS)
    assert keys(shards.load(tmp_path, instruct_every=3)) == found
    assert len(list(shards.load(tmp_path, "val", instruct_every=3))) == 21


@pytest.mark.parametrize(("sizes", "workers"), [((6, 6, 6, 6), 2), ((12, 12), 2), ((12, 12), 0)])
def test_an_epoch_has_every_sample_once_over_ranks_and_workers(sizes: tuple, workers: int, tmp_path: Path) -> None:
    data = shards.load(write_shards(tmp_path, *sizes), instruct_every=0)
    ranks = [batches(data, 8, workers=workers, rank=rank, world=2, batch=3) for rank in (0, 1)]
    for epoch in (slice(0, 4), slice(4, 8)):
        seen = Counter(key for rank in ranks for each in rank[epoch] for key in each)
        assert set(seen.values()) == {1} and set(seen) == set(keys(data))
    assert ranks[0][:4] != ranks[0][4:]


@pytest.mark.parametrize(
    ("workers", "positions", "stats"),
    [(0, range(1, 40, 3), True), (0, range(2, 40, 5), False), (1, (2,), True), (2, (1, 12), False), (3, (5, 21), True)],
)
def test_resumed_loaders_go_on_bit_for_bit(workers: int, positions: tuple, stats: bool, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, 5, 7, 4, 9, stats=stats)
    (folder / "00004.tar").write_bytes((folder / "00003.tar").read_bytes()[:-6000])  # breaks off
    make = partial(shards.load, folder, instruct_every=4)
    whole = batches(make(), 44, workers=workers, rank=1, world=2)
    assert any("broken shard!" in batch for batch in whole)
    for first in positions:
        assert batches(make(), 4, workers=workers, rank=1, world=2, first=first) == whole[first : first + 4]


def test_the_order_is_that_of_the_shards_wherever_they_lie(tmp_path: Path) -> None:
    here, there = (shards.load(write_shards(tmp_path / name, 5, 7, 4)) for name in ("here", "there"))
    assert batches(here, 20) == batches(there, 20)


def test_one_shard_and_many_readers_resume_too(tmp_path: Path) -> None:
    data = shards.load(write_shards(tmp_path, 9), instruct_every=0)
    for rank in range(4):
        whole = batches(data, 12, rank=rank, world=4)
        assert batches(data, 3, rank=rank, world=4, first=7) == whole[7:10]
    assert keys(pickle.loads(pickle.dumps(data))) == keys(data)  # as workers get it where processes are spawned


def test_what_is_passed_is_not_opened(tmp_path: Path, monkeypatch) -> None:
    data = shards.load(write_shards(tmp_path, 6, 6, 6, stats=True), instruct_every=0)
    whole, opened, read = batches(data, 9), [], shards._open
    monkeypatch.setattr(shards, "_open", lambda name: opened.append(Path(name).name) or read(name))
    assert batches(pickle.loads(pickle.dumps(data)), 1, first=8) == whole[8:]
    assert opened == [whole[8][0][:9]]


def test_damage_is_told_and_the_stream_goes_on(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, 4, 4, 4, 4, 4)
    whole = (folder / "00000.tar").read_bytes()
    with tarfile.open(folder / "00001.tar") as tar:
        third = tar.getmembers()[6].offset
    damaged = bytearray((folder / "00001.tar").read_bytes())
    damaged[third : third + 512] = b"?" * 512  # tarfile takes this for the end
    (folder / "00001.tar").write_bytes(damaged)
    (folder / "00002.tar").write_bytes(whole[:9000])
    (folder / "00003.tar").write_bytes(b"")
    (folder / "00004.tar").unlink()
    data = shards.load(folder / "{00000..00004}.tar", instruct_every=0)
    found = list(data)
    notes = [item for item in found if isinstance(item, Skipped)]
    intact = [f"00000.tar/00000000{n}" for n in range(4)]  # of the second, nobody knows whether the last one was whole
    assert keys(found)[:6] == [*intact, "00001.tar/000001000", "broken shard!"]
    assert [note.kind for note in notes] == ["broken shard"] * 4
    assert all(f"0000{number}.tar (" in note.where for number, note in enumerate(notes, 1))
    assert data.size == len(found)


@pytest.mark.parametrize(("number", "lost"), [(6, 2), ("x", 0), (4, 0)])
def test_stats_that_disagree_are_told(number: object, lost: int, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, 4)
    (folder / "00000_stats.json").write_text(json.dumps({"successes": number}))
    data = shards.load(folder, instruct_every=0)
    found = keys(data)
    assert [key for key in found if key.endswith("!")] == ["broken shard!"] * lost and data.size == len(found)
    (folder / "00000_stats.json").write_text(json.dumps({"successes": 3}))
    with pytest.raises(Mgp5Error, match=r"00000.tar has 4 samples, its stats file says 3: remove the stats file"):
        list(data)


def test_only_regular_members_are_read_and_no_name_is_a_path(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    folder = tmp_path / "in"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        for name in ("../../out.jpg", "../../out.txt", "/etc/x.txt", "._z.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    found = list(shards.load(folder))
    assert keys(found) == ["0.tar/../../out", "missing image!"] and found[0][1].images[0].data == b"abc"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "in", "secret.jpg"]


class _Flaky(SimpleHTTPRequestHandler):
    """Serves a folder; the first download of every shard breaks off, of the first with an error."""

    asked: ClassVar[Counter] = Counter()

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        if self.path.endswith("00000.tar") and self.asked[self.path] == 1:
            return self.send_error(503)
        super().do_GET()

    def copyfile(self, source, outputfile) -> None:
        body = source.read()
        outputfile.write(body[:5000] if self.asked[self.path] == 1 else body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(shards, "PAUSE", 0)
    _Flaky.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Flaky, directory=tmp_path)) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.parametrize("stats", [True, False])
def test_urls_are_streamed_and_tried_again(stats: bool, server: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, 5, 5, stats=stats)
    local = shards.load(folder, instruct_every=0)
    data = load_data("shards", f"{server}/{{00000..00001}}.tar", instruct_every=0)
    assert keys(data) == keys(local) and data.size is None
    assert [item[1] for item in data] == [item[1] for item in local]  # the samples, not only their names
    whole = batches(data, 8, workers=2)
    assert batches(data, 3, workers=2, first=5) == whole[5:]
    gone = shards.load(Path(f"{server}/{{00001..00002}}.tar"), instruct_every=0)
    assert keys(gone)[5:] == ["broken shard!"]
    assert list(gone)[5].where == f"{gone.names[1]} (HTTP Error 404: File not found)"


def test_places_that_are_refused(tmp_path: Path) -> None:
    for place in ("pipe:cat 0.tar", "s3://bucket/{0..3}.tar", "file:///etc/x.tar"):
        with pytest.raises(Mgp5Error, match=r"no \.tar file at .*http\(s\) URL") as caught:
            load_data("shards", place)
        assert caught.value.exit_code == 2
    for place in (tmp_path, tmp_path / "0.tar", tmp_path / "{0..3}.tar"):
        with pytest.raises(Mgp5Error, match=r"no \.tar file at"):
            load_data("shards", place)
    with pytest.raises(Mgp5Error, match="unknown split"):
        load_data("shards", tmp_path, "dev")
    write_tar(tmp_path / "0.tar", ("a.txt", b"alone"))
    with pytest.raises(
        Mgp5Error, match=r"0 more have no usable sample: skipped: 1 x missing image \(first: 0.tar/a has txt\)"
    ):
        load_data("shards", tmp_path)


def test_folders_of_splits_and_patterns(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", *[1] * 12)
    assert [Path(name).name for name in load_data("shards", tmp_path).names] == [f"{n:05d}.tar" for n in range(12)]
    names = shards.load(tmp_path / "train" / "000{08..11}.tar").names
    assert [name[-9:] for name in names] == ["00008.tar", "00009.tar", "00010.tar", "00011.tar"]
    write_tar(tmp_path / "s9-1.tar", *sample(1))
    names = shards.load(tmp_path / "s{9..10}-{1..2}.tar").names
    assert [Path(name).name for name in names] == ["s9-1.tar", "s9-2.tar", "s10-1.tar", "s10-2.tar"]


def test_shards_that_vanish_end_the_stream_with_an_error(tmp_path: Path) -> None:
    data = shards.load(write_shards(tmp_path, 3, 3))
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(Mgp5Error, match=r"no usable sample for reader 0 of 1 \(broken shard: .*tar"):
        batches(data, 100)
