"""The store when disks fail, writers die and others work beside it: whole artifacts or none, and no run ends."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from compile_policy import events
from compile_policy.artifacts import Artifact, ArtifactKey, Miss, Store
from compile_policy.artifacts.disk import Disk
from compile_policy.errors import PolicyWarning

KEY = ArtifactKey({"torch": "2.13.0", "config": {"hidden_size": 4}})
FILES = {"graph.so": b"\x7fELF" * 64, "blocks/0.pt2": b"package"}
SECRET = b"s" * 32


def number(n: int) -> ArtifactKey:
    return ArtifactKey({"n": n})


def good(store: Store, key: ArtifactKey = KEY) -> bool:
    found = store.load(key)
    return isinstance(found, Artifact) and dict(found.files) == FILES


def forked(body: Callable[[], object]) -> int:
    """Run in a child process; it exits with 0 when ``body`` returned something true."""
    child = os.fork()
    if child:
        return child
    try:
        os._exit(0 if body() else 1)
    except BaseException:
        os._exit(99)


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- disks that fail --------------------------------------------------------------------------------------------------


class FailingDisk(Disk):
    """Does not do what it is asked from the n-th time on, for ``times`` times."""

    def __init__(self, at: int, times: int = 1, fail: Callable[[], None] = lambda: None) -> None:
        self.at, self.times, self.fail, self.steps = at, times, fail, 0

    def step(self, name: str, path: Path) -> None:
        self.steps += 1
        if self.at <= self.steps - 1 < self.at + self.times:
            self.fail()


def raising(code: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


def steps_of_a_save(folder: Path) -> int:
    disk = FailingDisk(-1)
    assert Store(folder, secret=SECRET, disk=disk).save(KEY, FILES, {})
    return disk.steps


@pytest.mark.parametrize("times", [1, 1000], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EROFS, errno.EIO], ids=os.strerror)
def test_a_fault_at_every_write(tmp_path: Path, code: int, times: int) -> None:
    """Nothing partial is ever visible, there is one warning in all, and a good disk heals it."""
    total = steps_of_a_save(tmp_path / "count")
    assert total > 15
    outcomes = set()
    for at in range(total):
        root = tmp_path / str(at)
        store = Store(root, secret=SECRET, disk=FailingDisk(at, times, raising(code)))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            saved = store.save(KEY, FILES, {})
            if times > 1:
                store.save(KEY, FILES, {})
        assert [w.category for w in seen] == ([] if saved and not seen else [PolicyWarning])
        fresh = Store(root, secret=SECRET)
        assert good(fresh) or fresh.load(KEY) == Miss("absent", "there is no artifact of this key")
        assert good(fresh) or not saved
        assert not fresh.folders.quarantined.exists()
        assert fresh.save(KEY, FILES, {})
        assert good(fresh)
        outcomes.add(saved)
    assert False in outcomes


def test_a_disk_that_takes_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing goes on after a short write, and ends at the error that follows it."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:5]))
    store = Store(tmp_path / "short")
    assert store.save(KEY, FILES, {})
    assert good(store)


def test_the_warning_says_what_to_do(tmp_path: Path) -> None:
    """And an event says it each time."""
    seen: list[events.Event] = []
    store = Store(tmp_path, disk=FailingDisk(0, 1000, raising(errno.ENOSPC)))
    with events.listening(seen.append):
        with pytest.warns(PolicyWarning, match=r"No space left on device\. Free space, or choose another directory"):
            store.save(KEY, FILES, {})
        store.save(KEY, FILES, {})
    assert [event.kind for event in seen] == ["skipped", "skipped"]


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """Hits are hits, a lock isn't had, saving says so once."""
    assert Store(tmp_path).save(KEY, FILES, {})
    store = Store(tmp_path, disk=FailingDisk(0, 1000, raising(errno.EROFS)))
    assert good(store)
    with pytest.warns(PolicyWarning, match="Read-only"):
        assert not store.save(number(1), FILES, {})
    assert isinstance(store.load(number(1)), Miss)


@pytest.mark.parametrize("kind", ["absent", "file"])
def test_a_root_that_is_no_directory(tmp_path: Path, kind: str) -> None:
    """A root that isn't there yet is made; a file in its place is a warning."""
    root = tmp_path / "root"
    if kind == "absent":
        assert isinstance(Store(root).load(KEY), Miss)
        assert Store(root).save(KEY, FILES, {})
        return
    root.write_text("")
    assert isinstance(Store(root).load(KEY), Miss)
    with Store(root).lock(KEY) as held:
        assert not held
    with pytest.warns(PolicyWarning, match="cannot be written"):
        assert not Store(root).save(KEY, FILES, {})


def test_interrupted_while_saving(tmp_path: Path) -> None:
    """Ctrl-C goes through, and leaves nothing behind."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    for at in range(steps_of_a_save(tmp_path / "count") - 3):  # up to the rename
        store = Store(tmp_path / str(at), secret=SECRET, disk=FailingDisk(at, 1, interrupt))
        with pytest.raises(KeyboardInterrupt):
            store.save(KEY, FILES, {})
        assert isinstance(store.load(KEY), Miss)
        assert not store.folders.temporary.exists() or not list(store.folders.temporary.iterdir())


# -- writers that die -------------------------------------------------------------------------------------------------


def test_killed_at_every_write(tmp_path: Path) -> None:
    """What a killed writer leaves is nothing or whole; its lock is free; what it was writing is swept up."""
    total = steps_of_a_save(tmp_path / "count")
    left = 0
    for at in range(total):
        root = tmp_path / str(at)
        dying = Store(root, secret=SECRET, disk=FailingDisk(at, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)))

        def write(store: Store = dying) -> bool:
            with store.lock(KEY):
                return store.save(KEY, FILES, {})

        assert status(forked(write)) == -signal.SIGKILL
        store = Store(root, secret=SECRET)
        assert good(store) or store.load(KEY) == Miss("absent", "there is no artifact of this key")
        with store.lock(KEY, timeout=5) as held:
            assert held
            assert store.save(KEY, FILES, {})
        assert good(store)
        left += store.folders.sweep(older_than=0)
        assert not list(store.folders.temporary.iterdir())
        assert not store.folders.quarantined.exists()
    assert left > 0


def test_a_writer_at_work_is_not_swept(tmp_path: Path) -> None:
    """What is being written is locked; what is young is left alone."""
    store = Store(tmp_path)
    with store.folders.staging() as folder:
        assert Store(tmp_path).folders.sweep(older_than=0) == 0
        assert folder.exists()
    (store.folders.temporary / "dead").mkdir()
    assert store.folders.sweep() == 0
    assert store.folders.sweep(older_than=0) == 1


# -- others beside it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locking", [True, False], ids=["locked", "unlocked"])
def test_two_processes_one_key(tmp_path: Path, locking: bool) -> None:
    """Twenty times started together: both have it, it is there once, and under the lock one of them made it."""
    for again in range(20):
        root, made = tmp_path / str(again), tmp_path / f"made{again}"
        start = time.monotonic() + 0.02

        def work(root: Path = root, made: Path = made, start: float = start) -> bool:
            warnings.simplefilter("error")
            store = Store(root, secret=SECRET)
            while time.monotonic() < start:
                pass
            if not locking:
                return store.save(KEY, FILES, {}) and good(store)
            with store.lock(KEY, timeout=30) as held:
                if held and not good(store):
                    with made.open("a") as file:
                        file.write("made\n")
                    return store.save(KEY, FILES, {}) and good(store)
                return held

        children = [forked(work), forked(work)]
        assert [status(child) for child in children] == [0, 0]
        assert good(Store(root, secret=SECRET))
        assert not (root / "quarantine").exists()
        assert not locking or made.read_text() == "made\n"


def test_a_stopped_holder(tmp_path: Path) -> None:
    """Waits to the time-out and says that the caller is alone; when the holder is gone the lock is free."""
    ready, tell = os.pipe()

    def hold() -> None:
        with Store(tmp_path).lock(KEY):
            os.write(tell, b"x")
            time.sleep(60)

    child = forked(hold)
    try:
        assert os.read(ready, 1) == b"x"
        os.kill(child, signal.SIGSTOP)
        store = Store(tmp_path)
        seen: list[events.Event] = []
        with events.listening(seen.append), store.lock(KEY, timeout=0.2) as held:
            assert not held
            assert store.save(KEY, FILES, {})
        assert [event.kind for event in seen] == ["note"]
        with store.lock(number(1), timeout=0.2) as held:
            assert held
    finally:
        os.kill(child, signal.SIGKILL)
        status(child)
    with store.lock(KEY, timeout=5) as held:
        assert held


def test_threads(tmp_path: Path) -> None:
    """A lock holds between threads and stores of one process; an error in the block frees it."""
    store, inside, most = Store(tmp_path), [0], [0]

    def work() -> None:
        with Store(tmp_path).lock(KEY, timeout=30) as held:
            assert held
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.005)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    with pytest.raises(RuntimeError), store.lock(KEY):
        raise RuntimeError
    with store.lock(KEY, timeout=0) as held:
        assert held


def test_removed_while_it_is_read(tmp_path: Path) -> None:
    """A reader beside a process that removes and saves again gets a good artifact or none."""
    Store(tmp_path).save(KEY, FILES, {})

    def churn() -> bool:
        store = Store(tmp_path)
        for _ in range(150):
            store.remove(KEY.digest)
            store.save(KEY, FILES, {})
        return True

    child, store, hits = forked(churn), Store(tmp_path), 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        found = store.load(KEY)
        hits += isinstance(found, Artifact)
        assert isinstance(found, Artifact) or found.reason in ("absent", "missing"), found
    assert hits
    assert good(store)


# -- size -------------------------------------------------------------------------------------------------------------


def aged(store: Store, *numbers: int) -> None:
    """Saved in this order, long ago."""
    for age, n in enumerate(numbers):
        assert store.save(number(n), {"data": bytes(1000)}, {})
        os.utime(store.folders.of(number(n).digest), (age, age))


def kept(store: Store, *numbers: int) -> list[int]:
    return [n for n in numbers if store.folders.of(number(n).digest).exists()]


def test_least_recently_used_go(tmp_path: Path) -> None:
    """Loading counts as use; a limit holds after every save."""
    aged(Store(tmp_path), 0, 1, 2, 3)
    assert isinstance(Store(tmp_path).load(number(0)), Artifact)
    store = Store(tmp_path, limit_bytes=4000)
    assert store.save(number(4), {"data": bytes(1000)}, {})
    assert kept(store, *range(5)) == [0, 3, 4]
    assert not list(store.folders.temporary.iterdir())


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    """What this store has loaded or saved, and what somebody holds the lock of."""
    aged(Store(tmp_path), 0, 1, 2)
    store = Store(tmp_path)
    store.load(number(0))
    os.utime(store.folders.of(number(0).digest), (0, 0))
    with Store(tmp_path).lock(number(1)):
        assert [entry.digest for entry in store.trim(0)] == [number(2).digest]
    assert kept(store, 0, 1, 2) == [0, 1]
    assert isinstance(store.load(number(0)), Artifact)


def test_larger_than_the_limit(tmp_path: Path) -> None:
    """Not saved, and nothing is thrown away for it."""
    store = Store(tmp_path, limit_bytes=4000)
    aged(store, 0)
    with pytest.warns(PolicyWarning, match="larger than the limit"):
        assert not store.save(KEY, {"data": bytes(5000)}, {})
    assert kept(store, 0) == [0]


def test_quarantine_is_bounded(tmp_path: Path) -> None:
    """The newest are kept."""
    store = Store(tmp_path)
    for n in range(20):
        store.save(number(n), FILES, {})
        store.discard(number(n), "load")
    assert len(list(store.folders.quarantined.iterdir())) == 16
    assert store.folders.artifacts() == []


# -- reasons ----------------------------------------------------------------------------------------------------------


def test_why_miss(tmp_path: Path) -> None:
    """Against the nearest artifact, by name; nothing where there is nothing to compare, or nothing differs."""
    store = Store(tmp_path)
    wanted = {"torch": "2.13.0", "dtype": "bfloat16", "config": {"hidden_size": 4, "layers": 2}}
    assert store.why_miss(wanted) == []
    store.save(ArtifactKey({"torch": "2.11.0", "dtype": "float32", "config": {}}), FILES, {})
    store.save(ArtifactKey(wanted | {"config": {"hidden_size": 8, "layers": 2}}), FILES, {})
    assert store.why_miss(wanted) == [("config.hidden_size", 8, 4)]
    store.save(ArtifactKey(wanted), FILES, {})
    assert store.why_miss(wanted) == []


def test_a_group_of_factors_that_is_missing_counts_as_many(tmp_path: Path) -> None:
    """An index has no factors of the code: it is not nearer than the entry of which all files were edited."""
    store = Store(tmp_path)
    wanted = {"torch": "2.13.0", "kind": "entry", "code": {"text": {"a": "1", "b": "1", "c": "1"}}}
    store.save(ArtifactKey({"torch": "2.13.0", "kind": "index"}), FILES, {})
    store.save(ArtifactKey(wanted | {"code": {"text": {"a": "0", "b": "0", "c": "0"}}}), FILES, {})
    assert store.why_miss(wanted) == [(f"code.text.{name}", "0", "1") for name in "abc"]


def test_discarded_artifacts_make_way(tmp_path: Path) -> None:
    """One that is intact and cannot be loaded is moved aside, and the next one is kept."""
    store = Store(tmp_path)
    store.save(KEY, FILES, {})
    store.save(KEY, {"new": b""}, {})
    assert good(store), "a good one stays"
    store.discard(KEY, "load")
    assert isinstance(store.load(KEY), Miss)
    assert store.save(KEY, FILES, {})
    assert good(store)


def test_a_time_in_the_future_shields_nothing(tmp_path: Path) -> None:
    """An artifact whose time is years ahead is as old as its folder; the one that was used since stays."""
    writer = Store(tmp_path)
    for n in range(2):
        assert writer.save(number(n), {"a": bytes(2000)}, {})
    os.utime(writer.folders.of(number(0).digest), (time.time() + 1e8,) * 2)
    os.utime(writer.folders.of(number(1).digest), (time.time() + 60,) * 2)  # another machine's clock
    size = max(entry.size for entry in writer.folders.artifacts())
    gone = Store(tmp_path, limit_bytes=size).trim()
    assert [entry.digest for entry in gone] == [number(0).digest]


def test_leftovers_count(tmp_path: Path) -> None:
    """What a killed writer left and what was set aside are bytes too; what was set aside goes before an artifact."""
    writer = Store(tmp_path)
    assert writer.save(number(0), {"a": bytes(3000)}, {})
    assert writer.save(number(1), {"a": bytes(3000)}, {})
    writer.discard(number(1), "load")
    assert Store(tmp_path, limit_bytes=7500).trim() == []
    assert list((tmp_path / "quarantine").iterdir())
    assert Store(tmp_path, limit_bytes=5000).trim() == []
    assert not list((tmp_path / "quarantine").iterdir())
    killed = tmp_path / "tmp" / "killed"  # too young to be removed: its writer may be about to lock it
    killed.mkdir()
    (killed / "a").write_bytes(bytes(3000))
    assert Store(tmp_path, limit_bytes=7500).trim() == []
    assert [entry.digest for entry in Store(tmp_path, limit_bytes=5000).trim()] == [number(0).digest]


def test_a_replaced_artifact_is_never_missing(tmp_path: Path) -> None:
    """A reader beside a process that replaces gets the old one or the new one, at every look."""
    assert Store(tmp_path).save(KEY, FILES, {})

    def churn() -> bool:
        store = Store(tmp_path)
        return all(store.save(KEY, {**FILES, "n": str(n).encode()}, {}, replace=True) for n in range(150))

    child, store, hits = forked(churn), Store(tmp_path), 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        assert isinstance(store.load_settled(KEY), Artifact)
        hits += 1
    found = store.load(KEY)
    assert isinstance(found, Artifact) and found.files["n"] == b"149"
    assert hits > 10 and not (tmp_path / "quarantine").exists()
    assert not list((tmp_path / "tmp").iterdir())


def test_replacing_where_names_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On such a file system the old one goes aside for a moment; the new one is there afterwards."""
    monkeypatch.setattr(Disk, "exchange", lambda self, source, target: False)
    store = Store(tmp_path)
    assert store.save(KEY, FILES, {}) and store.save(KEY, {"b": b"2"}, {}, replace=True)
    found = store.load(KEY)
    assert isinstance(found, Artifact) and found.files == {"b": b"2"}
    assert not list((tmp_path / "tmp").iterdir())


def test_a_waiter_says_for_whom(tmp_path: Path) -> None:
    """Its process, its machine and since when; once, however often it looks."""
    ready, tell = os.pipe()

    def hold() -> bool:
        with Store(tmp_path).lock(KEY):
            os.write(tell, b"x")
            time.sleep(2)
        return True

    child = forked(hold)
    assert os.read(ready, 1) == b"x"
    seen: list[events.Event] = []
    with events.listening(seen.append), Store(tmp_path).lock(KEY, timeout=60, component="decoder") as held:
        assert held
    status(child)
    (event,) = seen
    assert (event.kind, event.component, event.data["pid"]) == ("waiting", "decoder", child)
    assert f"waits for process {child} on this machine" in event.message
    assert abs(event.data["since"] - time.time()) < 60
