"""The benchmark: every comparison runs, counts the same work, and its arithmetic is right."""
import importlib.util
import json

import conftest  # first: it puts helpers.py on the path
import pytest
from conftest import TODAY

pytestmark = pytest.mark.skipif(not TODAY, reason="today's Trainer is what it compares with")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location(
        "bench", str(conftest.ROOT / "benchmarks" / "bench.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_small_comparison_runs(bench, tmp_path, capfd):
    out = tmp_path / "table.json"
    bench.main(["--data", "data/sample", "--model", "data/sample/bert", "--n", "16", "--rounds",
                "1", "--n-classify", "40", "--n-tokenize", "60", "--out", str(out)])
    rows = {(row["work"], row["job"]): row for row in json.loads(out.read_text())}
    assert set(rows) == {(kind, job) for kind, jobs in bench.KINDS.items() for job in jobs}
    for (_, job), row in rows.items():
        assert row["examples_s"] > 0 and row["peak_mb"] > 50 and 0 <= row["padding"] < 1
        assert row["ours_is"] == 1 or job != "ours"
    assert rows["train", "ours"]["padding"] < 0.1 < rows["train", "plain-512"]["padding"]
    assert "ours is" in capfd.readouterr().out


@pytest.mark.parametrize("kind,jobs", [("train", ["ours", "trainer", "plain-512"]),
                                       ("classify", ["ours", "trainer"])])
def test_all_jobs_see_the_same_pieces(bench, tmp_path, kind, jobs):
    sample = str(conftest.ROOT / "data" / "sample")
    real = {job: bench.run_job(kind, job, 16, bench_arguments(sample), str(tmp_path / job))["real"]
            for job in jobs}
    assert len(set(real.values())) == 1, real


def bench_arguments(sample):
    import argparse
    return argparse.Namespace(model=sample + "/bert", data=sample)


def test_the_summary_is_medians_and_ratios(bench):
    def runs(*seconds):
        return [dict(seconds=s, examples=10, real=600, padded=800, peak_mb=s) for s in seconds]

    row = bench.summarize("classify", "x", runs(5, 100, 10), runs(2, 1, 2), 1e9,
                          str(conftest.ROOT / "data" / "sample" / "bert"))
    assert row["examples_s"] == 1 and row["tokens_s"] == 60 and row["padding"] == 0.25
    assert row["ours_is"] == 5 and row["peak_mb"] == 100
