"""The machine's memory, by the files of Linux: with and without containers of both versions of cgroups."""

import pytest

from mgp5.device import host_memory
from mgp5.files import GiB

V1, V2 = "9:cpu:/\n4:memory:/docker/ab\n", "0::/pod/ab\n"
STAT = f"anon 7\nactive_file {GiB // 2}\ninactive_file {GiB // 2}\ntotal_active_file 99\n"
UNLIMITED = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, (64, 40, False)),
        (V2, {"memory.max": "max", "memory.current": 5 * GiB}, (64, 40, False)),
        (V2, {"memory.max": 8 * GiB, "memory.current": 5 * GiB, "memory.stat": STAT}, (8, 4, True)),  # seen from within
        (V2, {"pod/ab/memory.max": 8 * GiB, "pod/ab/memory.current": 5 * GiB}, (8, 3, True)),
        (V2, {"pod/memory.max": 6 * GiB, "pod/memory.current": 5 * GiB, "pod/ab/memory.max": "max"}, (6, 1, True)),
        (V2, {"pod/memory.max": 6 * GiB, "pod/memory.current": 7 * GiB}, (6, 0, True)),
        (V1, {"memory/memory.limit_in_bytes": UNLIMITED, "memory/memory.usage_in_bytes": 5}, (64, 40, False)),
        (V1, {"memory/memory.limit_in_bytes": 8 * GiB, "memory/memory.usage_in_bytes": 5 * GiB}, (8, 3, True)),
        (
            V1,
            {
                "memory/memory.limit_in_bytes": UNLIMITED, "memory/docker/ab/memory.limit_in_bytes": 4 * GiB,
                "memory/docker/ab/memory.usage_in_bytes": 3 * GiB, "memory/docker/ab/memory.stat": STAT,
            },
            (4, 2, True),
        ),
        (V2, {"memory.max": 60 * GiB, "memory.current": GiB}, (60, 40, True)),  # others take the machine's
    ],
)  # fmt: skip
def test_containers_may_have_less_than_the_machine_has(tmp_path, groups, files, expected):
    written = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    written["proc/meminfo"] = f"MemTotal: {64 * GiB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {40 * GiB // 1024} kB\n"
    written["proc/self/cgroup"] = groups
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(text))
    total, free, limited = host_memory(tmp_path)
    assert (total / GiB, free / GiB, limited) == expected


def test_this_machine_has_some():
    memory = host_memory()
    assert 0 < memory.free <= memory.total and "GiB are free of the" in memory.told
