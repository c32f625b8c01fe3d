"""Keys and bytes in; the same bytes out, later and in other processes, as long as they are among the latest used.

A store is one SQLite file, which many processes may read and write at the same time and which a crash cannot damage.
What it holds can always be computed again: where the file cannot be used, that is said once, and nothing is kept.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

from calm_jax import config as config_lib
from calm_jax.errors import ConfigError

PLACE, SIZE = "CALM_CACHE", "CALM_CACHE_GB"  # where stores lie, and how large each may become; 0 = nothing is kept
WAIT = 30.0  # seconds for another process to finish writing
EVICTED = 16  # entries that are dropped at a time
TOUCHED = 512  # entries that were read since it was last noted which are in use
VERSION = 1  # of the tables
TABLES = (
    "CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, value BLOB NOT NULL, checksum INTEGER NOT NULL, "
    "used INTEGER NOT NULL)",
    "CREATE INDEX IF NOT EXISTS used ON entries (used)",
    f"PRAGMA user_version = {VERSION}",
)


def folder() -> Path:
    """Where stores lie: the folder that CALM_CACHE names, else `calm_jax/pictures` in the user's cache folder.

    Raises:
      ConfigError: CALM_CACHE is an address.
    """
    if place := os.environ.get(PLACE):
        config_lib.check_local(PLACE, place)
        return Path(place)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "calm_jax" / "pictures"


def gigabytes(default: float) -> float:
    """The size that CALM_CACHE_GB allows a store, else the default.

    Raises:
      ConfigError: it is no number from 0 on.
    """
    said = os.environ.get(SIZE, "")
    try:
        value = float(said) if said else default
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise ConfigError(f"{SIZE}={said} cannot be used; give gigabytes, such as 10, or 0 for no cache")
    return value


class Store:
    """A file of entries. Thread-safe; stores of other processes share the file.

    Args:
      path: of the file, which is made when it is first needed.
      limit: bytes that the file may take; the entries whose last use is longest ago make room.
    """

    def __init__(self, path: Path, limit: int):
        self.path, self.limit = path, limit
        self._lock, self._owner = threading.Lock(), 0
        self._connection: sqlite3.Connection | None = None
        self._touched: set[bytes] = set()
        self._broken = False

    def get(self, key: bytes) -> bytes | None:
        """What was put under the key; None where there is nothing, or where it is damaged."""
        with self._lock:
            if (connection := self._opened()) is None:
                return None
            try:
                row = connection.execute("SELECT value, checksum FROM entries WHERE key = ?", (key,)).fetchone()
                if row is None:
                    return None
                self._touched.add(key)
                if len(self._touched) >= TOUCHED:
                    self._note(connection)
            except sqlite3.Error as error:
                self._give_up(error)
                return None
        value, checksum = row
        return value if zlib.crc32(value) == checksum else None

    def put(self, entries: Mapping[bytes, bytes]) -> None:
        """Keeps entries, in place of those that have their keys; older ones make room for them."""
        need = sum(map(len, entries.values()))
        if not entries or need > self.limit:
            return
        with self._lock:
            if (connection := self._opened()) is None:
                return
            now = time.time_ns()
            rows = [(key, value, zlib.crc32(value), now) for key, value in entries.items()]
            try:
                with _writing(connection):
                    self._touch(connection)
                    self._make_room(connection, need)
                    connection.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", rows)
            except sqlite3.Error as error:
                self._give_up(error)

    def close(self) -> None:
        """Notes what was used. The store may be used again."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is None or self._owner != os.getpid():
                return
            try:
                if self._touched:
                    self._note(connection)
                connection.close()
            except sqlite3.Error as error:
                self._give_up(error)

    def size(self) -> int:
        """Bytes of the file that entries take."""
        with self._lock:
            connection = self._opened()
            return 0 if connection is None else _used(connection)

    # ---- with the lock held --------------------------------------------------------------------------------------

    def _opened(self) -> sqlite3.Connection | None:
        if self._broken or not self.limit:
            return None
        if self._connection is None or self._owner != os.getpid():  # SQLite's connections do not survive a fork
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._connection = self._connected()
            except (sqlite3.Error, OSError) as error:
                self._give_up(error)
                return None
            self._owner, self._touched = os.getpid(), set()
        return self._connection

    def _connected(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # of a new file; before anything is in it
            connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for a writer
            connection.execute("PRAGMA synchronous = NORMAL")
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, VERSION):
                raise sqlite3.DatabaseError(f"it is of version {found} of this cache, not {VERSION}")
            with _writing(connection):
                for statement in TABLES:
                    connection.execute(statement)
                self._make_room(connection, 0)  # the limit may have been larger
            connection.executescript("PRAGMA incremental_vacuum")  # `execute` would give back one page
            return connection
        except BaseException:
            connection.close()
            raise

    def _make_room(self, connection: sqlite3.Connection, need: int) -> None:
        while _used(connection) + need > self.limit:
            dropped = connection.execute(
                "DELETE FROM entries WHERE key IN (SELECT key FROM entries ORDER BY used LIMIT ?)", (EVICTED,))
            if not dropped.rowcount:
                return

    def _note(self, connection: sqlite3.Connection) -> None:
        with _writing(connection):
            self._touch(connection)

    def _touch(self, connection: sqlite3.Connection) -> None:
        now = time.time_ns()
        connection.executemany("UPDATE entries SET used = ? WHERE key = ?", [(now, key) for key in self._touched])
        self._touched = set()

    def _give_up(self, error: Exception) -> None:
        self._broken, self._connection = True, None
        logging.warning("the cache %s cannot be used (%s): pictures are encoded as if there were none. Delete the file "
                        "if it is damaged, or set %s to a folder of a local disk with room", self.path, error, PLACE)


class _writing:
    """A transaction that may write, whole or not at all; it waits for other writers."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind, *_) -> None:
        if self._connection.in_transaction:
            self._connection.execute("COMMIT" if kind is None else "ROLLBACK")


def _used(connection: sqlite3.Connection) -> int:
    """Bytes of the pages that hold something."""
    pages, free, size = (connection.execute(f"PRAGMA {name}").fetchone()[0]
                         for name in ("page_count", "freelist_count", "page_size"))
    return (pages - free) * size
