"""ROUGE: how many words of a reference summary a generated one has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

Score = dict[str, float]  # "r" recall, "p" precision, "f" their harmonic mean


def rouge(summaries: Sequence[str], references: Sequence[str]) -> dict[str, Score]:
    """Give the mean ROUGE-1, -2 and -L over pairs of texts, cut into words at white space.

    A repeated n-gram counts as often as both texts have it.
    """
    pairs = [(a.split(), b.split()) for a, b in zip(summaries, references, strict=True)]
    return {
        "rouge-1": _mean([_by_ngrams(*pair, n=1) for pair in pairs]),
        "rouge-2": _mean([_by_ngrams(*pair, n=2) for pair in pairs]),
        "rouge-l": _mean([_score(_common(a, b), len(a), len(b)) for a, b in pairs]),
    }


def _by_ngrams(summary: list[str], reference: list[str], n: int) -> Score:
    found, wanted = (
        Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (summary, reference)
    )
    return _score((found & wanted).total(), found.total(), wanted.total())


def _common(a: list[str], b: list[str]) -> int:
    """Give the length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]


def _score(both: int, found: int, wanted: int) -> Score:
    recall, precision = both / max(wanted, 1), both / max(found, 1)
    harmonic = 2 * recall * precision / (recall + precision) if both else 0.0
    return {"r": recall, "p": precision, "f": harmonic}


def _mean(scores: list[Score]) -> Score:
    return {key: sum(score[key] for score in scores) / max(len(scores), 1) for key in "rpf"}
