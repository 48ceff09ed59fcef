"""Model folders and checkpoints of trainings: what they must hold, what is wrong, writing them."""
from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import tempfile
import time

import torch
import transformers
from transformers import BertConfig

from files import (
    InputError,
    cache_dir,
    digest,
    file_digest,
    find_path,
    one_line,
    open_atomically,
    quarantine,
    remove_if_there,
    remove_leftovers,
    save_history,
    save_json,
    say,
    try_lock,
    warn,
    writing,
)
from runtime import LEGACY_FORMAT, SAFETENSORS, WEIGHTS_ONLY, processes

# What changes what BERT computes, in config.json: followed (and part of `model_digest`); set by
# load_bert's arguments; left out, so that the library's default holds; or no other than that.
BERT_SETTINGS = {
    "followed": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                 "intermediate_size", "hidden_act", "max_position_embeddings", "type_vocab_size",
                 "layer_norm_eps"),
    "arguments": ("hidden_dropout_prob", "attention_probs_dropout_prob", "num_labels", "pooling"),
    "left out": ("classifier_dropout",  # so that `dropout` is meant
                 "chunk_size_feed_forward", "gradient_checkpointing", "use_cache",  # memory only
                 "attn_implementation", "_attn_implementation", "dtype", "torch_dtype",
                 "output_attentions", "output_hidden_states", "return_dict", "torchscript",
                 "pad_token_id", "problem_type", "initializer_range"),
    "only": {"model_type": "bert", "is_decoder": False, "add_cross_attention": False,
             "is_encoder_decoder": False, "position_embedding_type": "absolute",
             "tie_word_embeddings": True, "pruned_heads": {}, "use_bfloat16": False,
             "quantization_config": None, "per_layer_config": None}}
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
           "mask_token": "[MASK]"}
FOREIGN_WEIGHTS = {  # how a file's name ends: whose weights it holds
    ".h5": "TensorFlow's", ".ckpt.index": "TensorFlow's", ".ckpt.meta": "TensorFlow's",
    ".msgpack": "Flax's", ".onnx": "ONNX's", "adapter_config.json": "an adapter's"}
NOT_THE_FILE = {  # how a file begins: what it is, and the remedy
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run `git lfs pull` "
                                "where it was cloned, or download the file",
    b"\xef\xbb\xbf": "begins with a byte-order mark; save it as UTF-8 without one",
    b"<!doctype html": "is a web page; download the file itself",
    b"<html": "is a web page; download the file itself"}


def check_folder(folder, name):
    """Refuse a folder that cannot be a model's, and say what it is and what to give instead."""
    names = sorted(os.listdir(folder))
    if not names:
        raise InputError(f"model {name!r}: {os.path.abspath(folder)} is an empty folder; fill it, "
                         f"or remove it to have the hub's model of that name")
    if "snapshots" in names:
        inside = sorted(glob.glob(os.path.join(glob.escape(folder), "snapshots", "*")))
        raise InputError(f"model {name!r}: a folder of the hub's cache; give the one in it that "
                         f"holds config.json: {inside[-1] if inside else 'none is there'}")
    for one in names:
        if one.startswith(("config.json", "vocab.txt", "tokenizer", "pytorch_model", "model.")):
            with contextlib.suppress(OSError), open(os.path.join(folder, one), "rb") as file:
                head = file.read(200).lstrip().lower()
                for sign, what in NOT_THE_FILE.items():
                    if head.startswith(sign):
                        raise InputError(f"model {name!r}: its {one} {what}")
    if not any(one.startswith(("pytorch_model", "model.safetensors")) for one in names):
        for end, whose in FOREIGN_WEIGHTS.items():
            for one in names:
                if one.endswith(end):
                    raise InputError(f"model {name!r}: holds {whose} weights only ({one}); give "
                                     f"the same model's PyTorch weights, pytorch_model.bin")
    elif not SAFETENSORS and not any(one.startswith("pytorch_model") for one in names):
        raise InputError(f"model {name!r}: holds model.safetensors only, which transformers "
                         f"{transformers.__version__} cannot read; give pytorch_model.bin")


def config_entries(folder):
    """Return the entries of config.json, a dict, in a local folder or on the hub."""
    if not os.path.isdir(folder):
        return BertConfig.from_pretrained(folder).to_dict()
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        entries = json.load(file)
    if not isinstance(entries, dict):
        raise TypeError("it holds no table of settings")
    return entries


def check_entries(entries, only, where):
    """Refuse entries with a value other than the `only` one: it would be dropped, or misled by."""
    for key, allowed in only.items():
        value = entries.get(key)
        if value is not None and value != allowed and (value or allowed):
            raise InputError(f"{where} says {key}: {json.dumps(value)}; only "
                             f"{json.dumps(allowed)} is supported: give a BERT made with it")


def check_activation(entries, name):
    """Refuse a hidden_act that this stack does not have."""
    try:
        from transformers.activations import ACT2FN
    except ImportError:
        from transformers.modeling_bert import ACT2FN
    value = entries.get("hidden_act", "gelu")
    if not isinstance(value, str) or value not in ACT2FN:
        raise InputError(f"model {name!r}: its config.json says hidden_act: {json.dumps(value)}; "
                         f"transformers {transformers.__version__} has {', '.join(ACT2FN)}")


def attempt(what, name, load, *args, **kwargs):
    """Return load(...); turn any failure into one clear error that names the model."""
    try:
        return load(*args, **kwargs)
    except Exception as error:
        keep_alive(error)
        folder = find_path(name)
        place = "" if os.path.isdir(folder) else " from the hub, nor is there such a folder"
        fault = weights_fault(folder) if what == "weights" else ""
        raise InputError(f"model {name!r}: its {what} could not be loaded{place}" + (
            f": {fault}" if fault else
            f" ({one_line(error)}); give a folder with config.json, vocab.txt and "
            f"pytorch_model.bin as model=, --model or BERT_MODEL")) from None


def keep_alive(error):
    """Never free an exception: PyTorch 1.3 aborts when it frees a tensor that it read by half."""
    if not WEIGHTS_ONLY:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(error))


def stored_weights(folder):
    """Return what lies in a folder's file of weights, or None: {name: tensor} in a sound one.

    Of model.safetensors, which today's stack prefers, the values are descriptions.
    """
    path = os.path.join(folder, "model.safetensors")
    if SAFETENSORS and os.path.isfile(path):
        with open(path, "rb") as file:
            return json.loads(file.read(int.from_bytes(file.read(8), "little")).decode())
    path = os.path.join(folder, "pytorch_model.bin")
    return torch.load(path, map_location="cpu", **WEIGHTS_ONLY) if os.path.isfile(path) else None


def weights_fault(folder, lacking=()):
    """Return what is wrong with a folder's weights and the remedy, or "" where it is not known.

    lacking: the names of tensors that were looked for in vain.
    """
    whole = ("pytorch_model.bin holds a whole pickled model or other objects, not only tensors; "
             "save the model anew: torch.save(model.state_dict(), 'pytorch_model.bin')")
    try:
        stored = stored_weights(folder)
    except Exception as error:
        keep_alive(error)
        return whole if "GLOBAL" in str(error) else ""
    if isinstance(stored, torch.nn.Module):
        return whole
    for key, value in stored.items() if isinstance(stored, dict) else ():
        if isinstance(value, dict) and any(map(torch.is_tensor, value.values())):
            return (f"pytorch_model.bin holds them in a dict, under {key!r}; save them alone: "
                    f"torch.save(torch.load(FILE)[{key!r}], FILE)")
        match = re.match(r"(.+\.)(bert\.)?embeddings\.word_embeddings\.weight$", key)
        start = match.group(1).replace("bert.", "") if match else ""
        if start and lacking and all(
                {start + one, start + "bert." + one} & set(stored) for one in lacking):
            return (f"their names begin with {start!r}; save them without it: torch.save("
                    f"{{key[{len(start)}:]: value for key, value in torch.load(FILE).items()}}, "
                    f"FILE)")
    return ""


def new_layers(bert, info, folder, name):
    """Return the names of the parameters that a checkpoint lacks and that are made new.

    InputError where it lacks any other, or holds some of an encoder that have no place.
    """
    named = dict(bert.named_parameters())  # transformers 2.1 puts "bert." before a BertModel's
    missing = {key if key in named else key.replace("bert.", "", 1)
               for key in info["missing_keys"] if "position_ids" not in key}
    if not SAFETENSORS and "cls.predictions.bias" in named and os.path.isdir(folder):
        stored = stored_weights(folder)  # where names have no "bert." 2.1 says nothing of heads
        missing.update(key for key in named if key.startswith("cls.") and key not in stored)
    new = sorted(key for key in missing if key.startswith(("cls.", "pooler.", "bert.pooler.")))
    lacking = sorted(missing - set(new))
    if lacking:
        fault = weights_fault(folder, [key.replace("bert.", "", 1) for key in lacking])
        raise InputError(f"model {name!r}: its weights lack {len(lacking)} tensors of a BERT "
                         f"({lacking[0]}, ...); {fault or 'give a whole BERT'}")
    unplaced = sorted(key for key in info["unexpected_keys"] if "position_ids" not in key
                      and re.match(r"(bert\.)?(embeddings|encoder)\.", key))
    if unplaced:
        raise InputError(f"model {name!r}: its weights hold {len(unplaced)} tensors that its "
                         f"config.json has no place for ({unplaced[0]}, ...); give the "
                         f"config.json that they were saved with")
    return new


def fit_embeddings(bert, config, tokenizer):
    """Cut embeddings and the masked-LM head's outputs to the vocabulary; name its padding."""
    encoder, n = getattr(bert, "bert", bert), len(tokenizer)
    words = encoder.embeddings.word_embeddings
    words.padding_idx = tokenizer.pad_token_id
    if words.num_embeddings == n:
        return
    words.weight = torch.nn.Parameter(words.weight.detach()[:n].clone())
    words.num_embeddings = n
    if bert is not encoder:
        head = bert.cls.predictions
        head.bias = torch.nn.Parameter(head.bias.detach()[:n].clone())
        head.decoder.weight, head.decoder.out_features = words.weight, n
        if head.decoder.bias is not None:
            head.decoder.bias = head.bias
    for one in (config, bert.config, encoder.config):
        one.vocab_size = n


def check_tokenizer(tokenizer, config, name):
    """Refuse a vocabulary that does not fit or is cased; give the tokenizer its model's limit."""
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.max_len = int(1e12)  # transformers 2.1 warns past it, but vectorize_ex cuts itself
    getattr(tokenizer, "deprecation_warnings", {})[  # and today's, once
        "sequence-length-is-longer-than-the-specified-maximum"] = True
    fast = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = fast.get_vocab(with_added_tokens=False) if fast else tokenizer.vocab
    special = [getattr(tokenizer, key) for key in SPECIAL]
    lacking = [word for word in special if word not in vocabulary]
    if lacking:
        raise InputError(f"model {name!r}: its vocabulary lacks {', '.join(lacking)}; is "
                         f"vocab.txt there, and this model's?")
    added = [word for word in tokenizer.added_tokens_encoder if word not in special]
    if added:
        raise InputError(f"model {name!r}: tokens were added to its tokenizer "
                         f"({', '.join(added[:3])}), which vocab.txt cannot say; give the model "
                         f"as it was before that")
    check_entries(tokenizer.init_kwargs, dict({"do_basic_tokenize": True, "never_split": None}, **(
        {} if fast else {"strip_accents": True})), f"model {name!r}: its tokenizer_config.json")
    spare = config.vocab_size - len(tokenizer)
    if 0 < spare < 128 and config.vocab_size % 8 == 0:
        warn(f"model {name!r}: its embeddings have {config.vocab_size} rows for "
             f"{len(tokenizer)} vocabulary entries, as padded to a multiple of 8; the last "
             f"{spare} are left out")
    elif spare:
        raise InputError(f"model {name!r}: its vocabulary has {len(tokenizer)} entries, its "
                         f"embeddings {config.vocab_size}; is vocab.txt there, and this model's?")
    ids = list(range(len(tokenizer)))
    words = tokenizer.convert_ids_to_tokens(ids)
    if None in words or tokenizer.convert_tokens_to_ids(words) != ids:
        raise InputError(f"model {name!r}: its vocabulary of {len(tokenizer)} tokens names one "
                         f"twice; vocab.txt is damaged")
    cased = sum(word != word.lower() and word[0] != "[" for word in words)
    if tokenizer.tokenize("Good") != tokenizer.tokenize("good") or cased > len(words) // 100:
        raise InputError(f"model {name!r}: its vocabulary is cased; use an uncased BERT")


def check_vocabularies(tokenizer, folder, name):
    """Refuse a folder whose tokenizer.json, which today's stack reads, is not its vocab.txt's."""
    paths = [os.path.join(folder, one) for one in ("tokenizer.json", "vocab.txt")]
    if all(map(os.path.isfile, paths)):
        with open(paths[1], encoding="utf-8") as file:
            words = [line.rstrip("\n") for line in file]
        if words != tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))):
            raise InputError(f"model {name!r}: its tokenizer.json and vocab.txt hold different "
                             f"vocabularies; remove the wrong one")


def save_bert(folder, model, tokenizer, note, history=None, replace=False, **entries):
    """Write a folder that `load_bert` reads on both stacks; it appears whole or not at all.

    note: a dict for note.json, which also gets the SHA-256 of the weights, and a checksum of all
    that makes the model. history: for history.json and .csv. replace: take the place of a folder
    that is there; else that one stays. entries: of config.json, beside the model's own.
    """
    state = weights_on_host(model)
    config = {key: value for key, value in model.config.to_dict().items()
              if key not in ("dtype", "_name_or_path", "pruned_heads")}
    parent, name = os.path.split(os.path.abspath(folder))
    with writing(folder, sum(value.numel() * value.element_size() for value in state.values())):
        os.makedirs(parent, exist_ok=True)
        remove_leftovers(folder)
        aside = tempfile.mkdtemp(dir=parent, prefix=name, suffix=".tmp")
        try:
            config.update(model_type="bert", **entries)
            save_json(os.path.join(aside, "config.json"), config)
            save_json(os.path.join(aside, "tokenizer_config.json"), tokenizer_entries(
                tokenizer, model.config.max_position_embeddings))
            with open_atomically(os.path.join(aside, "vocab.txt")) as file:
                file.writelines(word + "\n" for word in tokenizer.convert_ids_to_tokens(
                    list(range(len(tokenizer)))))
            with open_atomically(os.path.join(aside, "pytorch_model.bin"), "wb") as file:
                torch.save(state, file, **LEGACY_FORMAT)
            if history:
                save_history(os.path.join(aside, "history"), history)
            note = dict(note, sha256=file_digest(os.path.join(aside, "pytorch_model.bin")))
            save_json(os.path.join(aside, "note.json"), dict(note, checksum=seal(aside, note)))
            os.chmod(aside, 0o755)
            (replace_folder if replace else rename_if_first)(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def rename_if_first(aside, folder):
    """Rename a folder, unless another process was first, with the same."""
    try:
        os.rename(aside, folder)
    except OSError:
        if not os.path.isdir(folder):
            raise


def replace_folder(aside, folder):
    """Rename a folder to take the place of another, which is removed, or back after an error."""
    older = aside[:-len(".tmp")] + ".older"
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, older)
    try:
        os.rename(aside, folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rename(older, folder)
        raise
    shutil.rmtree(older, ignore_errors=True)


def tokenizer_entries(tokenizer, limit):
    """Return what tokenizer_config.json holds, for load_bert and for transformers' own loaders.

    Beside what those want: the settings that are other than BERT's usual.
    """
    usual = dict(SPECIAL, tokenize_chinese_chars=True, strip_accents=None)
    entries = dict({key: tokenizer.init_kwargs.get(key, usual[key]) for key in usual},
                   **{key: getattr(tokenizer, key) for key in SPECIAL})
    return dict({"do_lower_case": True, "tokenizer_class": "BertTokenizer",
                 "model_max_length": limit},
                **{key: value for key, value in entries.items() if value != usual[key]})


def seal(folder, note):
    """Return the checksum of a note and of the files that make its folder a model."""
    paths = [os.path.join(folder, name) for name in (
        "config.json", "vocab.txt", "pytorch_model.bin", "tokenizer_config.json")]
    return digest(note, *(file_digest(path) for path in paths[:3] + [
        path for path in paths[3:] if os.path.exists(path)]))


def sound_note(folder):
    """Return the note of a folder that `save_bert` wrote and nobody changed, or None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        with open(os.path.join(folder, "note.json"), encoding="utf-8") as file:
            note = json.load(file)
        if note.pop("checksum") == seal(folder, note):
            return note
    return None


def read_note(folder):
    """Return the note of a finished pretraining, or None; a damaged one is set aside."""
    return sound_note(folder) or (quarantine(folder) if os.path.isdir(folder) else None)


def check_place(folder):
    """Return the real path of a place for a classifier; refuse where anything else lies."""
    place = os.path.realpath(os.path.expanduser(folder))
    parent = os.path.dirname(place)
    if not folder or not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise InputError(f"{folder}: not a place in a folder that can be written; name another")
    if os.path.lexists(place) and "labels" not in (sound_note(place) or {}) and not (
            os.path.isdir(place) and not os.listdir(place)):
        raise InputError(f"{folder}: is there already, and is no sound classifier that "
                         f"save_classifier wrote; name another folder, or remove it")
    return place


def tokenizer_digest(tokenizer):
    """Return the hex SHA-256 of all that decides how a tokenizer splits texts and frames them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        how = json.loads(backend.to_str())
        del how["truncation"], how["padding"]  # calls leave them behind; tokenize clears them
    else:
        basic = getattr(tokenizer, "basic_tokenizer", None)
        how = basic and vars(basic), getattr(tokenizer, "added_tokens_encoder", None)
    return digest(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), how,
                  [getattr(tokenizer, key + "_id") for key in SPECIAL],
                  tokenizer.tokenize("A\u00e9 B\u96fb\u5f71, a.b [MASK]don't"))


def weights_digest(model):
    """Return the hex SHA-256 of a model's weights."""
    return digest(*itertools.chain.from_iterable(
        (name, value.cpu().numpy()) for name, value in sorted(model.state_dict().items())
        if not name.endswith("position_ids")))


def model_digest(model, tokenizer):
    """Return the hex SHA-256 of all of a loaded model that decides what comes of it.

    Weights, what it follows of config.json, the tokenizer; not load_bert's own arguments.
    """
    return digest(weights_digest(model), tokenizer_digest(tokenizer),
                  {key: getattr(model.config, key) for key in BERT_SETTINGS["followed"]})


def save_state(path, state):
    """Write tensors and plain values, led by the SHA-256 of what follows."""
    with open_atomically(path, "wb") as file:
        file.write(bytes(32))
        torch.save(state, file, **LEGACY_FORMAT)
        with file.getbuffer() as data, data[32:] as payload:
            data[:32] = hashlib.sha256(payload).digest()


def load_state(path):
    """Return what `save_state` wrote; None when there is nothing, or nothing sound, at `path`."""
    try:
        with open(path, "rb") as file:
            checksum, payload = file.read(32), file.read()
    except FileNotFoundError:
        return None
    with contextlib.suppress(pickle.UnpicklingError):  # what is no tensor and no plain value
        if hashlib.sha256(payload).digest() == checksum:
            return torch.load(io.BytesIO(payload), map_location="cpu", **WEIGHTS_ONLY)
    return quarantine(path)


def weights_on_host(model):
    """Return a model's weights as {name: tensor} on the CPU; tied ones share their memory, so that
    a file holds them once."""
    copies, state = {}, model.state_dict(keep_vars=True)
    for value in state.values():
        if id(value) not in copies:
            copies[id(value)] = value.detach().cpu()
    return {key: copies[id(value)].detach() for key, value in state.items()}


def optimizer_on_host(optimizer):
    """Return an optimizer's state with all tensors on the CPU."""
    state = optimizer.state_dict()
    return dict(state, state={number: {
        key: value.cpu() if torch.is_tensor(value) else value for key, value in moments.items()}
        for number, moments in state["state"].items()})


def save_checkpoint(path, model, optimizer, history, seconds, scaler=None):
    """Write all that the run needs to go on; what is random depends on seeds and step alone."""
    save_state(path, {"model": weights_on_host(model), "history": history, "seconds": seconds,
                      "optimizer": optimizer and optimizer_on_host(optimizer),
                      "scaler": scaler and scaler.state_dict()})


def resume(path, model, optimizer, scaler=None):
    """Load the checkpoint at `path`, if there is one; return (step, history, seconds used)."""
    state = load_state(path) if path else None
    if state is None:
        return 0, [], 0.0
    model.load_state_dict(state["model"])
    if state["optimizer"]:  # a finished run needs it no more
        optimizer.load_state_dict(state["optimizer"])
    if scaler:
        scaler.load_state_dict(state.get("scaler"))
    step = state["history"][-1]["step"]
    say(f"resuming from the checkpoint at step {step}")
    return step, state["history"], state["seconds"]


CHECKPOINT_DAYS = 7      # that a checkpoint waits for the command that goes on from it


@contextlib.contextmanager
def locked_checkpoint(path):
    """Hold the lock on a run's checkpoint; before, tend those that other runs have left."""
    if not processes()[0]:
        tend_checkpoints(path)
    with try_lock(path + ".lock") as mine:
        try:
            yield
        finally:
            if mine:
                remove_if_there(path + ".lock")


_reported = set()  # checkpoints that this process has named already


def tend_checkpoints(own):
    """Say once what checkpoints wait in the cache; remove those that wait for nobody.

    These are older than CHECKPOINT_DAYS, and no running process holds their lock. own: the
    checkpoint of the run that begins.
    """
    waiting, removed = {}, {}  # {file: MB}
    for path in [path for folder in (cache_dir("runs"), cache_dir("pretrained"))
                 for path in glob.glob(os.path.join(glob.escape(folder), "*.checkpoint*"))]:
        run = path[:path.rindex(".checkpoint")] + ".checkpoint"  # path: this, its lock, a damaged
        if run == own:
            continue
        with contextlib.suppress(OSError, InputError), try_lock(run + ".lock") as mine:
            if mine:
                size, age = os.path.getsize(path) / 2 ** 20, time.time() - os.path.getmtime(path)
                if age > 86400 * CHECKPOINT_DAYS:
                    os.remove(path)
                    removed[path] = size
                elif path == run:
                    waiting[path] = size
                remove_if_there(run + ".lock")
    if removed or set(waiting) - _reported:
        say(f"checkpoints of stopped runs in {cache_dir()}: {len(waiting)} "
            f"({sum(waiting.values()):,.1f} MB) wait, {CHECKPOINT_DAYS} days at most, for the "
            f"command that goes on from them; {len(removed)} ({sum(removed.values()):,.1f} MB) "
            f"older than that removed")
    _reported.update(waiting)
