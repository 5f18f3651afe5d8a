"""What an artifact says about itself: its key, its files with size and SHA-256, and what its maker noted."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from compile_policy.artifacts.key import JSON, ArtifactKey, canonical, plain
from compile_policy.artifacts.parsing import load_json

SCHEMA = 1
MANIFEST = "manifest.json"
SIGNATURE = "manifest.mac"
MANIFEST_BYTES = 8 << 20
FILES = 4096
FILE_BYTES = 64 << 30

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*){0,3}")
_NAME_LENGTH = 200
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Miss:
    """Why there is no artifact.

    Attributes:
        reason: ``absent``; ``manifest``, ``missing``, ``size``, ``hash`` (damaged); ``key`` (it is another key's);
            ``mac`` (not signed with our key); ``unreadable``.
        detail: one sentence for people, without a word of any secret.
    """

    reason: str
    detail: str


class Damaged(Exception):
    """Internal: an artifact is not what it should be."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.miss = Miss(reason, detail)


class FileRecord(NamedTuple):
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Key, files and meta of an artifact."""

    key: ArtifactKey
    files: Mapping[str, FileRecord]
    meta: Mapping[str, JSON]

    @classmethod
    def describe(cls, key: ArtifactKey, files: Mapping[str, bytes], meta: Mapping[str, JSON]) -> Manifest:
        """The manifest of new files.

        Raises:
            ValueError: a name is not a plain relative one, or there are too many files.
            TypeError: ``meta`` is no JSON.
        """
        for name in files:
            _check_name(name)
        if len(files) > FILES:
            raise ValueError(f"{len(files)} files in one artifact; {FILES} is the most")
        records = {name: FileRecord(len(data), sha256(data)) for name, data in files.items()}
        values = plain(meta)
        assert isinstance(values, dict)
        return cls(key, records, values)

    @property
    def size(self) -> int:
        """Size of all files."""
        return sum(record.size for record in self.files.values())

    def encode(self) -> bytes:
        files: dict[str, JSON] = {
            name: {"size": record.size, "sha256": record.sha256} for name, record in self.files.items()
        }
        return canonical(
            {
                "schema": SCHEMA,
                "key": self.key.digest,
                "factors": dict(self.key.factors),
                "files": files,
                "meta": dict(self.meta),
            }
        )

    @classmethod
    def decode(cls, text: bytes) -> Manifest:
        """Read a manifest of at most `MANIFEST_BYTES`.

        Raises:
            Damaged: it is no manifest, or its digest isn't that of its factors.
        """
        try:
            values = load_json(text)
            if set(values) != {"schema", "key", "factors", "files", "meta"}:
                raise ValueError("it has other fields than a manifest")
            if values["schema"] != SCHEMA:
                raise ValueError("it is of another schema version")
            if not isinstance(values["meta"], dict) or not isinstance(values["factors"], dict):
                raise ValueError("meta and factors must be objects")
            files = _records(values["files"])
        except ValueError as error:
            raise Damaged("manifest", f"the manifest cannot be used: {error}") from None
        key = ArtifactKey(values["factors"])
        if key.digest != values["key"]:
            raise Damaged("key", "the manifest's digest is not that of its factors")
        return cls(key, files, values["meta"])


def _records(values: Any) -> dict[str, FileRecord]:
    if not isinstance(values, dict) or len(values) > FILES:
        raise ValueError("the list of files is none, or too long")
    records: dict[str, FileRecord] = {}
    for name, record in values.items():
        _check_name(name)
        if not isinstance(record, dict) or set(record) != {"size", "sha256"}:
            raise ValueError("a file's record has other fields than size and sha256")
        size, digest = record["size"], record["sha256"]
        if type(size) is not int or not 0 <= size <= FILE_BYTES:
            raise ValueError("a file's size is no size")
        if not is_digest(digest):
            raise ValueError("a file's hash is no hash")
        records[name] = FileRecord(size, digest)
    return records


def _check_name(name: str) -> None:
    """A name may have folders in it; nothing in it can lead out of the artifact."""
    if not _NAME.fullmatch(name) or len(name) > _NAME_LENGTH or name in (MANIFEST, SIGNATURE):
        raise ValueError(f"{name[:80]!r} cannot name a file of an artifact")


def name_on_disk(name: str) -> str:
    """Artifacts are flat on disk; ``~`` is in no name."""
    return name.replace("/", "~")


def is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
