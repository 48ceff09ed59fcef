"""What stands around a training loop: progress, history, measuring, checkpoints, a stop.

The loop itself is helpers.fit.
"""
from __future__ import annotations

import contextlib
import math
import time

from checkpoints import resume, save_checkpoint
from files import Interrupted, say
from gpu import (
    QUEUED, Ahead, LossScaler, floats_later, ready_batches, rows_of, token_limit, tokens_of,
    unpads)
from runtime import (
    all_sum, is_notebook, open_writer, processes, progress_bar, seed_device, seed_of)


class Diverged(ArithmeticError):
    """The loss or the gradient became NaN or infinite."""


CHECKPOINT_SECONDS = 60  # between checkpoints; each is some 3 times the weights' size ...
CHECKPOINT_SHARE = 20    # ... and at least so many times what writing the last one took
EVALUATIONS = 4          # points of a run's learning curve, evenly over its progress


class Run:
    """What stands around a training loop: progress, history, measuring, checkpoints, a stop.

    step: optimizer steps done. progress: 0 to 1, the share of the steps that is done or, if that
    is more, of config.max_minutes spent. history: a dict for every step, and one before the first
    with the metrics of evaluate(model).
    """

    def __init__(self, model, optimizer, batches, config, n_steps, steps_per_epoch, evaluate=None,
                 checkpoint="", log_dir="", what="training"):
        self.model = model
        self.optimizer = optimizer
        self.make_batches = batches
        self.config = config
        self.device = next(model.parameters()).device
        self.scaler = LossScaler(self.device, config.precision)
        self.unpadded = unpads(model, config.precision)
        self.most_tokens = token_limit(model) if self.unpadded else math.inf  # of a micro-batch
        self.batches = Ahead(self.ready_batches, self.device, n_steps)
        self.n_steps = n_steps
        self.steps_per_epoch = steps_per_epoch
        self.evaluate = evaluate
        self.checkpoint = checkpoint
        self.what = what
        self.rank, _ = processes()
        self.writer = None if self.rank else open_writer(log_dir)
        self.step, self.history, seconds = resume(checkpoint, model, optimizer, self.scaler)
        self.began = time.time() - seconds
        self.saved = time.time()
        self.patience = CHECKPOINT_SECONDS  # until the next checkpoint
        self.expected = None  # a step's row and the function that reads its loss and norm
        self.progress = 0.0

    @contextlib.contextmanager
    def guarded(self):
        """Measure before the first step; keep a checkpoint when Ctrl-C stops the block."""
        minutes = self.config.max_minutes
        budget = minutes and self.began + 60 * minutes - time.time()
        with progress_bar(self.n_steps, self.what, "step", budget=budget) as self.bar:
            self.bar.skip(self.step)
            self.model.train()
            try:
                if self.evaluate and not self.history:
                    self.history.append(dict(step=0, epoch=0.0, seconds=0.0,
                                             **self.evaluate(self.model)))
                self.measure_if_due()  # the run was stopped while it was measured
                self.progress = self.share_done()
                yield
                self.settle()
            except KeyboardInterrupt as stop:
                self.save()
                raise self.interrupted(stop) from None
            finally:
                self.batches.close()
                self.model.eval()
                if self.writer:
                    self.writer.close()
        if self.step < self.n_steps:
            say(f"{self.what}: the budget of {self.config.max_minutes:g} minutes ended it after "
                f"{self.step} of {self.n_steps} steps, the last with lr "
                f"{self.history[-1].get('lr', 0) if self.history else 0:.2g}")

    def interrupted(self, stop):
        """Return what says how far the run was at a Ctrl-C; print it, but for in a notebook."""
        said = (f"{self.what} interrupted at step {self.step} of {self.n_steps}"
                f"{'; the same call resumes' * bool(self.checkpoint)}")
        if not is_notebook():
            print("\n" + said, flush=True)
        return Interrupted(said, *stop.args)

    def share_done(self):
        """Return the progress, the same in all processes: the first one's clock counts."""
        done = self.step / self.n_steps
        if not self.config.max_minutes:
            return done
        spent = (time.time() - self.began) / 60 / self.config.max_minutes
        return max(done, all_sum(0 if self.rank else spent, self.device))

    def seed_dropout(self):
        """Seed PyTorch's random numbers by seed, step and process; return the seed."""
        seed = seed_of("dropout", self.config.seed, self.step, *[self.rank] * bool(self.rank))
        seed_device(seed, self.device)  # for a GPU and PyTorch 1.3, which draw from it
        return seed

    def ready_batches(self, step):
        """Return a step's micro-batches as the device takes them, none larger than its memory."""
        return ready_batches(self.make_batches(step), self.device, self.unpadded, self.most_tokens)

    def halve(self, micro_batches, error):
        """Halve the most tokens of a micro-batch; raise the error if these are single."""
        if max(map(rows_of, micro_batches)) == 1:
            raise error
        clear_gradients(self.model)
        self.most_tokens = max(map(tokens_of, micro_batches)) // 2
        self.batches.forget()
        say(f"{self.what}: out of memory at step {self.step + 1}; micro-batches are halved to at "
            f"most {self.most_tokens:,} tokens, the optimizer's batch stays the same")

    def skip(self):
        """Forget a step whose scaled gradients overflowed in fp16, and say so: not counted."""
        clear_gradients(self.model)
        say(f"{self.what}: the gradients of step {self.step + 1} overflow in fp16; the step is "
            f"skipped, and repeated with the loss scaled by {self.scaler.factor:g}")

    def expect(self, lr, n_targets, loss, norm):
        """Begin to read a step's loss and norm; a GPU's are read when the next step is queued."""
        step, read = self.step + 1, floats_later(loss, norm)
        self.settle()
        self.row = dict(step=step, epoch=step / self.steps_per_epoch, lr=lr, grad_norm=None,
                        loss=None, targets=n_targets)
        self.expected = self.row, read
        if self.device.type not in QUEUED:
            self.settle()

    def settle(self):
        """Write the loss and norm that are expected into their row; Diverged if not finite."""
        if self.expected:
            (row, read), self.expected = self.expected, None
            loss, norm = read()
            if not math.isfinite(loss + norm):
                raise Diverged(f"loss {loss}, gradient norm {norm} at step {row['step']} of "
                               f"{self.n_steps} with lr {row['lr']:.3g}; lower lr or lengthen "
                               f"warmup")
            row.update(grad_norm=norm, loss=loss if row["targets"] else None)

    def record(self):
        """Count a step and append its row to the history, marked "due" if it is to be measured."""
        before = self.progress
        self.step += 1
        self.progress = self.share_done()
        self.row["seconds"] = time.time() - self.began
        if self.evaluate and int(self.progress * EVALUATIONS) > int(before * EVALUATIONS):
            self.row["due"] = True
        self.history.append(self.row)

    def after_step(self):
        """Measure the last step if that is due; log it; write a checkpoint now and then."""
        if self.measure_if_due():
            self.progress = self.share_done()  # measuring takes time too
        if self.writer:
            self.settle()
        row = self.history[-1]
        for key in row if self.writer else ():
            if row[key] is not None:  # a loss of no targets
                self.writer.add_scalar(key, row[key], self.step)
        self.bar.update(1)
        if time.time() - self.saved > self.patience:
            self.save()

    def measure_if_due(self):
        """Add the metrics of evaluate(model) to the last row where they are due; tell whether."""
        due = bool(self.history) and "due" in self.history[-1]
        if due:
            self.settle()
            self.history[-1].update(self.evaluate(self.model))
            del self.history[-1]["due"]
        return due

    def save(self):
        """Write a checkpoint, if the run has a file for it and has begun."""
        began = time.time()
        self.settle()
        if self.checkpoint and self.history and not self.rank:
            save_checkpoint(self.checkpoint, self.model, self.optimizer, self.history,
                            time.time() - self.began, self.scaler)
        self.saved = time.time()
        self.patience = max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * (self.saved - began))


def clear_gradients(model):
    """Forget all gradients; PyTorch 1.3's zero_grad leaves zeros, which a resumed run lacks."""
    for parameter in model.parameters():
        parameter.grad = None
