"""The reference run: kept whole or refused, and README says what results/reference says."""
import gzip
import json
import os
import zipfile

import conftest  # first: it puts the root on the path
import pytest

import assignment
import evaluate
import files
import helpers
import reference

NAMES = ["01_one", "02_two"]


def trial(correct="11110", n_train=7, mark="", **overrides):
    """A trial's row as studies.run_trial makes it, of the run's basic setting but for overrides."""
    config = helpers.make_config(**dict({"keep": "tail", "seq_len": 9, "epochs": 2, "lr": 0.1},
                                        **overrides))
    accuracy = correct.count("1") / len(correct)
    return {"seconds": 60, "device": "cpu", "model": "bert", "n_train": n_train, "mark": mark,
            "config": helpers.settings(config), "correct": correct,
            "metrics": {"dev_accuracy": accuracy}}


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The root of a repository, and the folder of a finished run that is to be kept in it."""
    root, out = tmp_path / "root", tmp_path / "out"
    monkeypatch.setattr(reference, "HERE", str(root))
    monkeypatch.setattr(reference, "REFERENCE", str(root / "results"))
    told = {"profile": "mine", "model": "bert", "n_train": 7, "n_dev": 5, "seq_len": 9, "epochs": 2,
            "lr": 0.1, "seeds": [0], "sizes": [3]}
    files.save_json(str(root / "profiles" / "mine.yml"), told)
    files.save_json(str(root / "profiles" / "full.yml"), {
        "profile": "full", "n_train": 0, "seeds": [0, 1, 2], "sizes": [3], "ks": [8, 16]})
    files.save_json(str(root / "bert" / "note.json"), {"source": "a small BERT"})
    files.save_json(str(out / "status.json"), {name: {
        "status": "ok", "seconds": 90, "profile": "mine", "reason": "", "parameters": {},
        "answers": [{"question": f"Q1. What of {name}?", "answer": "80.0 ± 1.0 % | n. More.",
                     "holds": name == "01_one", "figure": "f", "point": point},
                    {"question": "Q2. Else?", "answer": "81.5 % (1 seed)", "holds": None,
                     "figure": "", "point": ""}]} for name, point in zip(NAMES, ("1", "4a"))})
    for name in ["index", *NAMES]:
        (out / (name + ".html")).write_text("<p>" + name)
    (out / "figures").mkdir()
    (out / "figures" / "f.png").write_bytes(b"\x89PNG")
    (root / "notebooks").mkdir()
    for name, point in zip(NAMES, ("1", "4a")):
        (root / "notebooks" / (name + ".ipynb")).write_text(json.dumps(f'give("", point="{point}")'))
    for key, keep in (("a", "head"), ("b", "tail")):
        files.save_json(str(out / "trials" / (key + ".json")), trial(keep=keep, seq_len=512))
    (root / "README.md").write_text("# Mine\n" + reference.BEGIN + "old\n" + reference.END + "tail\n")
    return root, out


def test_a_run_is_kept(finished):
    root, out = finished
    assert reference.main([str(out)]) == 0
    text = (root / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Mine\n") and text.endswith(reference.END + "tail\n")
    assert "old" not in text and "Model: a small BERT." in text
    assert "Thinned, against profile full: seeds 1 of 3." in text  # sizes are all, ks not its own
    assert "2 trials took 2 minutes" in text
    assert ("| **1** environment | What of 01_one? 80.0 ± 1.0 % \\| n. | as expected | "
            "[01, Q1](notebooks/01_one.ipynb) |") in text
    assert "What of 02_two? 80.0 ± 1.0 % \\| n. | not as expected | [02, Q1]" in text
    assert "| **R5** weight decay, dropout, attention dropout | not run yet |  |  |" in text
    assert "states is 81.5 % (1 seed), on 5 reviews of dev (notebook 01, Q2)." in text
    listed = (root / "results" / "README.md").read_text(encoding="utf-8")
    assert "| Q1. What of 02_two? | 80.0 ± 1.0 % \\| n. More. | not as expected | 4a |" in listed
    assert "| Q2. Else? | 81.5 % (1 seed) | open |  |" in listed and "All 4 answers" in text
    assert (root / "figures" / "f.png").read_bytes() == b"\x89PNG"
    with zipfile.ZipFile(str(root / "results" / "report.zip")) as bundle:
        assert bundle.namelist() == ["01_one.html", "02_two.html", "index.html"]
    bytes_ = (root / "results" / "trials.zip").read_bytes()
    assert reference.main([str(out)]) == 0
    assert (root / "README.md").read_text(encoding="utf-8") == text
    assert (root / "results" / "trials.zip").read_bytes() == bytes_


def test_its_trials_come_back(finished, tmp_path):
    root, out = finished
    again = tmp_path / "again"
    assert reference.main([str(again), "--trials"]) == 0 and not again.exists()  # none yet
    reference.main([str(out)])
    files.save_json(str(again / "trials" / "a.json"), "mine")
    assert reference.main([str(again), "--trials"]) == 0
    assert json.loads((again / "trials" / "a.json").read_text()) == "mine"  # what is there stays
    assert (again / "trials" / "b.json").read_bytes() == (out / "trials" / "b.json").read_bytes()


def set_status(out, **states):
    rows = json.loads((out / "status.json").read_text())
    for number, status in states.items():
        rows[NAMES[int(number[1]) - 1]]["status"] = status
    files.save_json(str(out / "status.json"), rows)


@pytest.mark.parametrize("status", ("not run", "interrupted"))
def test_what_was_not_run_yet_is_named(status, finished):
    root, out = finished
    assert "Not run yet" not in (root / "README.md").read_text()
    set_status(out, _2=status)
    assert reference.main([str(out)]) == 0
    text = (root / "README.md").read_text(encoding="utf-8")
    assert "Not run yet: notebooks 02." in text and "02_two?" not in text
    assert "**4a** Adam, learning rate | not run yet |  | [02](notebooks/02_two.ipynb) |" in text
    assert sorted(os.listdir(str(root / "results"))) == ["01_one.json", "README.md", "report.zip",
                                                         "run.json", "trials.zip"]


def test_a_run_without_answers_is_refused(finished, capsys):
    root, out = finished
    rows = json.loads((out / "status.json").read_text())
    del rows["02_two"]["answers"]
    files.save_json(str(out / "status.json"), rows)
    assert reference.main([str(out)]) == 2 and not (root / "results").exists()
    assert "page 02_two was made before pages kept their answers" in capsys.readouterr().err


def test_a_run_that_failed_is_refused(finished, capsys):
    root, out = finished
    set_status(out, _2="failed")
    assert reference.main([str(out)]) == 2
    assert "page 02_two is failed" in capsys.readouterr().err
    set_status(out, _1="not run", _2="not run")
    assert reference.main([str(out)]) == 2
    assert "no page was run" in capsys.readouterr().err
    assert not (root / "results").exists()
    os.remove(str(out / "status.json"))
    assert reference.main([str(out)]) == 2
    assert "run report.py first" in capsys.readouterr().err


def test_trials_that_differ_in_one_setting(finished):
    run = {"parameters": {"model": "x/bert", "n_train": 7, "seq_len": 9, "epochs": 2, "lr": 0.1,
                          "seeds": [0, 1]}}
    base, seed = trial(), trial(seed=1, data_seed=1)
    rows = [base, seed, trial(lr=0.2), trial(lr=0.3, epochs=3), trial(n_train=8),
            trial(seed=10, data_seed=10),
            dict(trial(), model="other"), trial(optimizer="adamw", weight_decay=0.01, dropout=0.3)]
    assert reference.varied(rows, run, "lr") == {0.1: [base, seed], 0.2: [rows[2]]}
    assert reference.varied(rows, run, "dropout", **reference.ADAMW) == {0.3: [rows[-1]]}
    assert reference.varied([trial(lr=0.2)], run, "epochs") == {}


def test_what_the_trials_say_of_a_recipe(finished):
    run = {"parameters": {"model": "bert", "n_train": 7, "seq_len": 9, "epochs": 2, "lr": 0.1,
                          "seeds": [0]}}
    right = ["1" * 20, "1" * 12 + "0" * 8, "1" * 11 + "0" * 9]
    rows = [trial(right[0]), trial(right[1], lr=0.2), trial("0" * 20, lr=0.4, mark="diverged"),
            trial(right[2], keep="head", seq_len=512), trial(right[1], keep="tail", seq_len=512)]

    def said(*pairs):
        found = reference.choices_of({"arguments": [
            word for pair in pairs for word in ("--set", pair)]}, {}, rows, run)
        return {line.split("|")[1].strip(): line for line in found[2:]}

    lines = said("lr=0.1", "keep=head")
    assert "0.1: 100.0 % (1 seed), 0.2: 60.0 % (1 seed), 0.4: broken | 0.1 | is the best" in lines["lr"]
    assert "| head | tail against head: +5.0 points, within noise" in lines["keep (seq_len 512)"]
    assert "| 0.2 | 0.1 against 0.2: +40.0 points, significant, one seed" in said("lr=0.2")["lr"]
    assert "| 0.3 | was not tried |" in said("lr=0.3")["lr"]
    assert set(lines) == {"lr", "keep (seq_len 512)", "MLM pretraining"}  # of the others only one value was tried


def test_a_recipe_is_kept(finished, tiny_bert, tmp_path, monkeypatch):
    root, out = finished
    assert reference.main([str(out)]) == 0
    assert "best recipe" not in (root / "README.md").read_text(encoding="utf-8")
    data = tmp_path / "data"
    data.mkdir()
    for seed, part in enumerate(helpers.PARTS):
        texts, labels = conftest.made_up_reviews(12, seed=seed)
        (data / (part + ".texts")).write_text("\n".join(texts) + "\n", encoding="utf-8")
        (data / (part + ".labels")).write_text("\n".join(labels) + "\n")
    preds = tmp_path / "preds.tsv"
    arguments = ["--data", str(data), "--model", tiny_bert, "--no-pretrain", "--set", "epochs=1",
                 "--set", "seq_len=16", "--set", "batch_size=4", "--out", str(preds)]
    assert reference.main(["--recipe", *arguments]) == 0
    kept = (root / "results" / "preds.tsv.gz").read_bytes()
    assert gzip.decompress(kept) == preds.read_bytes() and preds.read_text().count("\n") == 60
    recipe = json.loads((root / "results" / "recipe.json").read_text())
    assert recipe["arguments"] == arguments
    assert [line.split()[0] for line in recipe["printed"] if "Warning" not in line] == [
        "training:", "classification:", str(preds) + ":", "train", "dev", "test", "dev-b", "test-b"]
    assert reference.PROGRESS.match("classifying:  2%|#  | 48128/3117183 [00:10<10:44, 4760piece/s]")
    text = (root / "README.md").read_text(encoding="utf-8")
    right = sum(line.split("\t")[1] == label for line, label in zip(
        preds.read_text().split("\n")[12:], (data / "dev.labels").read_text().split()))
    assert preds.read_text().split("\n")[12].startswith("dev/")
    assert f"dev    accuracy {right / 12:7.2%} of 12 reviews" in text
    assert "$ python evaluate.py --data " in text and "| the whole train part |" in text
    assert reference.main(["--recipe", *arguments]) == 0  # the same again: the same bytes
    assert (root / "results" / "preds.tsv.gz").read_bytes() == kept


def test_a_recipe_keeps_no_progress(finished, tmp_path, monkeypatch):
    root, _ = finished
    (tmp_path / "preds.tsv").write_text("dev/0\tpos\n")
    monkeypatch.setattr(reference.evaluate, "main", lambda arguments: print(
        "training:   1%|2   | 3/469 [00:12<33:10,  4.27s/step]\n"
        "classifying 14,980 reviews: about 10.3 minutes\ntraining: 34.5 minutes") or 0)
    assert reference.run_recipe(["--out", str(tmp_path / "preds.tsv")]) == 0
    recipe = json.loads((root / "results" / "recipe.json").read_text())
    assert recipe["printed"] == ["training: 34.5 minutes"]


def test_a_recipe_that_fails_is_not_kept(finished, tmp_path, capsys):
    root, out = finished
    assert reference.main(["--recipe", "--data", str(tmp_path / "none")]) == 2
    assert not (root / "results").exists() and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(os.path.join(reference.REFERENCE, "recipe.json")) or
                    not os.path.exists(str(conftest.ROOT / "data" / "FILIMDB" / "dev.labels")),
                    reason="needs the kept recipe and the reviews of data/FILIMDB")
def test_the_kept_predictions_have_the_accuracies_that_were_printed(capsys):
    data = helpers.load_filimdb(str(conftest.ROOT / "data" / "FILIMDB"))
    with gzip.open(os.path.join(reference.REFERENCE, "preds.tsv.gz"), "rt") as file:
        predicted = dict(line.rstrip("\n").split("\t") for line in file)
    assert list(predicted) == [i for part in helpers.PARTS for i in data[part].ids]
    recipe = reference.read_reference()[2]
    assert "--no-pretrain" in recipe["arguments"]
    capsys.readouterr()
    evaluate.report(data, {part: [predicted[i] for i in data[part].ids] for part in helpers.PARTS},
                    "no pretraining")
    assert capsys.readouterr().out.splitlines() == [
        line for line in recipe["printed"] if " accuracy " in line]


@pytest.mark.skipif(not os.path.isdir(reference.REFERENCE), reason="no reference run is kept")
def test_readme_says_what_the_reference_says():
    kept, text = reference.read_reference(), (conftest.ROOT / "README.md").read_text(encoding="utf-8")
    assert reference.fill_in(text, reference.table_of(*kept)) == text
    with open(os.path.join(reference.REFERENCE, "README.md"), encoding="utf-8") as file:
        assert file.read() == reference.all_answers(kept[0])
    points = {row["point"] for page in kept[0].values() for row in page["answers"]} - {""}
    assert points == set(assignment.POINTS)
