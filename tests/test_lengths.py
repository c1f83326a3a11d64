"""Recordings of any length: one rule on every path, in little memory, and clips that do not hear their neighbours."""

import io
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from psla_sb import demo
from psla_sb.checkpoints.definitions import read_yaml
from psla_sb.dataio.windows import covering
from psla_sb.experiment.brain import TaggingBrain
from psla_sb.inference.tagger import AudioTagger
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.features import GlobalNorm, KaldiFbank
from psla_sb.lobes.pooling import AttentionPooling
from stubs import band_tagger

RATE = 16000


@pytest.fixture(scope="module")
def long_wave():
    """Low noise for 25 s, then 3 s of high noise."""

    def noise(lowest, highest, seconds):
        spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=seconds * RATE))
        hertz = np.linspace(0, RATE / 2, len(spectrum))
        wave = np.fft.irfft(spectrum * ((hertz >= lowest) & (hertz < highest)))
        return 0.1 * wave / wave.std()

    return np.concatenate([noise(50, 1500, 25), noise(2500, 8000, 3)]).astype(np.float32)


@pytest.mark.parametrize("n_frames", [998, 400, None])
def test_a_long_recording_is_heard_whole_by_every_way(n_frames, long_wave, tmp_path):
    tagger = band_tagger(n_frames)
    path = tmp_path / "long.wav"
    soundfile.write(path, long_wave, RATE, subtype="FLOAT")
    window = tagger.window
    assert window == (160_000 if n_frames is None else tagger.n_samples)
    starts = [*range(0, len(long_wave) - window, window - window // 2), len(long_wave) - window]
    pieces = torch.from_numpy(np.stack([long_wave[start : start + window] for start in starts]))
    each = tagger.tag_features(*tagger.features_and_lens(pieces))
    for pool, expected in {"max": each.amax(0), "mean": each.mean(0), "first": each[0]}.items():
        ways = {
            "file": tagger.tag_file(path, pool=pool),
            "file object": tagger.tag_file(io.BytesIO(path.read_bytes()), pool=pool),
            "array": tagger.tag_file(long_wave, pool=pool, sample_rate=RATE),
            "16 bits": tagger.tag_file((long_wave * 2**15).round().astype(np.int16), pool=pool, sample_rate=RATE),
            "batch": tagger.tag_batch(torch.from_numpy(long_wave), pool=pool)[0],
            "files": next(iter(tagger.tag_files([path], pool=pool))).tags,
            "workers": next(iter(tagger.tag_files([path], pool=pool, num_workers=1))).tags,
            "file objects": next(iter(tagger.tag_files([path.open("rb")], pool=pool, num_workers=1))).tags,
            "arrays": next(iter(tagger.tag_files([long_wave], pool=pool, sample_rate=RATE))).tags,
        }
        for way, tags in ways.items():
            found = {tag.label: tag.score for tag in tags}
            np.testing.assert_allclose([found["Low"], found["High"]], expected, atol=2e-4, err_msg=f"{way}, {pool}")
        assert tagger.score_batch(torch.from_numpy(long_wave), pool=pool).shape == (1, 2)
    assert demo.listen(tagger, path).tags == tagger.tag_file(path)
    # the end has what the beginning has not
    assert each.amax(0)[1] > 5 * each[0][1]
    with pytest.raises(ValueError, match="pool must be one of max, mean, first, not 'last'"):
        tagger.tag_file(path, pool="last")


def test_short_and_long_files_in_their_order(long_wave, tmp_path):
    tagger = band_tagger(400)
    lengths = [RATE, 28 * RATE, RATE // 2, 8 * RATE, 4 * RATE]
    for i, length in enumerate(lengths):
        soundfile.write(tmp_path / f"{i}.wav", long_wave[-length:], RATE)
    paths = [tmp_path / f"{i}.wav" for i in range(len(lengths))] + [tmp_path / "none.wav"]
    for workers in (0, 2):
        found = list(tagger.tag_files(paths, batch_size=2, num_workers=workers))
        assert [one.path for one in found] == [str(path) for path in paths]
        assert found.pop().error == f"{tmp_path / 'none.wav'}: no such file"
        for one, path in zip(found, paths, strict=False):
            np.testing.assert_allclose([tag.score for tag in one.tags], [tag.score for tag in tagger.tag_file(path)], atol=1e-5)


def test_files_file_objects_and_arrays_together(long_wave, tmp_path):
    tagger = band_tagger(400)
    short, path = long_wave[-3 * RATE :], tmp_path / "short.wav"
    soundfile.write(path, short, RATE, subtype="FLOAT")
    sounds = [path, path.open("rb"), io.BytesIO(path.read_bytes()), short, torch.from_numpy(short), short.tolist(), long_wave]
    sounds += [np.zeros(0), path.open(encoding="latin-1"), io.BytesIO(b"no sound")]
    found = list(tagger.tag_files(sounds, batch_size=4, num_workers=2, sample_rate=RATE))
    expected = tagger.tag_file(path)
    for one in found[:6]:
        assert [tag.label for tag in one.tags] == [tag.label for tag in expected]
        np.testing.assert_allclose([tag.score for tag in one.tags], [tag.score for tag in expected], atol=1e-5)
    assert found[6].tags == tagger.tag_file(long_wave, sample_rate=RATE)
    assert [one.path for one in found[:4]] == [str(path), str(path), "the sound", "the sound"]
    assert [one.tags for one in found[7:]] == [None] * 3
    for one, error in zip(found[7:], ["an array of sound is", "must be open for reading bytes", "the sound: "], strict=True):
        assert error in one.error
    with pytest.raises(ValueError, match="needs sample_rate="):
        list(tagger.tag_files([path, short]))
    maps = [tagger.encode_file(sound, rate) for sound, rate in ((path, None), (path.open("rb"), None), (short, RATE))]
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], atol=1e-5, rtol=0)


def test_padded_long_waveforms_have_their_own_lengths(long_wave):
    tagger = band_tagger(400)
    wavs = torch.zeros(2, len(long_wave))
    wavs[0], wavs[1, :RATE] = torch.from_numpy(long_wave), torch.from_numpy(long_wave[:RATE])
    both = tagger.score_batch(wavs, torch.tensor([1.0, RATE / len(long_wave)]))
    torch.testing.assert_close(both[0], tagger.score_batch(wavs[0])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1], tagger.score_batch(wavs[1, :RATE])[0], atol=1e-5, rtol=0)


def test_covering():
    for n_samples in (1, 9, 10, 11, 15, 16, 34, 35, 36):
        signal = torch.arange(n_samples)
        found = list(covering(signal.split(4), 10, 5))
        starts = [0] if n_samples <= 10 else [*range(0, n_samples - 10, 5), n_samples - 10]
        assert [piece.tolist() for piece in found] == [signal[start : start + 10].tolist() for start in starts]


@pytest.fixture(scope="module")
def any_length():
    """A tagger with squeeze-excite and attention that takes clips of any length."""
    torch.manual_seed(0)
    encoder = EfficientNetEncoder("b0", width=0.5, depth=0.5, norm_momentum=0.5)
    parts = (KaldiFbank(n_mels=64), GlobalNorm(), encoder, AttentionPooling(640, 2, 2))
    with torch.no_grad():
        for _ in range(6):
            # statistics with which activations neither vanish nor explode
            encoder(parts[1](parts[0](0.1 * torch.randn(4, RATE))))
    stub = band_tagger()
    modules = dict(zip(AudioTagger.MODULES_NEEDED, parts, strict=True))
    with torch.no_grad():
        for conv in (*parts[3].att, *parts[3].cla):
            conv.weight.mul_(20)
    return AudioTagger(modules, vars(stub.hparams), run_opts={"device": "cpu"})


def test_a_clip_does_not_hear_its_neighbours(any_length):
    rng = np.random.default_rng(0)
    waves = [torch.from_numpy(rng.normal(0, 0.1, n).astype(np.float32)) for n in (8000, 30_000, 8000, 64_000, 20_001)]
    lengths = torch.tensor([len(wave) for wave in waves])
    padded = nn.utils.rnn.pad_sequence(waves, batch_first=True)
    alone = torch.cat([any_length.score_batch(wave) for wave in waves])
    torch.testing.assert_close(any_length.score_batch(padded, lengths / lengths.max()), alone, atol=1e-5, rtol=0)
    # padding would have been heard
    together = any_length.tag_features(*any_length.features_and_lens(padded, lengths / lengths.max()))
    assert (together - alone).abs().max() > 1e-3
    modules = dict(any_length.mods)
    brain = TaggingBrain(modules, hparams={"modules": modules, "seed": 1, "n_classes": 2}, run_opts={"device": "cpu"})
    brain.modules.eval()
    with torch.no_grad():
        scores = brain.scores(padded, lengths / lengths.max())
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)


def test_tag_batch_and_the_other_names(any_length, long_wave):
    wavs = torch.from_numpy(long_wave[: 2 * RATE]).reshape(2, RATE)
    scores = any_length.score_batch(wavs)
    for row, tags in zip(scores, any_length.tag_batch(wavs), strict=True):
        assert [tag.score for tag in tags] == sorted(row.tolist(), reverse=True)
    assert any_length.labels == ["Low", "High"]
    assert any_length.tag_batch(wavs, top_k=1, threshold=2.0) == [[], []]
    with pytest.raises(ValueError, match="sample_rate="):
        any_length.tag_file(long_wave)


@pytest.mark.parametrize("shape", [(16000, 1), (16000, 2), (300, 6)])
def test_waveforms_the_wrong_way_round(any_length, shape):
    with pytest.raises(ValueError, match=r"looks like \[samples, channels\]"):
        any_length.tag_batch(torch.zeros(shape))


def test_tensors_of_integers_scale(any_length, long_wave):
    with pytest.raises(ValueError, match=r"far outside of \[-1, 1\].*divide"):
        any_length.tag_batch(torch.from_numpy(long_wave[:RATE] * 2**15))


def test_device_beside_run_opts(tiny_run):
    for tagger in (
        AudioTagger.from_folder(tiny_run[0] / "tagger", device="cpu"),
        AudioTagger.from_hparams(source=tiny_run[0] / "tagger", device="cpu"),
        AudioTagger.from_experiment(tiny_run[0], device="cpu"),
    ):
        assert tagger.device == "cpu"


def test_a_taggers_folder_records_its_crop(tiny_run):
    assert read_yaml(tiny_run[0] / "tagger" / "hyperparams.yaml")["eval_crop"] == "first"


@pytest.mark.slow
def test_three_hours_in_less_than_a_gigabyte(tmp_path):
    """44.1 kHz, stereo; the largest size of the process, from its start, with all that is imported."""
    path = tmp_path / "long.wav"
    piece = np.random.default_rng(0).integers(-9000, 9000, (44100 * 60, 2)).astype(np.int16)
    with soundfile.SoundFile(path, "w", 44100, 2, "PCM_16") as file:
        for _ in range(180):
            file.write(piece)
    program = f"""
        import re, sys
        sys.path.insert(0, {str(path.parent)!r})
        from stubs import band_tagger
        tags = band_tagger().tag_file({str(path)!r})
        assert len(tags) == 2
        # not getrusage, which counts what the process was before it became this program
        print(re.search("VmHWM: *([0-9]+)", open("/proc/self/status").read().replace("\\t", " "))[1])
    """
    environment = {"PYTHONPATH": str(__import__("pathlib").Path(__file__).parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment, check=True
    )
    assert int(done.stdout.split()[-1]) < 1_000_000
