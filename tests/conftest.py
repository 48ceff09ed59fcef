"""Fixtures of all tests: a tiny BERT, made-up reviews, a cache of their own, one thread."""
import os
import shutil
import signal

import pytest
from hypothesis import HealthCheck, settings
from tools import ROOT, SOAK, TODAY, make_tiny_bert

if TODAY:  # before the first gradient of all: autograd then counts the kinds of devices
    import fake_gpu
    fake_gpu.register()

settings.register_profile("all", deadline=None, derandomize=not SOAK,
                          max_examples=1000 if SOAK else 60,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("all")


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory):
    """Keep the cache in a temporary folder, and to one thread."""
    import torch
    torch.set_num_threads(1)
    old = {key: os.environ.pop(key, None) for key in ("FILIMDB_CACHE", "BERT_MODEL")}
    os.environ["FILIMDB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("FILIMDB_CACHE")
    os.environ.update({key: value for key, value in old.items() if value})


@pytest.fixture(autouse=True)
def handlers():
    """Put back the signals' handlers that evaluate.main and report.main set."""
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.fixture
def two_threads():
    """Compute with two threads, as machines of two cores do."""
    import torch
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """The folder of a tiny random BERT, the same on both stacks."""
    return make_tiny_bert(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tiny_bert, tmp_path):
    """A copy of the tiny BERT, to be changed in place."""
    return shutil.copytree(tiny_bert, str(tmp_path / "bert"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of a cache that only this test uses."""
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer(tiny_bert):
    """The tokenizer that load_bert gives for the tiny BERT."""
    import helpers
    return helpers.load_bert(tiny_bert)[1]


@pytest.fixture(scope="session")
def sample():
    """The folder of the embedded sample of FILIMDB."""
    return str(ROOT / "data" / "sample")


@pytest.fixture(scope="session")
def reviews():
    """(texts, labels) with everything in them that reviews may hold."""
    texts = ["A great film, the best ending of all!", "Awful.<br /><br />I cried at the plot\u2026",
             "Caf\u00e9 na\u00efve \u00c5ngstr\u00f6m: tr\u00e8s lovely", "one line\x85two lines",
             "\U0001f600 funny \U0001f44d\U0001f3fd movie", "\u96fb\u5f71 is \u4e2d\u6587", "",
             "never  again\tnever\u00a0again", "[MASK] and [SEP] are words that I saw", "a" * 300,
             "worst " * 700, "\u0645\u0631\u062d\u0628\u0627 \u200b\ufeff\ufffd x\u0301\u0327"]
    return texts, ["pos", "neg"] * 6
