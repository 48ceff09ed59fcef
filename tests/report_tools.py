"""Made-up notebooks, and a folder like the project's in which report.py runs them."""
import base64
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WAIT = """try:
    open(out_dir + "/begun", "w").close()
    time.sleep(100)
except KeyboardInterrupt:
    open(out_dir + "/saved", "w").close()
    raise"""
PARAMETERS = 'lr = 2e-5  # step\nepochs = 1\nsizes = [1, 2]\nfast = True\nmodel = "a"\ndata_dir = "b"\nout_dir = ""'


def png(width, height, rgb=b"\x3a\x7c\xa8"):
    """Make a PNG of one colour, base64."""
    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data) & 0xFFFFFFFF))

    rows = (b"\x00" + rgb * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return base64.b64encode(data).decode()


def write_notebook(folder, name, *cells):
    """Store a notebook: `# ...` cells are Markdown, the one with PARAMETERS gets the tag."""
    made = []
    for source in cells:
        if source.startswith(("# ", "## ")):
            made.append(dict(cell_type="markdown", metadata={}, source=source))
        else:
            tags = {"tags": ["parameters"]} if "out_dir = " in source else {}
            made.append(dict(cell_type="code", metadata=tags, source=source, outputs=[],
                             execution_count=None))
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb = dict(cells=made, metadata={"kernelspec": spec}, nbformat=4, nbformat_minor=4)
    (folder / (name + ".ipynb")).write_text(json.dumps(nb), encoding="utf-8")


def make_project(folder, profile="epochs: 2\nlr: 3.0e-5\n"):
    """Lay out report.py, its parts, notebooks/ and profiles/ in a folder of their own."""
    for name in "notebooks", "profiles":
        (folder / name).mkdir(parents=True)
    for name in ("report.py", "parameters.py", "plan.py", "pages.py", "index.py", "report.html.j2",
                 "files.py", "assignment.py"):
        shutil.copy(str(ROOT / name), str(folder))
    (folder / "profiles" / "sample.yml").write_text(profile, encoding="utf-8")
    # The user's own kernel is broken, as after a removed conda environment: ours must win.
    user = folder / "user" / "kernels" / "python3"
    user.mkdir(parents=True)
    broken = {"argv": ["false", "{connection_file}"], "display_name": "mine", "language": "python"}
    (user / "kernel.json").write_text(json.dumps(broken), encoding="utf-8")
    return folder / "notebooks"


def add_gallery(notebooks):
    """Add one notebook of every kind that a report must survive."""
    picture = png(640, 300)
    write_notebook(
        notebooks, "01_good",
        "# How long is `a review`?\n\nWe **count** words, e.g. in one line. Then more.",
        "import json, os, sys, time\nfrom IPython.display import HTML, Image, display",
        PARAMETERS,
        "## Words in a review\n\nThe table is made up; see [the next one](02_fails.ipynb).\n\n"
        "| part | reviews | mean accuracy |\n|---|---|---|\n| train | 14,980 | 0.8312 |\n"
        "| dev | 10,000 | 0.8290 |",
        'seen = dict(lr=lr, epochs=epochs, sizes=sizes, cache=os.environ["FILIMDB_CACHE"])\n'
        'json.dump(seen, open(out_dir + "/seen.json", "w"))\n'
        "for i in range(101):\n"
        '    sys.stdout.write("\\r%3d%% of batches" % i); sys.stdout.flush(); time.sleep(.003)\n'
        'print()\nprint("done in " + out_dir)\nprint("word " * 60)\nprint("x" * 300)',
        "## What the figure says",
        "display(HTML('<table><tr>' + '<td>1,234.5</td>' * 14 + '</tr></table>'))\n"
        "display(HTML('<figure><img alt=\"A > B, in blue\" "
        f"src=\"data:image/png;base64,{picture}\">"
        "<figcaption>Accuracy by length</figcaption></figure>'))\n"
        f'Image(data=__import__("base64").b64decode("{png(40, 40)}"))',
        "## What the figure says\n\nThe same heading again.",
        'rows = [dict(question="Q1. Is <b>long</b> better?", verdict="supported", point="3a", figure="01",\n'
        '             answer="+1.2 points: 71.5 ± 0.4 % (3 seeds). The rest is detail."),\n'
        '        dict(question="Q2. Does the tail help?", answer="within noise", verdict="", point="", figure="")]\n'
        'run = dict(n_train=320, n_dev=200, seeds=3, hardware="an abacus", smallest=4.0,\n'
        '           data="d" * 64, weights="e" * 64, versions=dict(torch="1"))\n'
        'trials = dict(seconds=dict(a=30.0, b=60.0),\n'
        '              predictions=dict(a=[300, 200, 50, 50], b=[300, 250, 50, 50]))\n'
        'display(HTML("the run"), metadata=dict(run=run))\n'
        'display(HTML("<small>two trials</small>"), metadata=dict(trials=trials))\n'
        'print("Warning: 50 reviews stand in train and in dev: a leak")\n'
        "for row in rows:\n"
        "    display(HTML('<p class=\"answer\"><strong>Is it?</strong> +1.2 points <em>As expected.'\n"
        "                 '</em></p>'), metadata=dict(answer=row))\n"
        'os.makedirs(out_dir + "/answers", exist_ok=True)\n'
        'foreign = [dict(row, answer="of another run") for row in rows]\n'
        'json.dump(foreign, open(out_dir + "/answers/01_good.json", "w"))\n'
        'print("note on stderr", file=sys.stderr)\nrows[0]["answer"]')
    write_notebook(
        notebooks, "02_fails", "# A cell that fails\n\nIt raises.", PARAMETERS, "1 + 1",
        'answers.give("Never", "given", point="4a") if 0 else None\n'
        'raise ValueError("<script>alert(2)</script> at\\r\\nline two \\x1b[31mred \\u202etfel")',
        "## Never reached", "3")
    write_notebook(
        notebooks, "03_dies", "# A kernel that dies\n\nOut of memory.",
        "import os, signal, subprocess\nprint('so far, so good')", 'subprocess.Popen(["sleep", "100"])\n'
        "os.kill(os.getpid(), signal.SIGKILL)", "1")
    write_notebook(
        notebooks, "04_hostile", "# Reviews are data\n\nThey hold *anything*: x < y & z.",
        "## Text <b>in</b> `code`",
        'evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"\n'
        'print(evil, "\\x1b[31mred\\x1b[0m \\x07 \\x85 \\x1b]0;title\\x07 ")',
        "evil", "{evil: [evil]}",
        'from IPython.display import Javascript, display\ndisplay(Javascript("alert(3)"))\n'
        'display({"text/html": "<p>a figure</p>", "text/plain": evil}, raw=True)\n'
        'display({"text/markdown": evil + "[x](javascript:alert(4))"}, raw=True)')
    write_notebook(
        notebooks, "05_orphan", "# A papermill that dies\n\nThe kernel kills its parent.",
        "import os, signal, subprocess, time", 'subprocess.Popen(["sleep", "100"])\n'
        "os.kill(os.getppid(), signal.SIGKILL); time.sleep(100)")
    write_notebook(notebooks, "06_unread", "# Not asked for\n\nNo parameters.", "1")


def evil(way):
    """Return a review that tries to be markup, a terminal's master, and right before left."""
    return (f"<script>alert({way!r})</script></textarea></pre><img src=x onerror=alert(1)> "
            "**b** [go](javascript:alert(1)) <a href='javascript:alert(1)'>y</a> \"> &lt; "
            f"\x1b[31mred\x1b]0;title\x07 \x85 \u202etfel\u202c \u2067\u200f {way}")


def spelled(way):
    """Return what a reader is to see of it."""
    text = evil(way)
    for seen in "\x1b", "\x07", "\x85", "\u202e", "\u202c", "\u2067", "\u200f":
        text = text.replace(seen, ascii(seen)[1:-1])
    return text


def evil_outputs(folder):
    """Return a cell's outputs for each way in which a review's text reaches a page."""
    from tools import bare_study

    import figures
    import studies
    shown, show = [], studies.show_html
    figures.show_html = studies.show_html = lambda text, plain="", **metadata: shown.append(
        (text, metadata))
    try:
        figures.show_table([{evil("heading"): evil("table")}])
        study = bare_study()
        study.answer("3a", evil("question"), evil("answer"), verdict=True)
        study.summary()
        figures.save_figure(figures.new_figure(2)[0], "one", evil("caption"), str(folder),
                            [{"x": 1}], evil("alt"))
    finally:
        figures.show_html = studies.show_html = show
    data = [
        {"text/plain": evil("plain")}, {"text/markdown": evil("markdown"), "text/plain": "<M>"},
        {"text/html": "<p>a model's name</p>", "text/plain": evil("not shown")}]
    return [dict(output_type="display_data", metadata=metadata, data={"text/html": text})
            for text, metadata in shown] + [dict(output_type="stream", name=name, text=evil(name)) for name in (
        "stdout", "stderr")] + [dict(output_type="display_data", metadata={}, data=some)
                                for some in data] + [
        dict(output_type="error", ename="ValueError", evalue=evil("error"), traceback=[
            "\x1b[0;31mValueError\x1b[0m: " + evil("error")])]


SEEN = ["heading", "table", "question", "answer", "caption", "plain", "markdown", "stdout", "stderr",
        "error", "log", "reason", "given"]


def make_evil_page(folder):
    """Write a report whose every text is evil: a page, 01_evil.html, and the index."""
    import nbformat

    import index
    import pages
    cell = dict(cell_type="code", metadata={}, source="1", execution_count=1,
                outputs=evil_outputs(folder))
    nb = nbformat.from_dict(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=4))
    titles = {"01_evil": pages.Headline("Evil reviews", "They are text.", ["3a"])}
    row = {"status": "failed", "reason": evil("reason"), "seconds": 1, "profile": "sample"}
    pages.write_page(folder, titles, "01_evil", row, nb, {"model": evil("given")}, evil("log"))
    assert row["reason"] == evil("reason"), "no page: " + row["reason"]
    index.write_index(folder, titles, {"01_evil": row}, "sample", whole=True)


def make_gallery(tmp_path_factory, done=[]):  # noqa: B006 - one gallery for all tests
    """Run the whole gallery once: (folder of the project, of the report, exit code, output)."""
    if not done:
        folder = tmp_path_factory.mktemp("gallery") / "project"
        add_gallery(make_project(folder, "epochs: 2\nlr: 1\n"))
        code, said = run(folder, "--jobs", "2", "--only", "01", "02", "03_dies", "04", "05")
        done.append((folder, folder / "build" / "sample", code, said))
    return done[0]


def start(folder, *options):
    """Start report.py in a made-up project, its output going to FOLDER/said."""
    env = dict(os.environ, JUPYTER_DATA_DIR=str(folder / "user"))
    with open(str(folder / "said"), "w", encoding="utf-8") as said:
        return subprocess.Popen([sys.executable, str(folder / "report.py"), *options], env=env,
                                stdout=said, stderr=subprocess.STDOUT, cwd=str(folder))


def run(folder, *options):
    """Run report.py in a made-up project: (exit code, what it said)."""
    code = start(folder, *options).wait(timeout=400)
    return code, (folder / "said").read_text(encoding="utf-8")


def wait_for(condition, seconds=300):
    """Wait until a condition holds, and give what it returned."""
    end = time.time() + seconds
    while time.time() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {condition}")


def survivors(folder):
    """List the processes that a report started: its folder is in their environment."""
    text = subprocess.check_output(["ps", "axeww", "-o", "pid=,args="]).decode("utf-8", "replace")
    return [line for line in text.splitlines() if f"FILIMDB_CACHE={folder}" in line]


def read_status(out):
    """Read status.json: name -> row."""
    return json.loads((out / "status.json").read_text(encoding="utf-8"))
