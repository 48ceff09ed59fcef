"""Wrong use that anybody may fall into: told in one line; and one tool's output is the next's input."""
import builtins
import json
import re
import subprocess
import sys

import pandas
import papermill
import pytest
import yaml
from tools import (
    PATH_LINES,
    PATHS,
    ROOT,
    TINY,
    load_module,
    made_up_reviews,
    make_aclimdb,
    options,
    parameters,
    predictions,
    sources,
    write_folder,
)

import evaluate
import helpers
import runtime
import studies
from files import InputError

TEXTS, LABELS = made_up_reviews(20)


@pytest.fixture(scope="module")
def params(tiny_bert):
    return helpers.train(TEXTS, LABELS, model=tiny_bert, seq_len=12, epochs=1)


# ---- one string, a table or a mapping where many texts are meant --------------------------------

FRAME = pandas.DataFrame({"text": TEXTS, "label": LABELS})
MANY = {  # name: a call with something that is not many texts, given params and a model
    "classify": lambda one, params, bert: helpers.classify(one, params),
    "probabilities": lambda one, params, bert: helpers.probabilities(one, params),
    "train": lambda one, params, bert: helpers.train(one, LABELS, model=bert),
    "labels": lambda one, params, bert: helpers.train(TEXTS, one, model=bert),
    "dev texts": lambda one, params, bert: helpers.train(TEXTS, LABELS, dev=(one, LABELS), model=bert),
    "dev labels": lambda one, params, bert: helpers.train(TEXTS, LABELS, dev=(TEXTS, one), model=bert),
    "pretrain": lambda one, params, bert: helpers.pretrain(one, model=bert),
    "parts of pretrain": lambda one, params, bert: helpers.pretrain(TEXTS, one, model=bert),
    "bayes texts": lambda one, params, bert: helpers.naive_bayes(one, LABELS, TEXTS),
    "bayes labels": lambda one, params, bert: helpers.naive_bayes(TEXTS, one, TEXTS),
    "bayes unseen": lambda one, params, bert: helpers.naive_bayes(TEXTS, LABELS, one),
    "tfidf texts": lambda one, params, bert: helpers.tfidf_regression(one, LABELS, TEXTS),
    "as read": lambda one, params, bert: helpers.texts_as_read(one, params["tokenizer"],
                                                               params["config"]),
    "frozen features": lambda one, params, bert: helpers.frozen_features(
        one, params["model"], params["tokenizer"], params["config"]),
    "accuracy": lambda one, params, bert: helpers.accuracy(one, one),
    "majority": lambda one, params, bert: helpers.majority_accuracy(one, LABELS),
    "tokenize_all": lambda one, params, bert: helpers.tokenize_all(one, params["tokenizer"]),
    "parts of load_filimdb": lambda one, params, bert: helpers.load_filimdb("data/sample", one)}
ONES = {"a string": "A great film.", "bytes": b"A great film.", "a dict": {"train": TEXTS},
        "a table": FRAME, "nothing": None}


@pytest.mark.parametrize("one", ONES)
@pytest.mark.parametrize("name", MANY)
def test_what_is_not_many_texts_is_refused(name, one, params, tiny_bert):
    with pytest.raises(InputError) as caught:
        MANY[name](ONES[one], params, tiny_bert)
    assert "\n" not in str(caught.value)
    assert "give a list of strings" in str(caught.value) or one == "nothing" and "labels" in name


@pytest.mark.parametrize("dev", ["a great film", made_up_reviews(6) + ([],), ("text",)])
def test_dev_is_texts_and_labels(dev, tiny_bert):
    with pytest.raises(InputError, match="dev must be \\(texts, labels\\)"):
        helpers.train(TEXTS, LABELS, dev=dev, model=tiny_bert)


def test_many_texts_of_any_kind_are_taken(params, tiny_bert):
    expected = helpers.classify(TEXTS, params)
    for texts in (tuple(TEXTS), iter(TEXTS), FRAME["text"], FRAME["text"].values):
        assert helpers.classify(texts, params) == expected
    for texts in ([TEXTS[:5], "one more"], {"train": TEXTS}.values(), [FRAME["text"]]):
        assert len(helpers.distinct_texts(texts)) > 1
    for wrong in (["one more", {"train": TEXTS}], {"train": TEXTS}, "text", [FRAME]):
        with pytest.raises(InputError, match="give a list of strings"):
            helpers.distinct_texts(wrong)


def test_one_text_is_meant(params):
    with pytest.raises(InputError, match="texts are strings"):
        helpers.vectorize_ex(TEXTS, None, 12, params["tokenizer"])


# ---- the variables that torchrun sets ------------------------------------------------------------

ALL = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
       "MASTER_PORT": "29599"}
LAUNCHES = [({"WORLD_SIZE": value}, f"WORLD_SIZE='{value}'") for value in ("", "two", "0", "-1", "1.5")]
LAUNCHES += [({key: value for key, value in ALL.items() if key != gone}, gone) for gone in ALL
             if gone != "WORLD_SIZE"]
LAUNCHES += [(dict(ALL, **{key: value}), key) for key, value in (
    ("RANK", ""), ("RANK", "x"), ("RANK", "2"), ("LOCAL_RANK", ""), ("MASTER_ADDR", ""),
    ("MASTER_PORT", "port"))]


@pytest.mark.parametrize("variables,named", LAUNCHES)
def test_half_a_launch_is_refused_in_one_line(variables, named, monkeypatch, capsys):
    for key in ALL:
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert evaluate.main(["--out", "p.tsv"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and named in said.err and "torchrun" in said.err, said.err
    assert said.out == "" and runtime.processes() == (0, 1)


def test_a_single_process_of_torchrun_is_alone(monkeypatch):
    for key in ALL:
        monkeypatch.delenv(key, raising=False)
    assert runtime.launched_processes() == (1, 0)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert runtime.launched_processes() == (1, 0)
    for key, value in dict(ALL, RANK="1", LOCAL_RANK="1").items():
        monkeypatch.setenv(key, value)
    assert runtime.launched_processes() == (2, 1)


# ---- notebooks -----------------------------------------------------------------------------------

@pytest.mark.parametrize("value", ["[0]", 0, 0.5, None])
def test_a_parameter_that_must_be_a_list(value):
    with pytest.raises(InputError) as caught:
        studies.Study("x", "sample", "data/sample", "m", "build", seeds=value)
    said = str(caught.value)
    assert said.startswith(f"seeds={value!r}: must be a list") and "\n" not in said
    assert "-y 'seeds: [...]'" in said and "-f" in said


WRONG = [("seeds", 0, "must be a list, such as [0, 1, 2]"), ("seeds", [], "one or more numbers"),
         ("seeds", [0.5], "a list such as [0, 1, 2]"), ("seeds", [-1], "each 0 or more"),
         ("n_train", -3, "must be a number of reviews, 0 (all) or more"),
         ("n_dev", "many", "must be int, as 300"), ("lr", 0.0, "more than 0, and finite"),
         ("seq_len", 1000, "must be at least 3 and at most 512"), ("epochs", 1.5, "must be int, as 2"),
         ("lrs", [1e-3, 0.0], "each more than 0"), ("model", 3, "must be str, as data/sample/bert")]


@pytest.mark.parametrize("key,value,words", WRONG)
def test_a_parameter_is_refused_in_the_cell_that_takes_it(key, value, words):
    namespace = dict(parameters("03_training_loop"), torch=studies.torch)
    studies.check_parameters("03_training_loop", namespace)
    with pytest.raises(InputError) as caught:
        studies.check_parameters("03_training_loop", dict(namespace, **{key: value}))
    said = str(caught.value)
    assert said.startswith(f"{key}={value!r}: must be ") and words in said and "\n" not in said


def test_a_list_of_numbers_takes_whole_ones_and_a_page_may_have_its_own():
    studies.check_parameters("03_training_loop", {"lrs": [1], "own": "anything", "seeds": [7]})
    studies.check_parameters("no_such_page", {"seeds": [7]})


def test_a_name_that_papermill_put_in_must_be_declared():
    declaring, injected = "n_train = 320  # reviews\nlr = 1e-3\n", "# Parameters\nn_trian = 5\n"
    namespace = {"n_train": 320, "lr": 1e-3, "n_trian": 5}
    studies.check_parameters("03_training_loop", namespace)
    for before in ([""], ["", "import sys", "1 +"]):
        with pytest.raises(InputError) as caught:
            studies.check_parameters("03_training_loop", dict(
                namespace, In=[*before, declaring, injected, "studies.check_parameters(...)"]))
        assert str(caught.value) == ("n_trian=5: no parameter of this notebook; "
                                     "did you mean n_train?")
    with pytest.raises(InputError, match="x=1: no parameter of this notebook; use one of lr, n_train"):
        studies.check_parameters("03_training_loop", {
            "x": 1, "In": [declaring, "# Parameters\nx = 1\n"]})
    studies.check_parameters("03_training_loop", dict(
        namespace, In=["", declaring, "# Parameters\nn_train = 5\n", "n_trian = 5"]))


@pytest.mark.parametrize("name", sorted(PATHS))
def test_a_notebook_checks_its_parameters_first(name):
    assert sources(name, "code")[2].startswith(f'studies.check_parameters("{name}", globals())\n')


def test_a_notebook_finds_the_project_from_any_folder_within(tmp_path):
    code = "import importlib.util, sys\nfrom pathlib import Path\nsys.path.pop(0)\n" + PATH_LINES
    code += "print(importlib.util.find_spec('helpers').origin)"
    for folder in ("notebooks", ".", "tests", "data/sample"):
        done = subprocess.run([sys.executable, "-c", code], cwd=str(ROOT / folder),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.stdout.decode().split() == [str(ROOT / "helpers.py")]
    done = subprocess.run([sys.executable, "-c", code], cwd=str(tmp_path), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    last = done.stdout.decode().strip().split("\n")[-1]
    assert done.returncode == 1 and "--cwd" in last and "outside of the project" in last


def test_a_scheduler_without_distributed_names_the_command(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "distributed":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setenv("FILIMDB_SCHEDULER", "tcp://127.0.0.1:9")
    with pytest.raises(InputError) as caught:
        studies.run_trials([], None, None, str(tmp_path))
    assert "pip install distributed" in str(caught.value) and "\n" not in str(caught.value)


# ---- aclImdb: fetched, graded, shown -------------------------------------------------------------

@pytest.fixture(scope="module")
def aclimdb(tmp_path_factory):
    """A folder that get_filimdb.py made of a made-up aclImdb."""
    place = tmp_path_factory.mktemp("aclimdb")
    write_folder(place / "aclImdb", make_aclimdb())
    assert load_module("data/get_filimdb.py").main(["--source", str(place / "aclImdb"), "--out",
                                                    str(place / "FILIMDB")]) == 0
    return place / "FILIMDB"


@pytest.mark.parametrize("flags", [["--no-pretrain"], ["--transductive"]])
def test_what_get_filimdb_made_of_aclimdb_is_graded(flags, aclimdb, tiny_bert, tmp_path, capsys):
    out = tmp_path / "p.tsv"
    assert evaluate.main(["--data", str(aclimdb), "--model", tiny_bert, "--out", str(out), *flags,
                          *options()]) == 0
    said = capsys.readouterr().out
    assert f"{aclimdb} has no dev-b, test-b: left out\n" in said
    counts = {part: len(helpers.read_lines(str(aclimdb / (part + ".texts"))))
              for part in ("train", "dev", "test")}
    assert {part: len(labels) for part, labels in predictions(out).items()} == counts
    assert re.findall(r"(?m)^(\S+) +accuracy", said) == ["train", "dev"]
    if flags == ["--transductive"]:
        assert "pretrained on train, train_unlabeled, dev, test)" in said


def execute(name, data_dir, out_dir, **given):
    """Run a notebook as a user does, by papermill, with the tiny profile."""
    values = dict(yaml.safe_load(TINY.read_text(encoding="utf-8")), data_dir=str(data_dir),
                  out_dir=str(out_dir), **given)
    values = {key: value for key, value in values.items() if key in parameters(name)}
    papermill.execute_notebook(str(PATHS[name]), str(out_dir / "page.ipynb"), parameters=values,
                               kernel_name="python3", cwd=str(ROOT / "tests"),
                               progress_bar=False)
    cells = json.loads((out_dir / "page.ipynb").read_text(encoding="utf-8"))["cells"]
    return [output["metadata"]["answer"] for cell in cells for output in cell.get("outputs", [])
            if "answer" in output.get("metadata", {})]


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("JUPYTER_PATH", sys.prefix + "/share/jupyter")
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_a_notebook_shows_what_get_filimdb_made_of_aclimdb(aclimdb, kernel, tmp_path):
    rows = execute("02_vectorize_ex", aclimdb, tmp_path)
    answers = {row["question"][:2]: row for row in rows}
    assert set(answers) == {f"Q{i}" for i in range(1, 8)}
    assert "reviews of dev give" in answers["Q4"]["answer"] and answers["Q7"]["verdict"] in ("", "undecided")
    page = (tmp_path / "page.ipynb").read_text(encoding="utf-8")
    assert "has no dev-b, test-b: left out" in page


@pytest.mark.slow
def test_papermill_with_a_list_as_text_names_the_remedy(kernel, sample, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        execute("06_optimizer_comparison", sample, tmp_path, l2_decays="[1e-3]")
    assert "l2_decays='[1e-3]': must be a list" in caught.value.evalue


def test_papermill_with_a_mistyped_name_names_the_nearest(kernel, sample, tmp_path):
    values = dict(data_dir=sample, out_dir=str(tmp_path), n_trian=5)
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(
            str(PATHS["06_optimizer_comparison"]), str(tmp_path / "page.ipynb"), parameters=values,
            kernel_name="python3", cwd=str(ROOT / "tests"), progress_bar=False)
    assert caught.value.evalue == ("n_trian=5: no parameter of this notebook; did you mean n_train?")
    assert len(caught.value.traceback) == 1 and "\n" not in caught.value.traceback[0]
