"""Keep the course's limits on any machine: 30 minutes each to pretrain, to train, to classify.

    python evaluate.py --grading --data data/FILIMDB

A phase has LIMIT minutes by the clock, what is read and tokenized included; the two that the
course allows beyond are for a machine that slows down when it is too late to react. The first
steps are timed; then the most tokens of a review are taken that leave time for LEAST_PASSES over
the training reviews, and in which number format, with the learning rate's decay complete when
time is up. Classification begins with the tokens of the training and takes fewer of what is left
where the machine slows down. Each choice is said in one line; what --set names is not chosen.
"""
import math
import time
from collections import Counter, namedtuple

import torch

import gpu
import helpers
import runtime
from files import say, warn
from helpers import LABELS, TRUNCATIONS

LIMIT = 28.0         # minutes of a phase; the course allows helpers.GRADING_MINUTES
LENGTHS = 512, 384, 256, 192, 128, 64, 32, 16  # tokens of a review to choose from
SHORTEST = 128       # that a training reads; classification goes below in need alone
LEAST_PASSES = 1     # over the training reviews; where time is for fewer, shorter ones are read
MOST_PASSES = 3      # as many as bert-base wants (Devlin et al. 2019, appendix A.3: 2 to 4)
FASTER = 1.1         # times faster must bf16 be, to be taken on a CPU
STEPS = 4            # that are timed; of the first, which is slower, no account is taken
LONG = 0.01          # share of the limit: a step that takes more is the last that is timed
TOKENIZING = 0.25    # share of pretraining's limit that its texts may take to be tokenized
SHARES = 50          # parts in which reviews are classified; between them the clock is read

Speed = namedtuple("Speed", "seq_len precision tokens tokens_per_second seconds_per_step")


class Clock:
    """The minutes of a phase, from its making on; the first process's clock counts for all."""

    def __init__(self, device=""):
        self.device = runtime.pick_device(device)
        self.limit = LIMIT
        self.began = time.time()

    def agreed(self, value):
        """Return a number of the first process in all of them."""
        return runtime.all_sum(0.0 if runtime.processes()[0] else float(value), self.device)

    def left(self):
        """Return the minutes that are left of the phase."""
        return self.limit - self.agreed((time.time() - self.began) / 60)

    def timed(self, work, *arguments, **options):
        """Call a function with its arguments; return (what it returns, seconds it took)."""
        started = time.time()
        outcome = work(*arguments, **options)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return outcome, self.agreed(max(time.time() - started, 1e-6))


# ---- pretrain -----------------------------------------------------------------------------------

def plan_pretraining(texts, overrides, clock):
    """Return (texts, overrides) of a pretraining that ends within the clock's limit.

    texts: as pretrain takes them. Too many to be tokenized in TOKENIZING of the limit (with the
    Python tokenizer of 2019) are thinned evenly. The number format is chosen as for training.
    """
    config = helpers.make_config(helpers.MLM_DEFAULTS, **overrides)
    texts = helpers.distinct_texts(texts)
    (model, tokenizer), loading = load(config, "mlm", clock)
    if config.freeze:
        helpers.freeze_encoder(model)
    first = texts[::math.ceil(len(texts) / 200)]
    _, seconds = clock.timed(list, helpers.tokenize(first, tokenizer))
    most = max(2, int(TOKENIZING * clock.limit * 60 * len(first) / seconds))
    if len(texts) > most:
        texts = [texts[i * len(texts) // most] for i in range(most)]
        say(f"grading: {len(texts):,} texts are pretrained on: as many as can be tokenized")
    tokens = helpers.prepare(texts, tokenizer, config)  # found by pretrain in the cache
    windows = helpers.windows_of(tokens.lengths, config.seq_len - 2)
    timed = {}
    for precision in formats_of(overrides, clock.device):
        config = helpers.make_config(vars(config), precision=precision)
        timed[precision] = time_pretraining(model, tokens, windows, tokenizer, config, clock)
    precision = fastest({name: 1 / step for name, (_, step) in timed.items()})
    measuring, step = timed[precision]
    minutes = budget(clock, 2 * loading + measuring + 2 * step)
    steps = config.epochs * math.ceil(len(windows) / config.batch_size)
    say(f"grading: pretraining on {len(texts):,} texts, about "
        f"{min(steps, 60 * minutes / step):,.0f} of {steps:,} steps, in "
        f"{runtime.used_precision(precision, clock.device.type)}, {minutes:.1f} minutes at most")
    return texts, dict(overrides, precision=precision, max_minutes=minutes)


def load(config, head, clock):
    """Return ((model on the clock's device, tokenizer), seconds that loading it again takes)."""
    def once():
        return helpers.load_bert(config.model, head, config.dropout, config.attention_dropout,
                                 pooling=config.pooling)
    (model, tokenizer), seconds = clock.timed(once)
    if seconds > LONG * clock.limit * 60:  # a download? then the next time is shorter
        (model, tokenizer), seconds = clock.timed(once)
    return (model.to(clock.device), tokenizer), seconds


def formats_of(overrides, device):
    """Return the number formats to time: where a CPU may multiply in bf16, that too."""
    if "precision" in overrides:
        return [overrides["precision"]]
    both = device.type == "cpu" and hasattr(torch, "autocast")
    return ["fp32", "bf16"] if both else ["auto"]


def fastest(rates):
    """Return the format of {format: rate} to take: bf16 beside fp32 must be FASTER."""
    return max(rates, key=lambda name: rates[name] / (FASTER if name == "bf16" else 1))


def time_pretraining(model, tokens, windows, tokenizer, config, clock):
    """Return the seconds of measuring the held-out loss, and of a step of masked LM."""
    make = helpers.masked_batches(tokens, tokenizer, config, clock.device)
    step = make(windows[::math.ceil(len(windows) / config.batch_size)],
                runtime.generator("timing"))
    timed = time_steps(model, [step] * STEPS, helpers.mlm_forward, config, clock)
    seconds = sum(seconds for _, seconds in timed) / len(timed)
    _, measuring = clock.timed(helpers.mlm_loss, model, step, clock.device, config.precision)
    held = min(helpers.HELD_OUT, max(1, len(tokens) // 10)) * len(windows) / len(tokens)
    return measuring * held / sum(len(batch["labels"]) for batch in step), seconds


# ---- train --------------------------------------------------------------------------------------

def plan_training(texts, labels, overrides, clock):
    """Return overrides with which `train` ends within the clock's limit, its decay complete.

    overrides: fields of Config that are not to be chosen: seq_len, epochs, precision.
    """
    config, least = helpers.make_config(**overrides), overrides.get("epochs", LEAST_PASSES)
    (model, tokenizer), loading = load(config, "classifier", clock)
    limit = model.config.max_position_embeddings
    texts, label_ids = helpers.check_texts(texts, labels)
    tokens = helpers.prepare(texts, tokenizer, helpers.make_config(vars(config), seq_len=3))
    lengths = [overrides["seq_len"]] if "seq_len" in overrides else [
        n for n in LENGTHS if SHORTEST <= n <= limit] or [limit]
    speeds = {}
    for precision in formats_of(overrides, clock.device):
        config = helpers.make_config(vars(config), seq_len=lengths[-1], precision=precision)
        speeds[precision] = time_training(model, tokens, label_ids, tokenizer, config, clock)
    precision = fastest({name: speed.tokens_per_second for name, speed in speeds.items()})
    tried, longest_for = [speeds[precision]], f"with time for {least}"
    for seq_len in lengths[-2::-1]:  # longer and longer
        config = helpers.make_config(vars(config), seq_len=seq_len, precision=precision)
        hoped = tried[-1]._replace(tokens=tokens_of(tokens, seq_len))
        if passes(hoped, clock, loading) < least:  # not even at the speed of shorter ones
            break
        try:
            speed = time_training(model, tokens, label_ids, tokenizer, config, clock)
        except runtime.OutOfMemory:
            longest_for = "that memory has room for"
            break
        if passes(speed, clock, loading) < least:
            break
        tried.append(speed)
    chosen = tried[-1]
    n_passes = passes(chosen, clock, loading)
    epochs = overrides.get("epochs", max(1, min(MOST_PASSES, math.ceil(n_passes))))
    minutes = budget(clock, 2 * loading + 2 * chosen.seconds_per_step)
    reason = ("as set" if "seq_len" in overrides else
              f"the longest {longest_for}" if len(tried) > 1 or n_passes >= least else
              f"the shortest: there is no time for {least}")
    say(f"grading: {min(n_passes, epochs):.1f} passes over {len(texts):,} reviews of "
        f"{chosen.seq_len} tokens ({reason}) in "
        f"{runtime.used_precision(chosen.precision, clock.device.type)}, {minutes:.1f} minutes at "
        f"most: {chosen.tokens_per_second:,.0f} tokens a second were measured")
    return dict(overrides, seq_len=chosen.seq_len, precision=chosen.precision, epochs=epochs,
                max_minutes=minutes)


def time_training(model, tokens, label_ids, tokenizer, config, clock):
    """Return the Speed of a step of training."""
    batches = helpers.classifier_batches(tokens, label_ids, config, tokenizer, clock.device)
    timed = time_steps(model, map(batches, range(STEPS)), helpers.classifier_forward, config,
                       clock)
    read = sum(int(batch["attention_mask"].sum()) for step, _ in timed for batch in step)
    seconds = sum(seconds for _, seconds in timed)
    return Speed(config.seq_len, config.precision, tokens_of(tokens, config.seq_len),
                 read / seconds, seconds / len(timed))


def tokens_of(tokens, seq_len):
    """Return how many tokens are read of all reviews, [CLS] and [SEP] included."""
    return sum(min(n + 2, seq_len) for n in tokens.lengths)


def time_steps(model, steps, forward, config, clock):
    """Make some steps; return [(step, its seconds)], of the first one only where it is the last.

    A step that takes more than LONG of the limit is the last.
    """
    optimizer, timed = helpers.make_optimizer(model, config), []
    model.train()
    for step in steps:
        timed.append((step, clock.timed(one_step, model, optimizer, step, forward, config)[1]))
        if timed[-1][1] > LONG * clock.limit * 60:
            break
    return timed[1:] or timed


def one_step(model, optimizer, step, forward, config):
    """Make one optimizer step as `fit` would, on a model that is thrown away after."""
    device, unpadded = next(model.parameters()).device, gpu.unpads(model, config.precision)
    most_tokens = gpu.token_limit(model) if unpadded else math.inf
    while True:
        parts = gpu.ready_batches(step, device, unpadded, most_tokens)
        try:
            helpers.accumulate(model, parts, helpers.count_targets(parts), forward,
                               config.precision)
            break
        except runtime.OutOfMemory:
            if max(map(gpu.rows_of, parts)) == 1:
                raise
            helpers.clear_gradients(model)
            most_tokens = max(map(gpu.tokens_of, parts)) // 2
    optimizer.step()
    helpers.clear_gradients(model)


def budget(clock, reserve):
    """Return max_minutes for what is left, less what comes after the last look at the clock.

    reserve: seconds of loading, of the step that is under way, of the last measuring.
    """
    return round(max(0.01, clock.left() - max(0.01 * clock.limit, 1.5 * reserve / 60)), 2)


def passes(speed, clock, loading):
    """Return how often the training reviews can be read in the time that is left."""
    minutes = budget(clock, 2 * loading + 2 * speed.seconds_per_step)
    return 60 * minutes * speed.tokens_per_second / speed.tokens


# ---- classify -----------------------------------------------------------------------------------

def classify(data, params, clock, **overrides):
    """Return ({part: logits of its reviews, (n, 2)} within the clock's limit, how they were read).

    How: a list of {seq_len, views, reviews}; seq_len is 0 of those that were not read.

    The reviews of all parts are classified in a random order, so that each share costs alike;
    whoever is slower than planned gives up `views`, then reads fewer tokens of those that are
    left. Past the limit the rest gets the label that was given most often (of logits, the log of
    its share). Both are said.
    """
    config = helpers.make_config(vars(params["config"]), **overrides)
    texts = [(part, i) for part in data for i in range(len(data[part].texts))]
    order = torch.randperm(len(texts), generator=runtime.generator("grading")).tolist()
    way = config.seq_len, config.views
    shorter = [(n, False) for n in (config.seq_len, *LENGTHS) if n <= config.seq_len]
    ways = list(dict.fromkeys([way, *shorter]))
    logits, rate, done = torch.zeros(len(texts), len(LABELS)), None, 0
    size = max(1, len(texts) // SHARES)
    first = max(1, size // 10)  # so small until the speed is known
    words = [min(len(data[part].texts[i].split()), config.words or math.inf) for part, i in texts]
    read = Counter()
    bar = runtime.progress_bar(len(texts), "classifying", "review")
    while done < len(order) and clock.left() > 0:
        rest = order[done:]
        if rate is not None:
            fits = longest(ways, rate, [words[i] for i in rest], clock)
            if fits != way:
                readings = len(TRUNCATIONS) if fits[1] else 1
                what = (f"{fits[0]} tokens of a review, not {way[0]}," if fits[0] != way[0] else
                        f"{readings} of {len(TRUNCATIONS)} readings of what is cut")
                say(f"grading: {what} for the {len(rest):,} that are left to classify in "
                    f"{clock.left():.1f} minutes")
            way = fits
        share = rest[:first if rate is None else size]
        chosen = [data[texts[i][0]].texts[texts[i][1]] for i in share]
        logits[share], seconds = clock.timed(helpers.classifier_logits, chosen, params, what="",
                                             **dict(overrides, seq_len=way[0], views=way[1]))
        if done or seconds > LONG * clock.limit * 60:  # the first call of anything is slower
            rate = seconds / cost([words[i] for i in share], *way)
        done += len(share)
        read[way] += len(share)
        bar.update(len(share))
    bar.close()
    if done < len(order):
        given = helpers.labels_of(logits[order[:done]])
        usual = max(LABELS, key=given.count)
        logits[order[done:]] = torch.tensor([1.0 + given.count(one) for one in LABELS]).log()
        warn(f"grading: time was up before the last {len(order) - done:,} of {len(order):,} "
             f"reviews were read; they are called {usual}, as most were")
        read[0, False] = len(order) - done
    sizes = [len(data[part].texts) for part in data]
    return dict(zip(data, logits.split(sizes))), [
        {"seq_len": n, "views": views, "reviews": count} for (n, views), count in read.items()]


def cost(words, seq_len, views=False):
    """Return about how many tokens are read of reviews of these numbers of words."""
    tokens = [1.3 * n + 2 for n in words]  # 1.3 tokens a word in film reviews
    cut = sum(n > seq_len for n in tokens)
    return sum(min(n, seq_len) for n in tokens) + views * cut * seq_len * (len(TRUNCATIONS) - 1)


def longest(ways, rate, words, clock):
    """Return the first way (seq_len, views) with which what is left ends in time, else the last.

    rate: seconds a token, of the last share; a tenth of the time is kept back.
    """
    seconds = 60 * 0.9 * clock.left()
    return next((way for way in ways if rate * cost(words, *way) <= seconds), ways[-1])
