"""Undoing the spacing of text that was published as words and signs with a space around each.

    He said : " It 's 5 ( or 6 ) , is n 't it ? "   ->   He said: "It's 5 (or 6), is n't it?"

Each rule is a pattern and what stands in its place; they are applied in order, and what none names stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["DETOKENIZERS", "lm1b"]

_LM1B: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (r"(https?) : / / ?", r"\1://"),  # an address, before its colon and slashes are read as signs
        (r" '(?=\w)", "'"),  # 's, 'll, 't: joined to the word before
        (r" (?=[,;:.?!](?: |$))", ""),  # closing signs that stand alone
        (r" / ", "/"),
        (r'" ([^"]+) "', r'"\1"'),  # pairs, with something between
        (r"' ([^']+) '", r"'\1'"),
        (r"\( ([^()]+) \)", r"(\1)"),
        (r"\[ ([^\[\]]+) \]", r"[\1]"),
        (r"([$£]) ", r"\1"),  # what is counted in them follows
    )
)


def lm1b(text: str) -> str:
    """A sentence of the One Billion Word Benchmark as people write it.

    BERT's uncased tokenizer parts signs from words by itself, so that of all these rules only the one for £, which it
    takes for a letter, changes its ids.
    """
    for pattern, replacement in _LM1B:
        text = pattern.sub(replacement, text)
    return text


DETOKENIZERS: dict[str, Callable[[str], str]] = {"lm1b": lm1b}
"""By the names that data.detokenizer knows."""
