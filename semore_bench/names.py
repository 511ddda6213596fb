"""Names that come from elsewhere: as folders, and as text for a terminal, a table or a page."""

import difflib
import hashlib
import re
from collections.abc import Iterable

PUBLISHED = " (as published)"
"""ends the name of an agent whose numbers come from a file, not from runs"""


def folder_name(env_id: str) -> str:
    """The folder of an environment's runs: `dm_control/walker-walk-v0` -> `dm_control_walker-walk-v0`.

    Ids that have other characters than letters, digits and `_ . - /`, or would lead elsewhere, or are very long, end
    in a digest: no two of them share a folder.
    """
    plain = re.sub(r"[^\w.-]+", "_", env_id)
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)*", env_id) and len(plain.encode()) <= 100:
        return plain
    digest = hashlib.sha256(env_id.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{plain.encode()[:80].decode(errors='ignore').strip('._-') or 'env'}-{digest}"


def printable(text: str) -> str:
    """The text in one line, with escapes for characters that a terminal would obey or cannot show."""
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(map(_escaped, line))


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def shorten(text: str, length: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def did_you_mean(word: str, known: Iterable[str], advice: str = "") -> str:
    """The end of a sentence about an unknown `word`, and a further sentence of advice.

    >>> "there is no suite 'smok'" + did_you_mean("smok", ["smoke"], "A file of yours ends in .toml")
    "there is no suite 'smok'; did you mean 'smoke'? A file of yours ends in .toml"
    >>> "there is no suite 'x'" + did_you_mean("x", ["smoke"], "A file of yours ends in .toml")
    "there is no suite 'x'; expected one of smoke. A file of yours ends in .toml"
    """
    known = list(known)
    nearest = difflib.get_close_matches(word, known, n=1)
    text = f"; did you mean {nearest[0]!r}?" if nearest else f"; expected one of {', '.join(known)}"
    if not advice:
        return text
    return f"{text} {advice}" if nearest else f"{text}. {advice}"
