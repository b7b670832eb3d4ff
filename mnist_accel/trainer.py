"""Training: set up, the one loop, and what is left on disk at its end."""

import json
import math
import signal
import time
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from mnist_accel.augment import augmentation_for
from mnist_accel.checkpoint import TrainState, complete_checkpoints, write_checkpoint
from mnist_accel.cli import SharedError
from mnist_accel.config import TrainConfig
from mnist_accel.data import load_data
from mnist_accel.distributed import agree, build_accelerator, choose_kernels, require_alike, stop_signals, together
from mnist_accel.evaluation import Evaluation, evaluate, evaluate_on_all_ranks
from mnist_accel.hub import upload_folder
from mnist_accel.loader import ResidentLoader, hold_out, label_targets
from mnist_accel.micro_batch import allocate_gradients, halvings_to_fit
from mnist_accel.models import CONFIG_NAME, build_model, load_model
from mnist_accel.optim import WeightAverage, build_optimizer, learning_rate
from mnist_accel.reporting import Reporter
from mnist_accel.run_folder import RunFolder, choose_folder
from mnist_accel.seeding import derive_seed

# Reading a number from a GPU waits for the work queued there: only every so many steps, and before anything is written,
# the loop looks at its loss and asks the other ranks about signals. On a CPU it does so every step.
ACCELERATOR_CHECK_INTERVAL = 20


class Trainer:
    """One training run, from its options to its folder; what the user can mend is a `UserError`, on all ranks."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = RunFolder(choose_folder(config))
        self.accelerator = build_accelerator(config.gradient_accumulation_steps, config.report_to)
        self.reporter = Reporter(self.accelerator, config)
        self.is_main = self.accelerator.is_main_process
        device = self.accelerator.device
        choose_kernels(config.deterministic)

        # One process of each machine decodes, then the others read its cache. (Accelerate's `local_main_process_first`
        # does so too, but where the first process fails the others would wait for it.)
        for first_turn in (True, False):
            with together():
                if self.accelerator.is_local_main_process == first_turn:
                    self.data = load_data(config.dataset)
        own = {name: getattr(self.accelerator, name) for name in ("mixed_precision", "gradient_accumulation_steps")}
        require_alike(config.options() | own | {"dataset": self.data.fingerprint})
        train_split, self.eval_split, self.eval_name = self.data.train, self.data.test, "test"
        if config.validation_size:
            train_split, self.eval_split = hold_out(self.data.train, config.validation_size, config.seed)
            self.eval_name = "validation"
        if config.non_digits:
            from mnist_accel.non_digits import with_non_digits

            train_split = with_non_digits(train_split, config.non_digits, config.seed)
        torch.manual_seed(derive_seed(config.seed, "weights"))
        # channels_last is the layout in which CPUs and tensor cores convolve without reordering.
        self.network = build_model(config.model, self.data.class_names, config.dropout).to(device)
        self.network.to(memory_format=torch.channels_last)
        self.network.inverted = self.data.inverted
        self.loader = ResidentLoader(
            train_split,
            config.batch_size,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            micro_batches=self.accelerator.gradient_accumulation_steps,
            seed=config.seed,
            device=device,
            augmentation=augmentation_for(config.augmentation, self.data.class_names) if config.augment else None,
            dropout=config.dropout,
            features=self.network.dropout.features,
        )
        self.average = None if config.ema_decay is None else WeightAverage(self.network, config.ema_decay)
        self.evaluated_network = self.average.model if self.average else self.network  # and the one that is kept
        self.model, self.optimizer = self.accelerator.prepare(self.network, build_optimizer(self.network, config))
        if config.auto_batch_size:
            halvings = halvings_to_fit(self.accelerator, self.model, *next(self.loader.epoch(0)).micro_batches[0])
            self.accelerator.gradient_accumulation_steps <<= halvings
            self.loader.micro_batches <<= halvings
        if self.loader.micro_batches > 1:
            allocate_gradients(self.network)

        self.total_steps = config.epochs * self.loader.steps_per_epoch
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)
        checkpoint = self._open_folder()
        self.state = TrainState(**checkpoint["state"]) if checkpoint else TrainState()
        # Each rank sums the loss of its own images. A checkpoint holds the sum of all, so only one rank starts from it.
        precision = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.loss_sum = torch.tensor(self.state.loss_sum if self.is_main else 0.0, dtype=precision, device=device)
        self.best: dict[str, bytes] = checkpoint["best_files"] if checkpoint else {}  # what `best/` holds
        if checkpoint:
            self._restore(checkpoint)
        self.check_interval = 1 if device.type == "cpu" else ACCELERATOR_CHECK_INTERVAL
        self.evaluation: Evaluation | None = None  # the newest

    def run(self) -> int:
        """Train to the end or to a stop signal; returns the exit status, 128 + the signal's number after a signal."""
        config, accelerator, state, loader = self.config, self.accelerator, self.state, self.loader
        self.reporter.announce(self.data, self.network, self.loader, len(self.eval_split.labels))
        resumed = f", resumed after step {state.step:,}" if state.step else ""
        self.reporter.say(f"Run: {self.folder.path}, {self.last_step:,} steps{resumed}")
        criterion = nn.CrossEntropyLoss(reduction="sum")
        targets = label_targets(len(self.data.class_names), config.label_smoothing).to(accelerator.device)
        # What is wanted is the gradient of the mean loss over the global batch. `backward` divides by the micro-batches
        # and DDP by the processes, as if every share were full. So the loss is a sum, what these two divide by is
        # multiplied back in, and the loop divides by the images that there are: right for a short last batch too.
        gradient_scale = accelerator.gradient_accumulation_steps * accelerator.num_processes
        accumulates = accelerator.gradient_accumulation_steps > 1
        stop_signal = 0
        self._started = time.perf_counter()
        with stop_signals() as received_signal, closing(self.folder):
            while state.step < self.last_step and not state.out_of_patience(config) and not stop_signal:
                epoch, first_step = divmod(state.step, loader.steps_per_epoch)
                self.reporter.start_epoch(epoch, first_step * config.batch_size, loader.num_images)
                self.model.train()
                for batch in loader.epoch(epoch, first_step):
                    rate = learning_rate(state.step, self.total_steps, config)
                    for group in self.optimizer.param_groups:
                        group["lr"] = rate
                    for images, labels, dropout_mask in batch.micro_batches:
                        with accelerator.accumulate(self.model):
                            loss = criterion(self.model(images, dropout_mask), targets[labels])
                            accelerator.backward(loss * (gradient_scale / batch.size))
                            self.loss_sum += loss.detach()
                            if accelerator.sync_gradients:
                                if (state.step + 1) % self.check_interval == 0:
                                    # Once not finite, a sum stays so: one look covers all steps since the last.
                                    loss_sum, stop_signal = agree(accelerator, self.loss_sum, received_signal())
                                    self._refuse_non_finite(loss_sum, state.step + 1)
                                if config.max_grad_norm:
                                    accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                            self.optimizer.step()
                            self.optimizer.zero_grad(set_to_none=not accumulates)
                    state.step += 1
                    epoch_ends = state.step % loader.steps_per_epoch == 0
                    if self.average is not None:
                        self.average.update(self.network, state.step)
                    self.reporter.bar.update(batch.size)
                    if epoch_ends or state.step % config.log_every == 0:
                        self._log_progress(epoch, rate)
                    stopping = state.step == self.last_step or stop_signal
                    # At the end of an epoch the evaluation comes first, so that a checkpoint there includes it.
                    if (stopping or self._checkpoint_is_due()) and not epoch_ends:
                        self._save_checkpoint()
                    if stopping:
                        break
                self.reporter.bar.close()
                if epoch_ends:
                    self._end_epoch()
            status = self._stop(stop_signal) if stop_signal and state.step < self.last_step else self._finish()
            accelerator.end_training()
        return status

    # Parts of the loop

    def _refuse_non_finite(self, loss_sum: float, step: int) -> None:
        if math.isfinite(loss_sum):
            return
        saved = max(complete_checkpoints(self.folder.checkpoints), default="none")
        since = f"within the {self.check_interval} steps up to " if self.check_interval > 1 else "at "
        raise SharedError(
            f"the loss is not finite {since}step {step}, at learning rate {self._rate(step):g}; last good checkpoint: "
            f"{saved}; start anew with a lower --learning-rate or --max-grad-norm 1"
        )

    def _total_loss(self) -> float:
        """The loss summed over this epoch's images so far, of all ranks; a collective operation."""
        return self.accelerator.reduce(self.loss_sum.clone(), reduction="sum").item()

    def _clock(self) -> float:
        """Seconds that this epoch has trained; ends the measurement so far and starts the next."""
        now = time.perf_counter()
        self.state.seconds, self._started = self.state.seconds + now - self._started, now
        return self.state.seconds

    def _log_progress(self, epoch: int, rate: float) -> None:
        done = self._images_done()
        loss, speed = self._total_loss() / done, done / self._clock()
        with together():
            self.reporter.log_step(self.state.step, epoch, done, self.loader.num_images, loss, rate, speed)

    def _images_done(self) -> int:
        steps = self.state.step % self.loader.steps_per_epoch or self.loader.steps_per_epoch
        return min(steps * self.config.batch_size, self.loader.num_images)

    def _checkpoint_is_due(self) -> bool:
        return self.config.checkpoint_every != "epoch" and self.state.step % int(self.config.checkpoint_every) == 0

    def _save_checkpoint(self) -> None:
        self.state.loss_sum = self._total_loss()
        finite = all(bool(weights.isfinite().all()) for weights in self.network.parameters())
        self._refuse_non_finite(self.state.loss_sum if finite else math.nan, self.state.step)
        self._clock()
        with together():
            if self.is_main:
                scaler = self.accelerator.scaler
                content = {
                    "options": self.config.options(),
                    "fingerprint": self.data.fingerprint,
                    "mixed_precision": self.accelerator.mixed_precision,
                    "state": asdict(self.state),
                    "model": self.network.state_dict(),
                    "average": self.average.model.state_dict() if self.average else None,
                    "best_files": self.best,
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": scaler.state_dict() if scaler else None,
                }
                write_checkpoint(self.folder.checkpoints, self.state.step, content, self.config.keep_checkpoints)

    def _end_epoch(self) -> None:
        """Evaluate, write the epoch's row, keep the best weights, and save where the epoch is complete."""
        state, done = self.state, self._images_done()
        epochs = state.step / self.loader.steps_per_epoch  # done so far; --max-steps can end within one
        epoch, unfinished = math.ceil(epochs), not epochs.is_integer()
        train_loss = self._total_loss() / done
        seconds = self._clock()
        self._refuse_non_finite(train_loss, state.step)
        result = self._evaluate()
        row = {
            "epoch": epoch,
            "step": state.step,
            "train_loss": round(train_loss, 6),
            "eval_loss": round(result.loss, 6),
            "eval_accuracy": result.accuracy,
            "learning_rate": self._rate(state.step),
            "train_seconds": round(seconds, 3),
            "images_per_second": round(done / seconds, 1),
        }
        state.history.append(row)
        state.loss_sum, state.seconds = 0.0, 0.0
        best = state.best
        is_best = best is row
        self.reporter.say(
            f"{self.eval_name.capitalize()} set: {result.as_line()}, epoch {epoch}"
            + (" - new best" if is_best else f" - best so far {best['eval_accuracy']:.2%} in epoch {best['epoch']}")
        )
        with together():
            if self.is_main:
                if is_best:
                    self.best = self._write_weights("best", self.eval_name, result)
                self.folder.write_metrics(state.history)
                self.reporter.log_row(row, unfinished)
        self.loss_sum.zero_()
        self._started = time.perf_counter()
        if not unfinished:
            self._save_checkpoint()

    def _evaluate(self) -> Evaluation:
        self.evaluation, logits = evaluate_on_all_ranks(self.accelerator, self.evaluated_network, self.eval_split)
        if self.config.validation_size:
            self.evaluated_network.calibrate(logits, self.eval_split.labels)  # on held-out images only
        return self.evaluation

    def _rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1; before the first one its own."""
        return learning_rate(max(0, step - 1), self.total_steps, self.config)

    # The run's folder

    def _open_folder(self) -> dict[str, Any] | None:
        """Rank 0 reads the checkpoint, if any, and tells the others, which may not share its disk."""
        checkpoint = None
        with together():
            if self.is_main:
                checkpoint = self.folder.open(self.config, self.data.fingerprint, self.last_step)
                now = self.accelerator.mixed_precision
                if checkpoint and (then := checkpoint["mixed_precision"]) != now:
                    self.reporter.say(f"warning: the checkpoint is of mixed precision {then}: in {now} numbers differ")
                self.folder.write_config(self.config, self.data, self.accelerator)
            self.reporter.start_trackers(self.folder.path, checkpoint["state"]["step"] if checkpoint else None)
        return broadcast_object_list([checkpoint])[0]

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        with together():
            if self.is_main and self.best:  # what lies in best/ may be of another course, or half there
                self.folder.write_files("best", self.best)
        self.network.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.average:
            self.average.model.load_state_dict(checkpoint["average"])
        if self.accelerator.scaler and checkpoint["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])

    def _write_weights(self, name: str, split_name: str, result: Evaluation) -> dict[str, bytes]:
        row = self.state.history[-1]
        facts = {
            "dataset": self.config.dataset,
            "dataset_fingerprint": self.data.fingerprint,
            "split": split_name,
            "accuracy": result.accuracy,
            "loss": result.loss,
            "epoch": row["epoch"],
            "step": row["step"],
            "options": self.config.options(),
        }
        return self.folder.write_weights(name, self.evaluated_network, facts)

    def _finish(self) -> int:
        """Leave `final/`, the last row of metrics.jsonl and the figures."""
        state, test, config = self.state, self.data.test, self.config
        if not state.history or state.history[-1]["step"] != state.step:
            self._end_epoch()  # --max-steps ended within an epoch
        result = self.evaluation or self._evaluate()  # of the last step; an ended run that is resumed has none yet
        if self.eval_name != "test":
            result, _ = evaluate_on_all_ranks(self.accelerator, self.evaluated_network, test)
        best = state.best
        final = {"final": True, "step": state.step, "test_loss": round(result.loss, 6)}
        final |= {"test_accuracy": result.accuracy, "best_epoch": best["epoch"]}
        with together():
            if self.is_main:
                self._write_weights("final", "test", result)
                if config.validation_size:  # on this process alone: a second's work
                    model = load_model(self.folder.path / "best")
                    best_result = evaluate([model], test, self.data.class_names, self.accelerator.device)
                    final["best_test_accuracy"] = best_result.accuracy
                    facts = json.loads(self.best[CONFIG_NAME]) | {"test_accuracy": best_result.accuracy}
                    self.folder.write_weights("best", model, facts)
                    self.reporter.say(f"Test set: {result.as_line()}, last weights; {best_result.as_line()}, best")
                self.folder.write_metrics([*state.history, final])
                for name, picture in self.folder.draw_figures(state.history, test, result).items():
                    self.reporter.log_picture(name, picture, state.step + 1)
                self.reporter.log_row(final)
                if state.out_of_patience(config):
                    metric, patience = config.early_stopping_metric, config.early_stopping_patience
                    self.reporter.say(f"Stopped early: no better {metric} in {patience} epochs")
                accuracy = f"{self.eval_name} accuracy {best['eval_accuracy']:.2%}"
                self.reporter.say(f"Best epoch: {best['epoch']} ({accuracy})")
                self.reporter.say(f"Weights: {self.folder.path / 'best'} and {self.folder.path / 'final'}")
                if config.push_to_hub:
                    self.reporter.say(f"Uploaded: {upload_folder(self.folder.path / 'best', config.push_to_hub)}")
        return 0

    def _stop(self, stop_signal: int) -> int:
        """After a signal, whose checkpoint the loop has written."""
        self.reporter.say(
            f"Stopped by {signal.Signals(stop_signal).name} after step {self.state.step}; the state is saved: continue "
            f"with the same options and --output-dir {self.folder.path} --resume auto"
        )
        return 128 + stop_signal
