"""The papers' ablations as data: what each row changes, which way the papers' numbers go, and whether ours agree.

S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Literal

from ..config import Stage
from ..errors import Mgp5Error

ATTRIBUTES, FRECHET = "attributes", "Frechet distance, judge"
BASELINE = "baseline"
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0)  # of guidance
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MAX_SEEDS = len(STUDENT)
Sign = Literal[-1, 0, 1]
Verdict = Literal["agrees", "disagrees", "within chance", ""]
NEW, OLD = "MiniGPT-5", "MiniGPT-5 of 2023"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        pretrain, finetune: settings of `mgp5 train` beside those of all rows; pretrain None leaves the stage out, and
            finetuning then takes its updates too. Rows with the same settings share their trainings.
        vokens: per picture.
        guidance: scale at which it draws; None is the baseline's.
        context: what a question shows of a story.
        stages: after which it is measured.
        papers_stage: after which the papers measured it.
        against: the row it is compared with.
        papers: of their metrics that ours stand for, whether the row's is higher or lower than that of `against`, or
            neither: CLIP-I, or what they say of coherence, for attributes; FID for the Frechet distance.
        source: where the papers say so, with their numbers (the row's, then those of `against`).
    """

    name: str
    pretrain: tuple[str, ...] | None = ()
    finetune: tuple[str, ...] = ()
    vokens: int = 8
    guidance: float | None = None
    context: str = "full"
    stages: tuple[Stage, ...] = ("pretrain", "finetune")
    papers_stage: Stage = "pretrain"
    against: str = BASELINE
    papers: Mapping[str, Sign] = field(default_factory=dict)
    source: str = ""

    def training(self, stage: Stage) -> tuple:
        """What tells its training up to a stage from others."""
        return (self.vokens, self.pretrain, self.finetune if stage == "finetune" else None)


def _expect(attributes: Sign, frechet: Sign) -> dict[str, Sign]:
    return {ATTRIBUTES: attributes, FRECHET: frechet}


WORSE, BETTER = _expect(-1, 1), _expect(1, -1)


def rows(guidance: float) -> dict[str, Row]:
    """All rows by name.

    Args:
        guidance: the scale at which the baseline draws.
    """
    trained = [
        Row(name=BASELINE),
        Row(
            name="without CFG",
            pretrain=("guidance_dropout=0.0",),
            finetune=("guidance_dropout=0.0",),
            papers=WORSE,
            source=f"{NEW}, table 5: CLIP-I 0.60, 0.61; FID 33.73, 31.47",
        ),
        Row(name="without CFG, guidance 1", pretrain=("guidance_dropout=0.0",), guidance=1.0, stages=("pretrain",)),
        Row(
            name="without L_CAP",
            pretrain=("caption_weight=0.0",),
            papers=WORSE,
            source=f"{NEW}, table 5: CLIP-I 0.54, 0.61; FID 40.24, 31.47",
        ),
        Row(
            name="without L_LDM",
            pretrain=("ldm_weight=0.0",),
            finetune=("ldm_weight=0.0",),
            papers=WORSE,
            source=f"{NEW}, table 5: CLIP-I 0.58, 0.61; FID 34.65, 31.47",
        ),
        Row(
            name="fixed queries",
            pretrain=("train_queries=false",),
            papers=_expect(-1, -1),
            source=f"{NEW}, table 7: CLIP-I 0.60, 0.61; FID 30.56, 31.47",
        ),
        Row(
            name="decoder-only mapper",
            pretrain=("kind=decoder-only",),
            papers=WORSE,
            source=f"{NEW}, table 7: CLIP-I 0.58, 0.61; FID 34.88, 31.47",
        ),
        Row(
            name="prefix tuning",
            finetune=("lora=none", "prefix.tokens=5"),
            stages=("finetune",),
            papers_stage="finetune",
            papers=WORSE,
            source=f"{NEW}, table 1: CLIP-I 0.65, 0.66 (table 6: 0.70 both); FID per story 381.55, 366.62",
        ),
        Row(
            name="without pretraining",
            pretrain=None,
            finetune=("encoder_layers=2", "decoder_layers=3"),  # those of the preset's first stage
            stages=("finetune",),
            papers_stage="finetune",
            papers=WORSE,
            source=f"{OLD}, table 1: CLIP-I 0.58, 0.70; FID 76.51, 59.48",
        ),
    ]
    return {row.name: row for row in (*trained, *_vokens(), *_scales(guidance), *_contexts())}


def _vokens() -> list[Row]:
    told = f"{OLD}, figure 7: better with every further voken, most from 1 to 4"
    return [
        Row(name=f"{n} voken{'s' * (n > 1)}", vokens=n, papers=WORSE if n < 8 else BETTER, source=told)
        for n in (1, 2, 4, 16)
    ]


def _scales(guidance: float) -> list[Row]:
    """The papers' curves rise to 10; then coherence stays, and quality declines (appendix C.1)."""
    told = f"{OLD}, figure 6: better with a larger scale; above 10 coherence stays, quality declines"
    own = {"stages": ("pretrain",), "source": told}
    found = []
    for scale in SCALES:
        name = f"guidance {scale:g}"
        if scale > 10:
            found.append(Row(name=name, guidance=scale, against="guidance 10", papers=_expect(0, 1), **own))
        elif scale != guidance:
            found.append(Row(name=name, guidance=scale, papers=WORSE if scale < guidance else BETTER, **own))
    return found


def _contexts() -> list[Row]:
    told = {  # CLIP-I and FID of LoRA's last pictures; image-text context is the baseline: 0.70, 59.48
        "none": ("no context", WORSE, "0.61, 0.70; FID (of 2023, table 1) 61.44, 59.48"),
        "text": ("text context", WORSE, "0.64, 0.70; FID (of 2023, table 1) 61.34, 59.48"),
        "image": ("image context", _expect(-1, -1), "0.69, 0.70; FID (of 2023, table 1) 59.09, 59.48"),
    }
    return [
        Row(
            name=name,
            context=context,
            stages=("finetune",),
            papers_stage="finetune",
            papers=papers,
            source=f"{NEW}, table 6: CLIP-I {numbers}",
        )
        for context, (name, papers, numbers) in told.items()
    ]


def needed(table: Mapping[str, Row], names: Sequence[str]) -> list[Row]:
    """Rows of these names (none: all), those they are compared with, and the baseline, in the table's order.

    Raises Mgp5Error (wrong usage) for an unknown name.
    """
    if unknown := [name for name in names if name not in table]:
        raise Mgp5Error(f"no row {', '.join(map(repr, unknown))}", f"there are {'; '.join(table)}", usage=True)
    wanted = {BASELINE, *(names or table)}
    wanted |= {table[name].against for name in wanted}
    return [row for name, row in table.items() if name in wanted]


def mean_over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean of one number per seed (S,), and of two or more the ends of its 95 % interval (Student's t)."""
    mean, number = fmean(values), len(values)
    if number < 2:
        return {"value": mean, "n": number}
    half = STUDENT[number - 1] * stdev(values) / number**0.5
    return {"value": mean, "n": number, "low": mean - half, "high": mean + half}


def verdict(difference: Mapping[str, float], expected: Sign) -> Verdict:
    """Whether a difference over seeds has the papers' sign; "" where one seed gives no interval."""
    if "low" not in difference:
        return ""
    if difference["low"] <= 0 <= difference["high"]:
        return "within chance"
    return "agrees" if expected * difference["value"] > 0 else "disagrees"
