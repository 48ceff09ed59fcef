"""The reference run: kept whole or refused, and README says what results/reference says."""
import json
import os
import zipfile

import conftest  # first: it puts the root on the path
import pytest

import helpers
import reference

NAMES = ["01_one", "02_two"]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The root of a repository, and the folder of a finished run that is to be kept in it."""
    root, out = tmp_path / "root", tmp_path / "out"
    monkeypatch.setattr(reference, "HERE", str(root))
    monkeypatch.setattr(reference, "REFERENCE", str(root / "results"))
    told = {"profile": "mine", "model": "bert", "n_train": 7, "n_dev": 5, "seq_len": 9, "epochs": 2,
            "seeds": [0, 1], "sizes": [3]}
    helpers.save_json(str(root / "profiles" / "mine.yml"), told)
    helpers.save_json(str(root / "bert" / "note.json"), {"source": "a small BERT"})
    helpers.save_json(str(out / "status.json"), {name: {
        "status": "ok", "seconds": 90, "profile": "mine", "reason": ""} for name in NAMES})
    for name in NAMES:
        helpers.save_json(str(out / "answers" / (name + ".json")), [
            {"question": f"What of {name}?", "answer": "80.0 ± 1.0 % | n", "holds": name == "01_one",
             "figure": "f"}])
    for name in ["index", *NAMES]:
        (out / (name + ".html")).write_text("<p>" + name)
    (out / "figures").mkdir()
    (out / "figures" / "f.png").write_bytes(b"\x89PNG")
    (root / "notebooks").mkdir()
    for name in NAMES:
        (root / "notebooks" / (name + ".ipynb")).write_text("{}")
    for key in "ab":
        helpers.save_json(str(out / "trials" / (key + ".json")), {"seconds": 60, "device": "cpu"})
    (root / "README.md").write_text("# Mine\n" + reference.BEGIN + "old\n" + reference.END + "tail\n")
    return root, out


def test_a_run_is_kept(finished):
    root, out = finished
    assert reference.main([str(out)]) == 0
    text = (root / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Mine\n") and text.endswith(reference.END + "tail\n")
    assert "old" not in text and "Model: a small BERT." in text
    assert "2 trials took 2 minutes" in text and "the pages 3 minutes" in text
    assert "| What of 01_one? | 80.0 ± 1.0 % \\| n | yes | [01](notebooks/01_one.ipynb) |" in text
    assert "| What of 02_two? | 80.0 ± 1.0 % \\| n | no | [02](notebooks/02_two.ipynb) |" in text
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
    helpers.save_json(str(again / "trials" / "a.json"), "mine")
    assert reference.main([str(again), "--trials"]) == 0
    assert json.loads((again / "trials" / "a.json").read_text()) == "mine"  # what is there stays
    assert (again / "trials" / "b.json").read_bytes() == (out / "trials" / "b.json").read_bytes()


def set_status(out, **states):
    rows = json.loads((out / "status.json").read_text())
    for number, status in states.items():
        rows[NAMES[int(number[1]) - 1]]["status"] = status
    helpers.save_json(str(out / "status.json"), rows)


def test_what_was_not_run_yet_is_named(finished):
    root, out = finished
    assert "Not run yet" not in (root / "README.md").read_text()
    set_status(out, _2="not run")
    assert reference.main([str(out)]) == 0
    text = (root / "README.md").read_text(encoding="utf-8")
    assert "Not run yet: notebooks 02." in text and "02_two?" not in text
    assert sorted(os.listdir(str(root / "results"))) == ["01_one.json", "report.zip", "run.json",
                                                         "trials.zip"]


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


@pytest.mark.skipif(not os.path.isdir(reference.REFERENCE), reason="no reference run is kept")
def test_readme_says_what_the_reference_says():
    text = (conftest.ROOT / "README.md").read_text(encoding="utf-8")
    assert reference.fill_in(text, reference.table_of(*reference.read_reference())) == text
