"""`psla-ontology`: prints an ontology as a tree."""

import argparse
import sys

from psla_sb import add_version


def ontology(arguments: list[str] | None = None) -> None:
    """Runs `psla-ontology`, by default with the arguments of this process."""
    parser = argparse.ArgumentParser(prog="psla-ontology", description="Prints an ontology as a tree.", allow_abbrev=False)
    add_version(parser)
    parser.add_argument("ontology", help="AudioSet's ontology.json")
    parser.add_argument("--annotation", help="annotation CSV (ID,wav,duration,labels) whose clips are counted")
    parser.add_argument("--labels", help="class list (class_labels_indices.csv) of the annotation")
    args = parser.parse_args(arguments)
    if (args.annotation is None) != (args.labels is None):
        parser.error("--annotation and --labels belong together")
    # after the command line was checked: it takes seconds
    from psla_sb.errors import InputError
    from psla_sb.labels.ontology import Ontology

    try:
        tree, counts = Ontology.from_json(args.ontology), None
        if args.annotation:
            # only counting needs these
            from psla_sb.dataio.manifest import Manifest
            from psla_sb.labels.vocabulary import Vocabulary

            vocabulary = Vocabulary.from_csv(args.labels)
            label_sets = Manifest.from_csv(args.annotation).label_sets(vocabulary)
            counts = dict(zip(vocabulary.mids, label_sets.counts(len(vocabulary)).tolist(), strict=True))
        print(tree.tree(counts))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
