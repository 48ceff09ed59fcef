"""A trained classifier leaves its process: saved, loaded, pickled, read by transformers itself."""
import contextlib
import copy
import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from tools import ROOT, TODAY, made_up_reviews, options, predictions, run, write_filimdb
from transformers import BertForSequenceClassification, BertTokenizer

import checkpoints
import evaluate
import files
import handin
import helpers
import runtime
from files import InputError
from helpers import load_classifier, probabilities, save_classifier

OTHER = ROOT / (".venv-2019/bin/python" if TODAY else ".venv/bin/python")
READY = OTHER.parent.parent / "ready"
TEXTS, LABELS = made_up_reviews(40)


@pytest.fixture(scope="module")
def params(tiny_bert):
    """A classifier with settings other than the defaults."""
    return helpers.train(TEXTS, LABELS, model=tiny_bert, seq_len=12, keep="tail", epochs=2, lr=1e-3,
                         words=9, dropout=0.2)


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "classifier"
    save_classifier(str(folder), params)
    return str(folder)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved classifier, to be spoilt."""
    return shutil.copytree(saved, str(tmp_path / "copy"))


def logits_of_transformers(folder):
    """Return what transformers' own classes make of the texts, as a user would call them."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = BertTokenizer.from_pretrained(folder)
    rows = [helpers.vectorize_ex(helpers.truncate_words(text, 9, "tail"), None, 12, tokenizer, "tail")
            for text in TEXTS]
    ids, segments, mask = (torch.tensor([row[i] for row in rows]) for i in range(3))
    with torch.no_grad():
        return model(ids, attention_mask=mask, token_type_ids=segments)[0], model, tokenizer


# ---- saving and loading --------------------------------------------------------------------------

def test_the_number_format_is_kept_as_it_was_asked_for(params, tmp_path, monkeypatch):
    """Not as the training's machine took it; one that this stack lacks is left to the machine."""
    monkeypatch.setattr(helpers, "used_precision", lambda *_: "bf16")  # a GPU, and auto
    helpers.save_classifier(str(tmp_path / "auto"), params)
    half = dict(params, config=dataclasses.replace(params["config"], precision="bf16"))
    helpers.save_classifier(str(tmp_path / "half"), half)
    monkeypatch.undo()
    assert load_classifier(str(tmp_path / "auto"))["config"].precision == "auto"
    if hasattr(torch, "autocast"):
        assert load_classifier(str(tmp_path / "half"))["config"].precision == "bf16"
    monkeypatch.setitem(helpers.RULES, "precision", ("auto", lambda value: value == "auto"))
    assert load_classifier(str(tmp_path / "half"))["config"].precision == "auto"



def test_what_is_loaded_is_what_was_saved(params, saved):
    back = load_classifier(saved)
    assert set(back) == set(params) and back["history"] == params["history"]
    assert torch.equal(probabilities(TEXTS, back), probabilities(TEXTS, params))
    assert helpers.classify(TEXTS, back) == helpers.classify(TEXTS, params)
    assert helpers.settings(back["config"]) == helpers.settings(params["config"])
    assert not back["model"].training and back["config"].model == saved


def test_transformers_reads_the_folder_itself(params, saved):
    logits, model, tokenizer = logits_of_transformers(saved)
    ours = helpers.classifier_logits(TEXTS, params)
    assert float((logits - ours).abs().max()) < 1e-5
    assert {int(i): name for i, name in model.config.id2label.items()} == {0: "neg", 1: "pos"}
    assert model.config.label2id == helpers.LABEL_IDS and model.config.num_labels == 2
    with open(os.path.join(saved, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["model_type"] == "bert" and "cpu_attention" not in json.dumps(config)
    if TODAY:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        assert type(AutoModelForSequenceClassification.from_pretrained(saved)) is type(model)
        assert AutoTokenizer.from_pretrained(saved).model_max_length == 512


def test_a_classifier_names_its_pooling(tiny_bert, tmp_path):
    params = helpers.train(TEXTS, LABELS, model=tiny_bert, seq_len=12, epochs=1, lr=1e-3,
                           pooling="mean")
    folder = str(tmp_path / "c")
    save_classifier(folder, params)
    back, pickled = load_classifier(folder), pickle.loads(pickle.dumps(params))
    for other in (back, pickled):
        assert other["config"].pooling == other["model"].config.pooling == "mean"
        assert torch.equal(probabilities(TEXTS, other), probabilities(TEXTS, params))
    for name, key in (("config.json", None), ("note.json", "config")):
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            entries = json.load(file)
        assert (entries[key] if key else entries)["pooling"] == "mean"
    cls = helpers.train(TEXTS, LABELS, model=folder, seq_len=12, epochs=1, lr=1e-3)
    assert cls["model"].config.pooling == "cls", "a model's own folder says nothing on a new head"
    back["model"].config.pooling = "cls"
    assert not torch.equal(probabilities(TEXTS, back), probabilities(TEXTS, params))


@pytest.mark.slow
@pytest.mark.skipif(not READY.exists(), reason="the other stack is not installed")
def test_the_other_stack_reads_the_folder(params, saved, tmp_path):
    code = ("import sys, json, tools, test_saving as t, helpers\n"
            "back = helpers.load_classifier(sys.argv[1])\n"
            "both = [helpers.classifier_logits(t.TEXTS, back), t.logits_of_transformers(sys.argv[1])[0]]\n"
            "json.dump([rows.tolist() for rows in both], open(sys.argv[2], 'w'))\n")
    done = subprocess.run([str(OTHER), "-c", code, saved, str(tmp_path / "logits")], env=dict(
        os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode()
    for logits in json.loads((tmp_path / "logits").read_text()):
        assert float((torch.tensor(logits) - helpers.classifier_logits(TEXTS, params)).abs().max()) < 1e-5


def test_an_older_classifier_is_replaced_and_nothing_lies_beside(folder, params, tiny_bert):
    other = helpers.train(TEXTS, LABELS, model=tiny_bert, seq_len=16, epochs=1, lr=1e-3)
    save_classifier(folder, other)
    assert load_classifier(folder)["config"].seq_len == 16
    assert os.listdir(os.path.dirname(folder)) == ["copy"]
    os.mkdir(folder + "2")
    save_classifier(folder + "2", params)
    assert load_classifier(folder + "2")["config"].seq_len == 12


def test_an_older_classifier_stays_when_the_new_one_cannot_take_its_place(folder, params, monkeypatch):
    real = os.rename

    def rename(source, target):
        if target == folder and source.endswith(".tmp"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(InputError, match="No space"):
        save_classifier(folder, dict(params, config=helpers.make_config(seq_len=9)))
    assert load_classifier(folder)["config"].seq_len == 12
    assert os.listdir(os.path.dirname(folder)) == ["copy"]


def test_what_is_saved_may_be_trained_on_and_home_is_expanded(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_classifier("~/mine", load_classifier(saved))
    capsys.readouterr()
    again = helpers.train(TEXTS, LABELS, model="~/mine", seq_len=12, epochs=1, lr=1e-3)
    assert "holds a trained classifier, which is not taken" in capsys.readouterr().out
    assert load_classifier("~/mine")["config"].dropout == 0.2 and again["config"].model == "~/mine"


def test_a_bert_without_a_trained_head_is_not_warned_of(tiny_bert, saved, capsys):
    for head in ("classifier", "mlm"):
        helpers.load_bert(tiny_bert, head)
        assert capsys.readouterr().out == ""
        helpers.load_bert(saved, head)
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "load_classifier" in said and "--load" in said
    load_classifier(saved)
    assert capsys.readouterr().out == ""


def spoil(name, change):
    """Change a file's bytes by a function; remove it for None."""
    def make(folder):
        path = os.path.join(folder, name)
        with open(path, "rb") as file:
            content = file.read()
        os.remove(path)
        if change:
            with open(path, "wb") as file:
                file.write(change(content))
    return make


FILES = ["config.json", "vocab.txt", "tokenizer_config.json", "pytorch_model.bin"]
DAMAGED = {f"{name} {what}": (spoil(name, change), "damaged or missing") for name in FILES
           for what, change in (("gone", None), ("cut", lambda data: data[:-9]))}
DAMAGED.update({
    "a setting changed": (spoil("note.json", lambda data: data.replace(b'"seq_len": 12', b'"seq_len": 13')),
                          "damaged"),
    "a note that is no JSON": (spoil("note.json", lambda data: b"{"), "damaged"),
    "no note": (spoil("note.json", None), "not written by save_classifier"),
    "no folder": (shutil.rmtree, "no such folder")})


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_classifier_is_refused_in_one_line(name, folder, params):
    make, said = DAMAGED[name]
    make(folder)
    before = sorted(os.listdir(os.path.dirname(folder)))
    with pytest.raises(InputError) as caught:
        load_classifier(folder)
    assert said in str(caught.value) and folder in str(caught.value)
    assert "\n" not in str(caught.value) and sorted(os.listdir(os.path.dirname(folder))) == before
    if name != "no folder":
        with pytest.raises(InputError, match="is there already"):
            save_classifier(folder, params)


def test_a_classifier_of_other_settings_is_refused_by_name(folder, params, monkeypatch):
    monkeypatch.setattr(helpers, "settings", lambda config: {"depth": 3, "seq_len": 12})
    save_classifier(folder + "2", params)
    with pytest.raises(InputError, match=r"2: saved by a version .* \(depth\); train and save"):
        load_classifier(folder + "2")


def test_a_pretraining_is_no_classifier(tiny_bert):
    note = helpers.pretrain(TEXTS, model=tiny_bert, seq_len=12, epochs=1)
    with pytest.raises(InputError, match="not written by save_classifier"):
        load_classifier(note["path"])
    with pytest.raises(InputError, match="params is of type dict without model"):
        helpers.classify(TEXTS, note)
    with pytest.raises(InputError, match="params is of type list"):
        helpers.classify(note, TEXTS)


def test_a_broken_model_is_not_saved(params, tmp_path):
    broken = copy.deepcopy(params)
    broken["model"].classifier.bias.data[0] = float("nan")
    with pytest.raises(helpers.Diverged):
        save_classifier(str(tmp_path / "broken"), broken)
    assert os.listdir(str(tmp_path)) == []


def test_the_tokenizer_keeps_its_settings(tiny_bert, tmp_path):
    """Pretraining writes a folder too: it must split Chinese as the checkpoint did."""
    folder = shutil.copytree(tiny_bert, str(tmp_path / "bert"))
    files.save_json(os.path.join(folder, "tokenizer_config.json"), {"tokenize_chinese_chars": False})
    model, tokenizer = helpers.load_bert(folder)
    checkpoints.save_bert(str(tmp_path / "again"), model, tokenizer, {})
    text = "\u96fb\u5f71 is a film"
    there, back = (helpers.load_bert(str(tmp_path / name))[1] for name in ("bert", "again"))
    assert there.tokenize(text) == back.tokenize(text) == ["[UNK]", "is", "a", "film"]


# ---- probabilities -------------------------------------------------------------------------------

def test_probabilities(params):
    found = probabilities(TEXTS, params)
    assert found.dtype == torch.float32 and found.shape == (len(TEXTS), 2)
    assert torch.allclose(found.sum(1), torch.ones(len(TEXTS)), atol=1e-6)
    assert [["neg", "pos"][i] for i in found.argmax(1).tolist()] == helpers.classify(TEXTS, params)
    assert torch.allclose(found, helpers.classifier_logits(TEXTS, params).softmax(1))
    assert probabilities([], params).shape == (0, 2) and helpers.classify([], params) == []
    assert not torch.equal(found, probabilities(TEXTS, params, keep="head")), "overrides count"
    assert helpers.LABEL_IDS == {"neg": 0, "pos": 1}


# ---- pickles -------------------------------------------------------------------------------------

PICKLED = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    params, texts = pickle.load(file)
import helpers
torch.save(helpers.probabilities(texts, params), sys.argv[2])
params["model"].train()
params["model"](torch.tensor([[2, 5, 6, 3]]))
"""


WAYS = {"as they are": lambda value: value, "a deep copy": copy.deepcopy,
        "pickled before": lambda value: pickle.loads(pickle.dumps(value))}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_pickled_params_classify_in_another_process(way, params, tmp_path):
    (tmp_path / "params").write_bytes(pickle.dumps(WAYS[way]((params, TEXTS))))
    done = subprocess.run([sys.executable, "-c", PICKLED, str(tmp_path / "params"), str(tmp_path / "p")],
                          env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode()
    assert torch.equal(torch.load(str(tmp_path / "p")), probabilities(TEXTS, params))


def test_torch_save_and_load(params, tmp_path):
    with open(str(tmp_path / "params.pt"), "wb") as file:
        torch.save(params, file)
    everything = {"weights_only": False} if runtime.WEIGHTS_ONLY else {}
    back = torch.load(str(tmp_path / "params.pt"), **everything)
    assert torch.equal(probabilities(TEXTS, back), probabilities(TEXTS, params))


@pytest.mark.slow
def test_a_copy_of_the_module_pickles_too(params, tmp_path, tiny_bert):
    """Handed in as classifier.py it registers its attention under its own name."""
    (tmp_path / "classifier.py").write_text(handin.join(ROOT), encoding="utf-8")
    make = ("import classifier, pickle, sys\nfrom tools import made_up_reviews\n"
            "texts, labels = made_up_reviews(12)\n"
            "params = classifier.train(texts, labels, model=sys.argv[1], seq_len=12, epochs=1)\n"
            "pickle.dump((params, texts), open(sys.argv[2], 'wb'))\n")
    use = "import pickle, sys\nparams, texts = pickle.load(open(sys.argv[1], 'rb'))\n" \
          "import classifier\nprint(len(classifier.classify(texts, params)))\n"
    path = f"{tmp_path}:{ROOT / 'tests'}"
    for code, argv in ((make, [tiny_bert, str(tmp_path / "p")]), (use, [str(tmp_path / "p")])):
        done = subprocess.run([sys.executable, "-c", code, *argv], env=dict(os.environ, PYTHONPATH=path),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout.decode()
    assert done.stdout.decode().strip().endswith("12")


# ---- evaluate.py ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def filimdb(tmp_path_factory):
    return write_filimdb(tmp_path_factory.mktemp("filimdb"), words=20)


@pytest.fixture(scope="module")
def kept(filimdb, tiny_bert, tmp_path_factory):
    """Run evaluate.py with --save: (folder of all, what it printed)."""
    place = tmp_path_factory.mktemp("kept")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert evaluate.main(["--data", str(filimdb), "--model", tiny_bert, "--no-pretrain", "--out",
                              str(place / "p.tsv"), "--save", str(place / "c"), *options()]) == 0
    return place, said.getvalue()


def test_save_and_load_give_the_same_predictions(filimdb, kept, tmp_path, monkeypatch):
    place, said = kept
    assert f"{place / 'c'}: the classifier, for --load" in said
    for name in ("train", "pretrain"):
        monkeypatch.setattr(helpers, name, None)
    again = run("--data", str(filimdb), "--load", str(place / "c"), "--out", str(tmp_path / "p.tsv"))
    assert (tmp_path / "p.tsv").read_bytes() == (place / "p.tsv").read_bytes()
    assert "training:" not in again and f"loaded from {place / 'c'}" in again
    assert sorted(os.listdir(str(place))) == ["c", "p.tsv"]


def test_save_and_load_keep_the_pooling(filimdb, tiny_bert, tmp_path):
    folder, first, second = (str(tmp_path / name) for name in ("c", "p.tsv", "q.tsv"))
    run("--data", str(filimdb), "--model", tiny_bert, "--no-pretrain", "--out", first, "--save", folder,
        *options(pooling="mean"))
    run("--data", str(filimdb), "--load", folder, "--out", second)
    with open(first, "rb") as one, open(second, "rb") as two:
        assert one.read() == two.read()
    assert evaluate.main(["--data", str(filimdb), "--load", folder, "--set", "pooling=cls"]) == 2


def test_a_loaded_classifier_takes_parts_without_labels_and_without_train(filimdb, kept, tmp_path):
    place, (data, out) = kept[0], (tmp_path / "data", tmp_path / "p.tsv")
    data.mkdir()
    for name in ("test.texts", "dev-b.texts"):
        shutil.copy(str(filimdb / name), str(data / name))
    said = run("--data", str(data), "--load", str(place / "c"), "--out", str(out))
    assert "accuracy" not in said and "has no train, dev, test-b: left out" in said
    assert predictions(out) == {part: labels for part, labels in predictions(place / "p.tsv").items()
                                if part in ("test", "dev-b")}
    shutil.copy(str(filimdb / "dev-b.labels"), str(data))
    said = run("--data", str(data), "--load", str(place / "c"), "--out", str(out), "--set",
               "keep=head")
    assert said.count("accuracy") == 1 and "naive Bayes" not in said


@pytest.mark.parametrize("argv,words", [
    (["--load", "none"], ["none: no such folder"]),
    (["--load", "C", "--set", "lr=1"], ["--load trains nothing", "--set lr"]),
    (["--load", "C", "--set", "epochs=3", "--set", "pretrain.lr=1.0"], ["--set epochs", "pretrain.lr"]),
    (["--load", "C", "--model", "m"], ["--model"]), (["--load", "C", "--save", "x"], ["--save"]),
    (["--load", "C", "--no-pretrain", "--transductive"], ["--transductive, --no-pretrain"]),
    (["--load", "C", "--set", "seq_len=999"], ["seq_len=999"]), (["--load", ""], [": no such folder"])])
def test_what_does_not_go_with_load(argv, words, filimdb, kept, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    argv = [str(kept[0] / "c") if word == "C" else word for word in argv]
    assert evaluate.main(["--data", str(filimdb), *argv]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said
    assert os.listdir(str(tmp_path)) == []


def test_home_is_expanded_on_the_command_line(filimdb, tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(str(filimdb), str(tmp_path / "data"))
    shutil.copytree(tiny_bert, str(tmp_path / "bert"))
    argv = ["--no-pretrain", "--data", "~/data", "--out", "~/p.tsv", *options()]
    run(*argv, "--model", "~/bert", "--save", "~/c")
    first = (tmp_path / "p.tsv").read_bytes()
    monkeypatch.setenv("BERT_MODEL", "~/bert")
    run(*argv)
    assert (tmp_path / "p.tsv").read_bytes() == first
    run("--data", "~/data", "--out", "~/p.tsv", "--load", "~/c")
    assert (tmp_path / "p.tsv").read_bytes() == first
    assert sorted(os.listdir(str(tmp_path))) == ["bert", "c", "data", "p.tsv"]
