"""The reference run: kept whole or refused, and README says what results/reference says."""
import gzip
import json
import os
import re
import shutil
import zipfile

import pytest
from tools import ROOT, made_up_reviews

import assignment
import effects
import evaluate
import files
import helpers
import reference
import runtime

NAMES = ["01_one", "02_two"]


def trial(correct="11110", n_train=7, mark="", **overrides):
    """A trial's row as studies.run_trial makes it, of the run's basic setting but for overrides."""
    config = helpers.make_config(**dict({"keep": "tail", "seq_len": 9, "epochs": 2, "lr": 0.1},
                                        **overrides))
    accuracy = correct.count("1") / max(1, len(correct))
    return {"seconds": 60, "device": "cpu", "model": "bert", "n_train": n_train, "mark": mark,
            "n_dev": len(correct), "history": [], "results_version": helpers.RESULTS_VERSION,
            "versions": runtime.VERSIONS,
            "config": helpers.settings(config), "correct": correct,
            "metrics": {"dev_accuracy": accuracy}}


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The root of a repository, and the folder of a finished run that is to be kept in it."""
    root, out = tmp_path / "root", tmp_path / "out"
    monkeypatch.setattr(reference, "HERE", str(root))
    monkeypatch.setattr(reference, "REFERENCE", str(root / "results"))
    told = {"profile": "mine", "model": "bert", "n_train": 7, "n_dev": 5, "seq_len": 9, "epochs": 2,
            "lr": 0.1, "seeds": [0], "sizes": [3], "02_two": {"seeds": [0, 4]}}
    files.save_json(str(root / "profiles" / "mine.yml"), told)
    files.save_json(str(root / "profiles" / "full.yml"), {
        "profile": "full", "n_train": 0, "seeds": [0, 1, 2], "sizes": [3], "ks": [8, 16]})
    files.save_json(str(root / "bert" / "note.json"), {"source": "a small BERT"})
    files.save_json(str(out / "status.json"), {name: {
        "status": "ok", "seconds": 90, "profile": "mine", "reason": "", "parameters": {},
        "answers": [{"question": f"Q1. What of {name}?", "answer": "80.0 ± 1.0 % | n. More.",
                     "verdict": "supported" if name == "01_one" else "contradicted", "figure": "f", "point": point},
                    {"question": "Q2. Else?", "answer": "81.5 % (1 seed)", "verdict": "",
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
    assert "old" not in text
    assert ("2 trials of a small BERT on 3 to 7 training and 5 dev reviews, with 1 to 2 seeds, took 2 "
            "minutes of training on cpu: they tell two models apart") in text and "decide nothing about methods" in text
    assert ("| **1** environment | *What of 01_one?* 80.0 ± 1.0 % \\| n. | supported | "
            "[01, Q1](notebooks/01_one.ipynb) |") in text
    assert "80.0 ± 1.0 % \\| n. | contradicted | [02, Q1]" in text
    assert "| **R5** weight decay, dropout, attention dropout | not run yet |  |  |" in text
    assert "All answers (2 without expectation, 1 supported, 1 contradicted)" in text
    assert text.count("\n| **") == len(assignment.POINTS), "one line a point"
    page = (root / "results" / "README.md").read_text(encoding="utf-8")
    assert "| Q1. What of 02_two? | 80.0 ± 1.0 % \\| n. More. | contradicted | 4a |" in page
    assert "| Q2. Else? | 81.5 % (1 seed) |  |  |" in page
    assert "seeds [0] (notebook 02: [0, 4]); " in page
    assert "Thinned, against profile full: seeds 1 of 3." in page  # sizes are all, ks not its own
    assert "## Beside published figures" in page and "## The recipe" not in page
    assert (root / "figures" / "f.png").read_bytes() == b"\x89PNG"
    bytes_ = (root / "results" / "trials.zip").read_bytes()
    assert reference.main([str(out)]) == 0
    assert (root / "README.md").read_text(encoding="utf-8") == text
    assert (root / "results" / "trials.zip").read_bytes() == bytes_


def test_figures_of_an_older_run_go_and_the_readmes_picture_stays(finished):
    root, out = finished
    (root / "figures").mkdir()
    for name in ("report.png", "old.png", "old.csv"):
        (root / "figures" / name).write_bytes(b"mine")
    assert reference.main([str(out)]) == 0
    assert sorted(path.name for path in (root / "figures").iterdir()) == ["f.png", "report.png"]
    assert (root / "figures" / "report.png").read_bytes() == b"mine"


def test_trials_of_another_stack_or_version_are_no_part_of_the_run(finished):
    root, out = finished
    for name, other in (("c", {"results_version": 1}), ("d", {"versions": dict(
            runtime.VERSIONS, torch="0.4")})):
        files.save_json(str(out / "trials" / (name + ".json")), dict(trial(seq_len=512), **other))
    assert reference.main([str(out)]) == 0
    with zipfile.ZipFile(str(root / "results" / "trials.zip")) as bundle:
        assert bundle.namelist() == ["a.json", "b.json"]
    assert json.loads((root / "results" / "run.json").read_text())["trials"] == 2


def test_pages_of_two_profiles_and_a_run_without_trials_are_refused(finished, capsys):
    root, out = finished
    status = json.loads((out / "status.json").read_text())
    status[NAMES[0]]["profile"] = "sample"
    files.save_json(str(out / "status.json"), status)
    assert reference.main([str(out)]) == 2
    assert "pages of several profiles" in capsys.readouterr().err
    status[NAMES[0]]["profile"] = "mine"
    files.save_json(str(out / "status.json"), status)
    shutil.rmtree(str(out / "trials"))
    assert reference.main([str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_pages_are_packed_only_when_asked_to(finished):
    root, out = finished
    packed = root / "results" / "report.zip"
    assert reference.main([str(out)]) == 0 and not packed.exists()
    assert reference.main([str(out), "--pages"]) == 2 and not packed.exists(), "of an older report"
    (out / "report.html").write_text("<p>all")
    assert reference.main([str(out), "--pages"]) == 0
    with zipfile.ZipFile(str(packed)) as bundle:
        assert bundle.namelist() == ["report.html"]
    before = packed.read_bytes()
    (out / "report.html").write_text("<p>a comma more")
    assert reference.main([str(out)]) == 0 and packed.read_bytes() == before
    assert reference.main([str(out), "--pages"]) == 0 and packed.read_bytes() != before


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
    assert "02_two?" not in (root / "results" / "README.md").read_text(encoding="utf-8")
    assert "**4a** Adam, learning rate | not run yet |  | [02](notebooks/02_two.ipynb) |" in text
    assert sorted(os.listdir(str(root / "results"))) == ["01_one.json", "README.md", "run.json",
                                                         "trials.zip"]


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


RUN = {"parameters": {"profile": "mine", "model": "x/bert", "n_train": 7, "seq_len": 9, "epochs": 2,
                      "lr": 0.1, "seeds": [0]}}


def test_trials_that_differ_in_one_setting(finished):
    run = {"parameters": dict(RUN["parameters"], seeds=[0, 1])}
    rows = [trial(), trial(seed=1, data_seed=1), trial(lr=0.2), trial(lr=0.3, epochs=3),
            trial(n_train=8), trial(seed=10, data_seed=10), dict(trial(), model="other"),
            trial(optimizer="adamw", weight_decay=0.01, dropout=0.3)]
    table = effects.as_table(rows)
    assert list(reference.varied(table, run, "lr").index) == [0, 1, 2]
    assert list(reference.varied(table, run, "dropout", **reference.ADAMW).index) == [7]
    assert not len(reference.varied(effects.as_table([trial(lr=0.2)]), run, "epochs"))
    on_five = {"parameters": dict(run["parameters"], n_dev=5)}
    assert list(reference.varied(effects.as_table([*rows[:1], trial("1110")]), on_five,
                                 "lr").index) == [0]
    few = reference.varied(effects.as_table([*rows, trial(n_train=3, epochs=10)]), run, "dropout",
                           n_train=3, epochs=10)
    assert list(few["n_train"]) == [3], "of notebook 08"
    all_of_train = {"parameters": dict(run["parameters"], n_train=0)}
    assert list(reference.varied(table, all_of_train, "lr").index) == [4], "the most, not fewer"
    in_bf16 = dict(trial(), config=dict(trial()["config"], precision="bf16"))
    for precision, expected in (("bf16", [1, 2]), ("auto", [1, 2]), ("fp32", [0])):
        given = {"parameters": dict(RUN["parameters"], precision=precision)}
        found = reference.varied(effects.as_table([trial(), in_bf16, dict(in_bf16, config=dict(
            in_bf16["config"], lr=0.2))]), given, "lr")
        assert list(found.index) == expected and reference.tried(found, "lr")


def test_what_the_trials_say_of_a_recipe(finished):
    right = ["1" * 20, "1" * 12 + "0" * 8, "1" * 11 + "0" * 9]
    table = effects.as_table([
        trial(right[0]), trial(right[1], lr=0.2), trial("", lr=0.4, mark="diverged"),
        trial("1" * 10 + "0" * 10, lr=0.5, mark="collapsed"),
        trial(right[2], keep="head", seq_len=512), trial(right[1], keep="tail", seq_len=512),
        trial(right[1], weight_decay=0.01),
        trial(right[1], optimizer="adamw"), trial(right[2], optimizer="adamw", weight_decay=0.01)])

    def said(**settings):
        recipe = {"settings": settings, "pretraining": {}}
        found = reference.choices_of(recipe, {}, table, RUN)
        return {line.split("|")[1].strip(): line for line in found[2:]}

    assert "| views | none; seen on all of dev" in said(lr=0.1, views=True)["views"]
    lines = said(lr=0.1, keep="head")
    assert "0.1: 100.0 % (90.2 to 100.0; 1 seed), 0.2: 60.0 % (" in lines["lr"]
    assert ", 0.4: failed, 0.5: 50.0 % (" in lines["lr"]
    assert "; 1 seed, 1 of them collapsed) | 0.1 | the highest, and chosen |" in lines["lr"]
    assert "| head | keep tail against head: +5.0 points (95 % int" in lines["keep (seq_len 512)"]
    assert "of these two models; undecided" in lines["keep (seq_len 512)"]
    assert "| 0.2 | lr 0.1 against 0.2: +40.0 points (" in said(lr=0.2)["lr"]
    assert "| 0.3 | the recipe's was not tried |" in said(lr=0.3)["lr"]
    assert "| 0 | the highest, and chosen |" in lines["weight_decay (optimizer adam, epochs 2)"]
    assert "| adam | another optimizer |" in lines["weight_decay (optimizer adamw, epochs 2)"]
    assert set(lines) == {"lr", "keep (seq_len 512)", "MLM pretraining",
                          "weight_decay (optimizer adam, epochs 2)",
                          "weight_decay (optimizer adamw, epochs 2)"}
    assert "best" not in "".join(lines.values())  # no test has said so


@pytest.mark.parametrize("text,limit,short", [
    ("all of it; yes", 20, "all of it; yes"), ("one; two; three", 13, "one; two …"),
    ("no clause ends in this", 5, "no clause ends in this"),
    ("first is long; second", 5, "first is long …"),
    ("a (b; c) d; e; f", 13, "a (b; c) d …")])
def test_an_answer_is_cut_where_a_clause_ends(text, limit, short):
    assert reference.shortened(text, limit) == short


def write_reviews(folder):
    """Write 12 made-up reviews of each part; dev's last two stand in train too."""
    folder.mkdir()
    parts = {part: made_up_reviews(12, seed=seed)
             for seed, part in enumerate(helpers.PARTS)}
    parts["dev"] = (parts["dev"][0][:10] + parts["train"][0][:2],
                    parts["dev"][1][:10] + parts["train"][1][:2])
    for part, (texts, labels) in parts.items():
        (folder / (part + ".texts")).write_text("\n".join(texts) + "\n", encoding="utf-8")
        (folder / (part + ".labels")).write_text("\n".join(labels) + "\n")
    return folder


def test_a_recipe_is_kept(finished, tiny_bert, tmp_path):
    root, out = finished
    assert reference.main([str(out)]) == 0
    data, preds = write_reviews(tmp_path / "data"), tmp_path / "preds.tsv"
    arguments = ["--data", str(data), "--model", tiny_bert, "--no-pretrain", "--set", "epochs=1",
                 "--set", "seq_len=16", "--set", "batch_size=4", "--out", str(preds)]
    assert reference.main(["--recipe", *arguments]) == 0
    kept = (root / "results" / "preds.tsv.gz").read_bytes()
    assert gzip.decompress(kept) == preds.read_bytes() and preds.read_text().count("\n") == 60
    recipe = json.loads((root / "results" / "recipe.json").read_text())
    assert recipe["arguments"] == arguments and recipe["seen"] == "no pretraining"
    assert set(recipe["minutes"]) == {"training", "classification"}
    predicted = dict(line.split("\t") for line in preds.read_text().splitlines())
    dev = helpers.load_filimdb(str(data))["dev"]
    right = {i: predicted[i] == label for i, label in zip(dev.ids, dev.labels)}
    unused = set(dev.ids) - set(helpers.subset(dev, 5).ids)
    unseen = unused - {"dev/10", "dev/11"}
    for row, ids in zip(recipe["unseen"], (set(dev.ids), unused, unseen)):
        assert row["n"] == len(ids)
        assert row["accuracy"] == pytest.approx(100 * sum(right[i] for i in ids) / len(ids))
        assert row["low"] <= row["accuracy"] <= row["high"]
        mean, low, high = row["above_tfidf"]
        assert low <= mean <= high and mean == pytest.approx(row["accuracy"] - row["tfidf"])
    assert len(recipe["unseen"]) == 3 and "without the 5 that" in recipe["unseen"][1]["reviews"]
    assert recipe["parts"]["dev"]["accuracy"] == sum(right.values()) / 12
    page = (root / "results" / "README.md").read_text(encoding="utf-8")
    assert "python evaluate.py --data " in page and "| the whole train part |" in page
    last = recipe["unseen"][-1]
    assert (f"gets {last['accuracy']:.1f} % (95 % interval {last['low']:.1f} to {last['high']:.1f}) "
            f"of the {len(unseen)} dev reviews right") in (
                root / "README.md").read_text(encoding="utf-8")
    assert reference.main(["--recipe", *arguments]) == 0  # the same again: the same bytes
    assert (root / "results" / "preds.tsv.gz").read_bytes() == kept
    profile = root / "profiles" / "mine.yml"  # chosen on other reviews: counted anew
    files.save_json(str(profile), dict(json.loads(profile.read_text()), n_dev=8))
    assert reference.main([str(out)]) == 0
    unseen = json.loads((root / "results" / "recipe.json").read_text())["unseen"]
    assert [row["n"] for row in unseen][:2] == [12, 4]
    os.remove(str(data / "dev.texts"))  # cannot be counted: nothing is kept
    before = (root / "results" / "run.json").read_bytes()
    files.save_json(str(profile), dict(json.loads(profile.read_text()), n_dev=6))
    assert reference.main([str(out)]) == 2
    assert (root / "results" / "run.json").read_bytes() == before


def test_a_recipe_before_any_run_is_refused_at_once(finished, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "main", None)
    assert reference.main(["--recipe", "--no-pretrain"]) == 2
    assert "run report.py first" in capsys.readouterr().err


def test_a_recipe_that_fails_is_not_kept(finished, tmp_path, capsys):
    root, out = finished
    assert reference.main([str(out)]) == 0
    before = sorted(os.listdir(str(root / "results")))
    assert reference.main(["--recipe", "--data", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(os.listdir(str(root / "results"))) == before


def test_a_recipe_without_dev_labels_is_not_kept_by_half(finished, tmp_path, monkeypatch, capsys):
    root, out = finished
    assert reference.main([str(out)]) == 0
    data = write_reviews(tmp_path / "F")
    os.remove(str(data / "dev.labels"))

    def evaluated(arguments):
        (tmp_path / "p.tsv").write_text("dev/0\tpos\n")
        files.save_json(arguments[-1], {"predictions": str(tmp_path / "p.tsv"), "data": str(data)})
        return 0

    monkeypatch.setattr(evaluate, "main", evaluated)
    before = sorted(os.listdir(str(root / "results")))
    assert reference.main(["--recipe", "--data", str(data)]) == 2
    assert "has no labels" in capsys.readouterr().err
    assert sorted(os.listdir(str(root / "results"))) == before


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(os.path.join(reference.REFERENCE, "recipe.json")) or
                    not os.path.exists(str(ROOT / "data" / "FILIMDB" / "dev.labels")),
                    reason="needs the kept recipe and the reviews of data/FILIMDB")
def test_the_recipe_says_what_its_predictions_say():
    recipe, run = reference.read_reference()[2], reference.read_reference()[1]
    data = helpers.load_filimdb(str(ROOT / "data" / "FILIMDB"))
    predicted = reference.read_column(os.path.join(reference.REFERENCE, "preds.tsv.gz"))
    assert list(predicted) == [i for part in helpers.PARTS for i in data[part].ids]
    parts = evaluate.measure(data, {part: [predicted[i] for i in data[part].ids]
                                    for part in helpers.PARTS})
    assert parts == recipe["parts"]
    recipe = dict(recipe, data=str(ROOT / recipe["data"]))
    unseen = reference.accuracy_on_unseen(recipe, run["parameters"]["n_dev"])
    for row, kept in zip(unseen, recipe["unseen"]):
        assert row == {key: value if isinstance(value, str) else pytest.approx(value)
                       for key, value in kept.items()}


@pytest.mark.skipif(not os.path.isdir(reference.REFERENCE), reason="no reference run is kept")
def test_readme_says_what_the_reference_says():
    kept, text = reference.read_reference(), README.read_text(encoding="utf-8")
    assert reference.fill_in(text, reference.table_of(*kept[:3])) == text
    with open(os.path.join(reference.REFERENCE, "README.md"), encoding="utf-8") as file:
        assert file.read() == reference.page_of(*kept)
    points = {row["point"] for page in kept[0].values() for row in page["answers"]} - {""}
    assert points <= set(assignment.POINTS)
    for point, title in assignment.POINTS.items():
        assert (f"| **{point}** {title} | not run yet |" in text) == (point not in points)


# ---- README --------------------------------------------------------------------------------------

README = ROOT / "README.md"


def test_readme_is_short():
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(reference.BEGIN)
    table, after = rest.split(reference.END)
    assert text.count("\n") <= 130 and len((before + after).split()) <= 800
    assert max(len(line.split()) for line in table.splitlines()) <= 120, "a point is a line"


def test_readmes_table_says_a_comparison_briefly():
    said = ("Tail against head, averaged over k = 8, 16: +3.9 points (unadjusted 95 % interval +1.6 to "
            "+6.2; 3 seeds, 2,000 reviews): better (p = 0.028 by Holm over 3 comparisons).")
    short = "Tail against head, on average: +3.9 points (+1.6 to +6.2): better (p = 0.028)."
    assert reference.briefly(said + " More.") == short
    assert reference.briefly(f"{said} {said}") == f"{short} {short}", "there is room for two"
    assert reference.briefly(" ".join([said] * 5)) == f"{short} {short} … and 3 comparisons more"
    left_out = said.replace("2,000 reviews", "2,000 reviews; 1 failed trial left out")
    assert reference.briefly(" ".join([left_out] * 3)).count("Tail against") == 1
    assert reference.briefly(" ".join([left_out] * 3)).endswith(" … and 2 comparisons more")
    assert reference.briefly(f"One thing. {said}") == "One thing. … and 1 comparison more"
    assert reference.briefly("The smallest k, of k = 8, 16: head: 8; tail: none.") == (
        "The smallest k: head: 8; tail: none.")


def test_readme_names_what_there_is():
    text = README.read_text(encoding="utf-8")
    targets = re.findall(r"(?m)^([a-z0-9-]+):", (ROOT / "Makefile").read_text())
    assert set(re.findall(r"(?:`|\n)make ([a-z0-9-]+)", text)) <= set(targets)
    for path in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / path).exists(), path
    house = text[text.index("## Where everything lies"):text.index("## To change one thing")]
    named = set(re.findall(r"`([^`]+)`", house))
    assert {path.name for path in ROOT.glob("*.py")} <= named
    for path in named - {"vectorize_ex", "pretrain", "train", "classify", "sample", "small", "full"}:
        assert (ROOT / path).exists(), path
    change = text[text.index("## To change one thing"):text.index("## How far")]
    for name in re.findall(r"`([A-Z]\w+)`", change):
        assert hasattr(helpers, name), name
    flags = set(re.findall(r"`(--[a-z]+)`", text)) - {"--help"}
    options = evaluate.parse_arguments([])
    assert all(hasattr(options, flag[2:]) for flag in flags), flags
