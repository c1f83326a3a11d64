"""`psla-compare`: compares systems on the clips that all have scored."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from psla_sb import add_version

EXAMPLES = """examples:
  psla-compare results/psla/1 results/psla/2
  psla-compare results/psla/1 results/psla/2 results/ensemble --out results/comparison
  psla-compare base=results/psla/1 "theirs=scores/ast.npy" --row weight_average

PATH is a run's output folder, an aggregation's, or a .npy file of scores [clips, classes] of any project. Of which clips the rows
of X.npy are, is said beside it by X.csv, clips.csv or ids.csv (a column ID; a column labels, mids joined by ';', has the targets),
or by X.txt or ids.txt (an ID a line). The classes are those of class_labels_indices.csv beside it, or of --classes.

Intervals are those of a paired bootstrap over clips: all systems are evaluated on the same resamples. The percentiles are moved so
that the mean of the resamples is the figure itself, since average precision of resampled clips is too high on average. p is twice
the share of the moved differences of mAP that lie at or beyond 0 on the smaller side.

exit status: 0 if all is well, 2 if the command line or the input is wrong"""


def compare(arguments: list[str] | None = None) -> None:
    """Runs `psla-compare`, by default with the arguments of this process."""
    description = "Compares systems on the clips that all have scored: figures, differences to the first, intervals of both."
    parser = ArgumentParser("psla-compare", description=description, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)
    add_version(parser)
    parser.add_argument("systems", nargs="+", metavar="[NAME=]PATH", help="scores, see below; all are compared with the first")
    rows = ["ensemble", "weight_average", "best", "last"]
    parser.add_argument("--row", choices=rows, default="ensemble", help="of runs: whose scores (default: %(default)s)")
    parser.add_argument("--classes", metavar="CSV", help="the class list of scores that have none beside them")
    parser.add_argument("--annotation", metavar="CSV", help="has the targets (ID,labels), in place of the files beside scores")
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the clips (default: %(default)s)")
    parser.add_argument("--level", type=float, default=95, metavar="PERCENT", help="of the intervals (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (default: %(default)s)")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="classes that differ most (default: %(default)s)")
    parser.add_argument("--out", metavar="FOLDER", help="write compare.json, classes.csv and compare.png there")
    options = parser.parse_args(arguments)
    if not 0 < options.level < 100:
        parser.error("--level is in percent: it must be above 0 and below 100")
    if options.resamples < 2 or options.top < 0 or options.seed < 0:
        parser.error("--resamples must be 2 or more, --top and --seed 0 or more")
    # after the command line was checked: it takes seconds
    from psla_sb.aggregation.compare import compare as compare_systems
    from psla_sb.aggregation.compare import comparison_table, write_comparison
    from psla_sb.aggregation.predictions import match, open_all
    from psla_sb.errors import InputError

    try:
        matched = match(open_all(options.systems, options.row), options.classes, options.annotation)
        found = compare_systems(matched, options.resamples, options.level / 100, options.seed, options.top)
        if options.out:
            # matplotlib is slow to import
            from psla_sb.plots.compare import comparison

            write_comparison(found, options.out)
            comparison(found.report, Path(options.out) / "compare.png")
    except (InputError, OSError) as error:
        parser.error(str(error))
    print(comparison_table(found.report))
    if options.out:
        print(f"\n{options.out} has compare.json, classes.csv and compare.png.")
