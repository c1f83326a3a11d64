"""`psla-fit`: trains a tagger on own sounds."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from psla_sb import add_version

EXAMPLES = """examples:
  psla-prepare my_sounds --out my_data
  psla-fit my_data
  psla-fit my_data --pretrained_tagger=results/psla/1/tagger
  psla-fit my_data --target_precision=.9                  thresholds above which nine of ten are right
  psla-fit my_data --output_folder=my_data/long --number_of_epochs=60
  psla-fit my_data --folds

The settings are chosen by what the folder has, and printed; each, and each key of the YAML file, can be given as --KEY=VALUE, and
so can SpeechBrain's options, such as --device=cpu. `psla-fit my_data --dry_run` tries some steps and says how long it takes. The
run's folder, my_data/run, gets report.html, the tagger for psla-tag and all figures. A training that was interrupted goes on
with the same command.

exit status: 0 if all is well, 2 if the command line or the input is wrong, 75 if it was interrupted and has saved its state"""


def fit(arguments: list[str] | None = None) -> None:
    """Runs `psla-fit`, by default with the arguments of this process."""
    description = "Trains a tagger on the clips of a folder that psla-prepare has written, and reports what it is worth."
    parser = ArgumentParser(
        "psla-fit", description=description, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_version(parser)
    parser.add_argument("folder", metavar="FOLDER", help="what psla-prepare has written: train.csv, valid.csv, the class list")
    parser.add_argument("--hparams", metavar="YAML", help="the recipe (default: hparams/own.yaml of recipes/AudioSet)")
    said = "train again without each fold that psla-prepare --folds has made, for figures of all clips"
    parser.add_argument("--folds", action="store_true", help=said)
    options, others = parser.parse_known_args(arguments)
    # after the command line was checked: it takes seconds
    from psla_sb.experiment import launch
    from psla_sb.experiment.fit import RECIPE
    from psla_sb.experiment.fit import fit as fit_folder

    if options.hparams is None and not RECIPE.is_file():
        parser.error(f"{RECIPE} is not there: give the recipe's YAML file, --hparams FILE")
    file = options.hparams or str(RECIPE)
    launch.main(str(RECIPE), lambda *job: fit_folder(options.folder, options.folds, *job), [file, *others])
