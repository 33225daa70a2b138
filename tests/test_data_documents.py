"""Documents of text and images: the layouts of MMC4 and OBELICS."""

import json
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from tiny import picture

from mgp5.data import find_format, load_data
from mgp5.errors import Mgp5Error
from mgp5.messages import Text


def images(folder: Path, *names: str) -> None:
    (folder / "images").mkdir(exist_ok=True)
    for name in names:
        picture().save(folder / "images" / name)


def shape(conversation) -> list[str]:
    (message,) = conversation.messages
    assert message.role == "assistant" and conversation.bare
    return [part.text if isinstance(part, Text) else part.path.name for part in message.content]


def mmc4(*found: tuple, texts=("One.", "Two.", "Three.")) -> str:
    info = [{"image_name": n, "matched_text_index": i, "matched_sim": s} for n, i, s in found]
    return json.dumps({"text_list": list(texts), "image_info": info})


@pytest.mark.parametrize("zipped", [False, True])
def test_mmc4_places_similar_images_beside_their_sentence(zipped, tmp_path):
    images(tmp_path, "a.png", "b.png", "c.png")
    rows = [
        mmc4(("a.png", 0, 0.3), ("b.png", 2, 0.24), ("c.png", 1, 0.1)),
        mmc4(("a.png", 0, 0.3), ("gone.png", 2, 0.5), ("b.png", 1, 0.3)),
        mmc4(("a.png", 9, 0.3)),
        '{"text_list": 3}',
    ]
    if zipped:
        with zipfile.ZipFile(tmp_path / "docs_shard_1_v2.jsonl.zip", "w") as archive:
            archive.writestr("docs_shard_1_v2.jsonl", "\n".join(rows))
    else:
        (tmp_path / "docs_shard_1_v2.jsonl").write_text("\n".join(rows))
    assert find_format(tmp_path) == "mmc4" == find_format(next(tmp_path.glob("docs*")))
    data = load_data("mmc4", tmp_path)
    assert len(data) == 2 and data.key(1) == "docs_shard_1_v2.jsonl" + ".zip" * zipped + ":2/0"
    parts = shape(data[0])
    assert sorted(parts) == ["One.", "Three.", "Two.", "a.png", "b.png"]
    assert [part for part in parts if "." in part[-1]] == ["One.", "Two.", "Three."]
    assert abs(parts.index("a.png") - parts.index("One.")) == abs(parts.index("b.png") - parts.index("Three.")) == 1
    assert dict(data.problems) == {"missing image": 1, "no text or no image": 1, "bad row": 1}


def test_mmc4_drops_half_of_the_documents_with_one_image_and_limits_the_others(tmp_path):
    images(tmp_path, *(f"{n}.png" for n in range(9)))
    many = mmc4(*((f"{n}.png", n, 0.5) for n in range(9)), texts=[f"{n}." for n in range(9)])
    (tmp_path / "docs_shard_0.jsonl").write_text("\n".join([many] + [mmc4(("1.png", 1, 0.9))] * 60))
    data = load_data("mmc4", tmp_path)
    kept = [name for name in shape(data[0]) if name.endswith("png")]
    assert len(kept) == 6 and kept == sorted(kept)
    assert 15 < data.problems["one image"] < 45 and len(data) == 61 - data.problems["one image"]
    befores = {shape(data[index]).index("1.png") for index in range(1, len(data))}
    assert befores == {1, 2}  # before and behind its sentence
    assert [shape(data[i]) for i in range(9)] == [shape(load_data("mmc4", tmp_path)[i]) for i in range(9)]


def test_obelics_keeps_the_order_of_a_page(tmp_path):
    images(tmp_path, "a.png", "b.png")
    pages = [{"images": [None, "a.png", None, "b.png"], "texts": [" A cat. ", None, "It jumps.", None]}]
    pages += [{"images": ["b.png", "gone.png"], "texts": [None, None]}, {"images": ["a.png"], "texts": []}]
    (tmp_path / "train").mkdir()
    (tmp_path / "images").rename(tmp_path / "train" / "images")
    (tmp_path / "train" / "obelics_0.jsonl").write_text("\n".join(map(json.dumps, pages)))
    assert find_format(tmp_path) == "obelics"
    data = load_data("obelics", tmp_path)
    assert [shape(data[i]) for i in range(len(data))] == [["A cat.", "a.png", "It jumps.", "b.png"]]
    assert dict(data.problems) == {"missing image": 1, "no text or no image": 1, "bad row": 1}
    with pytest.raises(Mgp5Error, match="no obelics"):
        load_data("obelics", tmp_path, "val")
    assert find_format(tmp_path / "train" / "obelics_0.jsonl") == "obelics"


def test_obelics_in_parquet_is_as_its_lines(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import Table, parquet

    address = "http://a.example/b?c=1"
    name = sha256(address.encode()).hexdigest()
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "images/b.png").rename(tmp_path / "images" / name)
    columns = {"images": [[None, "a.png"], [address, None]], "texts": [["A cat.", None], [None, "A dog."]], "n": [1, 2]}
    parquet.write_table(Table.from_pydict(columns), tmp_path / "obelics-0.parquet", row_group_size=1)
    assert find_format(tmp_path) == "obelics" == find_format(tmp_path / "obelics-0.parquet")
    data = load_data("obelics", tmp_path)
    assert [shape(data[i])[::2] for i in range(2)] == [["A cat."], [name]]
    assert data.key(1) == "obelics-0.parquet:2/0" and data[1].images[0].load().size
    (tmp_path / "obelics-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(Mgp5Error, match=r"obelics-0.parquet cannot be read"):
        load_data("obelics", tmp_path)


def test_an_image_outside_the_folder_is_refused(tmp_path):
    (tmp_path / "docs_shard_0.jsonl").write_text(mmc4(("../../a.png", 0, 0.9)))
    with pytest.raises(Mgp5Error, match=r"docs_shard_0.jsonl:1.*leaves its folder"):
        load_data("mmc4", tmp_path)
