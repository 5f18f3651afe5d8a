"""``compile-policy cache``: says what is there, finds what is wrong, carries artifacts, and never a traceback."""

from __future__ import annotations

import json
import os
import pty
import sys
from pathlib import Path

import pytest

from compile_policy.artifacts import Artifact, ArtifactKey, Store, open_store
from compile_policy.cli import main
from compile_policy.cli.cache_tables import parse_size, size_text
from compile_policy.errors import InputError

FACTORS = {"torch": "2.13.0", "config": {"hidden_size": 4}}
KEY, SECOND = ArtifactKey(FACTORS), ArtifactKey({"torch": "2.11.0", "config": {"hidden_size": 8}})
FILES = {"graph.so": b"\x7fELF" * 64, "blocks/0.pt2": b"package"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The user's own, with two artifacts; the second was used later."""
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("COLUMNS", "200")
    store = open_store(None, os.environ)
    assert store is not None
    store.save(KEY, FILES, {"component": "decoder", "class": "[red]Evil[/red]\x1b[2JModel"})
    os.utime(store.folders.of(KEY.digest), (0, 0))
    store.save(SECOND, {"a": b"b"}, {})
    return store


def run(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert main(["cache", *argv]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The user's mistake: one line, code 2."""
    assert main(["cache", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def stored(store: Store) -> set[str]:
    return {entry.digest for entry in store.folders.artifacts()}


# -- looking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["40", "80", "120", "200"])
def test_ls(store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    """Every fact at every width, the last used first; what an artifact says of itself cannot draw."""
    monkeypatch.setenv("COLUMNS", width)
    out = run(capsys, "ls")
    for fact in (KEY.digest[:12], SECOND.digest[:12], "decoder", "[red]Evil[/red][2JModel", "signed", "2 artifacts"):
        assert fact in out
    assert out.index(SECOND.digest[:12]) < out.index(KEY.digest[:12])
    assert "\x1b" not in out
    assert max(len(line.rstrip()) for line in out.splitlines() if str(store.root) not in line) <= int(width)


def test_ls_json(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """One object with everything, also of an artifact that cannot be read."""
    (store.folders.of(SECOND.digest) / "manifest.json").write_text("{")
    found = json.loads(run(capsys, "ls", "--json"))
    assert found["root"] == str(store.root)
    broken, good = found["artifacts"]
    assert good["factors"] == FACTORS and good["signed"] and good["files"] == 2
    assert broken["digest"] == SECOND.digest and "not JSON" in broken["damaged"]
    assert "not JSON" in run(capsys, "ls")


def test_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing to list, to collect, to clear or to compare; only exporting it is a mistake."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "0 artifacts" in run(capsys, "ls")
    assert "nothing is wrong" in run(capsys, "doctor")
    assert "removed 0 artifacts" in run(capsys, "gc")
    assert "removed 0 artifacts" in run(capsys, "clear")
    (tmp_path / "f.json").write_text("{}")
    assert "no other artifact" in run(capsys, "why-miss", str(tmp_path / "f.json"))
    assert "no artifact to export" in fails(capsys, "export", str(tmp_path / "b.tar"))


def test_doctor(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """All that can be wrong is said with its remedy, and nothing is changed by looking."""
    assert "2 good, 0 damaged" in run(capsys, "doctor")
    good, bad = store.folders.of(KEY.digest), store.folders.of(SECOND.digest)
    (good / "stray.py").write_text("")
    (good / "graph.so").chmod(0o666)
    (bad / "a").write_bytes(b"c")
    (store.root / "v1" / "zz").write_text("")
    (store.folders.temporary / "dead").mkdir()
    store.save(ArtifactKey({}), {}, {})
    store.discard(ArtifactKey({}), "load")
    before = sorted(store.root.rglob("*"))
    out = run(capsys, "doctor", code=1)
    assert sorted(store.root.rglob("*")) == before
    for said in (
        "1 good, 1 damaged",
        f"problem: {SECOND.digest[:12]}: a was changed",
        "graph.so can be written by others",
        f"chmod -R go-w {store.root}",
        f"{KEY.digest[:12]} holds stray.py",
        "zz is not of the cache",
        "1 artifacts were set aside",
        "1 artifacts are being written",
        "compile-policy cache gc",
    ):
        assert said in out
    found = json.loads(run(capsys, "doctor", "--json", code=1))
    assert not found["healthy"] and found["damaged"] == 1
    assert {finding["kind"] for finding in found["findings"]} == {"problem", "note"}


def test_doctor_of_another_key(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """What is signed with another key is a problem, not damage to be collected."""
    key_file = Path(os.environ["HOME"], ".config", "compile_policy", "cache.key")
    key_file.write_text("another secret of more than 32 bytes")
    assert "signed with another key" in run(capsys, "doctor", code=1)
    run(capsys, "gc")
    assert stored(store) == {KEY.digest, SECOND.digest}


def test_why_miss(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The factor, what is stored and what is wanted."""
    path = tmp_path / "factors.json"
    path.write_text(json.dumps(FACTORS | {"torch": "2.14.0"}))
    out = run(capsys, "why-miss", str(path))
    assert [line.split() for line in out.splitlines()[-1:]] == [["torch", "2.13.0", "2.14.0"]]
    found = json.loads(run(capsys, "why-miss", str(path), "--json"))
    assert found["differences"] == [{"factor": "torch", "stored": "2.13.0", "wanted": "2.14.0"}]
    path.write_text(json.dumps(FACTORS))
    assert "no miss" in run(capsys, "why-miss", str(path))
    for text in ("[]", "{", '{"a": 1, "a": 2}'):
        path.write_text(text)
        assert str(path) in fails(capsys, "why-miss", str(path))
    assert "cannot be read: No such file" in fails(capsys, "why-miss", str(tmp_path / "absent.json"))
    assert "no artifact begins with 'fffffff'" in fails(capsys, "why-miss", "fffffff")


def test_why_miss_of_a_stored_artifact(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """What tells it from its neighbour, which could have been used in its place."""
    found = json.loads(run(capsys, "why-miss", KEY.digest[:8], "--json"))
    assert not found["hit"]
    assert found["differences"] == [
        {"factor": "config.hidden_size", "stored": 8, "wanted": 4},
        {"factor": "torch", "stored": "2.11.0", "wanted": "2.13.0"},
    ]
    assert "hidden_size" in run(capsys, "why-miss", SECOND.digest)
    store.remove(SECOND.digest)
    assert "no other artifact" in run(capsys, "why-miss", KEY.digest)
    (store.folders.of(KEY.digest) / "graph.so").write_bytes(b"")
    assert "cache doctor" in fails(capsys, "why-miss", KEY.digest)


# -- changing ---------------------------------------------------------------------------------------------------------


def test_gc(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Damaged artifacts, leftovers and what was set aside go; with a limit the least recently used as well."""
    store.discard(SECOND, "load")
    store.save(SECOND, {"a": b"b"}, {})
    (store.folders.temporary / "dead").mkdir()
    third = ArtifactKey({"n": 3})
    store.save(third, {"a": b"b"}, {})
    (store.folders.of(third.digest) / "a").write_bytes(b"")
    out = run(capsys, "gc")
    assert "removed 0 artifacts" in out and "1 damaged, 1 half written, 1 set aside; 2 artifacts left" in out
    assert stored(store) == {KEY.digest, SECOND.digest}
    assert "removed 1 artifact " in run(capsys, "gc", "--limit", "0.7kB")
    assert stored(store) == {SECOND.digest}
    assert "is no size" in fails(capsys, "gc", "--limit", "much")


def test_clear_asks(store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --yes and without a terminal it removes nothing; what is being made stays."""
    assert "--yes" in fails(capsys, "clear")
    assert stored(store) == {KEY.digest, SECOND.digest}
    with store.lock(KEY):
        out = run(capsys, "clear", "--yes")
    assert "removed 1 artifact " in out and "1 being made by other processes stay" in out
    assert stored(store) == {KEY.digest}


def test_clear_on_a_terminal(store: Store) -> None:
    """A person who says no keeps everything."""
    for answer, left in (("n", 2), ("y", 0)):
        child, screen = pty.fork()
        if not child:
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            code = main(["cache", "clear"])
            sys.stderr.flush()
            os._exit(code)
        os.write(screen, f"{answer}\n".encode())
        text = b""
        while chunk := _read(screen):
            text += chunk
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(screen)
        assert b"Remove 2 artifacts" in text
        assert code == (0 if left == 0 else 130)
        assert len(stored(store)) == left


def _read(screen: int) -> bytes:
    try:
        return os.read(screen, 4096)
    except OSError:
        return b""


def test_export_and_import(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To another user: refused without the key, taken with it or with --trust."""
    bundle, part, key_file = tmp_path / "all.tar", tmp_path / "part.tar", tmp_path / "team.key"
    key_file.write_text("a secret of the team, long enough")
    key_file.chmod(0o600)
    assert "2 artifacts in" in run(capsys, "export", str(bundle))
    assert "signed" in run(capsys, "export", str(part), KEY.digest[:8], "--key", str(key_file))
    assert "exists" in fails(capsys, "export", str(bundle))
    assert "no artifact begins with 'xyz'" in fails(capsys, "export", str(tmp_path / "x.tar"), "xyz")
    assert "2 artifacts begin with ''" in fails(capsys, "export", str(tmp_path / "x.tar"), "")
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(other))
    theirs = open_store(None, os.environ)
    assert theirs is not None
    for argv in ([str(part)], [str(bundle)], [str(bundle), "--key", str(key_file)]):
        assert "--trust" in fails(capsys, "import", *argv)
        assert stored(theirs) == set()
    assert "added 1 artifact; signed" in run(capsys, "import", str(part), "--key", str(key_file))
    out = run(capsys, "import", str(bundle), "--trust")
    assert "added 1 artifact, 1 were there already; trusted without" in out
    assert isinstance(theirs.load(KEY), Artifact)
    assert "cannot be read" in fails(capsys, "import", str(tmp_path / "absent.tar"))
    key_file.chmod(0o644)
    assert "chmod 600" in fails(capsys, "import", str(part), "--key", str(key_file))


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_places_that_are_refused(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for the cache itself gets the reason as an error."""
    store.root.chmod(0o770)
    for command in (["ls"], ["doctor"], ["gc"], ["clear", "--yes"]):
        assert "chmod 700" in fails(capsys, *command)
    monkeypatch.setenv("COMPILE_POLICY_CACHE_DIR", "false")
    assert "turned off" in fails(capsys, "ls")
    monkeypatch.setenv("COMPILE_POLICY_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert str(tmp_path / "elsewhere") in run(capsys, "ls")
    monkeypatch.setenv("COMPILE_POLICY_CACHE_KEY_FILE", str(tmp_path / "absent.key"))
    assert "absent.key" in fails(capsys, "ls")


def test_a_shared_cache(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a key file the doctor doesn't mind that others can write there."""
    key_file = tmp_path / "team.key"
    key_file.write_text("a secret of the team, long enough")
    key_file.chmod(0o600)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("COMPILE_POLICY_CACHE_DIR", str(shared))
    assert "COMPILE_POLICY_CACHE_KEY_FILE" in fails(capsys, "doctor")
    monkeypatch.setenv("COMPILE_POLICY_CACHE_KEY_FILE", str(key_file))
    assert "nothing is wrong" in run(capsys, "doctor")


def test_sizes() -> None:
    """As people write and read them."""
    assert [parse_size(text) for text in ("0", "10", "1kB", "1.5 MiB", "2g")] == [0, 10, 1000, 1572864, 2 * 10**9]
    assert [size_text(size) for size in (0, 1023, 1024, 1.5 * 2**20, 2**50)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 MiB",
        "1024 TiB",
    ]
    for text in ("", "-1", "1PB", "x"):
        with pytest.raises(InputError):
            parse_size(text)
