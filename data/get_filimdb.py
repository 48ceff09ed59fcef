"""Put the real film reviews into data/FILIMDB/ (git-ignored): PART.texts and PART.labels.

    make data                                      the course's archive; needs git and a network
    make data FILIMDB=path [SHA256=hex]            a local archive or folder
    python data/get_filimdb.py --source aclImdb_v1.tar.gz

A local source is an archive (.tar.gz .tgz .tar.xz .tar .zip) or a folder and holds FILIMDB's own
layout or the public aclImdb, which is laid out as FILIMDB. All is read and checked beside the
target before one rename swaps it in: after an error the older data/FILIMDB is untouched.
"""
import argparse
import gzip
import hashlib
import lzma
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib

URL = "https://github.com/nvanva/filimdb_evaluation"
COURSE_BLOB = "b12f2499a37579272d62c42048ddd86067d167b1"  # git blob id of its FILIMDB.tar.gz
HERE = os.path.dirname(os.path.abspath(__file__))
LABELLED = ("train", "dev", "dev-b")
PARTS = ("train", "dev", "test", "dev-b", "test-b", "train_unlabeled")
PART_FILES = [part + end for part in PARTS for end in (".texts", ".labels")]
REQUIRED = ("train", "dev")
DEV_SHARE = 0.4  # of aclImdb's labelled train reviews: about 10,000, as in FILIMDB
CHUNK = 1 << 20


class DataError(Exception):
    """What is wrong, where, and what to do, in one line."""


# ---- where it comes from ------------------------------------------------------------------------

def compute_digests(path):
    """Return a file's sha256 and its git blob id, in one pass."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as f:
        for chunk in iter(lambda: f.read(CHUNK), b""):
            sha256.update(chunk)
            blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()


def clone_archive(folder):
    """Clone the course's repository into `folder` and return the path of its FILIMDB.tar.gz."""
    tried = "git clone --depth 1 " + URL
    advice = "give a local archive or folder: make data FILIMDB=path"
    print(tried, flush=True)
    try:
        done = subprocess.run(["git", "clone", "--quiet", "--depth", "1", URL, folder],
                              stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              env=dict(os.environ, GIT_TERMINAL_PROMPT="0"))  # never asks
    except OSError as error:
        raise DataError(f"tried {tried}, but git did not start ({error.strerror}); {advice}")
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").split("\n")
        reason = next((line for line in said if line.startswith("fatal")), said[0])
        raise DataError(f"tried {tried}, which failed ({reason.strip()}); {advice}")
    found = [os.path.join(path, "FILIMDB.tar.gz") for path, _, files in os.walk(folder)
             if "FILIMDB.tar.gz" in files]
    if not found:
        raise DataError(f"{URL} holds no FILIMDB.tar.gz any more; {advice}")
    blobs = [compute_digests(path)[1] for path in found]
    if COURSE_BLOB not in blobs:
        raise DataError(f"FILIMDB.tar.gz of {URL} is not the course's: its git blob is "
                        f"{', '.join(blobs)}, expected {COURSE_BLOB}; {advice}")
    return found[blobs.index(COURSE_BLOB)]


def check_archive(path, expected):
    """Print an archive's sha256; refuse it if that is not `expected` (None: anything goes)."""
    sha256, blob = compute_digests(path)
    course = "the course's own" if blob == COURSE_BLOB else "not the course's own file"
    print(f"{path}\n  sha256   {sha256}\n  git blob {blob} ({course})", flush=True)
    if expected and sha256 != expected:
        raise DataError(f"{path}: sha256 is {sha256}, expected {expected}; fetch it again or "
                        "correct SHA256")


# ---- unpacking ----------------------------------------------------------------------------------

class StrictHeader(tarfile.TarInfo):
    """A tar header that reports damage, where tarfile would take it for the archive's end."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError,
                tarfile.InvalidHeaderError) as error:
            raise tarfile.ReadError(str(error))


def read_members(path):
    """Yield (name, kind, stream) of a .zip or .tar[.gz|.xz], forward only, up to its end."""
    with open(path, "rb") as f:
        magic = f.read(6)
    if magic.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                mode = stat.S_IFMT(info.external_attr >> 16)  # 0: packed on Windows
                if info.is_dir():
                    yield info.filename, "folder", None
                elif mode not in (0, stat.S_IFREG):
                    yield info.filename, "link or device", None
                else:
                    with archive.open(info) as stream:
                        yield info.filename, "file", stream
        return
    opener = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open}.get(magic[:2], open)
    with opener(path, "rb") as f, tarfile.open(fileobj=f, mode="r|", tarinfo=StrictHeader) as tar:
        for member in tar:
            kind = "file" if member.isfile() else "folder" if member.isdir() else "link or device"
            yield member.name, kind, tar.extractfile(member) if kind == "file" else None
        while f.read(CHUNK):  # to the very end, where the checksum is
            pass


def unpack(archive, folder):
    """Write an archive's reviews below `folder`: regular files only, never outside."""
    try:
        for name, kind, stream in read_members(archive):
            parts = name.replace("\\", "/").split("/")
            if parts[0] == "" or ".." in parts or ":" in parts[0] or kind == "link or device":
                raise DataError(f"{archive}: member {name!r} is a link or a device, or leads out "
                                "of the folder; refused, take an archive from a known place")
            if kind == "file" and name.endswith((".texts", ".labels", ".txt")):
                path = os.path.join(folder, *parts)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as f:
                    shutil.copyfileobj(stream, f, CHUNK)
    except (EOFError, OSError, RuntimeError, ValueError, lzma.LZMAError, struct.error,
            tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's fault, not the archive's
            raise
        raise DataError(f"{archive} is truncated, damaged or no archive ({error}); fetch it again")


def find_layout(folder):
    """Return ("FILIMDB" or "aclImdb", path) of the only data set below `folder`."""
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] not in "._")  # .git, __MACOSX
        if "train.texts" in files:
            found.append(("FILIMDB", path))
        if all(os.path.isdir(os.path.join(path, "train", kind)) for kind in ("neg", "pos")):
            found.append(("aclImdb", path))
    if len(found) != 1:
        places = ", ".join(os.path.relpath(path, folder) for _, path in found[:4]) or "none"
        raise DataError(f"need one folder with train.texts (FILIMDB) or train/neg and train/pos "
                        f"(aclImdb), found {len(found)}: {places}; give that folder itself")
    return found[0]


# ---- laying out ---------------------------------------------------------------------------------

def read_text(path):
    """Return a UTF-8 file as the harness reads it: stripped; lines end at \\n alone."""
    try:
        with open(path, encoding="utf-8", newline="\n") as f:
            return f.read().strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); fetch it "
                        "again")


def copy_parts(source, target, show):
    """Copy FILIMDB's files byte by byte; `show` prints each one's lines and sha256."""
    for name in PART_FILES:
        path = os.path.join(source, name)
        if os.path.exists(path):
            shutil.copyfile(path, os.path.join(target, name))
            if show:
                lines = len(read_text(path).split("\n"))
                print(f"  {name:23}{lines:7,} lines  sha256 {compute_digests(path)[0]}")


def list_reviews(root, part, kind):
    """Return the paths of aclImdb's PART/KIND/ID_RATING.txt in ID order; IDs are 0, 1, 2 …"""
    folder = os.path.join(root, part, kind)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in names if re.match(r"\d+_\d+\.txt$", name)]
    names.sort(key=lambda name: int(name.split("_")[0]))
    if not names or [int(name.split("_")[0]) for name in names] != list(range(len(names))):
        raise DataError(f"{folder} is incomplete: {len(names)} reviews, whose IDs are not "
                        "0, 1, 2 …; unpack aclImdb again")
    return [os.path.join(folder, name) for name in names]


def read_films(root, kind, n):
    """Return the film ids (tt0453418) of aclImdb's n train reviews of a kind, in ID order."""
    path = os.path.join(root, "train", f"urls_{kind}.txt")
    urls = read_text(path).split("\n")  # the first line belongs to ID 0
    films = [re.search(r"/title/(tt\d+)", url) for url in urls]
    if len(films) != n or None in films:
        raise DataError(f"{path}: {len(films)} lines, {films.count(None)} of them without a film, "
                        f"for {n} reviews; unpack aclImdb again")
    return [film.group(1) for film in films]


def write_part(target, part, paths, labels=None):
    """Write the reviews in `paths` as PART.texts, one a line, and PART.labels if there are any."""
    with open(os.path.join(target, part + ".texts"), "w", encoding="utf-8", newline="\n") as f:
        for path in paths:
            text = re.sub(r"[\r\n]+", " ", read_text(path))
            if not text:
                raise DataError(f"{path} is empty; unpack aclImdb again")
            f.write(text + "\n")
    if labels:
        with open(os.path.join(target, part + ".labels"), "w", newline="\n") as f:
            f.write("\n".join(labels) + "\n")


def hash_order(name):
    """Return a sorting key that is the same everywhere and says nothing about the name."""
    return hashlib.sha256(name.encode()).hexdigest()


def convert_aclimdb(root, target):
    """Lay aclImdb out as FILIMDB; no film is in both train and dev. Neg, then pos, by ID."""
    rows, reviews_of = [], {}  # (film, kind, path); film -> its number of reviews
    for kind in ("neg", "pos"):
        paths = list_reviews(root, "train", kind)
        for film, path in zip(read_films(root, kind, len(paths)), paths):
            rows.append((film, kind, path))
            reviews_of[film] = reviews_of.get(film, 0) + 1
    dev_films, n_dev = set(), 0
    for film in sorted(reviews_of, key=hash_order):
        if n_dev >= DEV_SHARE * len(rows):
            break
        dev_films.add(film)
        n_dev += reviews_of[film]
    for part in ("train", "dev"):
        chosen = [row for row in rows if (row[0] in dev_films) == (part == "dev")]
        write_part(target, part, [row[2] for row in chosen], [row[1] for row in chosen])
    test = [path for kind in ("neg", "pos") for path in list_reviews(root, "test", kind)]
    test.sort(key=lambda path: hash_order(os.path.relpath(path, root).replace(os.sep, "/")))
    write_part(target, "test", test)
    write_part(target, "train_unlabeled", list_reviews(root, "train", "unsup"))
    print(f"aclImdb laid out as FILIMDB: of {len(reviews_of):,} films {len(dev_films):,} went to "
          "dev, the others to train, neg then pos;\ntest is in hashed order, without labels; "
          "aclImdb has no short reviews: no dev-b, no test-b.")


# ---- checking and swapping ----------------------------------------------------------------------

def check_parts(folder):
    """Return a table's rows (part, reviews, pos/neg, bytes, sha256); refuse a broken one."""
    rows = []
    for part in PARTS:
        texts, labels = (os.path.join(folder, part + end) for end in (".texts", ".labels"))
        if not os.path.exists(texts):
            if part in REQUIRED or os.path.exists(labels):
                raise DataError(f"{part}.texts is missing; take a complete FILIMDB")
            continue
        n, counts = len(read_text(texts).split("\n")), "-"
        if os.path.exists(labels):
            found = [label.strip() for label in read_text(labels).split("\n")]
            strange = sorted(set(found) - {"pos", "neg"})
            if strange or len(found) != n:
                raise DataError(f"{part}: {n} texts, {len(found)} labels, labels other than pos "
                                f"and neg: {strange[:3]}; take a complete FILIMDB")
            counts = f"{found.count('pos'):,}/{found.count('neg'):,}"
        elif part in LABELLED:
            raise DataError(f"{part}.labels is missing; take a complete FILIMDB")
        rows.append((part, f"{n:,}", counts, f"{os.path.getsize(texts):,}",
                     compute_digests(texts)[0][:12]))
    return rows


def swap_in(new, target, old):
    """Put `new` on the disk and in the place of `target`, which moves to `old`."""
    for path in [os.path.join(new, name) for name in os.listdir(new)] + [new]:
        if os.path.isfile(path) or hasattr(os, "O_DIRECTORY"):  # Windows can't open folders
            handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    try:
        if os.path.exists(target):
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if os.path.exists(old) and not os.path.exists(target):
            os.rename(old, target)
        raise


def get_data(source, sha256, target):
    """Fill `target` from `source` (None: the course's repository); return the table's rows."""
    target = os.path.realpath(target)
    held = os.listdir(target) if os.path.isdir(target) else []
    others = sorted(set(held) - set(PART_FILES) - {".DS_Store", ".gitkeep"})
    if others or os.path.isfile(target):
        raise DataError(f"{target} would be replaced, but is no FILIMDB folder or holds more "
                        f"{others[:3]}; move that away or give another --out")
    if source and not os.path.exists(source):
        raise DataError(f"{source} does not exist; FILIMDB=path names an archive or a folder")
    is_folder = bool(source) and os.path.isdir(source)
    if is_folder and sha256:
        raise DataError(f"{source} is a folder: SHA256 is for archives only, leave it out")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    work = tempfile.mkdtemp(prefix=".FILIMDB-", dir=os.path.dirname(target))
    try:
        with open(os.path.join(work, ".gitignore"), "w") as f:
            f.write("*\n")  # the texts stay out of git even if this run is killed
        folder, new = source, os.path.join(work, "new")
        if not is_folder:
            archive = source or clone_archive(os.path.join(work, "clone"))
            check_archive(archive, sha256)
            folder = os.path.join(work, "unpacked")
            unpack(archive, folder)
        layout, found = find_layout(folder)
        os.mkdir(new)
        if layout == "aclImdb":
            convert_aclimdb(found, new)
        else:
            copy_parts(found, new, show=is_folder)
        rows = check_parts(new)
        swap_in(new, target, os.path.join(work, "old"))
        return rows
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main(argv=None):
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", help="local archive or folder (default: the course's, by git)")
    parser.add_argument("--sha256", help="refuse an archive with another sha256")
    parser.add_argument("--out", default=os.path.join(HERE, "FILIMDB"))
    args = parser.parse_args(argv)
    sha256 = (args.sha256 or "").strip().lower() or None
    try:
        if sha256 and not re.match("[0-9a-f]{64}$", sha256):
            raise DataError(f"SHA256 must be 64 hex digits, not {args.sha256!r}")
        rows = get_data(os.path.expanduser(args.source or "") or None, sha256,
                        os.path.expanduser(args.out))
    except KeyboardInterrupt:
        print("interrupted; what was there before is unchanged", file=sys.stderr)
        return 130
    except (DataError, OSError) as error:
        line = " ".join(str(error).split())  # one line, whatever a library said
        print(f"get_filimdb: {line}", file=sys.stderr)
        return 2
    print(f"\n{args.out}")
    for row in [("part", "reviews", "pos/neg", "bytes", "sha256 of texts")] + rows:
        print("{:16}{:>8}{:>15}{:>13}  {}".format(*row))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up then, too
    sys.exit(main())
