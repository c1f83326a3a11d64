"""Finds labels of training clips that annotators missed, with a trained tagger as the teacher.

    python recipes/AudioSet/enhance_labels.py hparams/psla_balanced_enhanced.yaml --data_folder=/data/audioset \\
        --teacher=results/psla_balanced/1
    python recipes/AudioSet/enhance_labels.py hparams/psla.yaml --data_folder=/data/audioset --audit

README.md in this folder has a section on it; `--help` lists the options. `ontology.json` must be in the data folder.
"""

from pyarrow import compute as pc

from audioset_prepare import read_segments
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.experiment.enhance_labels import main


def read_labels(path):
    """Labels from an annotation, or from one of AudioSet's segment lists.

    Arguments
    ---------
    path : str or Path
        A segment list begins with `#`.

    Returns
    -------
    Manifest
        Without usable paths, if it was a segment list.

    Raises
    ------
    InputError
        The file is missing or is neither.

    Example
    -------
    >>> path = getfixture("tmp_path") / "segments.csv"
    >>> _ = path.write_text('# a\\n# b\\n# YTID, ...\\n--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"\\n')
    >>> read_labels(path)[0]["labels"]
    ['/m/068hy', '/m/07q6cd_']
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            is_list = file.read(1) == "#"
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not is_list:
        return Manifest.from_file(path)
    segments = read_segments(path)
    ids, mids = pc.struct_field(segments, "id"), pc.struct_field(segments, "mids")
    return Manifest.from_columns(ids, ids, [None] * len(ids), pc.replace_substring(mids, ",", ";"), source=path)


if __name__ == "__main__":
    main(__file__, read_labels=read_labels)
