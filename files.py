"""Files that are whole or absent: errors, atomic writes, checksums, locks, the cache.

Standard library, numpy and tqdm only; every other module may use it.
"""
from __future__ import annotations

import array
import contextlib
import csv
import glob
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zlib

import numpy as np
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))


def printable(text):
    """Return a text with a blank for each terminal escape and each other control character."""
    return re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f]", " ", text)


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line with the remedy."""

    def __init__(self, message):
        """Take the message, less what a terminal would obey."""
        super().__init__(printable(message))


def one_line(error):
    """Return an exception as one short line that a terminal shows as it is."""
    text = printable(str(error))
    for sign, meaning in PUZZLES.items():
        text = meaning if re.search(sign, text) else text
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"


PUZZLES = {  # what a library says (a regular expression): what it means here
    "(?i)weights.only": "the file is damaged, or holds more than tensors",  # not its advice, ever
    "ignore_mismatched_sizes": "its tensors have other shapes than config.json says"}


def say(text):
    """Print a line; bars that are shown give way and stand below it."""
    tqdm.write(text)
    sys.stdout.flush()


def warn(message):
    """Print a warning, one line."""
    say(f"Warning: {printable(message)}")


def utf8(text):
    """Return a text as bytes, lone surrogates too."""
    return text.encode("utf-8", "surrogatepass")


def find_path(path):
    """Return `path`, ~ expanded, as seen from the working folder, else from this file's own."""
    path = os.path.expanduser(path)
    beside = os.path.join(HERE, path)
    return beside if not os.path.exists(path) and os.path.exists(beside) else path


def cache_dir(*parts):
    """Return a folder for files that can be made again, creating it.

    FILIMDB_CACHE from the environment, else .cache/ beside this file, else the system's temporary
    folder when that place cannot be written.
    """
    given = os.environ.get("FILIMDB_CACHE")
    roots = [os.path.abspath(os.path.expanduser(given))] if given else [
        os.path.join(HERE, ".cache"), os.path.join(tempfile.gettempdir(), "filimdb-cache")]
    for root in roots:
        folder = os.path.join(root, *parts)
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise InputError(f"no folder to write to: tried {', '.join(roots)}; set FILIMDB_CACHE to one")


@contextlib.contextmanager
def writing(path, size):
    """Turn an OSError of the block into one line: the path, the bytes, and how many are free."""
    try:
        yield
    except OSError as error:
        room = "an unknown number"
        with contextlib.suppress(OSError):
            room = f"{shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free:,}"
        raise InputError(f"{path}: cannot be written ({error.strerror or one_line(error)}): it "
                         f"needs {size:,} bytes, {room} are free; make room or name another "
                         f"place; the old file is unchanged") from None


def write_atomically(path, data):
    """Write bytes aside, to the disk, then rename: a crash leaves the old file or the new one."""
    path = os.path.abspath(os.path.expanduser(path))
    (folder, name), aside = os.path.split(path), ""
    with writing(path, len(data)):
        try:
            os.makedirs(folder, exist_ok=True)
            remove_leftovers(path)
            handle, aside = tempfile.mkstemp(dir=folder, prefix=name, suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(aside)
            raise


@contextlib.contextmanager
def open_atomically(path, mode="w"):
    """Open a file in memory; when the block ends well it takes the place of `path`: old or new.

    Raises InputError for a full or read-only disk.
    """
    with (io.BytesIO() if "b" in mode else io.StringIO()) as file:
        yield file
        if "b" not in mode:
            return write_atomically(path, file.getvalue().encode("utf-8"))
        with file.getbuffer() as data:
            write_atomically(path, data)


def remove_leftovers(path):
    """Remove what a killed process left beside `path` a day ago or earlier."""
    for aside in glob.glob(glob.escape(path) + "????????.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(aside) > 86400:
                shutil.rmtree(aside) if os.path.isdir(aside) else os.remove(aside)


def remove_if_there(path):
    """Remove a file that has served."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def quarantine(path):
    """Rename a damaged file or folder so that it is never used, and say so."""
    warn(f"{path} is damaged (its checksum differs): set aside as .damaged and done again")
    shutil.rmtree(path + ".damaged", ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(path, path + ".damaged")


def save_json(path, value):
    """Write `value` as JSON, whole or not at all."""
    with open_atomically(path) as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.write("\n")


def read_json(path, default):
    """Read a JSON file; give the default when there is none, or a damaged one, which is said."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return default
    except ValueError:
        warn(f"{path} is damaged: not used")
        return default


def save_table(path, rows):
    """Write a list of dicts as CSV, whole or not at all; a key that a row lacks stays empty."""
    with open_atomically(path) as file:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def save_history(stem, history):
    """Write the history as STEM.json and STEM.csv."""
    save_json(stem + ".json", history)
    save_table(stem + ".csv", history)


def sealed_table(rows):
    """Return arrays of ids, one after another, as the one int32 array that `Tokens` describes."""
    ids, offsets = array.array("i"), [0]  # 4 bytes an id, whatever the number of rows
    for row in rows:
        ids.frombytes(row.tobytes())
        offsets.append(len(ids))
    table = np.empty(len(offsets) + 2 + len(ids), dtype=np.int32)
    table[1], table[2:len(offsets) + 2] = len(offsets) - 1, offsets
    table[len(offsets) + 2:] = ids
    table[0] = zlib.crc32(table[1:].data) >> 1
    return table


def load_table(path):
    """Return a sound table from the cache, memory-mapped, or None."""
    try:
        table = np.load(path, mmap_mode="r")
        if zlib.crc32(table[1:].data) >> 1 == table[0]:
            return table
    except FileNotFoundError:
        return None
    except Exception:  # whatever numpy makes of a damaged header
        pass
    return quarantine(path)


@contextlib.contextmanager
def try_lock(path):
    """Hold a lock file; yield whether it is ours. It falls with its process, even by SIGKILL."""
    with writing(path, 0):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "a").close()
    with open(path, "w") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except (ImportError, OSError):  # Windows, or a disk without locks: one process, please
            pass
        yield True


@contextlib.contextmanager
def folder_lock(folder):
    """Hold a folder until the block ends; whoever comes second says so and waits."""
    import fcntl
    path = os.path.join(folder, ".lock")
    with writing(path, 0):  # the opening alone: an error of the block is not of this file
        open(path, "a").close()
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{folder}: another process is at work there; waiting until it ends")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(*parts):
    """Return the hex SHA-256 of arrays, bytes and JSON-able values, in order."""
    return digest_of(parts)


def digest_of(parts):
    """Return what `digest` does of an iterable, which need not fit the memory."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part).tobytes()
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True).encode()
        sha.update(b"%d:" % len(part) + part)
    return sha.hexdigest()


def file_digest(path):
    """Return the hex SHA-256 of a file."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            sha.update(block)
    return sha.hexdigest()
