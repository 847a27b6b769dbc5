"""Figures of an evaluation: decisions under noise, answers, variety.

Everything is float64 (Python's own), and nothing here knows a model.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import NormalDist

from nanollada.trainers.scoring.estimates import share

NORMAL = NormalDist()
NODES = 200  # of the integral over the noise of one choice: good to about a thousandth
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
CMRC_DELETES = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"  # one character each: its "……" never matches


# ---- decisions between noisy scores


def win_probability(place: int, scores: Sequence[float], variances: Sequence[float]) -> float:
    """
    How probable it is that the true score of `place` is the lowest, if each score is the truth with normal noise of
    its own variance and nothing is known beforehand: ∫ φ_place(x) Π_j P(score_j > x) dx.
    """
    others = [(score, var) for j, (score, var) in enumerate(zip(scores, variances, strict=True)) if j != place]
    own, deviation = scores[place], math.sqrt(variances[place])
    if len(others) == 1:
        return _above(others[0][0] - own, math.sqrt(others[0][1] + deviation**2))
    nodes = [own + deviation * NORMAL.inv_cdf((i + 0.5) / NODES) for i in range(NODES)] if deviation else [own]
    total = math.fsum(math.prod(_above(score - x, math.sqrt(var)) for score, var in others) for x in nodes)
    return total / len(nodes)


def _above(distance: float, deviation: float) -> float:
    """P(N(distance, deviation²) > 0); without noise a tie is half."""
    if deviation == 0:
        return 0.5 if distance == 0 else float(distance > 0)
    return NORMAL.cdf(distance / deviation)


def decisions(scores: Sequence[Sequence[float]], variances: Sequence[Sequence[float]], labels: Sequence[int]) -> dict:
    """
    How often the lowest score is the label's, the first of equal ones, as [`share`]; and what the scores' noise does:

    - `open_share`: the expected share of rows whose lowest score is not truly the lowest;
    - `mask_error`: the standard deviation that this gives the accuracy, √(Σ q(1 − q)) / n with q the probability that
      the label's is truly the lowest. `standard_error` is over the rows and holds it already.
    """
    lowest = [row.index(min(row)) for row in map(list, scores)]
    rows = list(zip(scores, variances, labels, lowest, strict=True))
    certain = [win_probability(best, values, noise) if any(noise) else 1.0 for values, noise, _, best in rows]
    right = [win_probability(label, values, noise) if any(noise) else 0.0 for values, noise, label, _ in rows]
    return {
        **share([best == label for best, label in zip(lowest, labels, strict=True)]),
        "open_share": 1 - math.fsum(certain) / len(rows),
        "mask_error": math.sqrt(math.fsum(q * (1 - q) for q in right)) / len(rows),
    }


# ---- answers


def units(text: str, language: str | None = None) -> list[str]:
    """
    What two answers are compared by: lower-case words, and each Chinese character by itself.

    Chinese (`language="zh"`): what CMRC 2018's official script deletes is deleted, which parts no word: dashes, colons
    and full-width punctuation; not `.`, `,` or `%`. Two things differ: words end at spaces and Chinese characters
    alone, where the script asks NLTK (for which `50%` is two words); and Chinese characters are those of Unicode's
    blocks of ideographs, there U+4E00 to U+9FA5.

    Otherwise ASCII punctuation is deleted, then a, an and the, as by SQuAD's official script, for which Chinese
    characters are letters like others.
    """
    deleted = CMRC_DELETES if language == "zh" else string.punctuation
    text = "".join(character for character in text.lower() if character not in deleted)
    text = text if language == "zh" else re.sub(r"\b(a|an|the)\b", " ", text)
    return re.sub(f"([{HAN}])", r" \1 ", text).split()


def answer_match(answer: str, references: Iterable[str], language: str | None = None) -> bool:
    """
    Whether an answer is one of the references, up to what [`units`] drops; in Chinese up to spaces, too, which CMRC's
    script compares.
    """

    def plain(text: str) -> str:
        return ("" if language == "zh" else " ").join(units(text, language))

    return plain(answer) in {plain(reference) for reference in references}


def answer_f1(answer: str, references: Sequence[str], language: str | None = None) -> float:
    """
    The best F1 over the references. Chinese: 2·LCS / (n + m), with LCS the longest common run of units (CMRC 2018's
    official rule); otherwise by the units in common, whatever their order (SQuAD's). What [`answer_match`] takes for
    equal has 1.
    """
    if answer_match(answer, references, language):
        return 1.0
    said = units(answer, language)
    return max(_f1(said, units(reference, language), language) for reference in references)


def _f1(said: list[str], reference: list[str], language: str | None) -> float:
    if not said or not reference:
        return float(said == reference)
    common = _longest_run(said, reference) if language == "zh" else (Counter(said) & Counter(reference)).total()
    return 2 * common / (len(said) + len(reference))


def _longest_run(one: list[str], other: list[str]) -> int:
    best, row = 0, [0] * (len(other) + 1)
    for unit in one:
        row = [0, *(row[j] + 1 if unit == other[j] else 0 for j in range(len(other)))]
        best = max(best, *row)
    return best


# ---- variety


def distinct(tokens: Sequence, n: int) -> float | None:
    """Different n-grams by n-grams (Li et al., 1510.03055) of one text; `None` where it has none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def unigram_entropy(tokens: Sequence) -> float | None:
    """Entropy of one text's token frequencies, in nats; `None` without tokens."""
    if not tokens:
        return None
    return -math.fsum(count / len(tokens) * math.log(count / len(tokens)) for count in Counter(tokens).values())


def repetition(tokens: Sequence, n: int = 4) -> float | None:
    """Share of the n-grams that stand earlier in the text (seq-rep-n of Welleck et al., 1908.04319)."""
    found = distinct(tokens, n)
    return None if found is None else 1 - found
