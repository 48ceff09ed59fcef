"""Time this project against transformers.Trainer and plain loops: the same work, in turns.

    make bench                      # data/FILIMDB, the BERT in MODEL (build/minilm)
    make bench N=192 ROUNDS=3       # reviews to train on; A B A B ... so often
    make bench ARGS=--bf16          # on a CPU: the same in bf16 too

Every measurement is a fresh process that loads, tokenizes and works; imports are not counted. The
table gives medians over the rounds; ratios compare the jobs of one kind with this project's, those
in bf16 with each other. On a GPU all jobs are in bf16.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

KINDS = {"train": ["ours", "trainer", "trainer-grouped", "plain-512", "ours-bf16", "trainer-bf16"],
         "train-512": ["ours", "ours-no-attention-dropout"],
         "classify": ["ours", "trainer", "ours-bf16", "trainer-bf16"],
         "mlm": ["ours", "trainer", "ours-bf16", "trainer-bf16"],
         "tokenize": ["ours", "ours-again"]}
# A part of the reviews shows a slow training's speed: loading weighs more, by a percent or two.
# Not where they are grouped by length: what Trainer sorts at once grows with the reviews.
SLOW = {"plain-512": 4, "trainer": 3, "trainer-bf16": 3}
BATCH, SEQ_LEN = 16, 512


# ---- one measurement, in a process of its own --------------------------------------------------

def count_tokens(counts, training):
    """Count real and padded tokens of every pass through a BERT that trains, or that does not.

    On a GPU the sums stay there until the end: reading one would hold the work up.
    """
    from transformers import BertModel
    forward, lock = BertModel.forward, threading.Lock()

    def counting(self, input_ids=None, attention_mask=None, **kwargs):
        padded = input_ids.numel()
        real = padded if attention_mask is None else attention_mask.sum()
        with lock:  # micro-batches run side by side
            if self.training == training:  # what masked LM holds out is measured, not trained on
                counts["padded"] += padded
                counts["real"] += real
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    BertModel.forward = counting


def trainer_arguments(folder, **options):
    """Return TrainingArguments with the defaults but for what this job must share."""
    import torch
    from transformers import TrainingArguments

    from runtime import supported_options
    cuda = torch.cuda.is_available()
    return TrainingArguments(output_dir=folder, num_train_epochs=1, learning_rate=1e-4,
                             per_device_train_batch_size=BATCH, use_cpu=not cuda, report_to=[],
                             save_strategy="no", disable_tqdm=True, **supported_options(
                                 TrainingArguments, **dict({"bf16": cuda}, **options)))


def encoded(texts, labels, model):
    """Load a tokenizer and a BERT for Trainer, as its documentation does; return both and rows."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from files import find_path
    tokenizer = AutoTokenizer.from_pretrained(find_path(model), model_max_length=SEQ_LEN)
    bert = AutoModelForSequenceClassification.from_pretrained(find_path(model))
    rows = tokenizer(texts, truncation=True, max_length=SEQ_LEN)
    return tokenizer, bert, [
        dict(input_ids=ids, attention_mask=mask, labels=int(label == "pos")) for ids, mask, label
        in zip(rows["input_ids"], rows["attention_mask"], labels)]


def train_ours(texts, labels, model, folder, **overrides):
    import helpers
    helpers.train(texts, labels, **dict(
        dict(model=model, seq_len=SEQ_LEN, batch_size=BATCH, accumulation=1, epochs=1, lr=1e-4,
             optimizer="adamw"), **overrides))


def train_trainer(texts, labels, model, folder, **options):
    from transformers import DataCollatorWithPadding, Trainer
    tokenizer, bert, rows = encoded(texts, labels, model)
    Trainer(model=bert, args=trainer_arguments(folder, **options), train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer)).train()


def train_plain(texts, labels, model, folder):
    """Train by a loop as tutorials have it: every review padded to the limit."""
    import torch

    from runtime import autocast, pick_device
    tokenizer, bert, rows = encoded(texts, labels, model)
    device = pick_device()
    optimizer = torch.optim.AdamW(bert.train().to(device).parameters(), lr=1e-4)
    order = torch.randperm(len(rows)).tolist()
    for start in range(0, len(rows), BATCH):
        batch = tokenizer.pad([rows[i] for i in order[start:start + BATCH]],
                              padding="max_length", max_length=SEQ_LEN, return_tensors="pt")
        optimizer.zero_grad()
        with autocast(device, "auto"):  # as all other jobs: in 16 bits on a GPU
            loss = bert(**batch.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
        optimizer.step()


def classify_ours(texts, labels, model, folder, **overrides):
    import helpers
    bert, tokenizer = helpers.load_bert(model)
    config = helpers.make_config(model=model, seq_len=SEQ_LEN, keep="head", **overrides)
    helpers.classify(texts, {"model": bert, "tokenizer": tokenizer, "config": config})


def classify_trainer(texts, labels, model, folder, **options):
    from transformers import DataCollatorWithPadding, Trainer
    tokenizer, bert, rows = encoded(texts, labels, model)
    Trainer(model=bert, args=trainer_arguments(folder, **options),
            data_collator=DataCollatorWithPadding(tokenizer)).predict(rows)


def mlm_ours(texts, labels, model, folder, **overrides):
    import helpers
    helpers.pretrain(texts, model=model, seq_len=SEQ_LEN, batch_size=BATCH, epochs=1, lr=1e-4,
                     **overrides)


def mlm_trainer(texts, labels, model, folder, **options):
    """Train a masked LM as run_mlm does: all texts in one stream, cut at SEQ_LEN."""
    from transformers import (
        AutoModelForMaskedLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
    )

    from files import find_path
    tokenizer = AutoTokenizer.from_pretrained(find_path(model), model_max_length=SEQ_LEN)
    bert = AutoModelForMaskedLM.from_pretrained(find_path(model))
    stream = [i for ids in tokenizer(texts, return_special_tokens_mask=False)["input_ids"]
              for i in ids]
    rows = [{"input_ids": stream[i:i + SEQ_LEN], "attention_mask": [1] * SEQ_LEN}
            for i in range(0, len(stream) - SEQ_LEN + 1, SEQ_LEN)]
    Trainer(model=bert, args=trainer_arguments(folder, **options), train_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)).train()


def tokenize(texts, labels, model, folder):
    import helpers
    helpers.tokenize_all(texts, helpers.load_bert(model)[1])


JOBS = {("train", "ours"): train_ours, ("train", "trainer"): train_trainer,
        ("classify", "ours"): classify_ours, ("classify", "trainer"): classify_trainer,
        ("mlm", "ours"): mlm_ours, ("mlm", "trainer"): mlm_trainer}
IN_BF16 = {"ours": {"precision": "bf16"}, "trainer": {"bf16": True}}
JOBS.update({(kind, who + "-bf16"): partial(work, **IN_BF16[who])
             for (kind, who), work in JOBS.items()})
JOBS.update({
    ("train", "trainer-grouped"): partial(train_trainer, group_by_length=True,
                                          train_sampling_strategy="group_by_length"),
    ("train", "plain-512"): train_plain,
    ("train-512", "ours"): train_ours,
    ("train-512", "ours-no-attention-dropout"): partial(train_ours, attention_dropout=0.0),
    ("tokenize", "ours"): tokenize, ("tokenize", "ours-again"): tokenize})



def read_work(kind, n, data_dir):
    """Return (texts, labels) of a job: reviews as they come, only long ones for train-512."""
    from helpers import load_part, subset
    if kind == "tokenize":
        texts = [text for name in ("train_unlabeled", "test", "train")
                 for text in load_part(data_dir, name).texts][:n]
        return texts, ["neg"] * len(texts)
    part = load_part(data_dir, "train")
    if kind == "train-512":
        rows = [i for i, text in enumerate(part.texts) if len(text.split()) > SEQ_LEN][:n]
        return [part.texts[i] for i in rows], [("neg", "pos")[i % 2] for i in range(len(rows))]
    part = subset(part, n)
    return part.texts, part.labels


def measure(kind, job, n, model, data_dir, cache):
    """Do a job once; return {seconds, examples, real, padded, peak_mb}."""
    import torch
    import transformers

    import runtime
    os.environ["FILIMDB_CACHE"] = cache
    transformers.logging.set_verbosity_error()
    texts, labels = read_work(kind, n, data_dir)
    counts = {"real": 0, "padded": 0}
    count_tokens(counts, kind != "classify")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, runtime.quiet_transformers():
        JOBS[kind, job](texts, labels, model, folder)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = (torch.cuda.max_memory_allocated() / 1024 if on_gpu else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB: of the GPU, of the process
    return dict({key: int(count) for key, count in counts.items()}, seconds=seconds,
                examples=len(texts), peak_mb=peak / 1024)


def matmul_ceiling(model, precision):
    """Return FLOP/s of a matrix product of the model's shape: (1024, h) x (h, 4 h)."""
    import torch
    from transformers import BertConfig

    from files import find_path
    h = BertConfig.from_pretrained(find_path(model)).hidden_size
    cuda = torch.cuda.is_available()
    kind = {"device": "cuda" if cuda else "cpu",
            "dtype": torch.bfloat16 if precision == "bf16" else torch.float32}
    rows = 8192 if cuda else 1024
    a, b, best = torch.randn(rows, h, **kind), torch.randn(h, 4 * h, **kind), 0.0
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        if cuda:
            torch.cuda.synchronize()
        best = max(best, 10 * 2 * rows * h * 4 * h / (time.perf_counter() - started))
    return best


def measure_ceilings(model, bf16):
    """Return {precision: FLOP/s}: first of what most jobs compute in, then bf16 if asked for."""
    import torch
    usual = "bf16" if torch.cuda.is_available() else "fp32"
    return {precision: matmul_ceiling(model, precision)
            for precision in dict.fromkeys([usual, *["bf16"] * bf16])}


def flop_per_token(model, kind):
    """Return the FLOP of a token's way through the encoder; x3 for training."""
    from transformers import BertConfig

    from files import find_path
    c = BertConfig.from_pretrained(find_path(model))
    layer = 2 * (4 * c.hidden_size ** 2 + 2 * c.hidden_size * c.intermediate_size)
    return layer * c.num_hidden_layers * (1 if kind == "classify" else 3)


# ---- all of them, in turns ---------------------------------------------------------------------

def run_job(kind, job, n, args, cache):
    """Measure a job in a fresh process; return its figures."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", kind, job, "--n", str(n), "--model", args.model,
         "--data", args.data, "--cache", cache], stdout=subprocess.PIPE, universal_newlines=True)
    if done.returncode:
        raise SystemExit(f"bench: {kind} {job} failed; its message stands above")
    return json.loads(done.stdout.strip().split("\n")[-1])


def compare(args):
    """Run all kinds of job in turns; print the table and return its rows."""
    ceilings, table = measure_ceilings(args.model, args.bf16), []
    print("ceiling: a matrix product of the model's shape reaches " + ", ".join(
        f"{ceiling / 1e9:,.0f} GFLOP/s in {name}" for name, ceiling in ceilings.items())
        + f"; {args.rounds} rounds in turns, medians", flush=True)
    print(f"{'work':<10} {'job':<26} {'ex./s':>8} {'tokens/s':>9} {'padding':>8} {'peak MB':>8} "
          f"{'ceiling':>8} {'ours is':>8}", flush=True)
    usual = next(iter(ceilings))
    sizes = {"train": args.n, "train-512": max(16, args.n // 4), "classify": args.n_classify,
             "mlm": args.n, "tokenize": args.n_tokenize}
    for kind in args.kinds or KINDS:
        runs = {job: [] for job in KINDS[kind] if args.bf16 or "bf16" not in job}
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as shared:
                for job in runs:
                    with tempfile.TemporaryDirectory() as own:
                        cache = shared if kind == "tokenize" else own
                        n = sizes[kind] // (1 if kind == "classify" else SLOW.get(job, 1))
                        runs[job].append(run_job(kind, job, n, args, cache))
        for job, some in runs.items():
            ours, precision = ("ours-bf16", "bf16") if "bf16" in job else ("ours", usual)
            table.append(summarize(kind, job, some, runs[ours], ceilings[precision], args.model))
            print("{work:<10} {job:<26} {examples_s:8.2f} {tokens_s:9,.0f} {padding:8.1%} "
                  "{peak_mb:8,.0f} {of_ceiling:8.1%} {ours_is:7.2f}x".format(**table[-1]),
                  flush=True)
    return table


def summarize(kind, job, runs, ours, ceiling, model):
    """Return a table's row: medians over the rounds, and how many times faster ours is.

    By real tokens, which masked LM holds some of out; by texts where no model runs.
    """
    def rate(some, key):
        return statistics.median(run[key] / run["seconds"] for run in some)
    tokens, unit = rate(runs, "real"), "real" if runs[0]["real"] else "examples"
    return {"work": kind, "job": job, "n": runs[0]["examples"],
            "examples_s": rate(runs, "examples"), "tokens_s": tokens,
            "padding": 1 - runs[0]["real"] / runs[0]["padded"] if runs[0]["padded"] else 0.0,
            "peak_mb": max(run["peak_mb"] for run in runs),
            "of_ceiling": tokens * flop_per_token(model, kind) / ceiling,
            "ours_is": rate(ours, unit) / rate(runs, unit)}


def main(argv=None):
    """Read the command line; measure one job, or compare all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/FILIMDB")
    parser.add_argument("--model", default=os.environ.get("MODEL", "build/minilm"))
    parser.add_argument("--n", type=int, default=192, help="reviews to train on")
    parser.add_argument("--n-classify", type=int, default=500)
    parser.add_argument("--n-tokenize", type=int, default=75000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="time a CPU in bf16 too")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS))
    parser.add_argument("--out", help="a JSON file for the table")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    from files import find_path, save_json
    data = find_path(args.data)
    if args.one:
        print(json.dumps(measure(*args.one, args.n, args.model, data, args.cache)))
        return
    table = compare(args)
    if args.out:
        save_json(args.out, table)


if __name__ == "__main__":
    main()
