"""What the papers report: (who, numbers, where) by format and table. Theirs, by their protocols: see METRICS."""

from __future__ import annotations

Row = tuple[str, dict[str, float], str]


def _rows(source: str, names: str, table: dict[str, str]) -> list[Row]:
    """Rows of numbers under metric names, which are parted by "; "."""
    metrics = names.split("; ")
    return [(who, dict(zip(metrics, map(float, row.split()), strict=True)), source) for who, row in table.items()]


T8 = "MiniGPT-5, table 8"
T6 = "MiniGPT-5, table 6"
OLD = "MiniGPT-5 of 2023"
CONTEXTS = {  # CLIP-I of no, text, image, and image-text context; "-" is not reported
    "SD 2, zero-shot": "0.57 0.59 - -",
    "SD 2, fine-tuned": "0.59 0.61 - -",
    "GILL, zero-shot": "0.54 0.54 0.55 0.54",
    "two-stage": "0.54 0.56 0.57 0.58",
    "MiniGPT-5, zero-shot": "0.54 0.57 0.57 0.57",
    "MiniGPT-5, prefix tuning": "0.60 0.63 0.68 0.70",
    "MiniGPT-5, LoRA": "0.61 0.64 0.69 0.70",
}
LAST = {
    f"last, {context}": [
        (who, {"CLIP-I": float(row.split()[column])}, T6) for who, row in CONTEXTS.items() if row.split()[column] != "-"
    ]
    for column, context in enumerate(("none", "text", "image", "full"))
}
PUBLISHED: dict[str, dict[str, list[Row]]] = {
    "cc3m": {
        "caption": _rows(
            f"{OLD}, table 6",
            "CLIP-I; CLIP-T; IS; FID",
            {
                "SD 2.1": "0.64 0.25 31.74 26.39",
                "GILL": "0.57 0.20 22.76 37.97",
                "MiniGPT-5": "0.61 0.22 28.09 31.47",
            },
        )
        + _rows(
            T8,
            "CLIP-I; FID",
            {
                "SD 3": "0.68 29.19",
                "MiniGPT-5, LLaVA-1.5 + SD 2.1": "0.62 28.96",
                "MiniGPT-5, Qwen2.5-VL + SD 3": "0.64 29.31",
            },
        )
    },
    "vist": {
        "illustrate, full": _rows(
            "MiniGPT-5, table 1",
            "CLIP-I; FID per story",
            {
                "SD 2.1": "0.59 393.49",
                "SD 2.1, fine-tuned": "0.61 390.25",
                "two-stage": "0.57 403.06",
                "GILL": "0.60 381.88",
                "MiniGPT-5, prefix tuning": "0.65 381.55",
                "MiniGPT-5, LoRA": "0.66 366.62",
            },
        )
        + _rows(
            T8,
            "CLIP-I; FID per story",
            {
                "SD 3": "0.63 380.35",
                "MiniGPT-5, LLaVA-1.5 + SD 2.1": "0.65 376.58",
                "MiniGPT-5, Qwen2.5-VL + SD 3": "0.70 340.20",
            },
        ),
        "narrate, full": _rows(
            "MiniGPT-5, table 2",
            "S-BERT; ROUGE-L; METEOR",
            {
                "GILL": "0.3864 0.1784 0.1951",
                "MiniGPT-4": "0.6273 0.3401 0.3296",
                "MiniGPT-5": "0.6315 0.3373 0.3263",
            },
        ),
        **LAST,
    },
    "mmdialog": {
        "dialogue": _rows(
            "MMDialog, in MiniGPT-5, table 4",
            "IS; BLEU-1; BLEU-2; ROUGE-L; MM-Relevance",
            {"Divter": "20.53 0.0944 0.0745 0.1119 0.62"},
        )
        + _rows(
            "MiniGPT-5, table 4",
            "IS; BLEU-1, characters; BLEU-2, characters; ROUGE-L; MM-Relevance, pooled",
            {"GILL": "23.78 0.2912 0.1945 0.1207 0.64", "MiniGPT-5": "20.23 0.3369 0.2323 0.1176 0.67"},
        )
    },
}
