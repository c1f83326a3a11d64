"""Where a run's figures go besides its own files: TensorBoard and Weights & Biases, through SpeechBrain's loggers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.train_logger import FileTrainLogger, TensorboardLogger, TrainLogger, WandBLogger

from psla_sb.errors import InputError
from psla_sb.experiment.pace import duration_text


def all_loggers(given: Sequence[TrainLogger], track: str | Sequence[str] | None, folder: Path, settings: Mapping[str, Any]) -> list:
    """Collects a run's loggers: those of its YAML file, a text file in any case, and those that `track` names.

    Arguments
    ---------
    track
        "tensorboard", "wandb", both in a list or joined by a comma, or none.
    settings
        What Weights & Biases shows as the run's configuration.

    Raises
    ------
    InputError
        There is no such tracker, it is not installed, or it cannot start.

    Example
    -------
    >>> all_loggers([], "mlflow", getfixture("tmp_path"), {})
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: track must be of tensorboard, wandb, not 'mlflow'
    """
    names = [name.strip() for name in track.split(",")] if isinstance(track, str) else list(track or ())
    for name in filter(None, names):
        if name not in TRACKERS:
            raise InputError(f"track must be of {', '.join(TRACKERS)}, not {name!r}")
    in_any_case = [] if any(isinstance(one, FileTrainLogger) for one in given) else [FileTrainLogger(str(folder / "train_log.txt"))]
    trackers = [_started(name, folder, settings) for name in filter(None, names) if if_main_process()]
    return [*given, *in_any_case, *trackers]


def _started(name: str, folder: Path, settings: Mapping[str, Any]) -> TrainLogger:
    try:
        return TRACKERS[name](folder, settings)
    except ImportError as error:
        raise InputError(f"--track={name} needs a package that is not installed ({error}): pip install {name}") from None
    except Exception as error:  # of a service
        reason = error.__context__ or error
        raise InputError(f"--track={name} cannot start: {type(reason).__name__}: {reason}") from error


def _tensorboard(folder: Path, settings: Mapping[str, Any]) -> TensorboardLogger:
    return TensorboardLogger(str(folder / "tensorboard"))


def _wandb(folder: Path, settings: Mapping[str, Any]) -> WandBLogger:
    import wandb

    # the folder's name, so that a run that goes on is the same one there
    identity = "".join(letter if letter.isalnum() else "-" for letter in str(folder.absolute()))[-100:].strip("-")
    config = {key: value for key, value in settings.items() if isinstance(value, bool | int | float | str)}
    options = {"project": "psla_sb", "name": "/".join(folder.absolute().parts[-2:]), "id": identity, "resume": "allow"}
    return WandBLogger(wandb.init, dir=str(folder), config=config, **options)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], TrainLogger]] = {"tensorboard": _tensorboard, "wandb": _wandb}


def go_on(loggers: Sequence[TrainLogger], n_epochs: int) -> None:
    """Tells TensorBoard's logger, which counts by itself, how many epochs it has been told of by earlier processes."""
    for one in loggers:
        if isinstance(one, TensorboardLogger):
            for name in ("train", "valid"):
                one.global_step[name] = _From(n_epochs)
            one.global_step["meta"] = n_epochs


class _From(dict):
    """Begins to count every name from a number."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start = start

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return self.start


def log_epoch(loggers: Sequence[TrainLogger], record: Mapping[str, Any], timing: Mapping[str, Any], figures: Sequence[str]) -> None:
    """Tells all loggers of an epoch: its figures, the learning rate, and how fast it was."""
    numbers = {key: value for key, value in timing.items() if key != "epoch"}
    for one in loggers:
        as_text = isinstance(one, FileTrainLogger)
        one.log_stats(
            {"epoch": record["epoch"], "lr": record["lr"], **(_readable(numbers) if as_text else numbers)},
            train_stats={"loss": record["train_loss"]},
            valid_stats={"loss": record["valid_loss"], **{name: record[name] for name in figures if name in record}},
        )


def _readable(timing: Mapping[str, Any]) -> dict[str, str]:
    """Timing for people.

    >>> _readable({"seconds": 61.23, "clips_per_second": 1034.5, "eta_seconds": 90061.0, "peak_memory_MiB": 812.3})
    {'seconds': '61.2', 'clips/s': '1034.5', 'ETA': '25 h 01 min', 'memory': '812 MiB'}
    """
    return {
        "seconds": f"{timing['seconds']:.1f}",
        "clips/s": f"{timing['clips_per_second']:.1f}",
        "ETA": duration_text(timing["eta_seconds"]),
        "memory": f"{timing['peak_memory_MiB']:.0f} MiB",
    }


def log_results(loggers: Sequence[TrainLogger], evaluation: Mapping[str, Mapping[str, Any]], pictures: Sequence[Path]) -> None:
    """Tells trackers the figures of the finished run, and shows them its pictures."""
    figures = {
        f"{row}_{name}": float(value)
        for row, of_row in evaluation.items()
        for name, value in of_row.items()
        if isinstance(value, int | float)
    }
    for one in loggers:
        if isinstance(one, TensorboardLogger):
            # slow to import
            import matplotlib.image

            for name, value in figures.items():
                one.writer.add_scalar(f"final/{name}", value)
            for picture in pictures:
                one.writer.add_image(picture.stem, matplotlib.image.imread(picture)[..., :3], dataformats="HWC")
            one.writer.close()
        elif isinstance(one, WandBLogger):
            import wandb

            one.run.summary.update({f"final/{name}": value for name, value in figures.items()})
            one.run.log({picture.stem: wandb.Image(str(picture)) for picture in pictures})
            one.run.finish()
