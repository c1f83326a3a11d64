"""The pictures: the right values are drawn, names are printed as they are, nothing overlaps or is cut off."""

import itertools
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import matplotlib.image
import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib.text import Text

from psla_sb.checkpoints.run_folder import prediction_path, write_results
from psla_sb.dataio.dataset import TaggingDataset
from psla_sb.dataio.manifest import Manifest
from psla_sb.inference.timeline import Timeline
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.features import KaldiFbank
from psla_sb.metrics import average_precision
from psla_sb.plots.ablation import ablation
from psla_sb.plots.enhancement import label_changes
from psla_sb.plots.ensemble import ensemble_curve
from psla_sb.plots.page import PAGE_WIDTH, STYLE, page, shorten
from psla_sb.plots.recording import recording
from psla_sb.plots.training import class_ap, example_clips, training_curves, write_pictures

LONGEST = "Livestock, farm animals, working animals"  # of AudioSet's names
DPI = STYLE["figure.dpi"]


def drawn_texts(figure):
    """[(what it says, its rectangle in pixels)] of what a figure's last drawing put on the page."""
    drawn, draw = [], Text.draw

    def recording(self, renderer, *args, **kwargs):
        if self.get_visible() and self.get_text().strip():
            assert not self.get_parse_math()
            drawn.append((self.get_text(), Text.get_window_extent(self, renderer)))
        return draw(self, renderer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, matplotlib.style.context(["default", STYLE]):
        patch.setattr(Text, "draw", recording)
        figure.canvas.draw()
    return drawn


def assert_fit_to_print(figure, path):
    """A PNG of a page's width, not empty, whose texts lie on it and apart from each other."""
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] == round(PAGE_WIDTH * DPI)
    assert picture.shape[0] <= 10.7 * DPI  # A4 less its margins
    assert picture[..., :3].std() > 0.05
    drawn = drawn_texts(figure)
    assert drawn
    for what, box in drawn:
        assert box.x0 >= -0.5, what
        assert box.y0 >= -0.5, what
        assert box.x1 <= figure.bbox.x1 + 0.5, what
        assert box.y1 <= figure.bbox.y1 + 0.5, what
    for (what, one), (other, two) in itertools.combinations(drawn, 2):
        # a rectangle includes room for letters that the text may not have
        overlap = min(one.x1, two.x1) - max(one.x0, two.x0), min(one.y1, two.y1) - max(one.y0, two.y0)
        assert min(overlap) < 2.5, (what, other)


def epochs(n):
    rng = np.random.default_rng(n)
    keys = ("lr", "train_loss", "valid_loss", "mAP", "ensemble_mAP")
    return [{"epoch": i + 1, **dict(zip(keys, rng.uniform(0.1, 0.9, 5), strict=True))} for i in range(n)]


def curves(figure):
    """{(label of the axis, line style): values of y}"""
    return {(axes.get_ylabel()[:4], line.get_linestyle()): line.get_ydata() for axes in figure.axes for line in axes.lines}


CURVES = {
    ("loss", "--"): "train_loss",
    ("loss", "-"): "valid_loss",
    ("mAP ", "--"): "mAP",
    ("mAP ", "-"): "ensemble_mAP",
    ("lear", "-"): "lr",
}


@pytest.mark.parametrize("n", [1, 2, 12, 60])
def test_training_curves_are_the_records(tmp_path, n):
    records = epochs(n)
    figure = training_curves(records, tmp_path / "plots" / "curves.png")
    drawn = curves(figure)
    for curve, key in CURVES.items():
        np.testing.assert_array_equal(drawn[curve], [record[key] for record in records])
    best = max(records, key=lambda record: record["ensemble_mAP"])
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert legend[1].endswith(f"best {best['ensemble_mAP']:.3f} (epoch {best['epoch']})")
    assert_fit_to_print(figure, tmp_path / "plots" / "curves.png")


@pytest.mark.filterwarnings("error")
def test_values_that_are_missing_leave_gaps(tmp_path):
    records = epochs(5)
    records[1]["mAP"], records[2]["train_loss"] = None, float("nan")
    for record in records:
        del record["valid_loss"]
        record["ensemble_mAP"] = None
    figure = training_curves(records, tmp_path / "curves.png")
    drawn = curves(figure)
    assert np.flatnonzero(np.isnan(drawn["mAP ", "--"])).tolist() == [1]
    assert np.flatnonzero(np.isnan(drawn["loss", "--"])).tolist() == [2]
    assert np.isnan(drawn["loss", "-"]).all()
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()][1] == "ensemble of the epochs so far"
    assert_fit_to_print(figure, tmp_path / "curves.png")


def panels(figure):
    """The panels with the bars and with the counts."""
    return figure.axes[-2:]


def drawn_classes(figure):
    """[(name, AP, training clips)] as the picture has them, from the top."""
    bars, counts = panels(figure)
    (dots,) = counts.lines
    names = [label.get_text() for label in bars.get_yticklabels()]
    rows = bars.get_yticks()
    assert list(rows) == sorted(rows)
    assert bars.yaxis_inverted()
    np.testing.assert_array_equal(dots.get_ydata(), rows)
    np.testing.assert_allclose([bar.get_y() + bar.get_height() / 2 for bar in bars.patches], rows)
    return list(zip(names, [bar.get_width() for bar in bars.patches], dots.get_xdata(), strict=True))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 16, 60])
def test_class_ap_is_sorted_and_beside_its_counts(tmp_path, n):
    rng = np.random.default_rng(n)
    names = [LONGEST, "Bird vocalization, bird call, bird song", "$alpha_1$", "a_b^c \\frac", *(f"class {i}" for i in range(n))][:n]
    ap, counts = rng.uniform(0, 1, n), (10 ** rng.uniform(0, 6, n)).astype(int)
    ap[-1], counts[0] = 1.0, 0
    figure = class_ap(names, ap, counts, tmp_path / "ap.png", "Average precision of the ensemble")
    assert drawn_classes(figure) == sorted(zip(names, ap, counts, strict=True), key=lambda row: -row[1])
    printed = [what for what, _ in drawn_texts(figure)]
    assert {f"{value:.2f}" for value in ap} <= set(printed)
    assert {f"{count:,}" for count in counts} <= set(printed)
    assert f"Average precision of the ensemble\nmAP {ap.mean():.3f}, the mean over {n} class{'es' * (n > 1)}" in printed
    assert_fit_to_print(figure, tmp_path / "ap.png")


def test_classes_without_ap_are_left_out_and_counted(tmp_path):
    figure = class_ap(["a", "b", "c", "d"], [np.nan, 0.2, np.nan, 0.6], [1, 2, 3, 4], tmp_path / "ap.png")
    assert drawn_classes(figure) == [("d", 0.6, 4), ("b", 0.2, 2)]
    title = figure.get_suptitle()
    assert "mAP 0.400" in title
    assert "2 of 4 classes have no positive clip" in title
    figure = class_ap(["a", "b"], [np.nan, np.nan], [1, 2], tmp_path / "ap.png")
    assert drawn_classes(figure) == []
    assert "2 of 2 classes" in figure.get_suptitle()
    assert "nan" not in figure.get_suptitle()


@pytest.mark.filterwarnings("error")
def test_many_classes_have_an_overview_and_their_extremes_names(tmp_path):
    rng = np.random.default_rng(0)
    ap, counts = rng.beta(1.5, 2, 527), (10 ** rng.uniform(1.7, 6, 527)).astype(int)
    names = [LONGEST, *(f"class number {i}" for i in range(1, 527))]
    ap[:3], counts[3] = [1.0, np.nan, np.nan], 0
    figure = class_ap(names, ap, counts, tmp_path / "ap.png")
    order = [c for c in np.argsort(-ap) if ap[c] == ap[c]]
    assert drawn_classes(figure) == [(names[c], ap[c], counts[c]) for c in order[:20] + order[-20:]]
    top, bottom = figure.axes[:2]
    np.testing.assert_array_equal([bar.get_height() for bar in top.patches], ap[order])
    np.testing.assert_array_equal(bottom.lines[0].get_ydata(), counts[order])
    assert "485 classes between" in [what for what, _ in drawn_texts(figure)]
    assert_fit_to_print(figure, tmp_path / "ap.png")


def clip(i, n_frames=100, **kwargs):
    features = np.random.default_rng(i).normal(-8, 3, (n_frames, 64))
    names = [LONGEST, "Rain", "Bell", "$x$_1", "W" * 60]
    tags = list(zip(names, np.linspace(1.0, 0.1, 5), strict=True))
    labels = (["Rain", "Church bell"], ["Rain", LONGEST, "Siren"] * 3, [])[i % 3]
    return {"title": f"_clip$_{i}", "features": features, "shift": 0.01, "labels": labels, "tags": tags, **kwargs}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_example_clips_show_features_labels_and_tags(tmp_path, n):
    clips = [clip(i, 50 + 100 * i) for i in range(n)]
    clips[0]["title"] = "long" * 40
    figure = example_clips(clips, tmp_path / "examples.png", "Tagged by the weight average")
    assert any(text.get_text().startswith("Tagged by the weight average\n") for text in figure.texts)
    for one, image, bars in zip(clips, figure.axes[0::2], figure.axes[1::2], strict=False):
        (shown,) = image.images
        np.testing.assert_array_equal(shown.get_array(), one["features"].T)
        assert shown.origin == "lower"
        assert shown.get_extent() == [0, pytest.approx(len(one["features"]) / 100), 0, 64]
        assert shown.get_clim() == figure.axes[0].images[0].get_clim()
        heading = image.get_title(loc="left")
        assert one["title"][:20] in heading
        assert (one["labels"] or ["no label"])[0].split()[0] in heading
        assert [bar.get_width() for bar in bars.patches] == [score for _, score in one["tags"]]
        for (name, score), said, figures in zip(one["tags"], bars.texts[0::2], bars.texts[1::2], strict=True):
            right = name in one["labels"]
            assert name[:40] in said.get_text()
            assert said.get_text().startswith("✓") == right
            assert (said.get_fontweight() == "bold") == right
            assert figures.get_text() == f"{score:.2f}"
    assert_fit_to_print(figure, tmp_path / "examples.png")


@pytest.mark.parametrize("n", [1, 2, 3, 40])
@pytest.mark.parametrize("average", [None, 0.02])
def test_ensemble_curve_is_what_it_is_given(tmp_path, n, average):
    singles, ensembles = np.random.default_rng(n).uniform(0.1, 0.9, (2, n))
    figure = ensemble_curve(singles, ensembles, tmp_path / "ensemble.png", average)
    line, dots, *dashed = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), np.column_stack([np.arange(1, n + 1), ensembles]))
    np.testing.assert_array_equal(dots.get_xydata(), np.column_stack([np.arange(1, n + 1), singles]))
    assert (dots.get_linestyle(), dots.get_marker()) == ("None", "o")
    assert [one.get_ydata()[0] for one in dashed] == ([] if average is None else [average])
    low, high = figure.axes[0].get_ylim()
    values = [*singles, *ensembles, *([] if average is None else [average])]
    assert low < min(values)
    assert max(values) < high
    assert figure.axes[0].get_legend().get_texts()[0].get_text().startswith(f"ensemble: {ensembles[-1]:.3f} with {n} member")
    assert_fit_to_print(figure, tmp_path / "ensemble.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("n_steps", "n_classes"), [(1, 1), (30, 3), (11250, 39)])
def test_a_recordings_panels_share_their_time(tmp_path, n_steps, n_classes):
    rng = np.random.default_rng(0)
    names = [LONGEST, "$x$_1", *(f"class {i}" for i in range(39))][:n_classes]
    timeline = Timeline(0.16 + 0.32 * np.arange(n_steps), rng.uniform(0, 0.5, (n_steps, n_classes)), names, names)
    timeline.scores[n_steps // 2, 0] = 1.0
    n_columns = min(1500, n_steps * 32)
    extremes, energies = rng.uniform(0, 1, (n_columns, 2)) - [1, 0], rng.normal(-8, 3, (n_columns, 64))
    seconds = n_steps * 0.32
    figure = recording(extremes, energies, seconds / n_columns, timeline, tmp_path / "recording.png", "_long$_.wav")
    wave, _, image, _, heat, _ = figure.axes
    scale = 1 if seconds < 300 else 60
    for axes in (wave, image, heat):
        np.testing.assert_allclose(axes.get_xlim(), (0, seconds / scale))
    positions = [axes.get_position() for axes in (wave, image, heat)]
    np.testing.assert_allclose([p.x0 for p in positions], positions[0].x0)
    np.testing.assert_allclose([p.x1 for p in positions], positions[0].x1)
    np.testing.assert_array_equal(image.images[0].get_array(), energies.T)
    shown = heat.images[0].get_array()
    assert len(shown) == min(10, n_classes)
    # the highest score is in the first row, where it was in time, however narrow
    left, right, _, _ = heat.images[0].get_extent()
    where = (shown[0].argmax() + 0.5) / shown.shape[1] * (right - left) * scale
    assert shown[0].max() == 1.0
    assert where == pytest.approx((n_steps // 2 + 0.5) * 0.32, abs=0.32 * 5)
    assert heat.get_yticklabels()[0].get_text()[:20] == names[0][:20]
    assert_fit_to_print(figure, tmp_path / "recording.png")


@pytest.mark.parametrize("n", [0, 13])
def test_a_page_has_one_to_twelve_clips(tmp_path, n):
    with pytest.raises(ValueError, match=f"1 to 12 clips, not {n}"):
        example_clips([clip(i) for i in range(n)], tmp_path / "examples.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), page(tmp_path / "a.png", 1):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_neither_pyplot_nor_global_settings_are_touched(tmp_path):
    code = (
        "import sys, matplotlib, numpy as np; from psla_sb.plots.training import class_ap\n"
        "matplotlib.rcParams['font.size'] = 30; before = matplotlib.rcParams.copy()\n"
        f"figure = class_ap(['a'], [0.5], [3], {str(tmp_path / 'a.png')!r})\n"
        "assert before == matplotlib.rcParams.copy(); assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert figure.axes[0].get_yticklabels()[0].get_fontsize() == 7"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": "", "HOME": str(tmp_path)}, timeout=300)


def test_the_toolkit_imports_matplotlib_only_to_draw():
    code = "import sys, psla_sb.experiment.train; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_pictures_of_a_run(tmp_path, monkeypatch):
    """What each picture is given, by a run's files."""
    soundfile = pytest.importorskip("soundfile")
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary(["/m/1", "/m/2", "/m/3"], ["Bell", "Rain", "Siren"])
    labels, samples = ["/m/1;/m/2", "/m/2", "", "/m/1"] * 10, rng.integers(2000, 9000, 40)
    for i, n in enumerate(samples):
        soundfile.write(tmp_path / f"{i}.wav", rng.uniform(-0.5, 0.5, n), 16000)
    wavs = [str(tmp_path / f"{i}.wav") for i in range(40)]
    manifest = Manifest.from_columns([f"id{i}" for i in range(40)], wavs, [1.0] * 40, labels)
    dataset = TaggingDataset(manifest, manifest.label_sets(vocabulary), 3, n_samples=7000)
    # one clip fewer than there are, as after a debugging run
    ensemble, average = rng.uniform(size=(2, 39, 3)).astype(np.float32)
    (tmp_path / "predictions").mkdir()
    np.save(prediction_path(tmp_path, "test_ensemble"), ensemble)
    np.save(prediction_path(tmp_path, "test_weight_average"), average)
    write_results(tmp_path, {"epochs": epochs(3)})
    fbank = KaldiFbank(n_mels=40, n_frames=60)
    hparams = SimpleNamespace(output_folder=str(tmp_path), sample_rate=16000, modules={"compute_features": fbank})
    calls = {}
    for function in (training_curves, class_ap, example_clips):
        name = function.__name__
        monkeypatch.setattr(
            f"psla_sb.plots.training.{name}", lambda *args, name=name, real=function: calls.update({name: args}) or real(*args)
        )
    brain = SimpleNamespace(device="cpu", hparams=hparams)
    write_pictures(brain, dataset, "test", vocabulary, manifest.label_sets(vocabulary))
    assert calls["training_curves"][0] == epochs(3)
    names, ap, counts, _, title = calls["class_ap"]
    targets = np.array([[mid in row.split(";") for mid in vocabulary.mids] for row in labels[:39]], int)
    np.testing.assert_array_equal(ap, average_precision(ensemble, targets))
    assert (names, counts.tolist()) == (vocabulary.names, [20, 20, 0])
    assert "ensemble" in title
    clips, _, title = calls["example_clips"]
    assert "weights" in title
    assert len(clips) == 12
    rows = [int(one["title"].removeprefix("id")) for one in clips]
    assert rows[0] == 0
    assert rows[-1] == 38
    assert set(np.diff(rows)) == {3, 4}
    for row, one in zip(rows, clips, strict=True):
        wave = torch.from_numpy(soundfile.read(wavs[row], dtype="float32")[0])
        wave = (wave - wave.mean())[:7000]
        np.testing.assert_allclose(one["features"], KaldiFbank(n_mels=40)(wave[None])[0], atol=1e-4)
        assert one["labels"] == [vocabulary.names[c] for c in np.flatnonzero(targets[row])]
        scores = dict(zip(vocabulary.names, average[row].tolist(), strict=True))
        assert one["tags"] == sorted(scores.items(), key=lambda tag: -tag[1])
    for name in ("training_curves", "class_ap", "examples"):
        assert matplotlib.image.imread(tmp_path / "plots" / f"{name}.png").shape[1] == PAGE_WIDTH * DPI


def test_a_run_writes_its_pictures(tiny_run):
    folder, results, _ = tiny_run
    assert len(results["epochs"]) == 2
    for name in ("training_curves", "class_ap", "examples"):
        assert matplotlib.image.imread(folder / "plots" / f"{name}.png").shape[1] == PAGE_WIDTH * DPI


@pytest.mark.parametrize("n", [0, 1, 60])
def test_label_changes_shows_the_classes_with_most_additions(tmp_path, n):
    rng = np.random.default_rng(0)
    names, before = [f"{LONGEST} {i}" for i in range(70)], rng.integers(0, 10**6, 70)
    added = np.where(np.arange(70) < n, rng.permutation(70) + 1, 0)
    figure = label_changes(names, before, before + added, tmp_path / "labels.png", "Labels of train.csv")
    assert_fit_to_print(figure, tmp_path / "labels.png")
    bars = [bar.get_width() for bar in figure.axes[0].patches]
    assert bars == sorted(added[:n], reverse=True)[:40]
    assert figure.get_suptitle().splitlines()[1] == f"{before.sum():,} labels before, {added.sum():,} added, to {n} of 70 classes"
    assert ("the other 20 got" in figure.get_suptitle()) == (n == 60)


def test_label_changes_of_a_class_that_was_on_no_clip(tmp_path):
    figure = label_changes(["Bell", "Rain"], [0, 5], [2, 5], tmp_path / "labels.png")
    assert_fit_to_print(figure, tmp_path / "labels.png")
    assert [text.get_text() for text in figure.axes[1].texts] == ["new"]


def ablated(group, name, mean, each, interval, published=None):
    difference = {"mean": mean, "each": each, "interval": interval, "seeds": list(range(len(each)))}
    return {"group": group, "name": name, "difference": difference, "published_difference": published}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n_seeds", [1, 2, 3])
def test_ablation_draws_differences_intervals_and_published_ones(tmp_path, n_seeds):
    rng = np.random.default_rng(n_seeds)
    groups = ["off"] * 6 + ["alone"] * 5 + ["varied"] * 3 + ["aggregation"] * 2
    entries = [{"group": "full", "name": "full", "difference": None, "published_difference": None}]
    for i, group in enumerate(groups):
        mean, half = rng.normal(0, 0.03), 0.04 if i else 3
        each, interval = [mean] * n_seeds, [mean - half, mean + half] if n_seeds > 1 else None
        name = "key=" + "$x_1$" * 12 if i == 12 else f"variant {i}"
        entries.append(ablated(group, name, mean, each, interval, -0.004 if i in (4, 15) else None))
    figure = ablation(entries, tmp_path / "ablation.png", "last epoch", "published for full AudioSet")
    assert_fit_to_print(figure, tmp_path / "ablation.png")
    (axes,) = figure.axes
    drawn = {
        line.get_ydata()[0]: line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1
    }
    rows = {label.get_text(): place for label, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)}
    assert len(rows) == len(drawn) == len(groups)
    for entry in entries[1:]:
        assert drawn[rows[shorten(entry["name"], 36)]] == entry["difference"]["mean"]
    hollow = [line for line in axes.lines if line.get_marker() == "D" and len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in hollow] == [-0.004] * 2
    # the interval of the first goes beyond the picture, which says so with two arrows, and does not shrink the others
    arrows = [line.get_marker() for line in axes.lines if line.get_marker() in ("<", ">")]
    assert arrows == ["<", ">"] * (n_seeds > 1)
    assert np.ptp(axes.get_xlim()) < 0.5
    texts = [what for what, _ in drawn_texts(figure)]
    assert ("each seed" in texts) == (n_seeds > 1)
    assert f"mean of {n_seeds} seeds, 95 % interval" in texts or n_seeds == 1
