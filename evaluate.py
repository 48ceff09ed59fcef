"""Grade the bundle as the course does: pretrain, train, classify five parts, write preds.tsv.

    python evaluate.py                                   # embedded sample, tiny BERT: two minutes
    python evaluate.py --data data/FILIMDB --grading     # 30 minutes a phase: what fits is chosen
    python evaluate.py --data data/FILIMDB --model FOLDER --no-pretrain --set lr=3e-5
    torchrun --nproc_per_node 4 evaluate.py --data data/FILIMDB    # on four GPUs
    python evaluate.py --data data/FILIMDB --save build/classifier   # keep what was trained
    python evaluate.py --data FOLDER --load build/classifier         # classify, train nothing
    python evaluate.py --data data/FILIMDB --json build/run.json     # keep accuracies as a file
    python evaluate.py --data data/FILIMDB --scores build/scores.tsv # and probabilities

Reads PART.texts and PART.labels of train, dev, test, dev-b and test-b (and train_unlabeled for
pretraining), prints the accuracy of every labelled part, and writes a line `PART/INDEX<TAB>label`
for each review. A part that is absent is left out; training needs train.
--set KEY=VALUE reaches helpers.train, --set pretrain.KEY=VALUE helpers.pretrain; --help has all.
--json FILE holds the accuracies with n, baselines and what was seen in training, the minutes of
each phase, settings, versions and device. --scores FILE: `PART/INDEX<TAB>probability of pos`.
Several processes give the losses of one to 1e-5 in fp32 without dropout; with dropout they draw
other masks.
Exit code: 0 done, 2 wrong use, a full disk or a diverged training, 130/143 stopped by Ctrl-C or
SIGTERM.
"""
import argparse
import ast
import contextlib
import inspect
import json
import os
import shutil
import signal
import sys
import textwrap
import time


def stopped(number):
    """Say in one line how to go on after a signal; return the exit code."""
    given = {word.split("=")[0] for word in sys.argv}
    again = ("begins anew: --grading measures its budgets" if "--grading" in given else
             "begins anew" if "--load" in given else "resumes from the last checkpoint")
    print(f"evaluate.py: interrupted; the same command {again}", file=sys.stderr, flush=True)
    return 128 + number


STOPS = signal.SIGINT, signal.SIGTERM
if __name__ == "__main__":  # while libraries are loaded, which takes seconds, nothing is to save
    for number in STOPS:
        signal.signal(number, lambda number, frame: os._exit(stopped(number)))

import checkpoints  # noqa: E402
import files  # noqa: E402
import grading  # noqa: E402
import helpers  # noqa: E402
import runtime  # noqa: E402
from files import InputError  # noqa: E402
from helpers import LABEL_IDS  # noqa: E402

SAMPLE = os.path.join("data", "sample")
TINY = os.path.join(SAMPLE, "bert")
# A BERT of 0.3 million weights wants larger steps than one of 110 million.
SAMPLE_SETTINGS = {"lr": 3e-4, "seq_len": 256}
SAMPLE_PRETRAIN = {"lr": 5e-4}
SHORT = ("dev-b", "test-b")  # short reviews: another domain than the training reviews


def refuse(message):
    """Refuse a command line in one line, where argparse prints its usage too."""
    raise InputError(f"{message}; see --help")


def parse_arguments(argv):
    """Return the command line's values."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=describe_keys(), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("--data", help="folder in FILIMDB's layout (default: %s)" % SAMPLE)
    parser.add_argument("--model", help="BERT's folder or hub name (default: bert-base-uncased; "
                                        "for the sample its tiny BERT)")
    parser.add_argument("--transductive", action="store_true",
                        help="pretrain on the texts of dev and test parts too, without labels")
    parser.add_argument("--no-pretrain", action="store_true", help="fine-tune right away")
    parser.add_argument("--grading", action="store_true",
                        help="time the machine and choose what ends within the course's limits")
    parser.add_argument("--out", default="preds.tsv", help="where predictions go (preds.tsv)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="a hyperparameter of train, or pretrain.KEY=VALUE; keys: below")
    parser.add_argument("--save", metavar="FOLDER", help="keep the trained classifier there")
    parser.add_argument("--load", metavar="FOLDER", help="classify with what --save kept")
    parser.add_argument("--json", metavar="FILE", help="where a record of the run goes")
    parser.add_argument("--scores", metavar="FILE", help="where the probabilities of pos go")
    return parser.parse_args(argv)


def describe_keys():
    """Return --help's list of keys: defaults of train and pretrain, meaning, what is allowed."""
    mlm = vars(helpers.make_config(helpers.MLM_DEFAULTS))
    lines = ["keys of --set, with their defaults (pretrain.KEY: only where it is another):"]
    for key, value in vars(helpers.make_config()).items():
        lines.append(f"  {key}={value}" + f"  pretrain.{key}={mlm[key]}" * (mlm[key] != value))
        rule = "True or False" if isinstance(value, bool) else helpers.rule_of(key)[0]
        lines += textwrap.wrap(f"{helpers.meanings()[key]}; must be {rule}", 95,
                               initial_indent=" " * 6, subsequent_indent=" " * 6)
    own = [f"{key}={value}" for key, value in SAMPLE_SETTINGS.items()]
    own += [f"pretrain.{key}={value}" for key, value in SAMPLE_PRETRAIN.items()]
    return "\n".join([*lines, "", f"The sample's tiny BERT has others: {', '.join(own)}.",
                      *inspect.getdoc(helpers.Config).split("\n")[2:]])


def parse_settings(pairs):
    """Return (overrides of train, overrides of pretrain) from KEY=VALUE strings."""
    settings = {"": {}, "pretrain": {}}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        where, _, name = key.rpartition(".")
        if not equals or where not in settings:
            raise InputError(f"--set {pair}: write KEY=VALUE or pretrain.KEY=VALUE")
        try:
            settings[where][name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[where][name] = value  # a bare word: keep=tail
    for key in ("freeze", "whole_word"):
        if settings[""].get(key):
            raise InputError(f"--set {key}=True: for pretrain only; write pretrain.{key}=True")
    helpers.make_config(**settings[""])
    helpers.make_config(helpers.MLM_DEFAULTS, **settings["pretrain"])
    return settings[""], settings["pretrain"]


def check_load(args, overrides, pretrain_overrides):
    """Refuse beside --load what training alone reads."""
    given = [option for option, value in (
        ("--model", args.model), ("--transductive", args.transductive),
        ("--no-pretrain", args.no_pretrain), ("--save", args.save)) if value not in (None, False)]
    given += [f"--set {key}" for key in overrides if key not in helpers.CLASSIFYING]
    given += [f"--set pretrain.{key}" for key in pretrain_overrides]
    if given:
        raise InputError(f"--load trains nothing, so it does not go with {', '.join(given)}; "
                         f"leave out one of the two")


def check_grading(overrides, pretrain_overrides):
    """Refuse beside --grading a budget of one's own."""
    for where, settings in (("", overrides), ("pretrain.", pretrain_overrides)):
        if "max_minutes" in settings:
            raise InputError(f"--grading sets the budget, so it does not go with --set "
                             f"{where}max_minutes; leave out one of the two")


def check_output(option, path):
    """Refuse an output that could not be written, before hours are spent."""
    folder = os.path.dirname(os.path.abspath(path))
    odd = not path or os.path.exists(path) and not os.path.isfile(path)  # a folder, a pipe
    if odd or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise InputError(f"{option} {path}: not a file in a folder that can be written; name "
                         f"another")


def check_training(configs, data_dir, labels):
    """Refuse what `train` or `pretrain` would refuse, before hours are spent.

    configs: {"": Config of train, "pretrain.": that of pretrain, where there is one}.
    """
    path = os.path.join(files.find_path(data_dir), "train.labels")
    if labels is None:
        raise InputError(f"{path}: missing; training needs neg or pos for every review")
    if len(set(labels)) < 2:
        raise InputError(f"{path}: holds {labels[0]} alone; training needs neg and pos")
    for where, config in configs.items():
        runtime.pick_device(config.device)
        limit = positions_of(config.model)
        if config.seq_len > limit:
            raise InputError(f"{where}seq_len={config.seq_len}: the model has {limit} positions; "
                             f"--set {where}seq_len to no more")


def positions_of(model):
    """Return the positions of a model's folder; 512 where load_bert is to find the fault."""
    path = os.path.join(files.find_path(model), "config.json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(path, encoding="utf-8") as file:
            return int(json.load(file)["max_position_embeddings"])
    return 512


def write_predictions(path, data, predicted):
    """Write PART/INDEX<TAB>label for every review; checked whole before it replaces a file."""
    for part in data:
        if len(predicted[part]) != len(data[part].ids) or set(predicted[part]) - set(LABEL_IDS):
            raise RuntimeError(f"{part}: {len(predicted[part])} predictions for "
                               f"{len(data[part].ids)} reviews, or a label that is none")
    write_column(path, data, predicted, "predictions")


def write_column(path, data, values, what):
    """Write PART/INDEX<TAB>value for every review, whole or not at all, and say so."""
    lines = [f"{i}\t{value}\n" for part in data for i, value in zip(data[part].ids, values[part])]
    with files.open_atomically(path) as file:
        file.writelines(lines)
    print(f"{path}: {len(lines):,} {what}", flush=True)


def write_scores(path, data, logits):
    """Write PART/INDEX<TAB>the probability that the review is positive, for every review."""
    write_column(path, data, {part: [f"{p:.6f}" for p in logits[part].softmax(1)[
        :, LABEL_IDS["pos"]].tolist()] for part in data}, "probabilities of pos")


def measure(data, predicted):
    """Return {labelled part: n, accuracy, its baselines, how many of its texts train holds}."""
    train, parts = data.get("train"), {}
    for part in (part for part in data if data[part].labels):
        texts, labels, baselines, shared = data[part].texts, data[part].labels, {}, None
        if train:
            known = set(train.texts)
            shared = sum(text in known for text in texts)
        if train and train.labels and part != "train":
            bayes = helpers.naive_bayes(train.texts, train.labels, texts)
            baselines = {"naive Bayes": helpers.accuracy(labels, bayes),
                         "majority class": helpers.majority_accuracy(train.labels, labels)}
        parts[part] = {"n": len(labels), "accuracy": helpers.accuracy(labels, predicted[part]),
                       "baselines": baselines, "stand_in_train": shared}
    return parts


def report(parts, seen):
    """Print the accuracy of each labelled part, the baseline beside it, and what was seen."""
    for part, row in parts.items():
        note = ["short reviews, another domain"] if part in SHORT else []
        if part == "train":
            note += ["seen in training"] * (not seen.startswith("loaded"))
        elif row["baselines"]:
            note.append(f"naive Bayes {row['baselines']['naive Bayes']:.2%}")
        print(f"{part:<6} accuracy {row['accuracy']:7.2%} of {row['n']:,} reviews "
              f"({'; '.join([*note, seen])})", flush=True)


def record_of(args, params, overrides, seen, minutes, parts):
    """Return what --json keeps: all that a table, or another program, wants to know of a run."""
    config = helpers.make_config(vars(params["config"]), **overrides)
    pretrained, last = params["pretrained"] or {}, (params.get("history") or [{}])[-1]
    return {"data": args.data, "model": args.model, "load": args.load, "seen": seen,
            "predictions": args.out, "parts": parts, "minutes": minutes,
            "settings": helpers.settings(config),
            "trained": {"steps": last["step"], "epochs": last["epoch"]} if last else {},
            "pretraining": {key: pretrained[key] for key in (
                "parts", "n_texts", "loss_before", "loss_after", "config") if key in pretrained},
            "results_version": helpers.RESULTS_VERSION, "versions": runtime.VERSIONS,
            "device": str(next(params["model"].parameters()).device), "cores": os.cpu_count(),
            "processes": runtime.processes()[1]}


@contextlib.contextmanager
def timed(minutes, phase):
    """Note under a phase's name how many minutes the block takes."""
    started = time.time()
    yield
    minutes[phase] = (time.time() - started) / 60


def warn_of_one_class(data, predicted):
    """Say loudly which parts with both labels are called neg, or pos, from end to end."""
    for part in data:
        if len(set(data[part].labels or [])) > 1 and len(set(predicted[part])) == 1:
            files.warn(f"{part}: all {len(predicted[part])} reviews are called "
                         f"{predicted[part][0]}: the training collapsed or learned nothing; "
                         f"try another lr, a longer warmup, another seed")


def trained(args, data_dir, data, overrides, pretrain_overrides, minutes):
    """Pretrain and train; return (params, what pretraining saw, in words)."""
    if args.model is not None:
        overrides["model"] = args.model
    args.model = overrides.get("model", helpers.default_model())
    pretrain_overrides.setdefault("model", args.model)
    shortest = {"seq_len": 3} if args.grading else {}  # in place of a default: it is chosen later
    configs = {"": helpers.make_config(**dict(shortest, **overrides))}
    if not args.no_pretrain:
        configs["pretrain."] = helpers.make_config(helpers.MLM_DEFAULTS, **pretrain_overrides)
    check_training(configs, data_dir, data["train"].labels)
    params, seen = None, "no pretraining"
    if not args.no_pretrain:
        with timed(minutes, "pretraining"):
            clock = grading.Clock(pretrain_overrides.get("device", ""))
            texts = helpers.pretrain_parts(data_dir, data, args.transductive)
            parts, texts = list(texts), list(texts.values())
            if args.grading:
                texts, pretrain_overrides = grading.plan_pretraining(
                    texts, pretrain_overrides, clock)
            params = helpers.pretrain(texts, parts=parts, **pretrain_overrides)
        seen = "pretrained on " + ", ".join(params["parts"])
        print(f"{helpers.describe(params)}: {minutes['pretraining']:.1f} minutes", flush=True)
    with timed(minutes, "training"):
        clock = grading.Clock(overrides.get("device", ""))
        if args.grading:
            start = dict(overrides, model=params["path"] if params else args.model)
            plan = grading.plan_training(data["train"].texts, data["train"].labels, start, clock)
            overrides = dict(plan, model=args.model)
        params = helpers.train(data["train"].texts, data["train"].labels, params,
                               hold=not args.grading, **overrides)
    print(f"training: {minutes['training']:.1f} minutes", flush=True)
    return params, seen


def check_outputs(args):
    """Refuse what could not be written, before hours are spent; expand ~ in place."""
    args.out = os.path.expanduser(args.out)
    check_output("--out", args.out)
    place = checkpoints.check_place(args.save) if args.save is not None else None
    taken = {os.path.realpath(args.out): "predictions go there (--out)"}
    for option in ("json", "scores"):
        path = getattr(args, option)
        if path is not None:
            path = os.path.expanduser(path)
            setattr(args, option, path)
            check_output(f"--{option}", path)
            if os.path.realpath(path) in taken:
                raise InputError(f"--{option} {path}: {taken[os.path.realpath(path)]}; name "
                                 f"another")
            taken[os.path.realpath(path)] = f"--{option} goes there"
    for path in taken:
        if place and (path + os.sep).startswith(place + os.sep):
            raise InputError(f"{path}: lies in {args.save}, which --save replaces whole; name "
                             f"another")


def run(argv=None):
    """Pretrain and train, or load; classify, report, write predictions and save."""
    args = parse_arguments(argv)
    overrides, pretrain_overrides = parse_settings(args.set)
    check_outputs(args)
    if args.no_pretrain and args.transductive and args.load is None:
        raise InputError("--transductive is of pretraining, so it does not go with --no-pretrain; "
                         "leave out one of the two")
    if args.grading:
        check_grading(overrides, pretrain_overrides)
    tiny = args.data is None and args.model is None and args.load is None
    if args.data is None:
        args.data = SAMPLE
        print(f"no --data: the embedded sample ({SAMPLE}, synthetic)"
              f"{', its tiny BERT' if tiny else ''}", flush=True)
    minutes = {}
    if args.load is not None:
        check_load(args, overrides, pretrain_overrides)
        params, seen = helpers.load_classifier(args.load), f"loaded from {args.load}"
        data = helpers.load_filimdb(args.data)
    else:
        if tiny:
            overrides = dict(SAMPLE_SETTINGS, model=TINY, **overrides)
            pretrain_overrides = dict(SAMPLE_PRETRAIN, model=TINY, **pretrain_overrides)
        data = helpers.load_filimdb(args.data)
        params, seen = trained(args, args.data, data, overrides, pretrain_overrides, minutes)
        overrides = {}
    with timed(minutes, "classification"):
        if args.grading:
            clock = grading.Clock(overrides.get("device", params["config"].device))
            logits, read = grading.classify(data, params, clock, **overrides)
        else:
            logits = {part: helpers.classifier_logits(data[part].texts, params, **overrides)
                      for part in data}
        predicted = {part: helpers.labels_of(logits[part]) for part in data}
    print(f"classification: {minutes['classification']:.1f} minutes", flush=True)
    if not runtime.processes()[0]:
        write_predictions(args.out, data, predicted)
        if args.scores is not None:
            write_scores(args.scores, data, logits)
        if args.save is not None:
            helpers.save_classifier(args.save, params)
            print(f"{args.save}: the classifier, for --load", flush=True)
        parts = measure(data, predicted)
        report(parts, seen)
        if args.json is not None:
            record = record_of(args, params, overrides, seen, minutes, parts)
            files.save_json(args.json, dict(record, read=read) if args.grading else record)
        files.remove_if_there(params["run"])
        if args.grading and params["pretrained"] and args.load is None:
            # Its name holds the budget that was measured: no later run would find it.
            shutil.rmtree(params["pretrained"]["path"], ignore_errors=True)
        warn_of_one_class(data, predicted)


def interrupt(number, frame):
    """Raise what Ctrl-C raises, so that a checkpoint is written first."""
    raise KeyboardInterrupt(number)


def main(argv=None):
    """Run; return the exit code, with one clear line for what the user can mend."""
    try:
        for number in STOPS:
            signal.signal(number, interrupt)
        on_cpu = "device=cpu" in (sys.argv if argv is None else argv)
        with runtime.joined_processes("cpu" if on_cpu else ""):
            run(argv)
        return 0
    except (InputError, helpers.Diverged) as error:
        print("evaluate.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return stopped(*error.args or STOPS[:1])


if __name__ == "__main__":
    code = main()
    if code > 128:  # stopped: without waiting for threads that are at their last micro-batch
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
