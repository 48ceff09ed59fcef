"""What the tests share: a tiny BERT, made-up reviews, and no network.

Everything made here is the same on both stacks: the weights come from torch.randn with a generator,
not from the layers' own initialization, which differs between PyTorch 1.3 and today's.
"""
import os
import signal
import string
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

SOAK = bool(os.environ.get("SOAK"))
TODAY = sys.version_info >= (3, 8)  # else the pinned stack of 2019
settings.register_profile("all", deadline=None, derandomize=not SOAK,
                          max_examples=1000 if SOAK else 60,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("all")

WORDS = """the a an of and to in is it that this was i for with as but on film movie story actor
plot scene good bad great awful boring moving dull lovely never always one two not very best worst
ending music camera director joy pain time hour people watch love hate laugh cry slow fast funny
sad cinema again first last see saw think thought from by at my her his they we you all some more
most who what when why how will would can could should had has have been be are were""".split()
ENDINGS = "s ed ing ly er est y ness less ful".split()


def tiny_vocabulary():
    """Return some 200 tokens: special ones, letters, digits, punctuation, words, endings."""
    signs = string.ascii_lowercase + string.digits
    return (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *string.punctuation, "\u96fb",
             "\u5f71", "\u2026", *(w for w in WORDS if len(w) > 1), *("##" + c for c in signs),
             *("##" + ending for ending in ENDINGS if len(ending) > 1)])


def fill(model, seed=0, std=0.12):
    """Give every parameter values that depend on its name's place and the seed alone."""
    import torch
    random = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=random) * std
        parameter.data.copy_(values + float(name.endswith("LayerNorm.weight")))
    return model


def make_tiny_bert(folder, seed=0):
    """Write a random BERT (2 layers, hidden size 32) as a folder; return its path."""
    from transformers import BertConfig, BertForPreTraining, BertTokenizer

    import checkpoints
    import files
    words, folder = tiny_vocabulary(), Path(str(folder))
    config = {"vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 512,
              "type_vocab_size": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
              "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02,
              "layer_norm_eps": 1e-12, "pad_token_id": 0}
    bare = folder.with_name(folder.name + "-vocabulary")
    bare.mkdir(parents=True)
    (bare / "vocab.txt").write_text("".join(word + "\n" for word in words), encoding="utf-8")
    files.save_json(str(bare / "config.json"), dict(config, model_type="bert"))
    tokenizer = BertTokenizer.from_pretrained(str(bare), do_lower_case=True)
    model = fill(BertForPreTraining(BertConfig.from_dict(config)), seed)
    checkpoints.save_bert(str(folder), model, tokenizer, {"made": "for the tests"})
    return str(folder)


def made_up_reviews(n, length=12, seed=0):
    """Return n (texts, labels): a pattern of words of some `length`, the label leaks through."""
    texts, labels = [], []
    for i in range(n):
        label = "pos" if (i * 7 + seed) % 5 < 2 or i % 4 == 1 else "neg"
        size = 3 + (i * i + 3 * i + seed) % (2 * length)
        words = [WORDS[(i * 13 + j * (7 + seed) + j * j) % len(WORDS)] for j in range(size)]
        words[size // 2] = ("great" if label == "pos" else "awful") + ("ly" if i % 3 else "")
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels


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
