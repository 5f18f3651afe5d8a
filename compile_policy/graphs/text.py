"""Text that is safe to print, and names that are safe as file names."""

from __future__ import annotations

import hashlib
import re
import unicodedata

_LONGEST_NAME = 80
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def clean(text: str) -> str:
    """Without control characters and without those that turn text round or hide in it; line breaks and tabs stay."""
    if text.isascii():
        return _CONTROL.sub("", text)
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp"))


def one_line(text: str) -> str:
    """`clean` in one line, fit for a comment."""
    return " ".join(clean(text).split())


def file_name(text: str) -> str:
    """A name without separators, control characters or markup; what had to be replaced leaves a hash behind."""
    plain = text.replace(" ", "-").replace("[", "-").replace("]", "")  # as in the role encoder[image]
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._-")[:_LONGEST_NAME]
    if safe and safe == plain:
        return safe
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{safe}-{digest}" if safe else f"component-{digest}"
