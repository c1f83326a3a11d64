"""Label enhancement: adds the parents and children that annotators left out, where a teacher model hears them.

Section III-D of "PSLA: Improving Audio Tagging with Pretraining, Sampling, Labeling, and Aggregation" (Gong, Chung, Glass;
IEEE/ACM TASLP 29, 2021, arXiv 2102.01243). Two kinds of error are mended: a clip carries a class but not a direct child of it
that sounds too (Type I), or not one of its ancestors (Type II). A teacher's scores on the training clips decide: a missing
relative is added where its score is above what is usual on clips that do carry it.

`enhance_labels` takes and gives lists of mids; `enhance` does the same on index arrays and on memory-mapped scores, for
millions of clips; `enhance_annotation` is what a recipe's YAML file names. What came of it is told by
`psla_sb.labels.report`.
"""

import mmap

import numpy as np
from scipy.sparse import csr_array
from speechbrain.utils.logger import get_logger

from psla_sb.errors import InputError
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.ontology import Ontology
from psla_sb.labels.teacher_scores import read_scores

logger = get_logger(__name__)
# Human voice, Crash cymbal, Human group actions, Respiratory sounds, Domestic sounds: what carries one of these is left as it
# is, as in the published system. They are classes of FSD50K, not of AudioSet.
NEVER_GENERATE = ("/m/09l8g", "/m/0bm0k", "/t/dd00012", "/m/09hlz4", "/t/dd00071")
_BLOCK_BYTES = 2**26


def class_thresholds(scores, label_sets, kind="mean"):
    """What a teacher usually gives to clips that carry a class.

    Arguments
    ---------
    scores : numpy.ndarray or numpy.memmap [clips, classes]
        The teacher's scores, float16, float32 or float64; read in blocks of clips.
    label_sets : LabelSets, or numpy.ndarray [clips, classes]
        The labels that the clips came with; as an array, whatever is not 0 is carried. A label that a clip has twice counts
        once.
    kind : "mean", "median" or float
        A number is a percentile, 0 to 100, interpolated linearly.

    Returns
    -------
    numpy.ndarray [classes]
        float64; NaN for a class that no clip carries.

    Raises
    ------
    InputError
        If the scores have another shape, are not floating-point or not finite, or for another `kind`.

    Example
    -------
    >>> scores = np.array([[0.9, 0.5, 0.1], [0.3, 0.2, 0.1]])
    >>> class_thresholds(scores, LabelSets.from_lists([[0, 1], [0]]))
    array([0.6, 0.5, nan])
    """
    average = _average(kind)
    scores = np.asanyarray(scores)
    if not isinstance(label_sets, LabelSets):
        _check_scores(scores, np.shape(label_sets))
        carried = csr_array(np.asarray(label_sets) != 0)
    else:
        n_classes = scores.shape[1] if scores.ndim == 2 else 0
        _check_scores(scores, (len(label_sets), n_classes))
        carried = label_sets.to_sparse(n_classes)
    gathered = [np.empty(0)]
    for start, stop, block in _blocks(scores):
        clips, classes = carried[start:stop].nonzero()
        gathered.append(block[clips, classes].astype(np.float64))
    by_class = np.argsort(carried.indices, kind="stable")
    counts = np.bincount(carried.indices, minlength=scores.shape[1])
    parts = np.split(np.concatenate(gathered)[by_class], np.cumsum(counts)[:-1])
    # One call of NumPy's own mean or percentile per class, so that the figures are theirs to the last bit.
    return np.array([average(part) if part.size else np.nan for part in parts])


def candidate_matrix(vocabulary, ontology, types=("I", "II")):
    """Which classes are looked for on a clip because of a class that it carries.

    Arguments
    ---------
    vocabulary : Vocabulary
    ontology : Ontology
    types : sequence of str
        "I" for direct children, "II" for all ancestors.

    Returns
    -------
    numpy.ndarray [classes, classes]
        bool; in row i are the candidates of class i. Rows of `NEVER_GENERATE` are empty.

    Raises
    ------
    InputError
        If `types` is empty or has something else than "I" and "II".

    Example
    -------
    >>> from psla_sb.labels.ontology import Ontology
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> ontology = Ontology([{"id": "animal", "name": "Animal", "child_ids": ["dog"]},
    ...                      {"id": "dog", "name": "Dog", "child_ids": []}])
    >>> candidate_matrix(Vocabulary(["dog", "animal"], ["Dog", "Animal"]), ontology, ("II",))
    array([[False,  True],
           [False, False]])
    """
    types = {types} if isinstance(types, str) else set(types)
    if not types or types - {"I", "II"}:
        raise InputError(f"the types must be from 'I' and 'II', not {sorted(map(str, types))}")
    matrix = np.zeros((len(vocabulary), len(vocabulary)), dtype=bool)
    relations = {"I": ontology.children, "II": ontology.ancestors}
    for kind in types:
        matrix |= relation_matrix(vocabulary, relations[kind])
    matrix[[vocabulary.index(mid) for mid in NEVER_GENERATE if mid in vocabulary]] = False
    return matrix


def relation_matrix(vocabulary, relation):
    """A relation of the ontology as a matrix over the classes of a vocabulary.

    Arguments
    ---------
    vocabulary : Vocabulary
    relation : callable
        Gives the mids that a mid is related to, such as `Ontology.children`.

    Returns
    -------
    numpy.ndarray [classes, classes]
        bool; in row i are the classes that class i is related to.

    Example
    -------
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> relation_matrix(Vocabulary(["dog", "animal"], ["Dog", "Animal"]), {"dog": ["animal", "thing"], "animal": []}.get)
    array([[False,  True],
           [False, False]])
    """
    matrix = np.zeros((len(vocabulary), len(vocabulary)), dtype=bool)
    for i, mid in enumerate(vocabulary.mids):
        matrix[i, [vocabulary.index(other) for other in relation(mid) if other in vocabulary]] = True
    return matrix


def enhance(label_sets, scores, vocabulary, ontology, threshold="mean", types=("I", "II")):
    """Add missing children and ancestors to the labels of a data set.

    A candidate is added to a clip where the teacher's score is strictly greater than the class's threshold (see
    `class_thresholds`). Only labels that the clip came with generate candidates, so nothing follows from an added label. A
    class that no clip carries is never added.

    Arguments
    ---------
    label_sets : LabelSets
        Class indices of every clip. A clip may have none, or one twice.
    scores : numpy.ndarray or numpy.memmap [clips, classes]
        The teacher's scores on these clips, float16, float32 or float64, compared in float64. They are read in blocks of
        clips, so a memory-mapped file may be larger than the memory.
    vocabulary : Vocabulary
    ontology : Ontology
    threshold : "mean", "median", float or numpy.ndarray [classes]
        See `class_thresholds`; an array is what it returns.
    types : sequence of str
        "I" adds direct children, "II" ancestors.

    Returns
    -------
    LabelSets
        Every clip's labels as they were, followed by the added ones in the order of the vocabulary.

    Raises
    ------
    InputError
        If the scores have another shape, are not floating-point or not finite, or for another threshold or type.

    Example
    -------
    >>> from psla_sb.labels.ontology import Ontology
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> ontology = Ontology([{"id": "animal", "name": "Animal", "child_ids": ["dog"]},
    ...                      {"id": "dog", "name": "Dog", "child_ids": []}])
    >>> scores = np.array([[0.9, 0.5], [0.8, 0.6]], dtype=np.float16)
    >>> labels = LabelSets.from_lists([[0, 1], [0]])
    >>> [row.tolist() for row in enhance(labels, scores, Vocabulary(["dog", "animal"], ["Dog", "Animal"]), ontology)]
    [[0, 1], [0, 1]]
    """
    scores = np.asanyarray(scores)
    _check_scores(scores, (len(label_sets), len(vocabulary)))
    relation = csr_array(candidate_matrix(vocabulary, ontology, types))
    thresholds = threshold if isinstance(threshold, np.ndarray) else class_thresholds(scores, label_sets, threshold)
    carried = label_sets.to_sparse(len(vocabulary))
    clips, classes = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for start, stop, block in _blocks(scores):
        has = carried[start:stop]
        missing = (has @ relation) > has
        missing.sort_indices()
        rows, columns = missing.nonzero()
        added = block[rows, columns].astype(np.float64) > thresholds[columns]
        clips.append(rows[added].astype(np.int64) + start)
        classes.append(columns[added].astype(np.int32))
    return label_sets.append(np.concatenate(clips), np.concatenate(classes))


def enhance_labels(label_sets, scores, vocabulary, ontology, threshold="mean", types=("I", "II")):
    """`enhance` for label sets written as lists of mids.

    Arguments
    ---------
    label_sets : list of list of str
        Mids of every clip.
    scores : numpy.ndarray or numpy.memmap [clips, classes]
        The teacher's scores on these clips.
    vocabulary : Vocabulary
    ontology : Ontology
    threshold : "mean", "median" or float
        See `class_thresholds`.
    types : sequence of str
        "I" adds direct children, "II" ancestors.

    Returns
    -------
    list of list of str
        Every clip's mids as they were, followed by the added ones in the order of the vocabulary.

    Raises
    ------
    InputError
        As `enhance`, and if a mid is not in the vocabulary.

    Example
    -------
    >>> from psla_sb.labels.ontology import Ontology
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> ontology = Ontology([{"id": "animal", "name": "Animal", "child_ids": ["dog"]},
    ...                      {"id": "dog", "name": "Dog", "child_ids": []}])
    >>> vocabulary = Vocabulary(["dog", "animal"], ["Dog", "Animal"])
    >>> enhance_labels([["animal", "dog"], ["dog"]], np.array([[0.9, 0.5], [0.8, 0.6]]), vocabulary, ontology)
    [['animal', 'dog'], ['dog', 'animal']]
    """
    indices = []
    for clip, mids in enumerate(label_sets):
        try:
            indices.append([vocabulary.index(mid) for mid in mids])
        except InputError as error:
            raise InputError(f"labels of clip {clip}: {error}") from None
    enhanced = enhance(LabelSets.from_lists(indices), scores, vocabulary, ontology, threshold, types)
    return [[vocabulary.mids[i] for i in enhanced[clip]] for clip in range(len(enhanced))]


def enhance_annotation(manifest, label_sets, vocabulary, scores, ontology, threshold="mean", types=("I", "II")):
    """`enhance` for a training annotation, with files: what `label_enhancement` in a recipe's YAML file names.

        label_enhancement: !name:psla_sb.labels.enhancement.enhance_annotation
            scores: !ref <output_folder>/enhanced_labels
            ontology: !ref <data_folder>/ontology.json
            threshold: mean
            types: [I, II]

    Scores are matched with clips by ID, and stay on disk. The log says how many labels were added, and which classes have no
    threshold.

    Arguments
    ---------
    manifest : Manifest
        The clips.
    label_sets : LabelSets
        Their labels.
    vocabulary : Vocabulary
    scores : str or Path
        See `read_scores`. Scores of other clips are left unused.
    ontology : str or Path
        AudioSet's `ontology.json`.
    threshold : "mean", "median" or float
        See `class_thresholds`.
    types : sequence of str
        "I" adds direct children, "II" ancestors.

    Returns
    -------
    LabelSets
        See `enhance`.

    Raises
    ------
    InputError
        A file is missing or broken, a clip has no scores, or as `enhance`.

    Example
    -------
    >>> from psla_sb.dataio.manifest import Manifest
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> folder = getfixture("tmp_path")
    >>> np.save(folder / "scores.npy", np.array([[0.8, 0.6], [0.9, 0.5]]))
    >>> _ = (folder / "ids.csv").write_text("ID\\nb\\na\\n")
    >>> _ = (folder / "ontology.json").write_text(
    ...     '[{"id": "animal", "name": "Animal", "child_ids": ["dog"]}, {"id": "dog", "name": "Dog", "child_ids": []}]')
    >>> vocabulary = Vocabulary(["dog", "animal"], ["Dog", "Animal"])
    >>> manifest = Manifest.from_columns(["a", "b"], ["a.wav", "b.wav"], [1.0, 1.0], ["dog;animal", "dog"])
    >>> labels = manifest.label_sets(vocabulary)
    >>> [row.tolist() for row in enhance_annotation(manifest, labels, vocabulary, folder, folder / "ontology.json")]
    [[0, 1], [0, 1]]
    """
    values, ids, source = read_scores(scores)
    rows = manifest.rows_in(ids, source)
    # It is the labels that are put into the order of the scores, which may be larger than the memory. Rows of other clips get
    # no labels, so they count for no threshold and have no candidates.
    clips = np.full(len(ids), len(manifest))
    clips[rows] = np.arange(len(manifest))
    with_an_empty_one = LabelSets(np.append(label_sets.offsets, label_sets.offsets[-1]), label_sets.indices)
    ordered = with_an_empty_one.take(clips)
    ontology = Ontology.from_json(ontology)
    try:
        enhanced = enhance(ordered, values, vocabulary, ontology, threshold, types).take(rows)
    except InputError as error:
        raise InputError(f"label enhancement with {source}: {error}") from None
    changed = int((np.diff(enhanced.offsets) > np.diff(label_sets.offsets)).sum())
    logger.info(
        "Label enhancement (threshold %s, types %s): %d labels added to %d, on %d of %d clips; scores from %s",
        *(threshold, types if isinstance(types, str) else "+".join(types)),
        *(enhanced.indices.size - label_sets.indices.size, label_sets.indices.size, changed, len(manifest), source),
    )
    warn_of_classes_without_clips(label_sets, vocabulary)
    return enhanced


def warn_of_classes_without_clips(label_sets, vocabulary):
    """Logs which classes cannot be added to any clip, having no threshold.

    Arguments
    ---------
    label_sets : LabelSets
        The labels that the clips came with.
    vocabulary : Vocabulary

    Example
    -------
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> warn_of_classes_without_clips(LabelSets.from_lists([[0]]), Vocabulary(["/m/1"], ["Bell"]))
    """
    names = [vocabulary.names[c] for c in np.flatnonzero(label_sets.counts(len(vocabulary)) == 0)]
    if names:
        logger.warning("%d classes are on no clip, so they have no threshold and are not added: %s", len(names), "; ".join(names))


def _average(kind):
    if kind in ("mean", "median"):
        return getattr(np, kind)
    if isinstance(kind, (int, float)) and not isinstance(kind, bool) and 0 <= kind <= 100:
        return lambda values: np.percentile(values, kind)
    raise InputError(f"the threshold must be 'mean', 'median' or a percentile 0 to 100, not {kind!r}")


def _check_scores(scores, shape):
    if scores.shape != tuple(shape):
        raise InputError(f"the teacher's scores have the shape {list(scores.shape)}, not [clips, classes] = {list(shape)}")
    if scores.dtype.kind != "f":
        raise InputError(f"the teacher's scores must be floating-point numbers, not {scores.dtype}")


def _blocks(scores):
    """Yield (start, stop, scores [clips of the block, classes]) over all clips, refusing what is not finite."""
    size = max(1, _BLOCK_BYTES // max(1, scores[:1].nbytes))
    mapped = scores
    while isinstance(mapped, np.ndarray):
        mapped = mapped.base
    # Pages read from a mapped file count as this process's memory until they are given back. Private changes ("c") would be
    # lost by that, and Windows has no such call.
    releases = isinstance(mapped, mmap.mmap) and getattr(scores, "mode", "") == "r" and hasattr(mmap, "MADV_DONTNEED")
    for start in range(0, len(scores), size):
        block = np.asarray(scores[start : start + size])
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            raise InputError(f"the teacher's scores of clip {start + finite.argmin()} are not all finite numbers")
        yield start, start + len(block), block
        if releases:
            mapped.madvise(mmap.MADV_DONTNEED)
