"""`psla-teacher`: brings in the scores of other systems, to learn from."""

import shlex
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from psla_sb import add_version

EXAMPLES = """examples:
  psla-teacher passt_logits.npy --index passt_index.pkl --annotation results/psla/1/train.csv \\
      --labels /data/audioset/class_labels_indices.csv --out results/teacher
  python recipes/AudioSet/train.py hparams/psla.yaml --data_folder=/data/audioset --teacher_scores=results/teacher

LOGITS is a .npy file [rows, classes] of float16, float32 or float64, as EfficientAT publishes them. INDEX says which row is of
which clip: a pickle or a .json of a dictionary {clip id: row}, or a .csv with a column ID, one row after the other. No code in a
pickle is run. Clips are found by their IDs in the annotation, and else by YouTube's ID of 11 characters in both: <id>, Y<id>,
<id>_30_40.wav.

FOLDER gets scores.npy (probabilities of the clips that were found), ids.csv and class_labels_indices.csv. train.py reads it by
--teacher_scores=FOLDER: clips that were not found learn from their labels alone; and, if all were found, with a YAML file that has
a block label_enhancement (psla_balanced_enhanced.yaml), by --label_enhancement='{scores: FOLDER}'. Scores that know hardly more of
the clips' labels than chance are refused: the index or the classes are then wrong.

exit status: 0 if all is well, 2 if the command line or the input is wrong"""


def teacher(arguments: list[str] | None = None) -> None:
    """Runs `psla-teacher`, by default with the arguments of this process."""
    description = "Makes a folder of a teacher's scores, for distillation, of what another system has scored."
    parser = ArgumentParser("psla-teacher", description=description, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)
    add_version(parser)
    add = parser.add_argument
    add("scores", metavar="LOGITS", help="a .npy file [rows, classes]")
    add("--index", required=True, metavar="FILE", help="which row is of which clip: .pkl, .json or .csv")
    add("--annotation", required=True, metavar="CSV", help="the training annotation, such as a run's train.csv")
    add("--labels", required=True, metavar="CSV", help="the class list, such as class_labels_indices.csv")
    add("--out", required=True, metavar="FOLDER", help="where to write the scores")
    add("--teacher-labels", metavar="CSV", help="the class list of the scores, if they have other classes, or another order")
    add("--probabilities", action="store_true", help="the scores are probabilities, and not logits")
    options = parser.parse_args(arguments)
    # after the command line was checked: it takes seconds
    from psla_sb.dataio.manifest import Manifest
    from psla_sb.errors import InputError
    from psla_sb.labels.teacher_import import import_scores
    from psla_sb.labels.vocabulary import Vocabulary

    try:
        manifest, vocabulary = Manifest.from_file(options.annotation), Vocabulary.from_csv(options.labels)
        classes = Vocabulary.from_csv(options.teacher_labels) if options.teacher_labels else None
        arguments_of_all = (options.scores, options.index, manifest, vocabulary, options.out, classes, options.probabilities)
        found = import_scores(*arguments_of_all)
    except (InputError, OSError) as error:
        parser.error(str(error))
    n = found.by_id + found.by_youtube_id
    how = f": {found.by_id} by their ID, {found.by_youtube_id} by YouTube's ID in it" if found.by_youtube_id else ""
    print(f"Scores of {n} of {found.n_clips} clips ({n / found.n_clips:.1%}){how}.")
    print(f"The teacher's mAP on their labels is {found.score:.4f}, and by chance {found.chance:.4f}.")
    print(f"{options.out} is written. Learn from it: train.py ... --teacher_scores={shlex.quote(options.out)}")
