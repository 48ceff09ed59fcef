"""Hostile files: no code hidden in weights, states or trials ever runs; JupyterLab stays at home."""
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from tools import ROOT, TODAY, made_up_reviews

import checkpoints
import files
import helpers
import runtime
import studies

today = pytest.mark.skipif(not TODAY, reason="PyTorch 1.3 reads weights by unpickling alone")


class Evil:
    """Unpickling this makes a folder: code that ran."""

    def __init__(self, sign):
        self.sign = str(sign)

    def __reduce__(self):
        return os.mkdir, (self.sign,)


@pytest.fixture
def sign(tmp_path):
    """The folder that appears when hidden code runs; a test must end without it."""
    yield tmp_path / "it ran"
    assert not (tmp_path / "it ran").exists(), "the hidden code ran"


def evil_state(sign, **options):
    """Return what torch.save makes of weights with code among them."""
    buffer = io.BytesIO()
    torch.save({"bert.pooler.dense.bias": torch.zeros(32), "more": Evil(sign)}, buffer, **options)
    return buffer.getvalue()


def sealed(payload):
    return hashlib.sha256(payload).digest() + payload


def test_the_trap_works(tmp_path):
    options = {"weights_only": False} if TODAY else {}
    torch.load(io.BytesIO(evil_state(tmp_path / "one", **runtime.LEGACY_FORMAT)), **options)
    pickle.loads(pickle.dumps(Evil(tmp_path / "two")))
    assert (tmp_path / "one").is_dir() and (tmp_path / "two").is_dir()


@pytest.mark.parametrize("checksum", ["none", "wrong", pytest.param("right", marks=today)])
def test_a_checkpoint_runs_no_code(checksum, sign, tmp_path, capsys):
    """The pinned stack can be deceived by whoever writes the checksum too: into its own cache."""
    payload = evil_state(sign, **runtime.LEGACY_FORMAT)
    path = tmp_path / "run.checkpoint"
    path.write_bytes({"none": payload, "wrong": b"\0" * 32 + payload,
                      "right": sealed(payload)}[checksum])
    assert checkpoints.load_state(str(path)) is None
    assert not path.exists() and (tmp_path / "run.checkpoint.damaged").exists()
    assert capsys.readouterr().out.startswith("Warning: ")


@pytest.mark.parametrize("kind", ["legacy", "zip"])
@today
def test_a_named_model_runs_no_code(kind, sign, tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, str(tmp_path / "bert"))
    options = runtime.LEGACY_FORMAT if kind == "legacy" else {}
    with open(os.path.join(folder, "pytorch_model.bin"), "wb") as file:
        file.write(evil_state(sign, **options))
    for head in "classifier", "mlm":
        with pytest.raises(files.InputError, match="weights could not be loaded"):
            helpers.load_bert(folder, head)


@pytest.mark.parametrize("sealing", ["none", pytest.param("all", marks=today)])
def test_a_pretrained_folder_runs_no_code(sealing, sign, tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))
    texts, labels = made_up_reviews(20)
    small = {"model": tiny_bert, "seq_len": 16, "epochs": 1, "device": "cpu"}
    params = helpers.pretrain(texts, **small)
    weights = os.path.join(params["path"], "pytorch_model.bin")
    with open(weights, "wb") as file:
        file.write(evil_state(sign, **runtime.LEGACY_FORMAT))
    if sealing == "all":
        path = os.path.join(params["path"], "note.json")
        with open(path, encoding="utf-8") as file:
            note = dict(json.load(file), sha256=files.file_digest(weights))
        note.pop("checksum")
        files.save_json(path, dict(note, checksum=checkpoints.seal(params["path"], note)))
    with pytest.raises(files.InputError, match="call pretrain again|could not be loaded"):
        helpers.train(texts, labels, params, **small)


def test_a_trial_runs_no_code(sign, tmp_path, capsys):
    path = tmp_path / "trial.json"
    for payload in pickle.dumps(Evil(sign)), evil_state(sign), b'{"checksum": "0", "mark": ""}':
        path.write_bytes(payload)
        assert studies.read_row(str(path)) is None and not path.exists()
        assert "Warning" in capsys.readouterr().out


def test_a_table_of_pieces_runs_no_code(sign, tmp_path, capsys):
    path = str(tmp_path / "tokens.npy")
    for payload in [np.array([Evil(sign)], dtype=object), pickle.dumps(Evil(sign))]:
        with open(path, "wb") as file:
            np.save(file, payload) if isinstance(payload, np.ndarray) else file.write(payload)
        assert files.load_table(path) is None and "Warning" in capsys.readouterr().out


# ---- JupyterLab --------------------------------------------------------------------------------

def lab_command():
    """Return the words of the command that `make lab` runs."""
    said = subprocess.check_output(["make", "--no-print-directory", "-n", "lab"], cwd=str(ROOT))
    line, = [line for line in said.decode().split("\n") if "jupyterlab" in line]
    return line.split()


def test_the_lab_binds_to_this_computer_with_its_token():
    words = lab_command()
    assert "--ip=127.0.0.1" in words
    assert not [word for word in words if re.search("token|password|allow|0.0.0.0", word, re.I)]


def answer(url):
    """Return the status of a request, 0 while nobody answers."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, ConnectionError):
        return 0


@pytest.mark.slow
@pytest.mark.skipif(not TODAY, reason="JupyterLab belongs to today's stack")
def test_a_lab_refuses_whoever_lacks_the_token(tmp_path):
    pytest.importorskip("jupyterlab")
    *words, folder = lab_command()
    assert folder == "build/lab", "a copy, which this test does not make"
    words = [sys.executable, *words[1:], "--no-browser", "--port=0", "--allow-root", str(tmp_path)]
    env = {key: value for key, value in os.environ.items() if not key.startswith("JUPYTER")}
    env.update(HOME=str(tmp_path), JUPYTER_RUNTIME_DIR=str(tmp_path / "runtime"))
    with open(str(tmp_path / "said"), "wb") as said, subprocess.Popen(
            words, stdout=said, stderr=said, env=env, cwd=str(ROOT)) as lab:
        try:
            until, found = time.time() + 300, None
            while not found and time.time() < until and lab.poll() is None:
                time.sleep(0.2)
                found = re.search(r"http://127\.0\.0\.1:(\d+)/lab\?token=(\w{40,})",
                                  (tmp_path / "said").read_text(errors="replace"))
            assert found, (tmp_path / "said").read_text(errors="replace")[-2000:]
            port, token = found.groups()
            at = f"http://127.0.0.1:{port}/api/contents"
            while not answer(at) and time.time() < until:  # the address is told before it serves
                time.sleep(0.2)
            assert [answer(at), answer(at + "?token=" + "0" * 48), answer(at + "?token=" + token)
                    ] == [403, 403, 200]
            with open("/proc/net/tcp") as file:  # address:port in hex, 0A: listening
                assert re.findall(rf"(\w+):{int(port):04X} \w+:0000 0A", file.read()) == ["0100007F"]
        finally:
            lab.send_signal(signal.SIGTERM)
            lab.wait(timeout=300)
