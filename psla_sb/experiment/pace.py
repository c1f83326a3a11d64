"""How fast an epoch is, and when to say so."""

import time

HEARTBEAT = 180.0  # seconds between two lines about an epoch, where there is no progress bar


class Pace:
    """Measures an epoch: its seconds, its clips, and when to say so."""

    def __init__(self, step: int) -> None:
        self.begun = self.said = time.monotonic()
        self.first_step = step  # of an epoch that is gone on with, how many steps were done before
        self.clips, self.trained, self.last_step = 0, 0.0, step

    def seconds(self) -> float:
        """Since the training of the epoch began, to its end."""
        return self.trained or time.monotonic() - self.begun

    def clips_per_second(self) -> float:
        """Of this process."""
        return self.clips / max(1e-9, self.seconds())

    def end(self, step: int) -> None:
        """Marks the end of the training."""
        self.trained, self.last_step = time.monotonic() - self.begun, step

    def total(self) -> float:
        """Seconds since the epoch began."""
        return time.monotonic() - self.begun

    def whole_epoch(self, n_steps: int | None) -> float:
        """Seconds that the training of a whole epoch takes."""
        done = self.last_step - self.first_step
        return self.trained * (n_steps or done) / max(1, done)

    def is_due(self) -> bool:
        """Says whether nothing was said for some minutes."""
        due = time.monotonic() - self.said > HEARTBEAT
        self.said = time.monotonic() if due else self.said
        return due


def duration_text(seconds: float) -> str:
    """Writes a time as people say it.

    >>> [duration_text(seconds) for seconds in (3.2, 125, 90061)]
    ['3 s', '2 min', '25 h 01 min']
    """
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
