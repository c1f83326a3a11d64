"""A trained model as a folder that `AudioTagger`, and SpeechBrain's `EncoderClassifier`, load from anywhere."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ruamel.yaml
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.parameter_transfer import Pretrainer

from psla_sb.checkpoints.definitions import definitions_text, plain_definitions, tags_of
from psla_sb.checkpoints.run_folder import CALIBRATION, HPARAMS
from psla_sb.checkpoints.trust import untrusted
from psla_sb.checkpoints.weights import save_weights, state_of, trained_modules, write_tensors
from psla_sb.files import atomic_write, write_file
from psla_sb.labels.calibration import Calibration
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.chain import MODULES

WEIGHTS, LABEL_ENCODER = "model.safetensors", "label_encoder.ckpt"


class OneFilePretrainer(Pretrainer):
    """Loads a tagger whose weights are all in `model.safetensors`; SpeechBrain's own wants a file `.ckpt` of each module."""

    def collect_files(self, default_source: str | Path | None = None, **options: Any) -> dict[str, Path]:
        """Does what SpeechBrain's method does."""
        self.paths |= dict.fromkeys(self.custom_hooks, f"{default_source}/{WEIGHTS}")
        return super().collect_files(default_source, **options)


def write_tagger(
    folder: str | Path,
    definitions: Mapping[str, Any],
    modules: Mapping[str, Any],
    vocabulary: Vocabulary,
    calibration: Calibration | None = None,
    one_file: bool = False,
) -> None:
    """Writes `hyperparams.yaml`, `embedding_model.ckpt` and `classifier.ckpt` (safetensors) and `label_encoder.ckpt`.

    A front end with weights gets files of its own; a calibration becomes `calibration.json`. The folder holds no path: it can be
    moved.

    Arguments
    ---------
    definitions
        `sample_rate` and the four modules as YAML nodes, with tags such as `!new:`.
    modules
        The modules that they define, trained.
    calibration
        Fitted to what these modules score.
    one_file
        Puts all weights into `model.safetensors`, with keys `module.parameter`, in place of a file of each module.

    Example
    -------
    >>> import torch
    >>> definitions = ruamel.yaml.YAML().load('''
    ... sample_rate: 16000
    ... compute_features: !new:psla_sb.lobes.features.KaldiFbank
    ... mean_var_norm: !new:psla_sb.lobes.features.GlobalNorm
    ... embedding_model: !new:torch.nn.Identity
    ... classifier: !new:torch.nn.Linear {in_features: 1, out_features: 2}
    ... ''')
    >>> modules = {"embedding_model": torch.nn.Identity(), "classifier": torch.nn.Linear(1, 2)}
    >>> write_tagger(getfixture("tmp_path"), definitions, modules, Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]))
    >>> sorted(file.name for file in getfixture("tmp_path").iterdir())
    ['classifier.ckpt', 'embedding_model.ckpt', 'hyperparams.yaml', 'label_encoder.ckpt']
    """
    yaml, text = ruamel.yaml.YAML(), io.StringIO()
    text.write(definitions_text(plain_definitions(definitions, modules)))
    text.write("modules:\n" + "".join(f"    {name}: !ref <{name}>\n" for name in MODULES))
    text.write("label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder\n")
    yaml.dump({"mids": vocabulary.mids}, text)
    trained = trained_modules(modules)
    pretrainer = "psla_sb.checkpoints.OneFilePretrainer" if one_file else "speechbrain.utils.parameter_transfer.Pretrainer"
    text.write(f"\npretrainer: !new:{pretrainer}\n    loadables:\n")
    text.write("".join(f"        {name}: !ref <{name}>\n" for name in (*trained, "label_encoder")))
    text.write("    custom_hooks:\n")
    for name in trained:
        text.write(f"        {name}: !name:psla_sb.checkpoints.load_module" + (f" {{part: {name}}}\n" if one_file else "\n"))
    # those that are there are of other weights
    for file in (CALIBRATION, WEIGHTS):
        (Path(folder) / file).unlink(missing_ok=True)
    write_file(Path(folder) / HPARAMS, text.getvalue())
    if one_file:
        save_weights(trained, Path(folder) / WEIGHTS)
        for name in MODULES:
            (Path(folder) / f"{name}.ckpt").unlink(missing_ok=True)
    else:
        for name, module in trained.items():
            write_tensors(state_of(module), Path(folder) / f"{name}.ckpt")
    with atomic_write(Path(folder) / LABEL_ENCODER) as temporary:
        label_encoder(vocabulary).save(temporary)
    if calibration is not None:
        calibration.write(Path(folder) / CALIBRATION, vocabulary)


def read_calibration(folder: str | Path, vocabulary: Vocabulary) -> Calibration | None:
    """Reads the `calibration.json` of a tagger's or a run's folder, if there is one."""
    path = Path(folder) / CALIBRATION
    return Calibration.read(path, vocabulary) if path.is_file() else None


def trust_options(folder: str | Path) -> str:
    """What a command that loads a tagger's folder needs besides its name, such as ` --trust my_lobes`; mostly nothing."""
    modules = sorted(set(untrusted(tags_of((Path(folder) / HPARAMS).read_text(encoding="utf-8"))).values()))
    return "".join(f" --trust {module}" for module in modules)


def label_encoder(vocabulary: Vocabulary) -> CategoricalEncoder:
    """Makes SpeechBrain's encoder of the display names."""
    encoder = CategoricalEncoder()
    encoder.update_from_iterable(vocabulary.names)
    encoder.ignore_len()
    return encoder
