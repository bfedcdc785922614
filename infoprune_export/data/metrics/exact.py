"""GQA: exact match as LLaVA's conversion and the benchmark's ``eval.py`` do it together.

The prediction loses periods at its end and capitals, then must equal the answer letter by letter.
"""

from __future__ import annotations


def gqa_match(prediction: str, answer: str) -> float:
    """1 or 0."""
    return float(prediction.rstrip(".").lower() == answer)
