"""A report's front page, and the whole report in one file, to print or to mail.

Whatever they say they read from the pages: an index shows what its pages show.
"""
import re
import subprocess
from collections import Counter

from markupsafe import Markup

import files
import pages
from assignment import best_accuracy, spread, table_by_point

STATES = "ok", "failed", "timeout", "interrupted", "not run"


def read_recipe():
    """Return the reference run's recipe (results/reference/recipe.json), or None."""
    return files.read_json(pages.ROOT / "results" / "reference" / "recipe.json", None)


def commit_of():
    """Return the project's commit, and which files differ from it, in words; "" without git."""
    try:
        said = [subprocess.run(["git", *command.split()], cwd=str(pages.ROOT), check=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               timeout=10).stdout.decode("utf-8", "replace")
                for command in ("rev-parse --short HEAD", "status --porcelain -uno")]
    except (OSError, subprocess.SubprocessError):
        return ""
    names = [line[3:] for line in said[1].splitlines()]
    changed = ", ".join(names[:6]) + f" and {len(names) - 6} more" * (len(names) > 6)
    return said[0].strip() + f" (changed since: {changed})" * bool(changed)


def summarize(status):
    """Return what the front page says of a whole run: its sizes, provenance, trials, leaks."""
    rows = list(status.values())
    runs = [row["run"] for row in rows if row.get("run")]
    # page 01, whose box names no seeds of its own, trains nothing
    trained = [row["run"] for row in rows if row.get("run") and row.get("trials")]
    trials = {trial: s for row in rows for trial, s in row.get("trials", {}).items()}
    counts = {trial: n for row in rows for trial, n in row.get("predictions", {}).items()}
    n, right, n_leaked, right_leaked = map(sum, zip(*counts.values())) if counts else [0] * 4
    stacks = [", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items()))
              for run in runs]
    facts = {"date": sorted(row["date"] for row in rows if row.get("date")),
             "hardware": [run["hardware"] for run in runs], "versions": stacks,
             "commit": [row["commit"] for row in rows if row.get("commit")],
             **{"checksum of " + key: [run[key][:12] for run in runs]
                for key in ("data", "weights")}}
    return {"verdicts": Counter(row["verdict"] for one in rows for row in one.get("answers", ())),
            "sizes": {key: spread([run[key] for run in trained]) for key in (
                "n_train", "n_dev", "seeds")} if trained else {},
            "smallest": spread([run["smallest"] for run in trained],
                               "{:.1f}".format) if trained else "",
            "one_seed": bool(trained) and max(run["seeds"] for run in trained) == 1,
            "provenance": {key: " / ".join(dict.fromkeys(values))
                           for key, values in facts.items() if values},
            "trials": trials, "right": (n, right), "leaked": (n_leaked, right_leaked)}


def write_index(out, titles, status, profile, whole=False):
    """Write the index page and status.json; return a line that counts the states.

    whole: write report.html too, which it then names.
    """
    ran = [row["profile"] for row in status.values() if row["status"] != "not run"]
    profile = " and ".join(dict.fromkeys(ran)) or profile
    states = [status[name]["status"] for name in titles]
    counts = ", ".join(f"{states.count(s)} {s}" for s in STATES if s in states)
    answers = {name: status[name].get("answers", []) for name in titles}
    files.save_json(str(out / "status.json"), status)
    points = table_by_point(answers, {name: titles[name].points for name in titles})
    pages.save_page(out, "index", titles=titles, status=status, profile=profile, counts=counts,
                    answers=answers, best=best_accuracy(answers), recipe=read_recipe(),
                    run=summarize(status), points=points, whole=whole)
    if whole:
        write_print(out, titles, profile)
    return f"{len(states)} pages: {counts}"


def write_print(out, titles, profile):
    """Write report.html: the index and all pages in one file, made of the pages as they are."""
    names = "|".join(["index", *map(re.escape, titles)])

    def body(name):
        text = (out / (name + ".html")).read_text(encoding="utf-8")
        text = text[text.index("<main"):text.rindex("</main>")].split(">", 1)[1]
        for own in (r'<(p|section) class="screen".*?</\1><!-- screen -->',
                    r'<input type="checkbox" id="show-code".*?</label>'):
            text = re.sub(own, "", text, flags=re.DOTALL)
        text = re.sub(r'(?<=[ "])(id|aria-labelledby)="', rf'\1="{name}-', text)
        text = text.replace('href="#', f'href="#{name}-')
        text = re.sub(rf'href="({names})\.html#', r'href="#\1-', text)
        text = re.sub(rf'href="({names})\.html"', r'href="#\1"', text)
        return Markup(text.replace('<details class="given"', '<details open class="given"'))

    pages.save_page(out, "report", titles=titles, profile=profile,
                    bodies=[(name, body(name)) for name in ["index", *titles]])
