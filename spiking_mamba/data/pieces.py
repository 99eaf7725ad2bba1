"""Long documents in pieces whose tokens, end to end, are those of the whole.

A tokenizer takes well over a hundred times a text's size in memory, so that of a document of any length only
a piece is tokenized at a time. Where a cut changes nothing depends on the tokenizer: one that splits words
off with the space before them can be cut there, one that puts a space before every text can be cut where a
space is left out. So each cut is tried on the text around it, and taken only where both ways give the same
tokens.
"""

from collections.abc import Callable, Iterator, Sequence

__all__ = ["PIECE", "pieces"]

Encode = Callable[[Sequence[str]], list[list[int]]]

PIECE = 2**16  # characters, at least; the next good cut ends a piece
_AROUND = 128  # characters on each side of a cut, on which it is tried
_TRIES = 64  # cuts of each kind within the length of a piece


def pieces(text: str, encode: Encode, size: int = PIECE) -> Iterator[str]:
    """Pieces of a text, of about ``size`` characters where it has good cuts, else longer ones.

    Args:
        text: to be cut.
        encode: gives the token ids of each of several texts, without special tokens.
        size: in characters.
    """
    start, search = 0, size
    while search < len(text):
        cut = _good_cut(text, search, min(search + size, len(text)), encode)
        if cut is None:
            search += size
            continue
        yield text[start : cut[0]]
        start = cut[1]
        search = start + size
    yield text[start:]


def _good_cut(text: str, low: int, high: int, encode: Encode) -> tuple[int, int] | None:
    """Where a piece may end and the next one begin, from ``low`` on; they differ by a space left out."""
    for kind in (_before_a_space, _before_a_word):
        tries = 0
        for place in range(max(low, 1), high):
            if not kind(text, place):
                continue
            for after in (place, place + 1) if text[place] == " " else (place,):
                if _changes_nothing(text, place, after, encode):
                    return place, after
            tries += 1
            if tries == _TRIES:
                break
    return None


def _before_a_space(text: str, place: int) -> bool:
    """Whether a single space or line break stands between words here."""
    return (
        text[place].isspace()
        and not text[place - 1].isspace()
        and place + 1 < len(text)
        and not text[place + 1].isspace()
    )


def _before_a_word(text: str, place: int) -> bool:
    """Whether a word begins here behind something else: Chinese has no spaces."""
    return text[place].isalnum() and not text[place - 1].isalnum()


def _changes_nothing(text: str, before: int, after: int, encode: Encode) -> bool:
    left, right = text[max(0, before - _AROUND) : before], text[after : after + _AROUND]
    whole, one, two = encode([left + text[before:after] + right, left, right])
    return whole == one + two
