"""A trained model as a folder that `AudioTagger`, and SpeechBrain's `EncoderClassifier`, load from anywhere."""

import io
from pathlib import Path

import ruamel.yaml
from speechbrain.dataio.encoder import CategoricalEncoder

from psla_sb.checkpoints.definitions import definitions_text, plain_definitions, read_definitions
from psla_sb.checkpoints.weights import state_of, trained_modules, write_tensors
from psla_sb.files import atomic_write
from psla_sb.lobes.chain import MODULES


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
    text.write(definitions_text(plain_definitions(definitions, modules)))
    text.write("modules:\n" + "".join(f"    {name}: !ref <{name}>\n" for name in MODULES))
    text.write("label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder\n")
    yaml.dump({"mids": vocabulary.mids}, text)
    trained = trained_modules(modules)
    text.write("\npretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer\n    loadables:\n")
    text.write("".join(f"        {name}: !ref <{name}>\n" for name in (*trained, "label_encoder")))
    text.write("    custom_hooks:\n" + "".join(f"        {name}: !name:psla_sb.checkpoints.load_module\n" for name in trained))
    with atomic_write(Path(folder) / "hyperparams.yaml") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    for name, module in trained.items():
        write_tensors(state_of(module), Path(folder) / f"{name}.ckpt")
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
    encoder.ignore_len()
    return encoder
