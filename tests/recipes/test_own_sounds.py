"""The whole way of somebody's own sounds: folder -> psla-prepare -> psla-fit -> report -> psla-tag, through the commands."""

import csv
import json
import sys

import numpy as np
import pytest
import soundfile

from runs import rows_by_file, run

RATE = 16000
TONES = {"hum": 150, "whistle": 2500, "beep": 900}
SMALL = {
    **{"device": "cpu", "pretrained": "null", "embedding_model": "{width: 0.2, depth: 0.2}", "num_workers": 0},
    **{"n_mels": 32, "freq_mask": 4, "batch_size": 4, "draws_per_epoch": 32, "number_of_epochs": 3},
}
SOURCE = "import sys\nfrom psla_sb.cli.{command} import {command}\n{command}(sys.argv[1:])\n"


def command(tmp_path, name, *arguments, check=True):
    script = tmp_path / f"{name}.py"
    script.write_text(SOURCE.format(command=name))
    return run([sys.executable, script, *arguments], check=check)


def tone(labels, rng, seconds=0.6):
    times = np.arange(int(seconds * RATE)) / RATE
    waves = [np.sin(2 * np.pi * TONES[label] * rng.uniform(0.8, 1.25) * times + rng.uniform(0, 6)) for label in labels]
    return 0.2 * sum(waves) + 0.02 * rng.standard_normal(len(times))


def folders(root):
    """A folder for each class."""
    rng = np.random.default_rng(1)
    for label in TONES:
        (root / label).mkdir(parents=True)
        for i in range(14):
            soundfile.write(root / label / f"{label} {i}.wav", tone([label], rng), RATE)
    return root


def messy_table(root):
    """Several labels a clip, in a CSV file as a spreadsheet in Germany writes it: semicolons, Latin-1, other names."""
    rng = np.random.default_rng(2)
    (root / "Töne").mkdir(parents=True)
    rows = [["Nr", "Datei", "Tags", "Anmerkung"]]
    names = list(TONES)
    for i in range(42):
        labels = [names[i % 3]] + ([names[(i + 1) % 3]] if i % 4 == 0 else [])
        soundfile.write(root / "Töne" / f"Ton{i}.wav", tone(labels, rng), RATE)
        rows.append([i, f"Ton{i}", "|".join(labels), "gehört; früh"])
    with open(root / "Liste.csv", "w", newline="", encoding="latin-1") as file:
        csv.writer(file, delimiter=";").writerows(rows)
    return root / "Liste.csv"


def label_tracks(root):
    """Recordings with Audacity's label tracks: each segment is a clip, and nothing is copied."""
    rng = np.random.default_rng(3)
    root.mkdir()
    for i in range(8):
        order = rng.permutation([*TONES, *TONES])
        soundfile.write(root / f"recording{i}.wav", np.concatenate([tone([label], rng) for label in order]), RATE)
        lines = [f"{0.6 * k:.6f}\t{0.6 * (k + 1):.6f}\t{label}" for k, label in enumerate(order)]
        (root / f"recording{i}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize(
    ("source", "single", "options"),
    [(folders, True, []), (messy_table, False, ["--label-separator", "|"]), (label_tracks, True, [])],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_from_a_folder_to_tags(tmp_path, source, single, options):
    data = tmp_path / "data"
    prepared = command(tmp_path, "prepare", source(tmp_path / "sounds"), "--out", data, *options)
    assert f"psla-fit {data}" in prepared.stdout
    known = json.loads((data / "prepared.json").read_text())
    assert known["single_label"] == single
    assert known["n_classes"] == 3
    assert sum(known["clips"].values()) == (48 if source is label_tracks else 42)
    has_starts = "start" in (data / "train.csv").read_text().splitlines()[0]
    assert has_starts == (source is label_tracks)

    fitted = command(tmp_path, "fit", data, *(f"--{key}={value}" for key, value in SMALL.items()))
    assert ("each clip has one label" in fitted.stdout) == single
    found = json.loads((data / "run" / "results.json").read_text())
    # the tones differ, and so do the clips: what is learnt of some is right of others
    assert found["evaluation"]["weight_average"]["mAP"] > found["evaluation"]["chance"]["mAP"]
    assert found["baseline"]["mAP"] > 0.9
    report = (data / "run" / "report.html").read_text()
    assert all(label in report for label in TONES)
    assert "data:audio" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    thresholds = json.loads((data / "run" / "tagger" / "calibration.json").read_text())
    assert thresholds

    new = tmp_path / "new recording.wav"
    soundfile.write(new, tone(["whistle"], np.random.default_rng(9)), RATE)
    tagged = command(tmp_path, "tag", "--model", data / "run" / "tagger", "--format", "json", new)
    ((name, tags),) = rows_by_file(tagged.stdout).items()
    assert name == str(new)
    assert {tag["label"] for tag in tags} == set(TONES)
    assert all(isinstance(tag["decision"], bool) for tag in tags)
    said = "\n".join([prepared.stdout, prepared.stderr, fitted.stdout, fitted.stderr, report])
    assert "ontology" not in said.lower()
    if single:
        assert sum(tag["score"] for tag in tags) == pytest.approx(1, abs=1e-4)
