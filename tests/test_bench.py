"""The benchmark: every comparison runs, counts the same work, and its arithmetic is right."""
import importlib.util
import json
from unittest import mock

import pytest
import torch
from tools import ROOT, TODAY, load_module

import cpu
import gpu
import helpers

pytestmark = pytest.mark.skipif(not TODAY, reason="today's Trainer is what it compares with")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location(
        "bench", str(ROOT / "benchmarks" / "bench.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_small_comparison_runs(bench, tmp_path, capfd):
    out = tmp_path / "table.json"
    bench.main(["--data", "data/sample", "--model", "data/sample/bert", "--n", "16", "--rounds",
                "1", "--n-classify", "40", "--n-tokenize", "60", "--out", str(out)])
    rows = {(row["work"], row["job"]): row for row in json.loads(out.read_text())}
    assert set(rows) == {(kind, job) for kind, jobs in bench.KINDS.items() for job in jobs
                         if "bf16" not in job}
    for (_, job), row in rows.items():
        assert row["examples_s"] > 0 and row["peak_mb"] > 50 and 0 <= row["padding"] < 1
        assert row["ours_is"] == 1 or job != "ours"
    assert rows["train", "ours"]["padding"] < 0.1 < rows["train", "plain-512"]["padding"]
    assert "ours is" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind,jobs", [("train", ["ours", "trainer", "plain-512"]),
                                       ("classify", ["ours", "trainer-bf16", "onnxruntime"]),
                                       ("mlm", ["ours", "ours-bf16"])])
def test_all_jobs_see_the_same_tokens(bench, tmp_path, kind, jobs):
    sample = str(ROOT / "data" / "sample")
    counts = {}
    for job in jobs:
        (tmp_path / job).mkdir()
        made = bench.run_job(kind, job, 16, bench_arguments(sample), str(tmp_path / job))
        counts[job] = made["real"], made["squares"]
        assert made["real"] <= made["padded"]
    assert len(set(counts.values())) == 1, counts


@pytest.mark.slow
def test_the_graph_for_onnx_runtime_is_the_model(bench, tiny_bert, tmp_path):
    """Whatever the batch and its padding: the graph was made from one batch without any."""
    import onnxruntime
    from transformers import AutoModelForSequenceClassification
    folder = str(tmp_path / "classifier")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()
    model.save_pretrained(folder)  # with its new head
    bench.export_graph(folder, str(tmp_path / "bert.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "bert.onnx"),
                                           providers=["CPUExecutionProvider"])
    for lengths in ([8, 8], [5, 3, 1], [40], [30, 30, 29, 2, 2]):
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        mask = ids.clone()
        for row, n in enumerate(lengths):
            ids[row, :n] = torch.arange(5, 5 + n)
            mask[row, :n] = 1
        given = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            wanted = model(ids, attention_mask=mask)[0]
        assert torch.allclose(torch.from_numpy(given[0]), wanted, atol=1e-5), lengths


def test_ceilings_are_measured_as_far_as_they_are_needed(bench, monkeypatch):
    monkeypatch.setattr(bench, "matmul_ceiling", lambda model, precision: {"fp32": 1, "bf16": 2}[
        precision])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert list(bench.measure_ceilings("", False).items()) == [("fp32", 1)]
    assert list(bench.measure_ceilings("", True).items()) == [("fp32", 1), ("bf16", 2)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert bench.measure_ceilings("", False) == bench.measure_ceilings("", True) == {"bf16": 2}


def test_bf16_is_timed_when_asked_and_compared_with_itself(bench, monkeypatch, capsys):
    sample, made = str(ROOT / "data" / "sample"), []

    def run_job(kind, job, n, args, cache):
        made.append(job)
        return dict(seconds={"ours": 6, "trainer": 30, "ours-bf16": 4}.get(job, 8), examples=n,
                    real=600, padded=800, squares=9000, peak_mb=1)

    monkeypatch.setattr(bench, "run_job", run_job)
    monkeypatch.setattr(bench, "measure_ceilings", lambda model, bf16: {
        "fp32": (1e9, "numpy"), "bf16": (2e9, "PyTorch")})
    bench.main(["--data", "data/sample", "--model", sample + "/bert", "--rounds", "2",
                "--kinds", "classify", "--bf16"])
    assert made == 2 * ["ours", "onnxruntime", "trainer", "ours-bf16", "trainer-bf16"]
    printed = capsys.readouterr().out
    assert "1 GFLOP/s in fp32 (numpy), 2 GFLOP/s in bf16 (PyTorch)" in printed
    ratios = [line.split()[-1] for line in printed.splitlines()[2:]]
    assert ratios == ["1.00x", "1.33x", "5.00x", "1.00x", "2.00x"]
    assert bench.matmul_ceiling(sample + "/bert", "bf16")[0] > 0


def test_single_jobs_are_timed_against_ours(bench, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(bench, "measure_ceilings", lambda model, bf16: {"fp32": (1e9, "numpy")})
    monkeypatch.setattr(bench, "run_job", lambda kind, job, *args: made.append(job) or dict(
        seconds=1, examples=1, real=1, padded=1, squares=1, peak_mb=1))
    bench.main(["--data", "data/sample", "--model", str(ROOT / "data" / "sample" / "bert"),
                "--rounds", "1", "--kinds", "classify", "--jobs", "onnxruntime"])
    assert made == ["ours", "onnxruntime"]
    made.clear()
    bench.main(["--data", "data/sample", "--model", str(ROOT / "data" / "sample" / "bert"),
                "--rounds", "2", "--kinds", "train", "tokenize", "--jobs", "plain-512"])
    assert made == ["ours", "plain-512", "ours", "ours", "ours-again"], "some in one round alone"


def test_the_ceiling_is_the_fastest_product_that_is_fp32(bench, monkeypatch):
    """A library that rounds to bf16 is no ceiling, however fast; the others are all asked."""
    sample, clock = str(ROOT / "data" / "sample" / "bert"), [0.0]
    candidates, flop = bench.products(sample, "fp32")
    assert {"PyTorch", "numpy", "ONNX Runtime"} <= set(candidates)
    assert ("PyTorch with oneDNN" in candidates) == (
        cpu.measure_products(cpu.onednn_setting())[1] < cpu.ACCURATE)
    first, *others = (product() for product in candidates.values())
    assert all(torch.allclose(first, other, atol=1e-4) for other in others)
    monkeypatch.setattr(bench, "product_by_onnx", lambda a, b: lambda: (a @ b) * 1.001)
    assert "ONNX Runtime" not in bench.products(sample, "fp32")[0]

    def takes(seconds):
        def product():
            clock[0] += seconds
        return product

    monkeypatch.setattr(bench, "products", lambda model, precision: (
        {"slow": takes(2.0), "fast": takes(0.5)}, 100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    assert bench.matmul_ceiling("", "fp32") == (200.0, "fast")


@pytest.mark.slow
def test_the_gpus_benchmark_runs_to_its_end_on_a_cpu(tmp_path, monkeypatch, capfd):
    """Small: every part, with its checks; what only a GPU has is named as not measured."""
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path))
    bench_gpu = load_module("benchmarks/bench_gpu.py")
    out = tmp_path / "table.json"
    assert bench_gpu.main(["--device", "cpu", "--out", str(out), "--n", "48"]) == 0
    rows = {what: (value, remark) for what, value, remark in json.loads(out.read_text())}
    for what in ("training", "classifying", "masked LM", "transformers.Trainer, group_by_length"):
        assert float(rows[what][0].split()[0].replace(",", "")) > 0, rows[what]
    for what in ("launches and waits a step", "largest batch", "Trainer, flattened"):
        assert rows[what][0] == "not measured" and rows[what][1]
    said = capfd.readouterr().out
    assert "all numbers in bounds" in said and "FAILS" not in said
    assert all(f"| {what} | {value} |" in said for what, (value, _) in rows.items())


def test_a_number_out_of_bounds_fails_the_gpus_benchmark(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path))
    bench_gpu = load_module("benchmarks/bench_gpu.py")

    def wrong(bench):
        bench.check("a loss", 0.5, 0.1)

    def broken(bench):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(bench_gpu, "PARTS", (wrong, broken))
    assert bench_gpu.main(["--device", "cpu", "--n", "8"]) == 1
    said = capfd.readouterr().out
    assert "| a loss | 5.0e-01 | at most 1e-01: FAILS |" in said and "FAILED: a loss, broken" in said
    assert bench_gpu.main(["--device", "cpu", "--n", "8", "--minutes", "0"]) == 0
    assert capfd.readouterr().out.count("no time was left") == 2


def test_what_travels_is_packed_and_unpacked(tmp_path, monkeypatch, capsys):
    pack = load_module("benchmarks/pack.py")
    monkeypatch.setattr(pack, "FOLDER", str(tmp_path))
    arguments = ["--data", "data/sample", "--model", "data/sample/bert"]
    pack.main(arguments)
    pack.main(["--unpack"])
    import helpers
    here = helpers.load_filimdb(str(tmp_path / "FILIMDB"), ("train", "dev"))
    there = helpers.load_filimdb("data/sample", ("train", "dev"))
    assert here == there
    assert helpers.load_bert(str(tmp_path / "minilm"))[0].dtype.is_floating_point
    monkeypatch.setattr(pack, "LIMIT", 1000)
    with pytest.raises(SystemExit, match="more than 0 MiB"):
        pack.main(arguments)


def bench_arguments(sample):
    import argparse
    return argparse.Namespace(model=sample + "/bert", data=sample)


def test_the_summary_is_medians_and_ratios(bench):
    def runs(*seconds):
        return [dict(seconds=s, examples=10, real=600, padded=800, squares=0, peak_mb=s)
                for s in seconds]

    row = bench.summarize("classify", "x", runs(5, 100, 10), runs(2, 1, 2), 1e9,
                          str(ROOT / "data" / "sample" / "bert"))
    assert row["examples_s"] == 1 and row["tokens_s"] == 60 and row["padding"] == 0.25
    assert row["ours_is"] == 5 and row["peak_mb"] == 100
    assert row["of_ceiling"] == bench.flop_of(
        str(ROOT / "data" / "sample" / "bert"), "classify", 600, 0) / 10 / 1e9


def test_the_encoders_products_are_counted_attentions_too(bench, tiny_bert):
    """By hand: the tiny BERT has 2 layers, 32 wide, 64 within; 3 reviews of 5, 5 and 2 tokens."""
    dense = 2 * (4 * 32 * 32 + 2 * 32 * 64) * 12
    attention = 2 * 2 * 32 * (25 + 25 + 4)
    assert bench.flop_of(tiny_bert, "classify", 12, 54) == 2 * (dense + attention)
    assert bench.flop_of(tiny_bert, "train", 12, 54) == 6 * (dense + attention)
    counts = {"real": 0, "padded": 0, "squares": 0}
    bench.add_batch(counts, [5, 5, 2], 15)
    assert counts == {"real": 12, "padded": 15, "squares": 54}


def test_tokens_are_counted_as_a_gpu_gets_them_too(bench, monkeypatch):
    """Padded, with a mask of four dimensions; as one row, with boundaries; whole, without a mask."""
    batch = helpers.pad([[7] * 5, [7] * 2, [7] * 5], 0)
    assert bench.lengths_of(batch["input_ids"], batch["attention_mask"]) == [5, 2, 5]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    ready = gpu.pinned(batch)
    assert bench.lengths_of(ready["input_ids"], ready["attention_mask"]) == [5, 2, 5]
    seen = []
    row = gpu.unpad(batch)
    gpu.hidden_states(mock.Mock(bert=lambda ids, **rest: seen.append((ids, rest)) or [None]), row)
    ids, rest = seen[0]
    assert ids.shape == (1, 12) and bench.lengths_of(ids, attend=rest["attend"]) == [5, 2, 5]
    assert bench.lengths_of(batch["input_ids"]) == [5, 5, 5]
