"""Training on a simulated GPU: a CPU's numbers, all tensors on one device, few launches and waits.

The device (fake_gpu.py) computes on the CPU, refuses tensors of two devices as CUDA does, and
counts. Before reviews went unpadded and numbers were read late, a step of 32 reviews through 12
layers was 2,982 launches and 18 waits in fp32 (some 5,000 with autocast's casts).
"""
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from tools import ROOT, SOAK, TODAY, made_up_reviews, make_tiny_bert

import files
import gpu
import helpers

if TODAY:
    import fake_gpu

pytestmark = pytest.mark.skipif(not TODAY, reason="PyTorch 1.3 takes no devices written in Python")

TEXTS, LABELS = made_up_reviews(48)
UNSEEN, _ = made_up_reviews(37, seed=3)
CALM = dict(dropout=0.0, attention_dropout=0.0)  # masks of two devices differ
QUICK = dict(CALM, seq_len=32, batch_size=16, epochs=2, lr=1e-3)
MOST_LAUNCHES = {"unpadded": 620, "padded": 640}  # of a step; a third of what they were is 994
MOST_WAITS = 1  # of a step: its loss and norm, which are read when the next one is queued


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A simulated GPU, as work of its own `fake_gpu.Gpu` counts it."""
    if not hasattr(torch, fake_gpu.NAME):
        fake_gpu.register()
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(helpers, "inference_mode", torch.no_grad)
    gpu.QUEUED.add(fake_gpu.NAME)
    with fake_gpu.pretend() as counts:
        yield counts
    gpu.QUEUED.discard(fake_gpu.NAME)


@pytest.fixture(params=["padded", "unpadded"])
def way(request, monkeypatch):
    """Have the simulated GPU pad, or go without."""
    go_unpadded(monkeypatch, request.param)
    return request.param


def go_unpadded(monkeypatch, way):
    for module in (gpu, helpers):
        monkeypatch.setattr(module, "unpadding", lambda device, precision: (
            way == "unpadded" and device.type == fake_gpu.NAME))


def numbers(history, *keys):
    return [row[key] for row in history for key in keys if row.get(key) is not None]


def mutate(monkeypatch, module, name, old, new):
    """Change a line of a function for the test."""
    source = textwrap.dedent(inspect.getsource(getattr(module, name)))
    assert source.count(old) == 1, source
    scope = {}
    exec(compile(source.replace(old, new), "mutation", "exec"), vars(module), scope)
    for one in (helpers, helpers.run, gpu):
        if hasattr(one, name):
            monkeypatch.setattr(one, name, scope[name])


# ---- numbers ------------------------------------------------------------------------------------

@pytest.mark.parametrize("levers", [{}, {"pooling": "mean"}])
def test_it_trains_and_classifies_as_a_cpu(device, way, tiny_bert, levers):
    def run(device):
        params = helpers.train(TEXTS, LABELS, model=tiny_bert, dev=made_up_reviews(20, seed=5),
                               device=device, **QUICK, **levers)
        return params, helpers.probabilities(UNSEEN, params)

    cpu, expected = run("cpu")
    params, got = run(fake_gpu.NAME)
    assert next(params["model"].parameters()).device.type == fake_gpu.NAME
    for key in ("loss", "grad_norm", "dev_loss", "train_loss", "lr", "targets"):
        assert numbers(params["history"], key) == pytest.approx(
            numbers(cpu["history"], key), abs=2e-5), key
    assert torch.allclose(got, expected, atol=2e-5) and got.device.type == "cpu"
    kernels = {name for name in device.launches if "attention" in name}
    assert ("_flash_attention_forward" in kernels) == (way == "unpadded"), kernels


@pytest.mark.parametrize("settings", [{}, {"whole_word": True}, {"freeze": True}])
def test_it_pretrains_as_a_cpu(device, way, tiny_bert, tmp_path, monkeypatch, settings):
    def run(device):
        monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / device))
        note = helpers.pretrain(TEXTS, model=tiny_bert, device=device, **QUICK, **settings)
        with open(os.path.join(note["path"], "history.json")) as file:
            return note, files.json.load(file)

    (cpu, expected), (note, history) = run("cpu"), run(fake_gpu.NAME)
    for key in ("loss", "grad_norm", "targets", "held_out_loss"):
        assert numbers(history, key) == pytest.approx(numbers(expected, key), abs=2e-5), key
    sizes = [os.path.getsize(os.path.join(one["path"], "pytorch_model.bin")) for one in (cpu, note)]
    assert sizes[0] == sizes[1], "tied weights are written once"


def test_where_memory_runs_out_the_step_is_repeated_in_smaller_parts(device, way, tiny_bert, capsys,
                                                                     monkeypatch):
    settings = dict(QUICK, model=tiny_bert, device=fake_gpu.NAME)
    expected = helpers.train(TEXTS, LABELS, **settings)["history"]
    true_loss, sizes = helpers.summed_loss, []

    def summed_loss(forward, model, batch, *rest):
        sizes.append(gpu.tokens_of(batch))
        if sizes[-1] > 100:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return true_loss(forward, model, batch, *rest)

    monkeypatch.setattr(helpers, "summed_loss", summed_loss)
    history = helpers.train(TEXTS, LABELS, **settings)["history"]
    assert numbers(history, "loss", "grad_norm") == pytest.approx(
        numbers(expected, "loss", "grad_norm"), abs=2e-5)
    assert sum(size > 100 for size in sizes) == capsys.readouterr().out.count("out of memory at")
    assert 2 <= sum(size > 100 for size in sizes) <= 4, "the limit stays for all later steps"
    assert max(sizes[sizes.index(max(sizes[-5:])):]) > 50, "small ones are not halved in vain"


def test_a_stopped_run_goes_on(device, way, tiny_bert, capsys, monkeypatch):
    settings = dict(QUICK, model=tiny_bert, device=fake_gpu.NAME)
    expected = helpers.train(TEXTS, LABELS, **settings)["history"]
    true_step = helpers.clear_gradients
    calls = []

    def stop(model):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        true_step(model)

    monkeypatch.setattr(helpers, "clear_gradients", stop)
    with pytest.raises(KeyboardInterrupt):
        helpers.train(TEXTS, LABELS, **settings)
    monkeypatch.setattr(helpers, "clear_gradients", true_step)
    history = helpers.train(TEXTS, LABELS, **settings)["history"]
    assert "resuming from the checkpoint at step 3" in capsys.readouterr().out
    assert numbers(history[:3], "loss") == pytest.approx(numbers(expected[:3], "loss"), abs=2e-6)
    assert len(numbers(history, "loss")) == len(history) == len(expected), "none is lost"


def test_a_loss_that_is_nan_stops_the_run_a_step_later_at_most(device, tiny_bert, monkeypatch):
    true_loss, calls = helpers.summed_loss, []

    def summed_loss(*args):
        calls.append(1)
        return true_loss(*args) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(helpers, "summed_loss", summed_loss)
    monkeypatch.setattr(helpers.run, "EVALUATIONS", 1)
    with pytest.raises(helpers.Diverged, match="at step 2 of 6"):
        helpers.train(TEXTS, LABELS, model=tiny_bert, device=fake_gpu.NAME, **QUICK)
    assert len(calls) == 3
    assert not os.listdir(os.path.join(os.environ["FILIMDB_CACHE"], "runs")), "no broken checkpoint"


# ---- faults that a CPU does not show --------------------------------------------------------------

MUTATIONS = {
    "labels left behind": (gpu, "to_device", "if torch.is_tensor(value) else",
                           "if key != 'labels' and torch.is_tensor(value) else"),
    "logits not fetched": (helpers, "predict_logits",
                           "one_behind(parallel_map(logits_of, groups, device), device)",
                           "parallel_map(logits_of, groups, device)"),
    "a loss summed elsewhere": (helpers, "accumulate", "torch.zeros((), device=device)",
                                "torch.zeros(())"),
}


@pytest.mark.parametrize("fault", sorted(MUTATIONS))
def test_tensors_on_two_devices_fail(device, tiny_bert, monkeypatch, fault):
    def run(where):
        helpers.pretrain(TEXTS[:20], model=tiny_bert, device=where, **QUICK)
        params = helpers.train(TEXTS[:20], LABELS[:20], model=tiny_bert, device=where, **QUICK)
        helpers.classify(UNSEEN[:5], params)

    mutate(monkeypatch, *MUTATIONS[fault])
    run("cpu")  # there nothing shows
    with pytest.raises((RuntimeError, AssertionError), match="same device"):
        run(fake_gpu.NAME)


# ---- launches and waits ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def deep_bert(tmp_path_factory):
    """A tiny BERT of 12 layers: as many kernels as bert-base."""
    return make_tiny_bert(tmp_path_factory.mktemp("models") / "deep", layers=12)


def cost_of_a_step(device, work, tmp_path, monkeypatch):
    """Return (launches, waits) of a step: what four steps cost beyond two, evaluations aside."""
    monkeypatch.setattr(helpers.run, "EVALUATIONS", 1)
    costs = []
    for epochs in (1, 2):
        monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / f"{work}-{epochs}"))
        device.reset()
        steps = work(epochs)
        costs.append((steps, sum(device.launches.values()), sum(device.syncs.values())))
    (few, *less), (many, *more) = costs
    return [(b - a) / (many - few) for a, b in zip(less, more)]


def training(model):
    texts, labels = made_up_reviews(64)
    return lambda epochs: len(helpers.train(texts, labels, model=model, device=fake_gpu.NAME, **dict(
        QUICK, batch_size=32, seq_len=64, epochs=epochs))["history"])


def pretraining(model):
    texts, _ = made_up_reviews(71)
    return lambda epochs: helpers.pretrain(texts, model=model, device=fake_gpu.NAME, **dict(
        QUICK, batch_size=32, seq_len=64, epochs=epochs))["curve"][-1]["step"]


@pytest.mark.parametrize("work", [training, pretraining])
def test_a_step_is_few_launches_and_hardly_waits(device, way, deep_bert, tmp_path, monkeypatch, work):
    launches, waits = cost_of_a_step(device, work(deep_bert), tmp_path, monkeypatch)
    print(f"{work.__name__}, {way}: {launches:.0f} launches and {waits:.1f} waits a step")
    assert 500 < launches <= MOST_LAUNCHES[way]
    assert 1 <= waits <= MOST_WAITS, device.syncs


@pytest.mark.parametrize("module,name,old,new", [
    (helpers, "fit", "run.expect(lr, n_targets, loss, norm)",
     "run.expect(lr, n_targets, loss.item(), norm.item())"),
    (helpers, "fit", "n_targets = count_targets(micro_batches)",
     "n_targets = count_targets([{'labels': b['labels'].to(run.device)} for b in micro_batches])"),
    (gpu, "to_device", "value.to(device, non_blocking=True)", "value.to(device)"),
    (gpu, "ready_batch", "return pinned(batch)", "return batch")])
def test_what_makes_the_host_wait_is_seen(device, deep_bert, tmp_path, monkeypatch, module, name, old,
                                          new):
    mutate(monkeypatch, module, name, old, new)
    _, waits = cost_of_a_step(device, training(deep_bert), tmp_path, monkeypatch)
    assert waits > MOST_WAITS, device.syncs


def test_a_classification_waits_once_a_pass(device, way, tiny_bert):
    params = helpers.train(TEXTS, LABELS, model=tiny_bert, device=fake_gpu.NAME, **QUICK)
    device.reset()
    helpers.classify(UNSEEN, params)
    passes = device.launches["embedding"] // 3  # words, positions, types
    print(f"{way}: {passes} passes, {sum(device.launches.values())} launches, {device.syncs}")
    assert passes == 1 and sum(device.syncs.values()) == 1


# ---- as CUDA itself, in bf16 ----------------------------------------------------------------------

AS_CUDA = """
import ctypes, json, sys
library, model = sys.argv[1:]
ctypes.CDLL(library, ctypes.RTLD_GLOBAL)  # before PyTorch asks for the first time what there is
import torch, fake_gpu, helpers, tools
fake_gpu.register_as_cuda()
torch.set_num_threads(1)
helpers.inference_mode = torch.no_grad
texts, labels = tools.made_up_reviews(64)
settings = dict(model=model, batch_size=32, seq_len=64, lr=1e-3, dropout=0.0, attention_dropout=0.0)
helpers.run.EVALUATIONS = 1
def run(device, epochs, seed=0):
    params = helpers.train(texts, labels, epochs=epochs, seed=seed, device=device, **settings)
    return [row["loss"] for row in params["history"]], helpers.classify(texts, params)
expected, labels_of_cpu = run("cpu", 2)
with fake_gpu.pretend() as device:
    found, costs = run("cuda", 2), []
    for epochs in (1, 3):
        device.reset()
        run("cuda", epochs, seed=epochs)
        costs.append((sum(device.launches.values()), sum(device.syncs.values())))
    (launches, waits), (more_launches, more_waits) = costs
print(json.dumps({"losses": found[0], "expected": expected, "equal": found[1] == labels_of_cpu,
                  "launches": (more_launches - launches) / 4, "waits": (more_waits - waits) / 4,
                  "casts": device.launches["_to_copy"],
                  "flash": device.launches["_flash_attention_forward"]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not SOAK or not shutil.which("g++"), reason="a soak test, needs g++")
def test_as_cuda_it_trains_in_bf16_by_cudas_own_table(deep_bert, tmp_path):
    from torch.utils.cpp_extension import include_paths
    library, lib = str(tmp_path / "fake_cuda.so"), os.path.join(os.path.dirname(torch.__file__), "lib")
    subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", "-O0",
                    *("-I" + path for path in include_paths()),
                    str(ROOT / "tests" / "fake_cuda.cpp"), "-o", library,
                    "-L" + lib, "-Wl,-rpath," + lib, "-ltorch_cpu", "-lc10"],
                   check=True, timeout=500)
    done = subprocess.run([sys.executable, "-c", AS_CUDA, library, deep_bert], check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=500,
                          env=dict(os.environ, FILIMDB_CACHE=str(tmp_path), PYTHONPATH=os.pathsep.join(
                              [str(ROOT), str(ROOT / "tests")])))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().split("\n")[-1])
    print(found)
    assert found["losses"] == pytest.approx(found["expected"], abs=0.03)
    assert found["losses"] != found["expected"] and found["equal"]
    assert found["flash"] and found["casts"] > 100, "in bf16, without padding"
    assert found["launches"] <= 5000 / 3 and found["waits"] <= MOST_WAITS
