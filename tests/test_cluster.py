"""Trials on a real Dask cluster: workers of several threads, and one that is killed midway."""
import os
import signal
import threading
import time

import pytest
from tools import DEV, ROOT, TRAIN, core, names_in

import studies
from files import InputError

pytestmark = pytest.mark.slow

distributed = pytest.importorskip("distributed", reason="today's optional engine; in "
                                  "requirements-dev.txt, and in Anaconda 2019.10")


@pytest.fixture
def cluster(request, monkeypatch, tmp_path):
    """Two workers of one thread, or as many of as many as the test's parameter says."""
    workers, threads = getattr(request, "param", (2, 1))
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with distributed.LocalCluster(n_workers=workers, threads_per_worker=threads, processes=True,
                                  dashboard_address=None) as made:
        yield made


@pytest.mark.parametrize("cluster", [(1, 4), (2, 1)], indirect=True)
def test_a_worker_of_many_threads_gives_the_rows_of_none(cluster, tiny_bert, tmp_path):
    grid = [dict(model=tiny_bert, seq_len=16, epochs=4, batch_size=2, accumulation=1, dropout=0.3,
                 **point) for point in studies.product([0, 1, 2, 3], lr=[1e-3, 3e-3])]
    rows = studies.run_trials(grid, TRAIN, DEV, str(tmp_path / "store"),
                              scheduler=cluster.scheduler_address)
    here = studies.run_trials(grid, TRAIN, DEV, str(tmp_path / "here"))
    assert names_in(tmp_path / "here") == names_in(tmp_path / "store")
    assert list(map(core, rows)) == list(map(core, here))


def test_a_killed_worker_loses_no_trial_and_repeats_none(cluster, tiny_bert, tmp_path):
    store, alone = tmp_path / "store", tmp_path / "alone"
    grid = [dict(model=tiny_bert, seq_len=16, epochs=6, batch_size=2, accumulation=1, **point)
            for point in studies.product([0, 1, 2, 3], lr=[1e-3, 1e-2])]
    first = sorted(worker.pid for worker in cluster.workers.values())[0]
    at_kill = {}

    def kill_one():
        while len(names_in(store)) < 2:
            time.sleep(0.02)
        at_kill.update((p.name, p.stat().st_mtime_ns) for p in store.glob("*.json"))
        os.kill(first, signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    rows = studies.run_trials(grid, TRAIN, DEV, str(store), scheduler=cluster.scheduler_address)
    killer.join(60)
    assert at_kill and len(at_kill) < len(grid), "the worker was killed midway"
    assert len(names_in(store)) == len(rows) == len(grid), "nothing lost"
    for name, written in at_kill.items():
        assert (store / name).stat().st_mtime_ns == written, "a finished trial was run twice"
    here = studies.run_trials(grid, TRAIN, DEV, str(alone))
    assert names_in(alone) == names_in(store)
    assert [core(row)["metrics"] for row in rows] == [core(row)["metrics"] for row in here]


def test_what_has_no_scheduler_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError) as caught:
        studies.run_trials([], TRAIN, DEV, str(tmp_path), scheduler="tcp://127.0.0.1:9")
    assert "127.0.0.1:9" in str(caught.value) and "\n" not in str(caught.value)
