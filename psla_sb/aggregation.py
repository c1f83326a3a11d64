"""More from checkpoints already paid for: averages of weights."""

from psla_sb.checkpoints import load_weights
from psla_sb.errors import InputError


def average_weights(paths):
    """The mean of the weights of several snapshots, batch-norm statistics included.

    Sums are kept in float64, with one file in memory at a time; entries that are not floating point (batch norm counts its batches)
    are averaged and rounded.

    Arguments
    ---------
    paths : sequence of Path
        Snapshots, as `psla_sb.checkpoints.save_weights` writes them.

    Returns
    -------
    dict of str to torch.Tensor
        A state dict, each entry of the dtype that the files have.

    Raises
    ------
    InputError
        There are no files, or two of them differ in keys or shapes.

    Example
    -------
    >>> from psla_sb.checkpoints import save_weights
    >>> folder = getfixture("tmp_path")
    >>> for i in (1, 2):
    ...     linear = torch.nn.Linear(1, 1)
    ...     _ = torch.nn.init.constant_(linear.weight, i)
    ...     save_weights({"classifier": linear}, folder / f"{i}.safetensors")
    >>> average_weights([folder / "1.safetensors", folder / "2.safetensors"])["classifier.weight"]
    tensor([[1.5000]])
    """
    if not paths:
        raise InputError("no snapshots to average")
    first = load_weights(paths[0])
    total = {key: value.double() for key, value in first.items()}
    for path in paths[1:]:
        state = load_weights(path)
        differing = set(state) ^ set(total) or {key for key in total if state[key].shape != total[key].shape}
        if differing:
            raise InputError(f"{path} and {paths[0]} are not weights of the same model: they differ in '{min(differing)}'")
        for key, value in state.items():
            total[key] += value
    mean = {key: value / len(paths) for key, value in total.items()}
    return {key: (value if first[key].is_floating_point() else value.round()).to(first[key].dtype) for key, value in mean.items()}
