"""A trained model as a folder that `AudioTagger`, and SpeechBrain's `EncoderClassifier`, load from anywhere."""

import io
from pathlib import Path

import ruamel.yaml
from ruamel.yaml.comments import CommentedMap
from safetensors.torch import save_file
from speechbrain.dataio.encoder import CategoricalEncoder

from psla_sb.checkpoints import atomic_write

MODULES = ("compute_features", "mean_var_norm", "embedding_model", "classifier")

PRETRAINER = """
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
        classifier: !ref <classifier>
        label_encoder: !ref <label_encoder>
    custom_hooks:
        embedding_model: !name:psla_sb.checkpoints.load_module
        classifier: !name:psla_sb.checkpoints.load_module
"""


def export_tagger(folder, hparams_file, modules, vocabulary):
    """Writes `hyperparams.yaml`, `embedding_model.ckpt` and `classifier.ckpt` (safetensors) and `label_encoder.ckpt`.

    The folder holds no path: it can be moved.

    Arguments
    ---------
    folder : str or Path
        Where to write; made if there is none.
    hparams_file : str or Path
        A YAML file with the definitions of the four modules and `sample_rate`: a run's `hyperparams.yaml`.
    modules : dict of str to torch.nn.Module
        `embedding_model` and `classifier`, trained.
    vocabulary : Vocabulary
        The classes.

    Example
    -------
    >>> import torch
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "run.yaml").write_text('''
    ... sample_rate: 16000
    ... compute_features: !new:psla_sb.lobes.features.KaldiFbank
    ... mean_var_norm: !new:psla_sb.lobes.features.GlobalNorm
    ... embedding_model: !new:torch.nn.Identity
    ... classifier: !new:torch.nn.Linear {in_features: 1, out_features: 2}
    ... ''')
    >>> modules = {"embedding_model": torch.nn.Identity(), "classifier": torch.nn.Linear(1, 2)}
    >>> export_tagger(folder / "tagger", folder / "run.yaml", modules, Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]))
    >>> sorted(file.name for file in (folder / "tagger").iterdir())
    ['classifier.ckpt', 'embedding_model.ckpt', 'hyperparams.yaml', 'label_encoder.ckpt']
    """
    write_tagger(folder, read_definitions(hparams_file), modules, vocabulary)


def read_definitions(hparams_file):
    """The definitions of a tagger's four modules in a YAML file, without pretrained weights.

    Arguments
    ---------
    hparams_file : str or Path
        A run's or a tagger's `hyperparams.yaml`.

    Returns
    -------
    dict
        `sample_rate` and the four modules as YAML nodes.

    Example
    -------
    >>> file = getfixture("tmp_path") / "run.yaml"
    >>> _ = file.write_text("lr: 1\\nsample_rate: 16000\\n" + "".join(f"{name}: {{}}\\n" for name in MODULES))
    >>> list(read_definitions(file))
    ['sample_rate', 'compute_features', 'mean_var_norm', 'embedding_model', 'classifier']
    """
    with open(hparams_file, encoding="utf-8") as stream:
        run = ruamel.yaml.YAML().load(stream)
    definitions = {name: run[name] for name in ("sample_rate", *MODULES)}
    if "pretrained" in definitions["embedding_model"]:
        definitions["embedding_model"]["pretrained"] = None
    return definitions


def definitions_text(definitions):
    """Definitions as YAML, which HyperPyYAML builds and which can be compared.

    Example
    -------
    >>> definitions_text({"sample_rate": 16000})
    'sample_rate: 16000\\n'
    """
    text = io.StringIO()
    ruamel.yaml.YAML().dump(CommentedMap(definitions), text)
    return text.getvalue()


def plain_definitions(definitions, encoder):
    """Definitions whose classifier does not refer to the encoder: what `!ref <embedding_model.out_channels>` became is a number.

    Arguments
    ---------
    definitions : dict
        As `read_definitions` returns them; changed in place.
    encoder : torch.nn.Module
        What `embedding_model` describes.

    Returns
    -------
    dict
        The same.

    Example
    -------
    >>> import torch
    >>> definitions = ruamel.yaml.YAML().load("classifier: !new:torch.nn.Linear {in_features: !apply:getattr [x, in_features]}")
    >>> plain_definitions(definitions, torch.nn.Linear(3, 1))["classifier"]["in_features"]
    3
    """
    for key, value in definitions["classifier"].items():
        if getattr(getattr(value, "tag", None), "value", None) == "!apply:getattr":
            definitions["classifier"][key] = getattr(encoder, value[1])
    return definitions


def write_tagger(folder, definitions, modules, vocabulary):
    """What `export_tagger` does, with the definitions themselves in place of a run's file.

    Arguments
    ---------
    folder : str or Path
        Where to write; made if there is none.
    definitions : dict
        `sample_rate` and the four modules as YAML nodes, with tags such as `!new:`.
    modules : dict of str to torch.nn.Module
        `embedding_model` and `classifier`, trained.
    vocabulary : Vocabulary
        The classes.

    Example
    -------
    >>> import torch
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> definitions = ruamel.yaml.YAML().load('''
    ... sample_rate: 16000
    ... compute_features: !new:psla_sb.lobes.features.KaldiFbank
    ... mean_var_norm: !new:psla_sb.lobes.features.GlobalNorm
    ... embedding_model: !new:torch.nn.Identity
    ... classifier: !new:torch.nn.Linear {in_features: 1, out_features: 2}
    ... ''')
    >>> modules = {"embedding_model": torch.nn.Identity(), "classifier": torch.nn.Linear(1, 2)}
    >>> write_tagger(getfixture("tmp_path"), definitions, modules, Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]))
    >>> print((getfixture("tmp_path") / "hyperparams.yaml").read_text().splitlines()[0])
    sample_rate: 16000
    """
    yaml, text = ruamel.yaml.YAML(), io.StringIO()
    text.write(definitions_text(plain_definitions(definitions, modules["embedding_model"])))
    text.write("modules:\n" + "".join(f"    {name}: !ref <{name}>\n" for name in MODULES))
    text.write("label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder\n")
    yaml.dump({"mids": vocabulary.mids}, text)
    with atomic_write(Path(folder) / "hyperparams.yaml") as temporary:
        temporary.write_text(text.getvalue() + PRETRAINER, encoding="utf-8")
    for name in ("embedding_model", "classifier"):
        with atomic_write(Path(folder) / f"{name}.ckpt") as temporary:
            save_file({key: value.cpu().contiguous() for key, value in modules[name].state_dict().items()}, temporary)
    with atomic_write(Path(folder) / "label_encoder.ckpt") as temporary:
        label_encoder(vocabulary).save(temporary)


def label_encoder(vocabulary):
    """SpeechBrain's encoder of the display names.

    Example
    -------
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> label_encoder(Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"])).ind2lab
    {0: 'Bell', 1: 'Rain'}
    """
    encoder = CategoricalEncoder()
    encoder.update_from_iterable(vocabulary.names)
    return encoder
