"""Check and time this project on a GPU: one command, at most 8 minutes, no network.

    make bench-gpu                         # the GPU; reviews and vocabulary: build/gpu, if packed
    make bench-gpu ARGS="--device cpu"     # the same steps, small, to see that they run

First correctness: losses against a CPU's, padded against unpadded, fp16 and bf16 against fp32.
Then real tokens a second of training, masked LM and classifying for a BERT of bert-base's shape,
against transformers.Trainer in the same precision; the share of what a matrix product reaches;
launches and waits by the profiler; the largest batch. It prints a table for EXPERIMENTS.md. What
cannot be measured is named, with the reason. Exit code 1 where a number is not what it must be.
"""
import argparse
import collections
import contextlib
import os
import statistics
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402

import gpu  # noqa: E402
import helpers  # noqa: E402
import runtime  # noqa: E402
import studies  # noqa: E402
from checkpoints import save_bert  # noqa: E402
from files import find_path, save_json  # noqa: E402

BATCH, SEQ_LEN, WARM_UP = 32, 512, 3
SHAPES = {"bert-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                            intermediate_size=3072),
          "small": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=128)}


class Bench:
    """Settings and results: .rows are (what, value, remark); .failed: names of wrong numbers."""

    def __init__(self, args):
        self.device = runtime.pick_device(args.device)
        self.on_gpu = self.device.type == "cuda"
        self.ends = time.time() + 60 * args.minutes
        self.rows, self.failed = [], []
        self.table = sys.stdout
        train = helpers.load_part(find_path(args.data), "train")
        n = args.n or (4096 if self.on_gpu else 64)
        self.texts, self.labels = helpers.subset(train, n)[1:]
        self.folder = tempfile.mkdtemp()
        os.environ["FILIMDB_CACHE"] = os.path.join(self.folder, "cache")
        self.shape = "bert-base" if self.on_gpu else "small"
        self.model = self.make_model(args.model)
        self.seq_len = SEQ_LEN if self.on_gpu else 64
        self.batch = BATCH if self.on_gpu else 8

    def make_model(self, source):
        """Write a BERT of the shape with random weights and the vocabulary of another."""
        from transformers import BertConfig, BertForPreTraining
        _, tokenizer = helpers.load_bert(source)
        config = BertConfig.from_dict(dict(
            SHAPES[self.shape], vocab_size=len(tokenizer), max_position_embeddings=512,
            model_type="bert", pad_token_id=tokenizer.pad_token_id))
        torch.manual_seed(0)
        place = os.path.join(self.folder, self.shape)
        save_bert(place, BertForPreTraining(config), tokenizer, {"made": "for the benchmark"})
        return place

    def settings(self, **overrides):
        """Return Config's fields for a run."""
        return dict(dict(model=self.model, device=str(self.device), seq_len=self.seq_len,
                         batch_size=self.batch, epochs=1, lr=1e-4), **overrides)

    def row(self, what, value, remark=""):
        """Add a row to the table and print it."""
        self.rows.append((what, value, remark))
        print(f"| {what} | {value} | {remark} |", file=self.table, flush=True)

    def check(self, what, value, bound):
        """Add a row for a difference that must not be over a bound."""
        if not value <= bound:
            self.failed.append(what)
        self.row(what, f"{value:.1e}", f"at most {bound:.0e}{'' if value <= bound else ': FAILS'}")

    def part(self, work):
        """Do one part; say why where it fails, or where no time is left for it."""
        name = work.__name__.replace("_", " ")
        if time.time() > self.ends:
            self.row(name, "not measured", "no time was left")
            return
        try:
            work(self)
        except Exception as error:  # the others are measured all the same
            self.failed.append(name)
            self.row(name, "failed", runtime.one_line(error))

    def synchronize(self):
        """Wait until the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize()


def losses(bench, n=64, **overrides):
    """Return the losses of a short training without dropout."""
    settings = bench.settings(batch_size=16, epochs=2, seq_len=64, dropout=0.0,
                              attention_dropout=0.0, **overrides)
    return torch.tensor([row["loss"] for row in helpers.train(
        bench.texts[:n], bench.labels[:n], **settings)["history"]])


@contextlib.contextmanager
def padded():
    """Let reviews be padded on every device."""
    true = gpu.unpadding, helpers.unpadding
    gpu.unpadding = helpers.unpadding = lambda device, precision: False
    try:
        yield
    finally:
        gpu.unpadding, helpers.unpadding = true


def correctness(bench):
    """Compare losses of a few steps: of devices, of padding, of precisions."""
    cpu = losses(bench, device="cpu", precision="fp32")
    fp32 = losses(bench, precision="fp32")
    bench.check("loss in fp32 against a CPU's", float((fp32 - cpu).abs().max()), 1e-4)
    for precision, bound in (("bf16", 0.05), ("fp16", 0.01)):
        half = losses(bench, precision=precision)
        bench.check(f"loss in {precision} against fp32", float((half - fp32).abs().max()), bound)
        with padded():
            other = losses(bench, precision=precision)
        unpads = gpu.unpadding(bench.device, precision)
        bench.check(f"loss in {precision}, {'un' * unpads}padded against padded",
                    float((half - other).abs().max()), bound / 2)


def gradients_without_padding(bench):
    """Compare the gradients of one step, padded and unpadded, in the device's own precision."""
    model, tokenizer = helpers.load_bert(bench.model, dropout=0.0, attention_dropout=0.0)
    model.to(bench.device).train()
    config = helpers.make_config(**bench.settings(precision="auto"))
    tokens = helpers.prepare(bench.texts[:16], tokenizer, config)
    rows = [helpers.add_special_tokens(tokens[i], bench.seq_len, config.keep, tokenizer)
            for i in range(16)]
    batch = dict(helpers.pad(rows, tokenizer.pad_token_id), labels=torch.arange(16) % 2)
    found = []
    for one in (batch, gpu.unpad(batch)):
        helpers.clear_gradients(model)
        helpers.summed_loss(helpers.classifier_forward, model, one, bench.device).backward()
        found.append(torch.cat([p.grad.float().flatten() for p in model.parameters()
                                if p.grad is not None]))
    off = float((found[0] - found[1]).norm() / found[0].norm())
    bench.check("gradient, unpadded against padded, relative", off, 2e-2 if bench.on_gpu else 1e-5)


def matmul_peak(bench):
    """Measure FLOP/s of a matrix product in the precision that trains, as a ceiling."""
    n = 8192 if bench.on_gpu else 512
    kind = runtime.used_precision("auto", bench.device.type)
    dtype = getattr(torch, runtime.HALF.get(kind, "float32"))
    a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(10):
        bench.synchronize()
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        bench.synchronize()
        rates.append(5 * 2 * n ** 3 / (time.perf_counter() - began))
    bench.peak = max(rates)
    bench.row(f"matrix product {n} × {n} in {kind}", f"{bench.peak / 1e12:,.3g} TFLOP/s",
              "best of 10")


def token_counts(bench, n, tokenizer, config):
    """Return the real tokens of each text, with [CLS] and [SEP]."""
    tokens = helpers.prepare(bench.texts[:n], tokenizer, config)
    return [min(length, config.seq_len - 2) + 2 for length in tokens.lengths]


def share(bench, rate, training=True):
    """Return the share of the peak that so many tokens a second are, in words."""
    shape = SHAPES[bench.shape]
    h, layers = shape["hidden_size"], shape["num_hidden_layers"]
    flop = layers * (2 * 4 * h * h + 2 * 2 * h * shape["intermediate_size"]
                     + 2 * 2 * h * bench.seq_len / 2)  # a typical review is half as long
    return f"{rate * flop * (3 if training else 1) / bench.peak:.1%} of the matrix product"


def rate_of_history(history, tokens, batch):
    """Return real tokens a second by a history's clock, the first steps left out."""
    rows = [row for row in history if row["step"]]
    first = min(WARM_UP, len(rows) // 2) or 1
    seconds = rows[-1]["seconds"] - rows[first - 1]["seconds"]
    return sum(tokens) / len(rows) * (len(rows) - first) / seconds


def training(bench):
    """Time `train`."""
    params = helpers.train(bench.texts, bench.labels, **bench.settings())
    config = params["config"]
    bench.tokens = token_counts(bench, len(bench.texts), params["tokenizer"], config)
    bench.ours = rate_of_history(params["history"], bench.tokens, bench.batch)
    bench.row("training", f"{bench.ours:,.0f} real tokens/s", share(bench, bench.ours))
    if bench.on_gpu:
        bench.row("its peak memory", f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
        with padded():
            some = helpers.train(bench.texts[:1024], bench.labels[:1024], **bench.settings())
        slow = rate_of_history(some["history"], bench.tokens[:1024], bench.batch)
        bench.row("training, padded", f"{slow:,.0f} real tokens/s",
                  f"unpadded {bench.ours / slow:.2f} times as fast")
    bench.params = params


def masked_lm(bench):
    """Time `pretrain`."""
    note = helpers.pretrain(bench.texts, **bench.settings(seq_len=min(128, bench.seq_len)))
    import json
    with open(os.path.join(note["path"], "history.json"), encoding="utf-8") as file:
        history = [row for row in json.load(file) if row["step"]]
    whole = sum(helpers.prepare(bench.texts, bench.params["tokenizer"],
                                bench.params["config"]).lengths)
    gaps = [b["seconds"] - a["seconds"] for a, b in zip(history, history[1:])]
    rate = whole / len(history) / statistics.median(gaps)  # the median leaves measuring out
    bench.row("masked LM", f"{rate:,.0f} real tokens/s", share(bench, rate))


def classifying(bench):
    """Time `predict_logits`, the tokens at hand."""
    config = bench.params["config"]
    tokens = helpers.prepare(bench.texts, bench.params["tokenizer"], config)
    for _ in range(2):  # the first warms up
        bench.synchronize()
        began = time.perf_counter()
        helpers.predict_logits(bench.params["model"], tokens, bench.params["tokenizer"], config)
        seconds = time.perf_counter() - began
    rate = sum(bench.tokens) / seconds
    bench.calm = rate
    bench.row("classifying", f"{rate:,.0f} real tokens/s", share(bench, rate, False))


def trainer(bench):
    """Time transformers.Trainer: same precision and attention, reviews grouped by length."""
    import transformers
    rows = trainer_rows(bench)
    bert = transformers.AutoModelForSequenceClassification.from_pretrained(bench.model)
    collator = transformers.DataCollatorWithPadding(bench.params["tokenizer"])
    seconds = trainer_seconds(bench, bert, rows, collator, transformers)
    rate = sum(len(row["input_ids"]) for row in rows) / len(rows) * bench.batch / seconds
    bench.row("transformers.Trainer, group_by_length", f"{rate:,.0f} real tokens/s",
              f"ours {bench.ours / rate:.2f} times as fast")


def trainer_rows(bench):
    """Return the reviews for Trainer, of which a part shows its speed."""
    some = bench.texts[:1024] if bench.on_gpu else bench.texts[:32]
    encoded = bench.params["tokenizer"](some, truncation=True, max_length=bench.seq_len)
    return [{"input_ids": ids, "labels": int(label == "pos")}
            for ids, label in zip(encoded["input_ids"], bench.labels)]


def trainer_seconds(bench, bert, rows, collator, transformers):
    """Return the mean seconds of a step of Trainer, the first ones left out."""
    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            bench.synchronize()
            times.append(time.perf_counter())

    kind = runtime.used_precision("auto", bench.device.type)
    arguments = transformers.TrainingArguments(
        output_dir=bench.folder, num_train_epochs=1, learning_rate=1e-4, report_to=[],
        per_device_train_batch_size=bench.batch, use_cpu=not bench.on_gpu, save_strategy="no",
        disable_tqdm=True, logging_strategy="no", bf16=kind == "bf16", fp16=kind == "fp16",
        **runtime.supported_options(transformers.TrainingArguments, group_by_length=True,
                                    train_sampling_strategy="group_by_length"))
    transformers.Trainer(model=bert, args=arguments, train_dataset=rows, data_collator=collator,
                         callbacks=[Clock()]).train()
    gaps = [b - a for a, b in zip(times, times[1:])]
    return statistics.mean(gaps[min(WARM_UP, len(gaps) // 2):])


def trainer_without_padding(bench):
    """Time Trainer with reviews one after another, where its attention takes that."""
    import importlib.util

    import transformers
    name = "Trainer, flattened"
    if importlib.util.find_spec("flash_attn") is None or not bench.on_gpu:
        bench.row(name, "not measured", "needs a GPU and the package flash-attn")
        return
    bert = transformers.AutoModelForTokenClassification.from_pretrained(
        bench.model, attn_implementation="flash_attention_2", dtype=torch.bfloat16)
    rows = [{"input_ids": row["input_ids"], "labels": [0] * len(row["input_ids"])}
            for row in trainer_rows(bench)]
    collator = transformers.DataCollatorWithFlattening()
    seconds = trainer_seconds(bench, bert, rows, collator, transformers)
    rate = sum(len(row["input_ids"]) for row in rows) / len(rows) * bench.batch / seconds
    bench.row(name, f"{rate:,.0f} real tokens/s", f"ours {bench.ours / rate:.2f} times as fast")


LAUNCHES = "LaunchKernel", "cuLaunch"
WAITS = "StreamSynchronize", "EventSynchronize", "DeviceSynchronize", "cudaMemcpy"


def launches_and_waits(bench):
    """Count what the host asks of the GPU in a step, by PyTorch's profiler."""
    if not bench.on_gpu:
        bench.row("launches and waits a step", "not measured",
                  "the profiler counts a GPU's; tests/test_fake_gpu.py counts pretended ones")
        return
    from torch.profiler import ProfilerActivity, profile
    counts, steps = [], (4, 12)
    for n in steps:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            helpers.train(bench.texts[:n * bench.batch], bench.labels[:n * bench.batch],
                          **bench.settings())
        calls = collections.Counter()
        for event in profiler.key_averages():
            calls["launches"] += event.count * any(key in event.key for key in LAUNCHES)
            calls["waits"] += event.count * (any(key in event.key for key in WAITS)
                                             and "Async" not in event.key)
        counts.append(calls)
    for key in ("launches", "waits"):
        each = (counts[1][key] - counts[0][key]) / (steps[1] - steps[0])
        bench.row(f"{key} a step of {bench.batch} reviews", f"{each:,.0f}", "by the profiler")


def largest_batch(bench):
    """Find the largest batch of a training step by trying."""
    if not bench.on_gpu:
        bench.row("largest batch", "not measured", "a CPU would begin to swap")
        return
    model, _ = helpers.load_bert(bench.model)
    for n in (512, 128):
        size = studies.largest_batch(model.to(bench.device), n)
        bench.row(f"largest padded batch of {n} tokens", f"{size:,}", f"{n * size:,} tokens")


PARTS = (correctness, gradients_without_padding, matmul_peak, training, classifying, masked_lm,
         trainer, trainer_without_padding, launches_and_waits, largest_batch)


def main(argv=None):
    """Read the command line, measure, print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    packed = os.path.join(ROOT, "build", "gpu")
    there = os.path.isdir(os.path.join(packed, "FILIMDB"))
    parser.add_argument("--device", default="")
    parser.add_argument("--data", default=os.path.join(packed, "FILIMDB") if there else
                        "data/sample")
    parser.add_argument("--model", default=os.path.join(packed, "minilm") if there else
                        "data/sample/bert", help="a BERT whose vocabulary is taken")
    parser.add_argument("--n", type=int, default=0, help="reviews; 0: 4,096 on a GPU, else 64")
    parser.add_argument("--minutes", type=float, default=7, help="after which no part is begun")
    parser.add_argument("--out", help="a JSON file for the table")
    args = parser.parse_args(argv)
    with runtime.quiet_transformers():
        bench = Bench(args)
        print(f"{studies.device_name(bench.device)}, PyTorch {torch.__version__}, "
              f"{bench.shape}: {SHAPES[bench.shape]}, {len(bench.texts):,} reviews of at most "
              f"{bench.seq_len} tokens, {bench.batch} a step\n\n| what | value | remark |\n"
              f"|---|---|---|", flush=True)
        with contextlib.redirect_stdout(sys.stderr):  # what the project itself says
            for work in PARTS:
                bench.part(work)
    if args.out:
        save_json(args.out, bench.rows)
    print(f"\n{'FAILED: ' + ', '.join(bench.failed) if bench.failed else 'all numbers in bounds'}")
    return int(bool(bench.failed))


if __name__ == "__main__":
    sys.exit(main())
