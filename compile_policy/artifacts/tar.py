"""The members of a tar file, one at a time, with bounded work for each.

`tarfile` reads whatever an extension header claims into memory and follows chains of them by recursion, before a
caller sees the first member. A bundle needs next to nothing of the format, so its headers are read here: plain files,
and before one with a long name a single short extension header that holds the name.
"""

from __future__ import annotations

import os
import re
import tarfile
from typing import IO, NamedTuple

_BLOCK = tarfile.BLOCKSIZE
_EXTENSION, _PLAIN = tarfile.XHDTYPE, (tarfile.REGTYPE, tarfile.AREGTYPE)
_EXTENSION_BYTES = 1024
_PATH = re.compile(rb"(\d{1,4}) path=([^\n\0]*)\n\0*")
_NUMBER = re.compile(rb" *([0-7]*)[ \0]*")


class Member(NamedTuple):
    """One member: its name, whether it is a plain file, its size in bytes, and where it begins."""

    name: str
    plain: bool
    size: int
    offset: int


class Members:
    """Reads members in order.

    Raises:
        ValueError: a header is damaged, or claims more than a bundle's may.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._next = 0

    def next(self) -> Member | None:
        """The next member; ``None`` at the end."""
        header = self._header()
        if header is None:
            return None
        name = None
        if header[156:157] == _EXTENSION:
            name = self._long_name(_size(header))
            header = self._header()
            if header is None:
                raise ValueError("it ends after an extension header")
        kind, size = header[156:157], _size(header)
        offset = self._next
        if kind in _PLAIN:
            self._skip(size)
        return Member((name or _name(header)).rstrip("/"), kind in _PLAIN, size, offset)

    def read(self, member: Member) -> bytes:
        self._file.seek(member.offset)
        return self._file.read(member.size)

    def _header(self) -> bytes | None:
        self._file.seek(self._next)
        block = self._file.read(_BLOCK)
        self._next += _BLOCK
        if not block.strip(b"\0"):  # the end, or the end of the file
            return None
        if len(block) < _BLOCK or block[257:262] != b"ustar" or _checksum(block) != _number(block[148:156]):
            raise ValueError("a header in it is damaged")
        return block

    def _long_name(self, size: int) -> str:
        if size > _EXTENSION_BYTES:
            raise ValueError(f"an extension header in it has {size} bytes; {_EXTENSION_BYTES} is the most")
        text = self._file.read(size)
        self._skip(size)
        found = _PATH.fullmatch(text)
        if found is None or int(found[1]) != len(text.rstrip(b"\0")):
            raise ValueError("an extension header in it holds something else than a name")
        return found[2].decode("utf-8", "replace")

    def _skip(self, size: int) -> None:
        if size > self._size - self._next:
            raise ValueError("a member in it is too large: it ends behind the end of the file")
        self._next += -(-size // _BLOCK) * _BLOCK


def _name(header: bytes) -> str:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    joined = prefix + b"/" + name if prefix and header[263:265] == b"00" else name
    return joined.decode("utf-8", "replace")


def _size(header: bytes) -> int:
    return _number(header[124:136])


def _number(field: bytes) -> int:
    found = _NUMBER.fullmatch(field)
    if found is None:  # the binary form too, which is for files that no bundle holds
        raise ValueError("a header in it is damaged")
    return int(found[1] or b"0", 8)


def _checksum(header: bytes) -> int:
    return sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
