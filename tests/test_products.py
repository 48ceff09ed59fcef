"""The matrix product of a CPU: the faster one that stays fp32, and others' settings left alone."""
import os
import threading
import time
import types

import pytest
import torch
from tools import DEV, TODAY, TRAIN, made_up_reviews

import cpu
import helpers
import studies
from helpers import classify, pretrain, train

CPU = torch.device("cpu")
TEXTS, LABELS = made_up_reviews(24)
QUICK = dict(seq_len=16, epochs=1, batch_size=8, accumulation=1, lr=1e-3)


class Machine:
    """A made-up CPU: how long its product takes, and how far it is off, by PyTorch's setting."""

    def __init__(self, seconds, error=0.0, found="none"):
        self.seconds = {"none": 2.0, "bf16": seconds}
        self.error = error
        self.fp32_precision = found
        self.clock = 0.0
        self.products = 0
        self.cores = set()  # that products were computed with
        self.real = torch.mm

    def mm(self, a, b):
        self.products += 1
        self.cores.add(torch.get_num_threads())
        self.clock += self.seconds[self.fp32_precision]
        return self.real(a, b) * (1 + self.error * (self.fp32_precision == "bf16"))


@pytest.fixture
def machine(monkeypatch):
    def put(*args, **kwargs):
        made = Machine(*args, **kwargs)
        monkeypatch.setattr(cpu, "onednn_setting", lambda: made)
        monkeypatch.setattr(torch, "mm", made.mm)
        monkeypatch.setattr(cpu, "time", types.SimpleNamespace(perf_counter=lambda: made.clock))
        monkeypatch.setattr(cpu, "_switch", types.SimpleNamespace(
            lock=threading.RLock(), product="", users=0, ours=False))
        return made
    return put


@pytest.mark.parametrize("seconds,error,product", [
    (1.0, 0.0, "oneDNN"), (1.0, 5e-6, "oneDNN"), (0.1, 2e-3, "default"), (0.1, 2e-5, "default"),
    (1.9, 0.0, "default"), (3.0, 0.0, "default"), (0.1, float("nan"), "default")])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_faster_product_is_taken_where_it_is_accurate(machine, seconds, error, product, threads):
    torch.set_num_threads(threads)
    made, state = machine(seconds, error), torch.get_rng_state()
    with cpu.fast_products(CPU):
        assert made.fp32_precision == {"oneDNN": "bf16", "default": "none"}[product]
    assert made.fp32_precision == "none" and cpu.product_of(CPU) == product
    measured = made.products
    assert measured == (1 if not error < 1e-5 else 11), "an inaccurate product is asked for once"
    assert made.cores == {1}, "as many as a micro-batch has"
    with cpu.fast_products(CPU):
        assert cpu.product_of(CPU) == product
    assert made.products == measured, "measured once in a process"
    assert torch.equal(torch.get_rng_state(), state), "the caller's random stream"
    torch.set_num_threads(1)


def test_it_is_measured_against_float64(machine, monkeypatch):
    """A product in fp32 that errs as much, and alike, would find nothing wrong."""
    made, real = machine(1.0), torch.Tensor.mm

    def err(a, b):
        return real(a, b) * (1.001 if a.dtype == torch.float32 else 1)

    made.real = err
    monkeypatch.setattr(torch.Tensor, "mm", err)
    assert cpu.measure_products(made)[1] == pytest.approx(1e-3, rel=0.01)
    assert cpu.product_of(CPU) == "default"


def test_the_least_time_of_each_counts(machine):
    made = machine(1.0)
    seconds = iter([9.0, 2.0, 9.0, *[2.0, 1.0] * 3, 9.0, 9.0])  # first the one for the error
    made.real, real = lambda a, b: setattr(made, "clock", made.clock + next(seconds)) or real(a, b), made.real
    made.seconds = {"none": 0.0, "bf16": 0.0}
    assert cpu.measure_products(made)[0] == {"none": 2.0, "bf16": 1.0}


def test_this_cpu_multiplies_in_fp32_whatever_is_chosen():
    random = torch.Generator().manual_seed(1)
    a, b = torch.randn(200, 300, generator=random), torch.randn(300, 400, generator=random)
    exact = a.double().mm(b.double())
    with cpu.fast_products(CPU):
        products = [a.mm(b), torch.addmm(torch.zeros(400), a, b), torch.bmm(a[None], b[None])[0],
                    b.t().mm(a.t()).t()]
    for product in products:
        assert float((product - exact).abs().max() / exact.abs().max()) < cpu.ACCURATE
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            if "amx_bf16" in file.read():  # there the setting means what it says
                assert cpu.product_of(CPU) == "default"


@pytest.mark.skipif(not TODAY, reason="PyTorch 1.3 has no such setting")
def test_pytorch_has_the_setting_and_it_is_left_as_it_was():
    setting = cpu.onednn_setting()
    assert setting is torch.backends.mkldnn.matmul and setting.fp32_precision == "none"
    best, error = cpu.measure_products(setting)
    assert setting.fp32_precision == "none" and error < 0.1
    assert (max(best.values()) < float("inf")) == (error < cpu.ACCURATE)


@pytest.mark.parametrize("backends", [
    types.SimpleNamespace(), types.SimpleNamespace(mkldnn=types.SimpleNamespace()),
    types.SimpleNamespace(mkldnn=types.SimpleNamespace(matmul=types.SimpleNamespace()))])
def test_a_pytorch_without_the_setting_is_as_before(monkeypatch, backends):
    monkeypatch.setattr(torch, "backends", backends)
    monkeypatch.setattr(cpu, "measure_products", None)
    with cpu.fast_products(CPU):
        assert cpu.product_of(CPU) == "default"


def test_frozen_settings_are_as_before(machine, monkeypatch):
    def refuse(self, value):
        raise RuntimeError("not allowed to set flags after disable_global_flags")

    made = machine(1.0)
    del made.fp32_precision  # the class's, below
    monkeypatch.setattr(Machine, "fp32_precision", property(lambda self: "none", refuse), False)
    with cpu.fast_products(CPU):
        assert cpu.product_of(CPU) == "default"


def test_a_gpu_has_its_own_product(machine):
    made = machine(1.0)
    with cpu.fast_products(torch.device("cuda")):
        assert made.fp32_precision == "none"
    assert cpu.product_of(torch.device("cuda")) == "default" and not made.products


@pytest.mark.parametrize("found", ["ieee", "tf32", "bf16"])
def test_what_others_have_chosen_stays(machine, found):
    made = machine(1.0, found=found)
    with cpu.fast_products(CPU):
        assert made.fp32_precision == found and not made.products
    assert made.fp32_precision == found and cpu.product_of(CPU) == "default"
    made.fp32_precision = "none"  # they are done with it
    with cpu.fast_products(CPU):
        assert made.fp32_precision == "bf16"
        made.fp32_precision = "tf32"  # and choose again meanwhile
        with cpu.fast_products(CPU):
            assert made.fp32_precision == "tf32"
    assert made.fp32_precision == "tf32"


def test_an_error_within_takes_the_setting_back(machine):
    made = machine(1.0)
    with pytest.raises(KeyError), cpu.fast_products(CPU), cpu.fast_products(CPU):
        raise KeyError
    assert made.fp32_precision == "none"
    results = cpu.parallel_map(lambda i: 1 // (3 - i), range(9), CPU)
    assert next(results) == 0 and made.fp32_precision == "bf16"
    with pytest.raises(ZeroDivisionError):
        list(results)
    assert made.fp32_precision == "none"
    results = cpu.parallel_map(abs, range(9), CPU)
    next(results)
    results.close()  # whoever takes no more
    assert made.fp32_precision == "none"


def test_an_error_while_it_is_measured_takes_the_setting_back(machine):
    made, real, calls = machine(1.0), torch.mm, []

    def fail(a, b):
        calls.append(made.fp32_precision)
        if len(calls) == 5:
            raise MemoryError
        return real(a, b)

    torch.mm = fail  # the fixture puts the real one back
    with pytest.raises(MemoryError):
        cpu.measure_products(made)
    assert calls[-1] == "bf16" and made.fp32_precision == "none"


def test_whoever_asks_for_bf16_after_it_was_measured_keeps_it(machine):
    made = machine(1.0)
    assert cpu.product_of(CPU) == "oneDNN"
    made.fp32_precision = "bf16"
    with cpu.fast_products(CPU):
        pass
    assert made.fp32_precision == "bf16"


@pytest.mark.parametrize("paused", ["users", "ours"])
def test_a_thread_begins_while_the_last_one_ends(machine, monkeypatch, paused):
    """It waits, else the one that ends would take the setting from it."""
    made, ending, ended, seen = machine(1.0), threading.Event(), threading.Event(), []

    class Slow(types.SimpleNamespace):
        def __setattr__(self, key, value):
            super().__setattr__(key, value)
            if key == paused and not value and hasattr(self, "slow"):
                ending.set()
                ended.wait(0.5)  # the other one has this long to go wrong

    switch = Slow(lock=threading.RLock(), product="", users=0, ours=False)
    monkeypatch.setattr(cpu, "_switch", switch)

    def last():
        with cpu.fast_products(CPU):
            switch.slow = True
        ended.set()
        ending.set()

    def next_one():
        ending.wait(60)
        with cpu.fast_products(CPU):
            ended.wait(60)
            seen.append(made.fp32_precision)

    threads = [threading.Thread(target=work) for work in (last, next_one)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == ["bf16"] and made.fp32_precision == "none"


def test_the_last_of_several_threads_takes_it_back(machine):
    made, inside, leave, seen = machine(1.0), threading.Barrier(3), threading.Event(), []

    def first():
        with cpu.fast_products(CPU):
            inside.wait(60)

    def second():
        with cpu.fast_products(CPU):
            inside.wait(60)
            leave.wait(60)
            seen.append(made.fp32_precision)

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    inside.wait(60)
    threads[0].join(60)
    assert made.fp32_precision == "bf16", "the second is still at it"
    leave.set()
    threads[1].join(60)
    assert seen == ["bf16"] and made.fp32_precision == "none"


def test_threads_that_begin_at_once_measure_once(machine):
    made, start, answers = machine(1.0), threading.Barrier(4), []
    real = made.mm

    def slow_mm(a, b):
        time.sleep(0.01)
        return real(a, b)

    torch.mm = slow_mm  # the fixture puts the real one back

    def ask():
        start.wait(60)
        answers.append(cpu.product_of(CPU))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert made.products == 11 and answers == ["oneDNN"] * 4


@pytest.mark.parametrize("threads", [1, 2])
def test_training_classifying_and_pretraining_use_it(machine, monkeypatch, tiny_bert, tmp_path,
                                                     threads):
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(threads)
    made, seen, real = machine(1.0), [], helpers.BertModel.forward

    def spy(self, *args, **kwargs):
        seen.append(made.fp32_precision)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(helpers.BertModel, "forward", spy)
    note = pretrain(TEXTS, model=tiny_bert, **QUICK)
    params = train(TEXTS, LABELS, note, **QUICK)
    labels = classify(TEXTS, params)
    assert len(seen) > 8 and set(seen) == {"bf16"} and made.fp32_precision == "none"
    torch.set_num_threads(1)
    assert len(labels) == len(TEXTS)


def test_a_trial_records_its_product_outside_of_its_name(machine, tiny_bert, tmp_path, monkeypatch,
                                                         capsys):
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))
    grid = [dict(QUICK, model=tiny_bert, seed=seed) for seed in (0, 1)]
    rows = []
    for seconds, store in ((1.0, "fast"), (3.0, "slow")):
        machine(seconds)
        rows += studies.run_trials(grid[:1], TRAIN, DEV, str(tmp_path / store))
        assert "products" not in capsys.readouterr().out
    assert [row["product"] for row in rows] == ["oneDNN", "default"]
    names = [sorted(path.name for path in (tmp_path / store).glob("*.json"))
             for store in ("fast", "slow")]
    assert names[0] == names[1] and rows[0]["metrics"] == rows[1]["metrics"]
    assert [row["product"] for row in studies.run_trials(grid, TRAIN, DEV, str(tmp_path / "fast"))
            ] == ["oneDNN", "default"]
    assert "oneDNN and default matrix products" in capsys.readouterr().out, "seconds do not compare"
