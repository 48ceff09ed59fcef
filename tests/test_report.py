"""report.py runs notebooks headless, survives what goes wrong, and exports pages."""
import json
import os
import re
import signal
import subprocess
import time
import types

import nbformat
import pytest
import report_tools as h
from tools import Page

import index
import pages
import plan
import report
from assignment import POINTS


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Run the whole gallery once: (folder of the project, of the report, exit code, output)."""
    return h.make_gallery(tmp_path_factory)


@pytest.mark.slow
def test_every_kind_of_end_has_its_status(gallery):
    _, out, code, said = gallery
    rows = h.read_status(out)
    assert code == 1
    assert {n: r["status"] for n, r in rows.items()} == {
        "01_good": "ok", "02_fails": "failed", "03_dies": "failed", "04_hostile": "ok",
        "05_orphan": "failed", "06_unread": "not run"}, said
    assert rows["02_fails"]["reason"].startswith("ValueError: <script>alert(2)</script> at (in ")
    assert "cell 4 of 5" in rows["02_fails"]["reason"]
    assert "Kernel died" in rows["03_dies"]["reason"]
    assert "cell 2 of 3" in rows["03_dies"]["reason"]
    assert "signal 9" in rows["05_orphan"]["reason"]
    assert rows["01_good"]["seconds"] > 0 and rows["01_good"]["profile"] == "sample"
    assert said.strip().endswith("6 pages: 2 ok, 3 failed, 1 not run")
    assert str(out / "index.html") in said
    assert "01_good: started" in said and "01_good: ok" in said


@pytest.mark.slow
def test_no_process_survives(gallery):
    h.wait_for(lambda: not h.survivors(gallery[1]), 5)


@pytest.mark.slow
def test_parameters_reach_only_the_notebooks_that_declare_them(gallery):
    _, out, _, _ = gallery
    seen = json.loads((out / "seen.json").read_text())
    assert seen == dict(lr=1, epochs=2, sizes=[1, 2], cache=str(out / "cache"))
    given = (out / "notebooks" / "04_hostile.ipynb").read_text(encoding="utf-8")
    assert "injected-parameters" not in given
    assert "epochs" in Page(out / "02_fails.html").text


@pytest.mark.slow
def test_everything_lies_under_out(gallery):
    folder, out, _, _ = gallery
    assert {p.name for p in folder.iterdir()} <= {
        "report.py", "parameters.py", "plan.py", "pages.py", "index.py", "report.html.j2", "assignment.py",
        "files.py", "notebooks", "profiles", "build",
        "said", "user", "__pycache__"}
    assert len(list((folder / "notebooks").iterdir())) == 6
    assert not list(out.rglob("*.part")), "a file written aside was left"


@pytest.mark.slow
def test_pages_need_nothing_from_outside(gallery):
    for path in gallery[1].glob("*.html"):
        page = Page(path)
        assert page.source.startswith("<!doctype html>\n<html lang=\"en\">")
        assert 'charset="utf-8"' in page.source and 'name="viewport"' in page.source
        assert not {"script", "link", "iframe", "object"} & set(page.tags), path.name
        assert all(not x or x.startswith("data:") for x in page.loads), path.name
        assert "url(" not in page.source and "@import" not in page.source
        assert str(gallery[0]) not in page.source, "an absolute path"
        assert len(page.ids) == len(set(page.ids))
        for link in page.links:
            name, _, mark = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), (path.name, link)
            assert not mark or mark in Page(target).ids, (path.name, link)


@pytest.mark.slow
def test_every_image_has_a_text(gallery):
    images = Page(gallery[1] / "01_good.html").images
    assert [i["alt"] for i in images] == ["A > B, in blue", "figure 2 of 01_good"]
    assert all(i["src"].startswith("data:image/png;base64,") for i in images)


@pytest.mark.slow
def test_progress_bars_keep_their_last_state(gallery):
    text = Page(gallery[1] / "01_good.html").text
    assert "100% of batches" in text and "  7% of batches" not in text


@pytest.mark.slow
def test_page_head_and_contents(gallery):
    page = Page(gallery[1] / "01_good.html")
    assert "<title>How long is a review? · sample</title>" in page.source
    assert page.tags.count("h1") == 1 and page.tags.count("h2") == 4
    contents = page.source.split('aria-label="Contents"')[1].split("</nav>")[0]
    assert re.findall('href="(.*?)"', contents) == ["#found", "#s1", "#s2", "#s3"]
    assert {"#top", "#main", "#a1", "#a2"} <= set(page.links)
    assert "02_fails.html" in page.links and "index.html" in page.links
    assert re.search(r"ok profile sample · 0\.\d min · 2 trials, 1\.5 min of training · Python 3\.\d",
                     page.text.replace("\n", ""))
    assert 'id="show-code"' in page.source and "how long" not in page.text
    assert "¶" not in page.text
    assert page.tags.count("article") == 1 and ".highlight :is(.k," in page.source


@pytest.mark.slow
def test_outputs_are_text_not_markup(gallery):
    hostile = Page(gallery[1] / "04_hostile.html")
    assert hostile.text.count("<script>alert(1)</script>") >= 3
    assert "alert(3)" not in re.sub(r'(?s)<details class="input".*?</details>', "",
                                    hostile.source), "JavaScript output is dropped"
    failed = Page(gallery[1] / "02_fails.html")
    assert failed.text.count("<script>alert(2)</script>") >= 3
    for page in hostile, failed, Page(gallery[1] / "index.html"):
        assert "script" not in page.tags
        assert not re.search("[\x00-\x08\x0b-\x1f]", page.source), "a raw terminal code"


@pytest.mark.slow
def test_what_reviews_hold_is_spelled_out(gallery, tmp_path):
    assert "line two \\x1b[31mred \\u202etfel" in Page(gallery[1] / "02_fails.html").text
    assert "\\x1b[31mred\\x1b[0m \\x07 \\x85 \\x1b]0;title\\x07" in Page(
        gallery[1] / "04_hostile.html").text
    h.make_evil_page(tmp_path)
    page, front = Page(tmp_path / "01_evil.html"), Page(tmp_path / "index.html")
    for way in h.SEEN:
        assert h.spelled(way) in page.text, way
    for way in "question", "answer", "reason":
        assert h.spelled(way) in front.text, way
    assert [image["alt"] for image in page.images] == [
        h.spelled("alt"), "Panel 2 of the same figure"]
    whole = Page(tmp_path / "report.html")
    assert not {"script", "textarea", "input"} & set(whole.tags) and not pages.UNSEEN.search(whole.source)
    for some in page, front:
        assert not pages.UNSEEN.search(some.source)
        assert not {"script", "textarea", "b", "strong" * (some is front)} & set(some.tags)
        assert not [link for link in some.links if "javascript" in link]


@pytest.mark.slow
def test_pages_show_how_far_it_got(gallery):
    failed = Page(gallery[1] / "02_fails.html").text
    assert "ValueError" in failed and "Never reached" in failed
    assert "An Exception was encountered" not in failed, "papermill's own banner"
    dead = Page(gallery[1] / "03_dies.html")
    assert 'class="log"' in dead.source and "Kernel died" in dead.text
    assert "so far, so good\n" in dead.text and "SIGKILL" in dead.text, "output before, the code"
    assert "SIGKILL" in Page(gallery[1] / "05_orphan.html").text


@pytest.mark.slow
def test_index_lists_answers_and_reasons(gallery):
    page = Page(gallery[1] / "index.html")
    assert "We count words, e.g. in one line." in page.text and "Then more" not in page.text
    assert "Is <b>long</b> better?" in page.text and "+1.2 points" in page.text
    assert page.text.count("✓ supported") == 2 and "✗" not in page.text
    assert "not run" in page.text
    assert "<script>alert(2)</script> at" in page.text


@pytest.mark.slow
def test_index_shows_what_its_pages_show(gallery):
    page = Page(gallery[1] / "index.html")
    assert (gallery[1] / "answers" / "01_good.json").exists() and "of another run" not in page.text
    assert page.text.count("within noise") == 1  # no point's answer: in the notebook's list alone


@pytest.mark.slow
def test_the_front_page_begins_with_what_was_found(gallery):
    page = Page(gallery[1] / "index.html")
    text = " ".join(page.text.split("</style>")[-1].split())
    begin = text.index("This run: model a, fine-tuned on reviews of b")  # as the gallery names them
    assert text[begin:].startswith(
        "This run: model a, fine-tuned on reviews of b (profile sample): the best accuracy that an answer states is "
        "71.5 ± 0.4 % (3 seeds), on all reviews of dev (01, Q1. Is <b>long</b> better?).")
    assert begin < text.index("3a special tokens") < text.index("How long is a review?")
    assert "01_good.html#a1" in page.links and "01_good.html#a2" in page.links
    assert {"a1", "a2"} <= set(Page(gallery[1] / "01_good.html").ids)
    assert "#a1" not in Page(gallery[1] / "02_fails.html").links


@pytest.mark.slow
def test_the_table_by_point_says_what_is_missing_and_why(gallery):
    page = Page(gallery[1] / "index.html")
    rows = re.findall(r"(?s)<tr>.*?(?=<tr>|$)", page.source.split('<table class="stack points">')[1].split("</table>")[0])[1:]
    assert len(rows) == len(POINTS)
    by_point = dict(zip(POINTS, rows))
    assert "+1.2 points: 71.5 ± 0.4 % (3 seeds)." in by_point["3a"]
    assert "The rest is detail" not in by_point["3a"] and "✓ supported" in by_point["3a"]
    assert 'href="01_good.html#a1">01, Q1<' in by_point["3a"]
    assert "No answer: ValueError: " in by_point["4a"] and ">failed<" in by_point["4a"]
    assert 'href="02_fails.html">02<' in by_point["4a"]
    assert "No notebook answers this." in by_point["R5"]


@pytest.mark.slow
def test_the_front_page_says_what_matters_in_order(gallery):
    text = " ".join(Page(gallery[1] / "index.html").text.split("</style>")[-1].split())
    parts = [
        "3a special tokens",
        "2 answers: what was expected is supported by 1, contradicted by 0 and left undecided by 0; 1 expected "
        "nothing.",
        "Its pages train on 320 reviews, measure on 200 of dev and use 3 seeds. So a difference between two "
        "methods of about 4.0 points is seen four times in five",
        "hardware an abacus", "checksum of data dddddddddddd", "checksum of weights eeeeeeeeeeee",
        "profile sample: indicative only", "How long is a review?",
        "Over all trials of these pages 75.00 % of 600 predictions are right; 70.00 % without the 100"]
    places = [text.index(part) for part in parts]
    assert places[:-1] == sorted(places[:-1]) and places[-1] > places[-2]
    assert re.search(r"How long is a review\?.*? ok 2 1\.5 min 0\.\d min", text), "what its trials took"
    assert re.search(r"Total ?2 1\.5 min ", text)
    page = Page(gallery[1] / "01_good.html")
    assert "index.html#leaks" in page.links and "leaks" in Page(gallery[1] / "index.html").ids


@pytest.mark.slow
def test_a_page_begins_with_its_answers(gallery):
    source = (gallery[1] / "01_good.html").read_text(encoding="utf-8")
    found = Page(source[source.index('id="found"'):source.index("<article>")])
    assert found.links[1:3] == ["#a1", "#a2"] and "The rest is detail" not in found.text
    assert "71.5 ± 0.4 % (3 seeds)." in found.text and "notebooks/01_good.ipynb" in found.links


@pytest.mark.slow
def test_the_whole_report_is_one_file(gallery):
    whole = Page(gallery[1] / "report.html")
    assert len(whole.ids) == len(set(whole.ids)) and not {"input", "script"} & set(whole.tags)
    links = [link for link in whole.links if not link.startswith("#")]
    assert not [link for link in links if ".html" in link or ".ipynb" in link], links
    assert {link[1:] for link in whole.links if link.startswith("#")} <= set(whole.ids)
    for name in h.read_status(gallery[1]):
        assert name in whole.ids
    assert "Is <b>long</b> better?" in whole.text and whole.source.count("<details open class=\"given\"") >= 2
    assert "report.html" in Page(gallery[1] / "index.html").links


def test_code_that_is_not_the_lesson_is_folded():
    def cell(source, *tags):
        return nbformat.from_dict({"metadata": {"tags": list(tags)}, "source": source})

    assert pages.purpose(cell("import re\nimport files")) == "imports"
    assert pages.purpose(cell("lr = 1", "parameters")) == "parameters"
    assert pages.purpose(cell("study = studies.Study(1)\nstudy")) == "set-up"
    assert pages.purpose(cell('study.answer("", "Q")')) == "answer"
    assert pages.purpose(cell("figure, (axes,) = figures.new_figure()")) == "figure"
    assert pages.purpose(cell("def f(x):\n    return figures.save(x)")) == ""
    assert pages.purpose(cell("bert = load_bert(model)")) == ""
    assert pages.purpose(cell("import re", "lesson")) == "" and pages.purpose(cell("x", "folded")) == "code"


def test_columns_of_numbers_are_aligned_right_and_texts_left():
    table = ("<table><thead><tr><th>a</th><th>n</th></tr></thead><tbody><tr><td>Bayes</td><td>-1.5 %</td></tr>"
             "<tr><td>7</td><td>1,000</td></tr></tbody></table>")
    dressed = pages.dress(table)
    assert '<th>a</th><th class="number">n</th>' in dressed and "<td>7</td>" in dressed
    assert dressed.count('class="number"') == 3 and 'tabindex="0"' in dressed
    spans = ("<table><thead><tr><th></th><th>b</th></tr></thead><tr><th rowspan=2>x</th><td>1</td></tr>"
             "<tr><td>2</td></tr></table>")
    dressed = pages.dress(spans)
    assert '<td></td><th class="number">b</th>' in dressed and dressed.count('class="number"') == 3
    assert pages.dress("<pre>x</pre>") == '<pre tabindex="0">x</pre>'
    assert "<table><tr></table>" in pages.dress("<table><tr></table>")


# ---- how many trials, how long -------------------------------------------------------------------

GROUPS = """ks = [1, 2]
study.run("one")
a = study.run("grid", lr=lrs, words=[*ks, 0], epochs=2)
b = study.run("few", seeds=seeds[:1], lr=sorted({*lrs}))
points = studies.product(seeds, lr=lrs)
study.run_all("all", [dict(point, lr=point["lr"] + point["seed"]) for point in points for _ in range(2)])
lrs = measured()
study.run("later", lr=lrs)"""


def test_trials_are_counted_from_the_source(tmp_path):
    h.write_notebook(tmp_path, "01_x", h.PARAMETERS, "%time 1", GROUPS, 'for n in lrs:\n    study.run(f"{n} labels")')
    groups = plan.count_groups(tmp_path / "01_x.ipynb", {"seeds": [0, 1, 2], "lrs": [3, 4]})
    sizes = [groups.pop(what) for what in ("one", "grid", "few", "all", "later")]
    assert sizes == [3, 18, 2, 12, None] and list(groups.values()) == [None]


def test_a_changed_notebook_is_named_before_it_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert index.commit_of() == "", "no repository"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "notebooks").mkdir()
    h.write_notebook(tmp_path / "notebooks", "01_x", "# X", "1")
    for command in ["init", "-q"], ["add", "."], ["commit", "-qm", "one"]:
        subprocess.run([*git, *command], check=True)
    commit = index.commit_of()
    assert re.fullmatch("[0-9a-f]{7,}", commit)
    plan.announce(tmp_path, {}, {}, {}, commit)
    h.write_notebook(tmp_path / "notebooks", "01_x", "# X", "2")
    plan.announce(tmp_path, {}, {}, {}, index.commit_of())
    assert capsys.readouterr().out == f"commit {commit} (changed since: notebooks/01_x.ipynb)\n"


def keep_trial(out, key, seconds):
    (out / "trials").mkdir(exist_ok=True)
    (out / "trials" / (key + ".json")).write_text(json.dumps({"seconds": seconds}))


def test_the_log_says_what_is_wanted_there_and_left(tmp_path):
    groups = {"one": 3, "grid": 6, "later": None}
    assert plan.wanted(tmp_path, {}, {}) == "" == plan.progress(tmp_path, "01", groups)
    assert plan.wanted(tmp_path, groups, {}) == (
        "9 trials and 1 group of trials that only the run can count wanted, 0 in the store")
    keep_trial(tmp_path, "a", 10)
    assert plan.wanted(tmp_path, {"one": 3}, {}) == "3 trials wanted"  # it may have some
    assert plan.wanted(tmp_path, groups, {"one": ["a", "b"]}) == "2 trials wanted, 1 in the store"
    (tmp_path / "plan").mkdir()
    noted = [{"what": "one", "keys": ["a", "b", "c"]}]
    (tmp_path / "plan" / "01.json").write_text(json.dumps(noted))
    assert plan.progress(tmp_path, "01", groups) == "; trials: 1 of 9, about 80 s left"
    noted.append({"what": "grid", "keys": list("defghi")})
    (tmp_path / "plan" / "01.json").write_text(json.dumps(noted))
    keep_trial(tmp_path, "d", 60)
    assert plan.progress(tmp_path, "01", groups) == "; trials: 2 of 9, about 5 min left"
    for key in "bcefghi":
        keep_trial(tmp_path, key, 1)
    assert plan.progress(tmp_path, "01", groups) == "; trials: 9 of 9"


@pytest.mark.slow
def test_only_keeps_the_other_pages_and_statuses(gallery):
    folder, out, _, _ = gallery
    before, page = h.read_status(out), (out / "01_good.html").read_bytes()
    h.write_notebook(folder / "notebooks", "03_dies", "# Mended\n\nIt lives.", "1 + 1")
    code, said = h.run(folder, "--only", "03")
    after = h.read_status(out)
    assert code == 0 and said.strip().endswith("6 pages: 3 ok, 2 failed, 1 not run"), said
    assert after.pop("03_dies")["status"] == "ok" and before.pop("03_dies")
    assert after == before and (out / "01_good.html").read_bytes() == page


CHILD = 'import signal, subprocess\nsubprocess.Popen(["sleep", "100"])\n'
STUBBORN = CHILD + """print("half way", flush=True)
signal.signal(signal.SIGINT, signal.SIG_IGN)
open(out_dir + "/begun", "w").close()
for _ in range(1000): time.sleep(.1)"""
# A kernel that is in no hurry to end, and deaf to SIGTERM: its manager kills it after seconds.
LINGERING = """import atexit, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
atexit.register(time.sleep, 100)
time.sleep(1)"""


def sleeper(folder, *cells):
    """Make a project whose first notebook sleeps, and saves when it is interrupted."""
    notebooks = h.make_project(folder)
    h.write_notebook(notebooks, "01_sleeps", "# Deaf or not", "import time", h.PARAMETERS, *cells)
    h.write_notebook(notebooks, "02_next", "# Next", "1")
    return folder / "out"


def hurry(folder, **seconds):
    """Give a project's report.py other times than its own."""
    path = folder / "report.py"
    text = path.read_text(encoding="utf-8")
    for name, value in seconds.items():
        text, count = re.subn(rf"(?m)^{name} = \d+", f"{name} = {value}", text)
        assert count == 1, name
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def asleep(tmp_path_factory):
    """Start a report for each test that stops one, all at once: name -> (process, out)."""
    started = {}
    for name in "sigint", "sigterm", "stubborn", "killed":
        folder = tmp_path_factory.mktemp(name) / "project"
        out = sleeper(folder, {"stubborn": STUBBORN, "killed": CHILD + h.WAIT}.get(name, h.WAIT))
        started[name] = h.start(folder, "--out", str(out)), out
    for _, out in started.values():
        h.wait_for((out / "begun").exists)
    return started


@pytest.mark.slow
@pytest.mark.parametrize("name, signum", [("sigint", signal.SIGINT), ("sigterm", signal.SIGTERM)])
def test_a_signal_interrupts_the_cell(asleep, name, signum):
    process, out = asleep[name]
    process.send_signal(signum)
    assert process.wait(timeout=300) == 128 + signum
    assert (out / "saved").exists(), "the cell did not see KeyboardInterrupt"
    assert not h.survivors(out)
    rows, said = h.read_status(out), (out.parent / "said").read_text()
    assert (rows["01_sleeps"]["status"], rows["02_next"]["status"]) == ("interrupted", "not run")
    assert "KeyboardInterrupt" in Page(out / "01_sleeps.html").text
    assert "1 interrupted, 1 not run" in said and "Trace" not in said
    assert said.endswith("the same command goes on: finished trials are not run again\n")


@pytest.mark.slow
def test_a_second_interrupt_kills_a_stubborn_kernel(asleep):
    process, out = asleep["stubborn"]
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None and h.survivors(out)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=50) == 130 and not h.survivors(out)
    assert h.read_status(out)["01_sleeps"]["status"] == "interrupted"
    page = Page(out / "01_sleeps.html").text
    assert "Deaf" in page and "half way\n" in page, "what it had printed was not kept"


@pytest.mark.slow
def test_nothing_survives_a_killed_report(asleep):
    process, out = asleep["killed"]
    assert len(h.survivors(out)) >= 3, "papermill, its kernel, and what that started"
    process.kill()
    h.wait_for(lambda: not h.survivors(out), 10)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["", "cell 0"])
def test_an_interrupt_before_the_first_cell(tmp_path, where):
    out = sleeper(tmp_path / "project", "time.sleep(100)", "time.sleep(100)")
    process, said = h.start(tmp_path / "project", "--out", str(out)), tmp_path / "project" / "said"
    h.wait_for(lambda: "started" in said.read_text())
    h.wait_for(lambda: where in pages.find_cell(out / "notebooks" / "01_sleeps.ipynb"), 60)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130 and not h.survivors(out)
    assert h.read_status(out)["01_sleeps"]["status"] == "interrupted"
    assert "Deaf" in Page(out / "01_sleeps.html").text


@pytest.mark.slow
def test_a_cell_that_saves_for_too_long_is_ended_and_its_page_kept(gallery, tmp_path):
    limit = f"{4 * h.read_status(gallery[1])['02_fails']['seconds'] / 60:.2f}"
    out = sleeper(tmp_path / "project", STUBBORN)
    hurry(tmp_path / "project", GRACE=2)
    code, said = h.run(tmp_path / "project", "--timeout", limit, "--only", "01", "--out", str(out))
    row, page = h.read_status(out)["01_sleeps"], Page(out / "01_sleeps.html").text
    assert (code, row["status"]) == (1, "timeout") and not h.survivors(out), said
    assert "(in cell 4 of 4)" in row["reason"] and "half way\n" in page


@pytest.mark.slow
def test_the_log_names_a_cell_and_a_kernel_may_take_its_time_to_leave(tmp_path):
    out = sleeper(tmp_path / "project", LINGERING)
    hurry(tmp_path / "project", BEAT=0)
    code, said = h.run(tmp_path / "project", "--only", "01", "--out", str(out))
    assert h.read_status(out)["01_sleeps"]["status"] == "ok" and code == 0, said
    assert "01_sleeps: cell 4 of 4, " in said and ": , " not in said
    assert all(line.startswith("01_sleeps: ") for line in said.splitlines()[:-2]), said


def test_help_has_examples_and_exit_codes(capsys):
    with pytest.raises(SystemExit):
        report.main(["--help"])
    text = capsys.readouterr().out
    assert "\n    python report.py --profile small --jobs 2" in text
    assert "Exit code: 0 all" in text and "130/143" in text and "--timeout" in text


@pytest.mark.slow
def test_timeout_interrupts_even_a_cell_that_swallows_it(gallery, tmp_path):
    # Long enough for the cell to begin and the next notebook to end, on a loaded machine too.
    limit = f"{4 * h.read_status(gallery[1])['02_fails']['seconds'] / 60:.2f}"
    out = sleeper(tmp_path / "project", h.WAIT.replace("\n    raise", ""), "time.sleep(100)")
    code, said = h.run(tmp_path / "project", "--timeout", limit, "--out", str(out))
    rows = h.read_status(out)
    assert code == 1 and rows["02_next"]["status"] == "ok", said
    assert rows["01_sleeps"]["status"] == "timeout"
    assert rows["01_sleeps"]["seconds"] < 60 * float(limit) + 30
    assert f"longer than {float(limit):g} min" in rows["01_sleeps"]["reason"]
    assert (out / "saved").exists()
    assert not h.survivors(out)


def test_half_written_notebooks_are_tolerated(tmp_path):
    path = tmp_path / "half.ipynb"
    assert not pages.find_cell(path)
    path.write_text('{"cells": [{"cell_')
    assert not pages.find_cell(path)


def test_an_output_that_no_page_can_show_fails_its_notebook_alone(tmp_path):
    h.write_notebook(tmp_path, "01_odd", "# Odd", "1")
    nb = nbformat.read(str(tmp_path / "01_odd.ipynb"), as_version=4)
    nb.cells[1].outputs = [nbformat.from_dict(
        {"output_type": "stream", "name": "stdout", "text": 5})]
    row = {"status": "ok", "reason": "", "seconds": 1, "profile": "sample"}
    pages.write_page(tmp_path, {"01_odd": ("Odd", "")}, "01_odd", row, nb, {})
    assert row["status"] == "failed" and row["reason"].startswith("no page: ")
    assert row["reason"] in Page(tmp_path / "01_odd.html").text


def asked(jobs, stored=False):
    """Return the options of a command line that the kernels' environment depends on."""
    return types.SimpleNamespace(jobs=jobs, stored=stored)


def test_jobs_share_the_cores_and_wait_passively(tmp_path, monkeypatch):
    for name in "OMP_NUM_THREADS", "OMP_WAIT_POLICY":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert "OMP_NUM_THREADS" not in report.set_environment(tmp_path, asked(1))
    assert report.set_environment(tmp_path, asked(3))["OMP_NUM_THREADS"] == "2"
    assert report.set_environment(tmp_path, asked(16))["OMP_NUM_THREADS"] == "1"
    assert report.set_environment(tmp_path, asked(1))["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "FILIMDB_STORED" not in report.set_environment(tmp_path, asked(1))
    assert report.set_environment(tmp_path, asked(1, True))["FILIMDB_STORED"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    env = report.set_environment(tmp_path, asked(3))
    assert (env["OMP_NUM_THREADS"], env["OMP_WAIT_POLICY"]) == ("5", "ACTIVE")
