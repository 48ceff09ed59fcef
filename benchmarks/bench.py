"""Time this project against transformers.Trainer, ONNX Runtime and plain loops, in turns.

    make bench                      # data/FILIMDB, the BERT in MODEL (build/minilm)
    make bench N=144 ROUNDS=3       # reviews to train on; A B A B ... so often
    make bench ARGS=--bf16          # on a CPU: the same in bf16 too
    make bench ARGS="--kinds classify --jobs onnxruntime"   # these against ours

Every measurement is a fresh process that loads, tokenizes and works; imports, and making the graph
that ONNX Runtime loads, are not counted. The table gives medians over the rounds; ratios compare
the jobs of one kind with this project's, those in bf16 with each other. On a GPU all jobs are in
bf16. The ceiling is the fastest matrix product of all libraries here that err by no more than fp32
does; a job's share of it counts the products of the encoder's layers, attention's too, for real
tokens alone.
"""
import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

KINDS = {"train": ["ours", "trainer", "trainer-grouped", "plain-512", "ours-bf16", "trainer-bf16"],
         "train-512": ["ours", "ours-no-attention-dropout"],
         "classify": ["ours", "onnxruntime", "trainer", "ours-bf16", "trainer-bf16"],
         "mlm": ["ours", "trainer", "ours-bf16", "trainer-bf16"],
         "tokenize": ["ours", "ours-again"]}
# A part of the reviews shows a slow training's speed: loading weighs more, by a percent or two.
# Not where they are grouped by length: what Trainer sorts at once grows with the reviews.
SLOW = {"plain-512": 8, "trainer": 4, "trainer-bf16": 4}
ONCE = {"plain-512", "tokenize"}  # jobs, and kinds, that one round is enough for
BATCH, SEQ_LEN = 16, 512


# ---- one measurement, in a process of its own --------------------------------------------------

def count_tokens(counts, training):
    """Count the tokens of every pass through a BERT that trains, or that does not.

    real, padded, and squares: the sum over all reviews of their real tokens squared, which the
    products of attention grow with.
    """
    from transformers import BertModel
    forward, lock = BertModel.forward, threading.Lock()

    def counting(self, input_ids=None, attention_mask=None, **kwargs):
        lengths = lengths_of(input_ids, attention_mask, kwargs.get("attend"))
        with lock:  # micro-batches run side by side
            if self.training == training:  # what masked LM holds out is measured, not trained on
                add_batch(counts, lengths, input_ids.numel())
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    BertModel.forward = counting


def lengths_of(input_ids, attention_mask=None, attend=None):
    """Return the number of tokens of each review of a pass, padding not counted."""
    if attend is not None:  # without padding: one row, of which the reviews' boundaries are known
        return attend.keywords["starts"].diff().tolist()
    if attention_mask is None:
        return [input_ids.shape[1]] * len(input_ids)
    return attention_mask.flatten(1).sum(1).tolist()  # (reviews, 1, 1, tokens) on a GPU


def add_batch(counts, lengths, padded):
    """Add a batch of reviews of these lengths, of `padded` tokens in all, to the counts."""
    counts["padded"] += padded
    counts["real"] += sum(lengths)
    counts["squares"] += sum(n * n for n in lengths)


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


def export_graph(model, path):
    """Write a BERT classifier as a graph for ONNX Runtime: fp32, any batch and length."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from files import find_path
    bert = AutoModelForSequenceClassification.from_pretrained(
        find_path(model), attn_implementation="eager").eval()
    ids = torch.ones(2, 8, dtype=torch.int64)
    dims = {0: "batch", 1: "seq"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing cannot see; a test compares the logits
        torch.onnx.export(bert, (ids, ids), path, dynamo=False, opset_version=17,
                          input_names=["input_ids", "attention_mask"], output_names=["logits"],
                          dynamic_axes={"input_ids": dims, "attention_mask": dims})


def classify_onnx(texts, labels, model, folder, graph, count=8):
    """Classify by ONNX Runtime on all cores: sorted by length, batches of `count`; return counts.

    graph: a file of `export_graph`.
    """
    import numpy as np
    import onnxruntime
    import torch
    from transformers import AutoTokenizer

    from files import find_path
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(find_path(model), model_max_length=SEQ_LEN)
    rows = tokenizer(texts, truncation=True, max_length=SEQ_LEN)["input_ids"]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    logits = np.zeros((len(rows), 2), np.float32)
    counts = {"real": 0, "padded": 0, "squares": 0}
    for start in range(0, len(order), count):
        some = order[start:start + count]
        lengths = [len(rows[i]) for i in some]
        ids, mask = (np.zeros((len(some), max(lengths)), np.int64) for _ in range(2))
        for row, i in enumerate(some):
            ids[row, :lengths[row]], mask[row, :lengths[row]] = rows[i], 1
        logits[some] = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
        add_batch(counts, lengths, ids.size)
    return counts


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
        ("classify", "onnxruntime"): classify_onnx,
        ("mlm", "ours"): mlm_ours, ("mlm", "trainer"): mlm_trainer}
IN_BF16 = {"ours": {"precision": "bf16"}, "trainer": {"bf16": True}}
JOBS.update({(kind, who + "-bf16"): partial(work, **IN_BF16[who])
             for (kind, who), work in JOBS.items() if who in IN_BF16})
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
    """Do a job once; return {seconds, examples, real, padded, squares, peak_mb}."""
    import torch
    import transformers

    import runtime
    os.environ["FILIMDB_CACHE"] = cache
    transformers.logging.set_verbosity_error()
    texts, labels = read_work(kind, n, data_dir)
    counts, work = {"real": 0, "padded": 0, "squares": 0}, JOBS[kind, job]
    if job == "onnxruntime":
        work = partial(work, graph=os.path.join(cache, "bert.onnx"))
        with runtime.quiet_transformers():
            export_graph(model, work.keywords["graph"])
    count_tokens(counts, kind != "classify")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, runtime.quiet_transformers():
        counts.update(work(texts, labels, model, folder) or {})
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = (torch.cuda.max_memory_allocated() / 1024 if on_gpu else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB: of the GPU, of the process
    return dict({key: int(count) for key, count in counts.items()}, seconds=seconds,
                examples=len(texts), peak_mb=peak / 1024)


def products(model, precision):
    """Return ({library: a function that multiplies}, FLOP of one): (1024, h) x (h, 4 h).

    On a CPU in fp32 by every library here; a product that errs more than fp32 is left out.
    """
    import torch
    from transformers import BertConfig

    import cpu
    from files import find_path
    h = BertConfig.from_pretrained(find_path(model)).hidden_size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = {"device": device, "dtype": torch.bfloat16 if precision == "bf16" else torch.float32}
    rows = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(rows, h, **kind), torch.randn(h, 4 * h, **kind)
    flop = 2 * rows * h * 4 * h
    if device.type == "cuda" or precision == "bf16":
        return {"PyTorch": lambda: a @ b}, flop

    def by_onednn():
        with switched_to_onednn(cpu.onednn_setting()):
            return a @ b

    def by_numpy():
        return torch.from_numpy(a.numpy() @ b.numpy())

    found = {"PyTorch": lambda: a @ b, "PyTorch with oneDNN": by_onednn, "numpy": by_numpy,
             "ONNX Runtime": product_by_onnx(a, b)}
    exact = a.double() @ b.double()
    return {name: product for name, product in found.items() if product and float(
        (product() - exact).abs().max() / exact.abs().max()) < cpu.ACCURATE}, flop


@contextlib.contextmanager
def switched_to_onednn(setting):
    """Let PyTorch multiply by oneDNN in the block, if it has the setting."""
    if setting is None:
        yield
        return
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def product_by_onnx(a, b):
    """Return a function that multiplies two tensors by ONNX Runtime on all cores."""
    import onnx
    import onnxruntime
    import torch
    info, helper = onnx.helper.make_tensor_value_info, onnx.helper
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])], "product",
        [info("a", onnx.TensorProto.FLOAT, a.shape)],
        [info("c", onnx.TensorProto.FLOAT, [a.shape[0], b.shape[1]])],
        [onnx.numpy_helper.from_array(b.numpy(), "b")])  # as weights are: packed beforehand
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(helper.make_model(
        graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString(),
        options, providers=["CPUExecutionProvider"])
    given = {"a": a.numpy()}
    return lambda: torch.from_numpy(session.run(["c"], given)[0])


def matmul_ceiling(model, precision):
    """Return (FLOP/s, library) of the fastest matrix product of the model's shape, in turns."""
    import torch
    candidates, flop = products(model, precision)
    best = dict.fromkeys(candidates, 0.0)
    for _ in range(20):
        for name, product in candidates.items():
            started = time.perf_counter()
            for _ in range(10):
                product()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[name] = max(best[name], 10 * flop / (time.perf_counter() - started))
    library = max(best, key=best.get)
    return best[library], library


def measure_ceilings(model, bf16):
    """Return {precision: (FLOP/s, library)}: of what most jobs compute in, bf16 if asked for."""
    import torch
    usual = "bf16" if torch.cuda.is_available() else "fp32"
    return {precision: matmul_ceiling(model, precision)
            for precision in dict.fromkeys([usual, *["bf16"] * bf16])}


def flop_of(model, kind, real, squares):
    """Return the FLOP of the encoder's products for so many tokens; x3 for training.

    squares: the sum of the reviews' squared lengths, for attention's query key' and weights value.
    """
    from transformers import BertConfig

    from files import find_path
    c = BertConfig.from_pretrained(find_path(model))
    token = 2 * (4 * c.hidden_size ** 2 + 2 * c.hidden_size * c.intermediate_size)
    layer = token * real + 4 * c.hidden_size * squares
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
        f"{ceiling / 1e9:,.0f} GFLOP/s in {name} ({library})"
        for name, (ceiling, library) in ceilings.items())
        + f"; {args.rounds} rounds in turns, medians", flush=True)
    print(f"{'work':<10} {'job':<26} {'ex./s':>8} {'tokens/s':>9} {'padding':>8} {'peak MB':>8} "
          f"{'ceiling':>8} {'ours is':>8}", flush=True)
    usual = next(iter(ceilings))
    sizes = {"train": args.n, "train-512": max(16, args.n // 8), "classify": args.n_classify,
             "mlm": max(16, args.n // 2), "tokenize": args.n_tokenize}
    for kind in args.kinds or KINDS:
        runs = {job: [] for job in KINDS[kind] if (args.bf16 or "bf16" not in job) and (
            not args.jobs or job in args.jobs or job.startswith("ours"))}
        for number in range(args.rounds):
            with tempfile.TemporaryDirectory() as shared:
                for job in [job for job in runs if not number or not {kind, job} & ONCE]:
                    with tempfile.TemporaryDirectory() as own:
                        cache = shared if kind == "tokenize" else own
                        n = sizes[kind] // (1 if kind == "classify" else SLOW.get(job, 1)) or 1
                        runs[job].append(run_job(kind, job, n, args, cache))
        for job, some in runs.items():
            ours, precision = ("ours-bf16", "bf16") if "bf16" in job else ("ours", usual)
            table.append(summarize(kind, job, some, runs[ours], ceilings[precision][0],
                                   args.model))
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
            "of_ceiling": statistics.median(
                flop_of(model, kind, run["real"], run["squares"]) / run["seconds"]
                for run in runs) / ceiling,
            "ours_is": rate(ours, unit) / rate(runs, unit)}


def main(argv=None):
    """Read the command line; measure one job, or compare all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/FILIMDB")
    parser.add_argument("--model", default=os.environ.get("MODEL", "build/minilm"))
    parser.add_argument("--n", type=int, default=144, help="reviews to train on")
    parser.add_argument("--n-classify", type=int, default=200)
    parser.add_argument("--n-tokenize", type=int, default=25000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="time a CPU in bf16 too")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS))
    parser.add_argument("--jobs", nargs="+", default=[],
                        choices=sorted({job for jobs in KINDS.values() for job in jobs}),
                        help="these against ours, instead of all")
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
