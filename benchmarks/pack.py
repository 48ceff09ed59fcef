"""Pack what a GPU machine without network needs: build/gpu, at most 64 MiB.

    make pack-gpu                                          # before it travels
    make pack-gpu ARGS="--wheels papermill nbconvert"      # with these packages, as wheels
    python benchmarks/pack.py --unpack                     # on arrival: build/gpu/FILIMDB

It holds the small BERT of build/minilm in half precision, 15,000 training and 10,000 dev reviews
with their labels, and wheels. Project files are not in it: they travel as the repository.
"""
import argparse
import os
import subprocess
import sys
import tarfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
LIMIT = 64 * 2 ** 20  # bytes
FOLDER = os.path.join(ROOT, "build", "gpu")
PARTS = {"train": 15000, "dev": 10000}  # reviews of each, at most


def pack_reviews(source):
    """Write the reviews as reviews.tar.xz."""
    import helpers
    from files import find_path
    for part, n in PARTS.items():
        some = helpers.subset(helpers.load_part(find_path(source), part), n)
        for ending, lines in (("texts", some.texts), ("labels", some.labels)):
            with open(os.path.join(FOLDER, f"{part}.{ending}"), "w", encoding="utf-8",
                      newline="\n") as file:
                file.writelines(line + "\n" for line in lines)
    with tarfile.open(os.path.join(FOLDER, "reviews.tar.xz"), "w:xz") as archive:
        for part in PARTS:
            for ending in ("texts", "labels"):
                path = os.path.join(FOLDER, f"{part}.{ending}")
                archive.add(path, f"FILIMDB/{part}.{ending}")
                os.remove(path)


def pack_model(source):
    """Write a BERT with its weights in half precision, tied ones once."""
    import shutil

    import torch

    from files import find_path
    from runtime import WEIGHTS_ONLY
    source, target = find_path(source), os.path.join(FOLDER, "minilm")
    os.makedirs(target, exist_ok=True)
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        if os.path.exists(os.path.join(source, name)):
            shutil.copy(os.path.join(source, name), target)
    halves, state = {}, torch.load(os.path.join(source, "pytorch_model.bin"), **WEIGHTS_ONLY)
    for value in state.values():
        halves.setdefault(value.data_ptr(), value.half() if value.is_floating_point() else value)
    torch.save({key: halves[value.data_ptr()] for key, value in state.items()},
               os.path.join(target, "pytorch_model.bin"))


def pack_wheels(packages):
    """Fetch packages as wheels, without what they depend on."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest",
                    os.path.join(FOLDER, "wheels"), *packages], check=True)


def unpack():
    """Unpack the reviews beside the archive."""
    with tarfile.open(os.path.join(FOLDER, "reviews.tar.xz")) as archive:
        wanted = {f"FILIMDB/{part}.{ending}" for part in PARTS for ending in ("texts", "labels")}
        if set(archive.getnames()) != wanted:
            sys.exit("pack.py: reviews.tar.xz holds other files than it should; pack it again")
        archive.extractall(FOLDER)
    wheels = os.path.join(FOLDER, "wheels")
    if os.path.isdir(wheels):
        print(f"{sys.executable} -m pip install --no-index --no-deps {wheels}/*.whl")
    print(os.path.join(FOLDER, "FILIMDB"))


def packed_size():
    """Return the bytes of all packed files; print each."""
    total = 0
    for folder, _, names in os.walk(FOLDER):
        for name in sorted(names):
            path = os.path.join(folder, name)
            size = os.path.getsize(path)
            total += size
            print(f"{size / 2 ** 20:8.1f} MiB  {os.path.relpath(path, ROOT)}")
    return total


def main(argv=None):
    """Read the command line; pack or unpack."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/FILIMDB")
    parser.add_argument("--model", default="build/minilm")
    parser.add_argument("--wheels", nargs="*", default=[])
    parser.add_argument("--unpack", action="store_true")
    args = parser.parse_args(argv)
    if args.unpack:
        return unpack()
    os.makedirs(FOLDER, exist_ok=True)
    pack_reviews(args.data)
    pack_model(args.model)
    if args.wheels:
        pack_wheels(args.wheels)
    total = packed_size()
    print(f"{total / 2 ** 20:8.1f} MiB in all")
    if total > LIMIT:
        sys.exit(f"pack.py: more than {LIMIT / 2 ** 20:.0f} MiB; name fewer wheels")


if __name__ == "__main__":
    main()
