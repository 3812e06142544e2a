"""Train a picture classifier: from the settings to a run folder with checkpoints and TensorBoard's curves.

`python train.py --epochs 10` trains CIFAR-quick on CIFAR-10. Read `main()` first: it tells the whole story. Then come
one epoch, one step, the learning rate and the evaluation.
"""

from quick.cli import check_flags
from quick.run.flags import parse_train

if __name__ == "__main__":  # --help and wrong flags are answered before PyTorch is imported, which takes seconds
    check_flags("train.py", parse_train)

import contextlib
import logging
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import datasets
import model
from device import autocast, memory_format, memory_used, pick, pick_precision, seed, tune
from quick.cli import exit_script, log, progress_bar, run_script
from quick.data.pictures import Batch, Pictures
from quick.errors import Interrupted, NetworkError, TrainingError
from quick.nets import losses
from quick.nets.checking import check_network
from quick.nets.sync_batch_norm import synchronise
from quick.nets.transfer import freeze, train_mode
from quick.nets.whitening import whiten
from quick.processes import Group
from quick.run.evaluation import outputs_of_set
from quick.run.features import train_head_alone
from quick.run.folder import RunFolder
from quick.run.optimizers import make_optimizer
from quick.run.report import epoch_line, print_result, print_start
from quick.run.resume import Start, begin, check_pictures, restore
from quick.run.rules import complete
from quick.run.settings import Config
from quick.run.state import EpochTotals, TrainState, epoch_steps, hardest, make_state
from quick.run.stopping import StopVote, program_start
from quick.run.warming import warm_up
from quick.views.tensorboard import log_metrics, show_embedding, show_epoch, show_start

LOG_STEPS = 100  # between two points of the training curves


def main(argv: list[str] | None = None) -> int:
    """Train as these flags say; returns the exit status: 0, or 130 when a signal such as Ctrl-C stopped it."""
    began = program_start()
    config, given, args = parse_train(argv)
    resume = args.resume  # what run to go on with, or None
    with Group(config.timeout) as group, RunFolder() as run:
        if group.rank == 0 and (error := model.unknown(config.model)):
            raise NetworkError(f"{'--model' if 'model' in given else f'{args.config}: model'}: {error}")

        # A run begins in one of four ways: a new run; a new run from pretrained weights (--weights); --resume, from its
        # own newest checkpoint; and a restart by torchrun, which works like --resume.
        start = begin(
            run, config, given, resume, group, load=model.load, pretrained=model.pretrained, own_networks=model.NETWORKS
        )
        config = start.config
        if config.quiet:
            log.setLevel(logging.WARNING)

        # The device.
        device = pick(config.device, group)
        precision = pick_precision(config.precision, device)
        layout = memory_format(device)
        tune(device, config.deterministic)
        if group.rank == 0 and not start.checkpoint:  # a network that cannot work is refused before pictures are read
            options = model.config_options(config, 2, start.pretrained)  # any number of classes will do
            check_network(model.create_empty, config.model, options, config.batch_size, training=config.freeze != "all")

        # The data. The first of the held-out sets chooses the best epoch.
        train_set, *held_out_sets = datasets.load_sets(config, device, group)
        sets = [train_set, held_out_sets[0]]
        manifest = check_pictures(start, config, [train_set, *held_out_sets], group)

        # The network, and the part of it that trains, on pictures or on features.
        network, options, head = make_network(config, start, train_set, group)
        config = complete(config, train_set, network, own=config.model in model.NETWORKS)
        network = network.to(device, memory_format=layout)
        if config.sync_bn and group.size > 1:
            network = synchronise(network, device)
        print_start(config, [train_set, *held_out_sets], network, device, precision, group)
        trainable, inputs = network, sets
        if config.freeze == "all":
            with autocast(device, precision):
                trainable, inputs = train_head_alone(network, head, sets, config, group)

        # All that changes while training. A resumed run gets back what its checkpoint has of it.
        optimizer = make_optimizer(network, head, config, precision)  # SGD, unless the config says otherwise
        state = make_state(network, trainable, optimizer, config, precision, group, labels=train_set.labels)
        restore(state, start, config, train_set, lr_share)
        if group.rank == 0:
            run.open(config, options, train_set.classes, state, manifest, start.job)
            if not start.checkpoint:
                show_start(run.board, network, run.header["config"], split=sets[1].split)
                show_epoch(run.board, network, sets, config)

        # The epochs. An epoch is saved last: a run that is killed before that repeats it when it is resumed.
        with StopVote(group, config.time_limit, began) as stop:
            if device.type == "cuda" and inputs[0].store.pixels:  # no convolution works on features
                with autocast(device, precision):
                    warm_up(state, inputs[0], config)
            try:
                while not state.history.ended_by(config):
                    metrics = train_epoch(state, inputs[0], config, run.board, stop)
                    held_out, answers = evaluate(state, trainable, inputs[1], config, stop.check)
                    metrics |= held_out
                    is_best = state.end_epoch(metrics, answers, train_set.classes)
                    is_last = bool(state.history.ended_by(config))
                    if group.rank == 0:
                        show_epoch(run.board, network, sets, config, metrics, answers, last=is_last)
                        log_metrics(run.board, metrics, memory_used(device))
                        if is_last and config.views and config.embedding:
                            show_embedding(run.board, network, head, sets[1], state.step)
                        line = epoch_line(metrics, sets[1].split, config.epochs, is_best)
                        run.save_epoch(state, is_best=is_best, keep=config.keep, line=line)
            except Interrupted:
                if group.rank == 0:
                    run.save_interrupted(state)
                if stop.by_signal:
                    return 130
                run.check_saved()
                return 0

        # The end. With a validation set, the best epoch is tested, once.
        run.check_best()
        if len(held_out_sets) > 1 and "test_accuracy" not in state.history.best:
            best = run.load_best(state)
            tested, answers = evaluate(state, network, held_out_sets[1], config)
            run.save_tested(state, best, tested, answers)
        if group.rank == 0:
            run.attempt("TensorBoard's events", run.board.flush)
            print_result(run, state, config)
            run.check_saved()
    return 0


def train_epoch(state: TrainState, train_set: Pictures, config: Config, board, stop: StopVote) -> dict:
    """One pass over the training pictures, or the rest of one that was interrupted; returns its metrics.

    Raises Interrupted after the step at which `stop` says so; `state.totals` then tells how far the epoch is. Raises
    TrainingError when the loss is not finite.
    """
    start, epoch, group = time.perf_counter(), state.epoch, state.group
    keep = hardest(state.confidence, config, epoch)
    totals = state.totals = state.totals or EpochTotals(steps=epoch_steps(state.pictures, config, epoch))
    train_mode(state.trainable)
    batches = train_set.batches(
        config.batch_size,
        shuffle=config.shuffle,
        augment=config,
        seed=config.seed,
        epoch=epoch,
        keep=keep,
        skip=totals.step,
        group=group,
        pieces=config.accumulate,
    )
    correct = torch.zeros((), dtype=torch.int64, device=state.device)
    confidence = torch.zeros(state.pictures, device=state.device) if config.hardest < 1 else None
    unread, shown = [], ""  # steps whose losses are still on the device; the last loss that was read
    bar = progress_bar(f"epoch {epoch}/{config.epochs}", totals.steps, "steps", start=totals.step)
    for batch in batches:
        loss, logits = train_step(state, batch, config)
        totals.step, totals.lr = totals.step + 1, state.lr
        correct += (logits.argmax(1) == batch.labels).sum()
        if confidence is not None:
            of_label = losses.probabilities(logits.float(), config.loss).gather(1, batch.labels.view(-1, 1))
            confidence[batch.indices] = of_label.squeeze(1).clamp(min=torch.finfo(torch.float32).tiny)  # 0: not seen

        unread.append((loss, batch.size, batch.indices, totals.lr))
        is_last, is_point = totals.step == totals.steps, totals.step % LOG_STEPS == 0
        leave = stop.asked()  # on which all processes agree
        if is_point or is_last or leave:  # to read a loss waits for the device, so not at every step
            totals.add_losses(unread, epoch, group)
            unread.clear()
        if is_point and not is_last:  # the loss of the whole epoch comes with its accuracy
            mean = totals.loss_since_last_point()
            shown = f"loss {mean:.3f}, "
            board.add_scalar("loss/train", mean, state.step)
            board.add_scalar("lr", totals.lr, state.step)
        if is_point or is_last:
            board.add_scalar("gradient_norm", state.gradient_norm(), state.step)
        state.crowding.tell()
        bar.set_postfix_str(f"{shown}run {state.time_left()} left", refresh=False)
        bar.update()
        if leave:
            break
    bar.close()

    totals.correct += group.all_reduce(correct).item()
    if confidence is not None:
        group.all_reduce(confidence)
        totals.confidence = confidence if totals.confidence is None else totals.confidence + confidence
    if not config.sync_bn:
        group.broadcast(state.trainable.buffers())  # the averages of batch normalisation, of which each has its own
    totals.seconds += time.perf_counter() - start
    if totals.step < totals.steps:
        raise Interrupted
    return {"epoch": epoch, "step": state.step} | totals.metrics()


def train_step(state: TrainState, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """One step on a batch: forward, loss, backward, optimizer. In a group, on this process's pictures of the batch.

    Returns what these pictures add to the mean loss of the batch (a scalar), and their logits `(N, classes)`, without
    waiting for the device. The gradients stay until the next step, for whoever wants to look at them.
    """
    share = lr_share(config, state.total_steps, state.step)
    state.lr = config.lr * share
    for weights in state.optimizer.param_groups:
        weights["lr"] = weights["highest_lr"] * share
    state.optimizer.zero_grad(set_to_none=True)
    seed(config.seed, state.epoch, state.step, state.group.rank)  # a resumed run draws the same dropout

    found = []
    for images, labels in zip(batch.images.split(batch.pieces), batch.labels.split(batch.pieces), strict=True):
        is_last = len(found) + 1 == len(batch.pieces)
        # The processes of a group add up their gradients in the backward pass of the last piece.
        with contextlib.nullcontext() if is_last or state.group.size == 1 else state.forward.no_sync():
            with autocast(state.device, state.precision):
                forward = state.forward if len(images) else state.eager  # compiled code takes no empty batches
                logits, *auxiliary = losses.split_outputs(forward(images))
                loss, *others = (
                    losses.loss_function(output, labels, config.loss, config.label_smoothing, state.class_weights)
                    for output in (logits, *auxiliary)
                )
                total = loss + losses.AUXILIARY_WEIGHT * sum(others)
            part = len(labels) / batch.size
            # DistributedDataParallel takes the mean over the processes; the batch needs the sum.
            state.scaler.scale(total * (part * state.group.size)).backward()
        found.append((loss.detach() * part, logits.detach()))

    if config.clip_grad:
        state.scaler.unscale_(state.optimizer)
        state.clipped_norm = torch.nn.utils.clip_grad_norm_(state.trainable.parameters(), config.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    if len(found) == 1:
        return found[0]
    return torch.stack([loss for loss, _ in found]).sum(), torch.cat([logits for _, logits in found])


def lr_share(config: Config, steps: int, step: int) -> float:
    """The share of the highest learning rate to use at `step` of `steps`.

    `onecycle` rises for a fifth of the run, then falls (Smith 2018, arxiv.org/abs/1803.09820); after `warmup` epochs
    of rising, `cosine` falls along half a wave (Loshchilov and Hutter 2017, arxiv.org/abs/1608.03983).
    """
    done, rise = min(1.0, step / max(1, steps)), config.warmup / config.epochs
    if config.schedule == "onecycle":
        return min((step + 1) / (0.2 * steps + 1), (1 - done) / 0.8)
    if done < rise:
        return (step + 1) / (rise * steps + 1)
    return (1 + math.cos(math.pi * (done - rise) / (1 - rise))) / 2 if config.schedule == "cosine" else 1.0


def evaluate(
    state: TrainState, network: nn.Module, pictures: Pictures, config: Config, check: Callable[[], None] | None = None
) -> tuple[dict, tuple[Tensor, Tensor]]:
    """Exact mean loss (without label smoothing) and metrics over a whole set, in eval mode, each picture once.

    Returns the metrics, and what they are of: class probabilities `(N, classes)` and labels `(N,)`. Each process of a
    group looks at a shard; all get all. `check` is called before each batch. Raises TrainingError when the loss is not
    finite.
    """
    with autocast(state.device, state.precision):
        logits, labels = outputs_of_set(
            network, pictures, classes=len(pictures.classes), group=state.group, tta=config.tta, check=check
        )
    scores = losses.score(logits, labels, config.loss)
    if not math.isfinite(scores["loss"]):
        raise TrainingError(f"the {pictures.split} loss is {scores['loss']}; try a lower --lr, or --clip-grad 1")
    metrics = {f"{pictures.split}_{name}": value for name, value in scores.items()}
    return metrics, (losses.probabilities(logits, config.loss), labels)


# ---- helpers of main() -----------------------------------------------------------------------------------------------


def make_network(config: Config, start: Start, train_set: Pictures, group: Group) -> tuple[nn.Module, dict, list[str]]:
    """The network, as its run left it or with its first weights; its options; and the names of its head's weights.

    It is frozen where the config says so. All processes get the first one's weights.
    """
    seed(config.seed)
    if start.checkpoint:
        options = start.checkpoint["model"]["options"]
    else:
        options = group.from_rank0(lambda: model.config_options(config, len(train_set.classes), start.pretrained))
    head = model.head_keys(config.model, options)
    if start.checkpoint:
        network = start.network or model.create(config.model, options)
    else:
        network = model.build(config, options, head, train_set.classes, start.pretrained)
        if config.whiten and config.weights == "none" and group.rank == 0:
            images, _, _ = train_set.preview(torch.arange(min(train_set.evaluation_batch, len(train_set))))
            whiten(network, images)
    start.pretrained = None  # its memory is free again
    group.broadcast(network.state_dict().values())
    if config.freeze != "0":
        freeze(network, head, None if config.freeze == "all" else int(config.freeze))
    return network, options, head


def cli(argv: list[str] | None = None) -> int:
    return run_script("train.py", main, argv, "; what was saved before is whole")


if __name__ == "__main__":
    exit_script(cli())
