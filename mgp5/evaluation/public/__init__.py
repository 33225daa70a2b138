"""Public benchmarks of interleaved replies: a file each, of one class that reads, writes and asks judges.

request -> cases (a benchmark's own files) -> run (replies on disk, answers in its own layout) -> score -> report.
"""

from __future__ import annotations

from .cases import Benchmark
from .comm import CoMM
from .interleavedbench import InterleavedBench
from .isg import ISG
from .mmie import MMIE
from .opening import OpenING
from .weave import WEAVE

BENCHMARKS: dict[str, Benchmark] = {b.name: b for b in (OpenING(), InterleavedBench(), MMIE(), ISG(), CoMM(), WEAVE())}
