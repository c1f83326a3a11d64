"""Clips that are segments of recordings, by the column `start` of annotations: read, cropped, packed, scored, told apart."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from sounds import FORMATS, LOSSLESS, encoded
from speechbrain.dataio.dataset import DynamicItemDataset

from psla_sb.dataio import decoders
from psla_sb.dataio.audio import AudioError, as_floats, read_audio, read_samples
from psla_sb.dataio.dataset import TaggingDataset, clip_loader
from psla_sb.dataio.loudness import some_loudness
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import Draw
from psla_sb.errors import InputError
from psla_sb.labels.label_sets import LabelSets
from psla_sb.prepare import segments
from psla_sb.prepare.packing import pack

RATE = 16000
NOISE = (0.1 * np.random.default_rng(0).standard_normal(4 * RATE)).astype(np.float32)


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "recording.wav"
    soundfile.write(path, NOISE, RATE)
    return path


def annotation(recording, starts, seconds, **kwargs):
    n = len(starts)
    return Manifest.from_columns([f"c{i}" for i in range(n)], [str(recording)] * n, seconds, ["a"] * n, starts, **kwargs)


def dataset(manifest, **kwargs):
    return TaggingDataset(manifest, LabelSets.from_lists([[0]] * len(manifest)), 1, **kwargs)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_segment_is_what_the_whole_file_has_there(name, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(
        encoded(name, NOISE, rate=8000 if name == "amr" else 48000 if name in ("opus", "webm", "mov", "ac3") else 16000)
    )
    (rate, *_), pieces = zip(*decoders.decoded(path, str(path), 600.0), strict=True)
    (segment_rate, *_), parts = zip(*decoders.decoded_segment(path, str(path), 0.5, 0.25), strict=True)
    whole, part = as_floats(torch.cat(pieces)), as_floats(torch.cat(parts))
    assert segment_rate == rate
    assert part.shape == (round(0.25 * rate), whole.shape[1])
    assert torch.equal(part, whole[round(0.5 * rate) :][: len(part)])


@pytest.mark.parametrize("options", [{"format": "FLAC", "subtype": "PCM_24"}, {"format": "WAV", "subtype": "FLOAT"}])
def test_other_samples(options, tmp_path):
    soundfile.write(tmp_path / "a", NOISE, RATE, **options)
    assert torch.equal(read_audio(tmp_path / "a", RATE, 1.0, 0.5), read_audio(tmp_path / "a", RATE)[RATE : RATE + RATE // 2])


@pytest.mark.parametrize("name", ["flac", "wav", "aiff"])
def test_what_can_be_sought_in_is_not_decoded_from_its_beginning(name, tmp_path, monkeypatch):
    assert name in LOSSLESS
    (tmp_path / "a").write_bytes(encoded(name, NOISE, rate=RATE))
    expected = read_audio(tmp_path / "a", RATE)[2 * RATE :]
    monkeypatch.setattr(decoders, "decoded", lambda *args: pytest.fail("all of it is decoded"))
    assert torch.equal(read_audio(tmp_path / "a", RATE, 2.0), expected)


def test_it_is_resampled_as_a_file_of_its_own_is(recording):
    cut = io.BytesIO()
    soundfile.write(cut, NOISE[RATE : 2 * RATE], RATE, format="WAV")
    assert torch.equal(read_audio(recording, 8000, 1.0, 1.0), read_audio(io.BytesIO(cut.getvalue()), 8000))


def test_dataset_and_loader_read_segments(recording):
    whole = read_audio(recording, RATE)
    manifest = annotation(recording, [None, 0.0, 1.5, 3.0], [4.0, 1.0, 0.25, None])
    expected = [whole, whole[:RATE], whole[24000:28000], whole[48000:]]
    (batch,) = clip_loader(manifest, RATE, None, [range(4)])
    for row, (item, wave) in enumerate(zip(dataset(manifest), expected, strict=True)):
        assert item["error"] is None
        torch.testing.assert_close(item["sig"], wave - wave.mean(), rtol=0, atol=1e-6)
        assert torch.equal(batch.sig.data[row, : len(wave)], item["sig"])


@pytest.mark.parametrize("crop", ["first", "centre", "random"])
def test_crops_are_within_the_segment(crop, recording):
    n_samples = RATE // 100
    clips = dataset(annotation(recording, [1.0], [0.5]), n_samples=n_samples, crop=crop)
    segment = read_audio(recording, RATE, 1.0, 0.5)
    segment = segment - segment.mean()
    windows = segment.unfold(0, n_samples, 1)
    found = set()
    for epoch in range(8):
        distances = (windows - clips[Draw(0, epoch, 0, False)]["sig"]).abs().amax(dim=1)
        assert distances.min() < 1e-6
        found.add(distances.argmin().item())
    n_places = len(windows)
    assert found == {"first": {0}, "centre": {n_places // 2}}.get(crop, found)
    assert len(found) == (1 if crop != "random" else 8)


@pytest.mark.parametrize(
    ("start", "seconds", "said"), [(3.5, 1.0, r"only 0\.50 s are"), (9.0, 1.0, "there are no"), (9.0, None, "no")]
)
@pytest.mark.parametrize("name", ["wav", "vorbis"])
def test_a_segment_beyond_the_end_is_an_error(name, start, seconds, said, tmp_path):
    (tmp_path / "a.x").write_bytes(encoded(name, NOISE, rate=RATE))
    item = dataset(annotation(tmp_path / "a.x", [start], [seconds]))[0]
    assert f"a.x: it ends early for its segment from {start:.2f} s" in item["error"]
    with pytest.raises(AudioError, match=said):
        read_samples(tmp_path / "a.x", RATE, start=start, seconds=seconds)


def test_an_end_that_was_rounded_is_none(recording):
    assert len(read_audio(recording, RATE, 3.0, 1.049)) == RATE


def test_the_csv_keeps_starts(recording, tmp_path):
    manifest = annotation(recording, [None, 0.0, 1.25], [4.0, 1.0, None])
    manifest.to_csv(tmp_path / "a.csv")
    again = Manifest.from_csv(tmp_path / "a.csv")
    assert [clip["start"] for clip in again] == [None, 0.0, 1.25]
    assert again.table["start"].equals(manifest.table["start"])
    theirs = DynamicItemDataset.from_csv(str(tmp_path / "a.csv"), output_keys=["id", "start", "duration"])
    assert [(item["id"], float(item["start"])) for item in theirs][1:] == [("c1", 0.0), ("c2", 1.25)]
    empty = tmp_path / "b.csv"
    empty.write_text("ID,wav,duration,labels,start\na,a.wav,1,x,\n")
    assert not Manifest.from_csv(empty).has_segments
    assert "start" not in Manifest.from_csv(empty)[0]


@pytest.mark.parametrize(("starts", "seconds", "said"), [([-1.0], [1.0], "'start' is -1 s"), ([1.0], [0.0], "'duration' is 0 s")])
def test_segments_that_cannot_be(starts, seconds, said, recording):
    with pytest.raises(InputError, match=rf"x\.csv, clip 'c0': {said}"):
        annotation(recording, starts, seconds, source="x.csv")


def test_digests_tell_segments_apart(recording):
    one, other, longer = (annotation(recording, [start], [seconds]) for start, seconds in ((0.5, 1.0), (1.0, 1.0), (0.5, 2.0)))
    whole = Manifest.from_columns(["c0"], [str(recording)], [1.0], ["a"])
    assert len({manifest.digest() for manifest in (one, other, longer, whole)}) == 4
    assert len({manifest.digest(("ID",)) for manifest in (one, other, longer, whole)}) == 1
    assert len({str(manifest.places()) for manifest in (one, other, whole)}) == 3


def test_loudness_is_that_of_the_segment(tmp_path):
    path = tmp_path / "steps.wav"
    soundfile.write(path, np.repeat([0.1, 0.001], RATE), RATE)
    levels = [clip["loudness"] for clip in some_loudness(annotation(path, [0.0, 1.0], [1.0, 1.0])).values()]
    assert levels == [[-20, -20], [-57, -57]]


def test_psla_json_cannot_say_it(recording, tmp_path):
    with pytest.raises(InputError, match="pack them first"):
        annotation(recording, [1.0], [1.0]).to_psla_json(tmp_path / "a.json")


def test_the_list_of_enhanced_clips_says_where_they_are(recording):
    from psla_sb.labels.report import clip_table
    from psla_sb.labels.vocabulary import Vocabulary

    before, after = LabelSets.from_lists([[0], [0]]), LabelSets.from_lists([[0], [0, 1]])
    listed = clip_table(annotation(recording, [0.5, 1.5], [1.0, 1.0]), before, after, Vocabulary(["a", "b"], ["a", "b"]))
    assert listed["start"].to_pylist() == [1.5]


def test_the_example_of_an_evaluation_is_a_segment(recording, monkeypatch):
    from psla_sb.experiment import evaluation
    from psla_sb.inference.tagger import Tag
    from psla_sb.labels.vocabulary import Vocabulary

    heard = []

    class Tagger:
        def tag_file(self, source, sample_rate):
            heard.append((source, sample_rate))
            return [Tag("A", "a", 0.5)]

    monkeypatch.setattr(evaluation, "in_memory", lambda *args: None)
    monkeypatch.setattr(evaluation, "trust_options", lambda folder: "")
    monkeypatch.setattr(evaluation.AudioTagger, "from_source", lambda *args, **kwargs: Tagger())
    brain = SimpleNamespace(hparams=SimpleNamespace(output_folder=recording.parent), device="cpu")
    said = evaluation.example(brain, dataset(annotation(recording, [1.25], [0.5])), Vocabulary(["a"], ["A"]))
    assert torch.equal(heard[0][0], read_audio(recording, RATE, 1.25, 0.5))
    assert heard[0][1] == RATE
    assert said.startswith(f"An example, {recording}, from 1.25 s on\n")
    evaluation.example(brain, dataset(annotation(recording, [None], [0.5])), Vocabulary(["a"], ["A"]))
    assert heard[1][0] == str(recording)


def test_packs_have_the_segments_alone(recording, tmp_path, monkeypatch):
    stereo = tmp_path / "b.wav"
    soundfile.write(stereo, np.stack([NOISE, -NOISE / 2], 1), RATE, subtype="FLOAT")
    wavs = [str(recording)] * 3 + [str(stereo)]
    manifest = Manifest.from_columns(list("abcd"), wavs, [4.0, 1.0, 0.5, 0.5], ["x"] * 4, [None, 0.0, 2.0, 1.0])
    manifest.to_csv(tmp_path / "train.csv")
    packed = pack(tmp_path / "train.csv", tmp_path / "packs")
    clips = Manifest.from_csv(packed, tmp_path / "packs")
    assert not clips.has_segments
    assert packed.read_text().splitlines()[0] == '"ID","wav","duration","labels"'
    for ours, theirs in zip(dataset(clips), dataset(manifest), strict=True):
        assert ours["error"] is theirs["error"] is None
        torch.testing.assert_close(ours["sig"], theirs["sig"], rtol=0, atol=2**-22)
    # the whole file as it is, a half second in FLAC
    packs = list((tmp_path / "packs").glob("*.tar"))
    assert sum(path.stat().st_size for path in packs) < recording.stat().st_size + 2.6 * RATE * 2 + 20_000
    assert not [path for path in (tmp_path / "packs").iterdir() if path.name.startswith("tmp+")]
    written = packs[0].stat().st_mtime_ns
    pack(tmp_path / "train.csv", tmp_path / "packs")
    assert packs[0].stat().st_mtime_ns == written


def test_a_segment_that_cannot_be_packed(recording, tmp_path):
    annotation(recording, [9.0], [1.0]).to_csv(tmp_path / "train.csv")
    with pytest.raises(AudioError, match=r"recording\.wav: it ends early for its segment from 9\.00 s"):
        pack(tmp_path / "train.csv", tmp_path / "packs")
    annotation(tmp_path / "gone.wav", [9.0], [1.0]).to_csv(tmp_path / "train.csv")
    with pytest.raises(InputError, match="1 of the 1 clips cannot be packed"):
        pack(tmp_path / "train.csv", tmp_path / "packs")
    assert not list((tmp_path / "packs").glob("tmp+*"))


def test_full_scale_is_not_turned_over():
    samples = torch.tensor([[1.5], [-1.5], [0.25]])
    decoded, _ = soundfile.read(io.BytesIO(segments.encoded(RATE, samples)))
    np.testing.assert_allclose(decoded, [1.0, -1.0, 0.25], atol=1e-6)


def test_scores_are_of_the_segments(lively_runs, tmp_path):
    from psla_sb.aggregation.scoring import score
    from psla_sb.labels.vocabulary import Vocabulary

    run = lively_runs / "a"
    vocabulary = Vocabulary.from_csv(run / "class_labels_indices.csv")
    sweep = np.sin(np.cumsum(np.linspace(0.05, 2.5, 2 * RATE))).astype(np.float32) / 2
    soundfile.write(tmp_path / "sweep.wav", sweep, RATE)
    cuts = []
    for i, start in enumerate((0.0, 1.5)):
        cuts.append(str(tmp_path / f"{i}.wav"))
        soundfile.write(cuts[-1], sweep[round(start * RATE) :][: RATE // 2], RATE)
    member = {"a": run / "snapshots" / "epoch_01.safetensors"}
    clips = annotation(tmp_path / "sweep.wav", [0.0, 1.5], [0.5, 0.5])
    of_files = Manifest.from_columns(["c0", "c1"], cuts, [0.5, 0.5], ["a", "a"])
    scored = [np.array(score(member, c, vocabulary, tmp_path / name)["a"]) for c, name in ((clips, "x"), (of_files, "y"))]
    np.testing.assert_allclose(*scored, rtol=0, atol=1e-4)
    assert np.abs(scored[0][0] - scored[0][1]).max() > 1e-3
    # scores of other segments under the same IDs are not taken for these
    other = np.array(score(member, annotation(tmp_path / "sweep.wav", [1.5, 0.0], [0.5, 0.5]), vocabulary, tmp_path / "x")["a"])
    np.testing.assert_allclose(other, scored[0][::-1], rtol=0, atol=1e-4)


def test_other_times_in_the_same_file_are_other_sounds(tmp_path):
    (tmp_path / "a.wav").touch()
    states = set()
    for starts, seconds in (([0.0, 1.0], [1.0, 1.0]), ([0.0, 1.5], [1.0, 1.0]), ([0.0, 1.0], [1.0, 0.5])):
        clips = Manifest.from_columns(["x", "y"], [str(tmp_path / "a.wav")] * 2, seconds, ["a", "b"], starts=starts)
        states.add(clips.state_of_files())
    assert len(states) == 3
