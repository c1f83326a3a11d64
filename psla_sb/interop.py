"""PSLA's published checkpoints, read and written.

A published checkpoint is a state dict with `effnet.*` (efficientnet_pytorch's names) and `attention.*`, usually behind the prefix
`module.` that DataParallel adds. What kind of model it is of is read off its tensors. As a program this module turns one into the
folder of a tagger:

    python -m psla_sb.interop CHECKPOINT --labels class_labels_indices.csv --out FOLDER
"""

import argparse
import functools
import re
import statistics
from pathlib import Path

import ruamel.yaml
import torch
from torch import nn

from psla_sb.checkpoints import atomic_write, load_into
from psla_sb.errors import InputError
from psla_sb.export import write_tagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.efficientnet import PADDINGS, VARIANTS, EfficientNetEncoder
from psla_sb.lobes.pooling import AttentionPooling, MeanPooling

# efficientnet-pytorch 0.7.0, with which the published models were trained, pads so
PUBLISHED_PADDING = "symmetric"
AUDIOSET_FRAMES = 1056

TAGGER = """
sample_rate: 16000
compute_features: !new:psla_sb.lobes.features.KaldiFbank
    sample_rate: 16000
    n_mels: 128
    n_frames: {n_frames}
mean_var_norm: !new:psla_sb.lobes.features.GlobalNorm
    mean: -4.6476
    std: 4.5699
embedding_model: !new:psla_sb.lobes.efficientnet.EfficientNetEncoder
    variant: {variant}
    padding: {padding}
classifier: !new:psla_sb.lobes.pooling.{pooling}
    {arguments}
"""


def load_psla_checkpoint(path, padding=PUBLISHED_PADDING):
    """The model in a checkpoint of the published code, or of others that use its layout.

    Variant, kind of pooling, heads and classes are read off the tensors. Keys with and without `module.` are read; leftovers of
    the ImageNet classifier (`effnet._fc.*`) are ignored. Code in the file is never run.

    Arguments
    ---------
    path : str or Path
        A `.pth` file.
    padding : str
        The encoder's padding, "symmetric" or "tensorflow", which the file does not tell. Official models were trained with
        "symmetric"; see `EfficientNetEncoder`.

    Returns
    -------
    EfficientNetEncoder, AttentionPooling or MeanPooling
        In evaluation mode, on the CPU.

    Raises
    ------
    InputError
        The file cannot be read, holds anything but tensors, or has tensors missing, too many, or of wrong shapes; the message
        names them.
    ValueError
        There is no such padding.

    Example
    -------
    >>> path = getfixture("tmp_path") / "best_audio_model.pth"
    >>> save_psla_checkpoint(path, EfficientNetEncoder("b0"), AttentionPooling(1280, 527, n_heads=4))
    >>> encoder, pooling = load_psla_checkpoint(path)
    >>> pooling(encoder(torch.zeros(1, 1056, 128))).shape
    torch.Size([1, 527])
    """
    state = read_tensors(path)
    prefix = "module." if any(key.startswith("module.") for key in state) else ""
    effnet, attention = f"{prefix}effnet", f"{prefix}attention"
    state = {key: value for key, value in state.items() if not key.startswith(f"{effnet}._fc.")}
    variant = _variant_of(below(effnet, state))
    if variant is None:
        raise InputError(f"{path}: not a PSLA checkpoint: it has no tensor 'effnet.*' of an EfficientNet")
    encoder = EfficientNetEncoder(variant, padding=padding)
    pooling = _new_pooling(below(attention, state), encoder.out_channels)
    load_into({effnet: encoder, attention: pooling}, state, f"{path}, read as a PSLA checkpoint of efficientnet-{variant},")
    return encoder.eval(), pooling.eval()


def save_psla_checkpoint(path, encoder, pooling):
    """Writes a model in the layout of the published code, with the prefix `module.` that its DataParallel reads and writes.

    Arguments
    ---------
    path : str or Path
        The `.pth` file, written whole or not at all.
    encoder : EfficientNetEncoder
        The published code computes the same only with the padding of the efficientnet_pytorch that it runs with.
    pooling : AttentionPooling or MeanPooling
        The published code has 4 heads wherever there is more than one.

    Example
    -------
    >>> path = getfixture("tmp_path") / "model.pth"
    >>> save_psla_checkpoint(path, EfficientNetEncoder("b0"), MeanPooling(1280, 200))
    >>> list(torch.load(path, weights_only=True))[-2:]
    ['module.attention.cla.weight', 'module.attention.cla.bias']
    """
    modules = {"module.effnet": encoder, "module.attention": pooling}
    state = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    with atomic_write(path) as temporary:
        torch.save({key: value.cpu().contiguous() for key, value in state.items()}, temporary)


def psla_to_tagger(checkpoint, labels, folder, padding=PUBLISHED_PADDING, n_frames=AUDIOSET_FRAMES):
    """Turns a checkpoint of the published code into the folder of a tagger, with the published front end.

    Arguments
    ---------
    checkpoint : str or Path
        The `.pth` file.
    labels : str or Path
        The class list, such as AudioSet's `class_labels_indices.csv`.
    folder : str or Path
        Where to write.
    padding : str
        See `load_psla_checkpoint`; the folder remembers it.
    n_frames : int
        Frames that the model was trained on: 1056 for AudioSet, 3000 for FSD50K.

    Raises
    ------
    InputError
        A file is wrong, or the class list has another number of classes than the model.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> save_psla_checkpoint(folder / "model.pth", EfficientNetEncoder("b0"), MeanPooling(1280, 2))
    >>> Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]).to_csv(folder / "labels.csv")
    >>> psla_to_tagger(folder / "model.pth", folder / "labels.csv", folder / "tagger")
    >>> sorted(file.name for file in (folder / "tagger").iterdir())
    ['classifier.ckpt', 'embedding_model.ckpt', 'hyperparams.yaml', 'label_encoder.ckpt']
    """
    vocabulary = Vocabulary.from_csv(labels)
    encoder, pooling = load_psla_checkpoint(checkpoint, padding)
    arguments = {"in_channels": encoder.out_channels, "n_classes": _first_conv(pooling).out_channels}
    if len(vocabulary) != arguments["n_classes"]:
        raise InputError(
            f"{labels} has {len(vocabulary)} classes, but {checkpoint} is a model of {arguments['n_classes']}: "
            "give the class list that it was trained with"
        )
    if isinstance(pooling, AttentionPooling):
        arguments["n_heads"] = pooling.n_heads
    definitions = TAGGER.format(
        n_frames=n_frames,
        variant=_variant_of(encoder.state_dict()),
        padding=padding,
        pooling=type(pooling).__name__,
        arguments="\n    ".join(f"{name}: {value}" for name, value in arguments.items()),
    )
    modules = {"embedding_model": encoder, "classifier": pooling}
    write_tagger(folder, ruamel.yaml.YAML().load(definitions), modules, vocabulary)


def read_tensors(path):
    """A state dict that `torch.save` wrote. Code in the file is never run.

    Raises
    ------
    InputError
        The file cannot be read, or holds anything but names and plain tensors.

    Example
    -------
    >>> path = getfixture("tmp_path") / "model.pth"
    >>> torch.save({"bias": torch.zeros(2)}, path)
    >>> read_tensors(path)
    {'bias': tensor([0., 0.])}
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # a broken file raises whatever the unpickler stumbles over; PyTorch's message advises to run the code in the file
        raise InputError(
            f"{path}: not a checkpoint that can be loaded without running code: it is damaged, or holds more than tensors "
            f"({type(error).__name__})"
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}; a checkpoint is a dict of names and tensors")
    for key, value in state.items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not (isinstance(key, str) and plain):
            raise InputError(f"{path}: {key!r} is not a name with a plain tensor; a checkpoint holds nothing else")
    return state


def below(name, state):
    """The entries `name.*` of a state dict, without `name.`.

    Example
    -------
    >>> below("classifier", {"classifier.bias": 1, "other.bias": 2})
    {'bias': 1}
    """
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def _shapes(state):
    return {key: value.shape for key, value in state.items()}


@functools.cache
def _layouts():
    """Each variant's names and shapes."""
    with torch.device("meta"):
        return {variant: _shapes(EfficientNetEncoder(variant).state_dict()) for variant in VARIANTS}


def _variant_of(state):
    """The variant with which a state dict has the most tensors in common, None if there is none in common."""
    in_common = {variant: len(layout.items() & _shapes(state).items()) for variant, layout in _layouts().items()}
    return max(in_common, key=in_common.get) if any(in_common.values()) else None


def _first_conv(pooling):
    return pooling.cla if isinstance(pooling.cla, nn.Conv2d) else pooling.cla[0]


def _new_pooling(state, in_channels):
    """The pooling whose tensors these are, as far as they agree with each other."""
    sizes = [len(value) for key, value in state.items() if value.dim() and key != "head_weight"]
    n_classes = max(1, statistics.mode(sizes)) if sizes else 1
    heads = {match[1] for key in state if (match := re.match(r"(?:att|cla)\.(\d+)\.", key))}
    if heads or any(key.startswith("att.") for key in state):
        return AttentionPooling(in_channels, n_classes, max(1, len(heads)))
    return MeanPooling(in_channels, n_classes)


def main(arguments=None):
    """The command line: a checkpoint of the published code -> the folder of a tagger.

    Arguments
    ---------
    arguments : list of str, optional
        The command line, by default `sys.argv[1:]`.

    Raises
    ------
    SystemExit
        With status 2 if the command line or a file is wrong.

    Example
    -------
    >>> main(["model.pth", "--labels", "nowhere.csv", "--out", "tagger"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    parser = argparse.ArgumentParser("psla-import", description="Turns a PSLA checkpoint into the folder of a tagger.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .pth file of the published code")
    parser.add_argument("--labels", required=True, metavar="CSV", help="its class list, such as class_labels_indices.csv")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write the tagger")
    parser.add_argument(
        "--padding",
        choices=PADDINGS,
        default=PUBLISHED_PADDING,
        help="symmetric: trained with efficientnet-pytorch 0.7.0, as official models; tensorflow: 0.7.1 (default: %(default)s)",
    )
    parser.add_argument(
        "--n-frames",
        type=int,
        default=AUDIOSET_FRAMES,
        metavar="N",
        help="frames that it was trained on; 3000 for FSD50K (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.n_frames < 1:
        parser.error("--n-frames must be 1 or more")
    try:
        psla_to_tagger(options.checkpoint, options.labels, options.out, options.padding, options.n_frames)
    except (InputError, OSError) as error:
        parser.error(str(error))
    print(f"{options.out} is written. Tag sounds with it: psla-tag --model {options.out} FILE...")


if __name__ == "__main__":
    main()
