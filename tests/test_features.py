"""Features against torchaudio's per-clip Kaldi code, and against figures of the published PSLA code."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.compliance.kaldi import fbank

from psla_sb.lobes.features import (
    GlobalNorm,
    KaldiFbank,
    _float32_matmul,
    full_float32,
    n_frames_of,
    n_samples_for,
    remove_mean,
    true_lengths,
)

# [::37, ::5] of the published code's features of published_clip(0) and (1), of these its rows 0, 2, 4, 8 and columns 0, 11, 25
PUBLISHED = [
    [
        [-1.2250195741653442, 0.05693862959742546, 0.9802808165550232],
        [-0.9488304853439331, -0.03230658173561096, 0.9991556406021118],
        [-1.1470417976379395, -0.09134908020496368, 1.0025714635849],
        [-1.155713438987732, -0.32864826917648315, 0.9528833627700806],
    ],
    [
        [-0.17652949690818787, 0.4440319836139679, 1.624019980430603],
        [-1.1649365425109863, 0.9042755365371704, 1.768513560295105],
        [-0.4901329576969147, 0.6503206491470337, 1.3665441274642944],
        [-1.3255517482757568, 0.330375611782074, 1.6372981071472168],
    ],
]


def published_clip(i):
    """A chirp in noise with an offset, quantised to 16 bits: `[samples]` float32."""
    seconds, amplitude = [(10.0, 0.1), (3.21, 0.5)][i]
    n = int(seconds * 16000)
    t = np.arange(n) / 16000
    noise = np.random.default_rng(100 + i).standard_normal(n)
    chirp = np.sin(2 * np.pi * (200 + 300 * i) * t * (1 + 0.1 * t / seconds))
    wave = amplitude * (0.5 * noise * 0.3 + chirp) + 0.01 * i
    return torch.from_numpy(np.round(wave * 32767).astype("float32") / 32768)


def clip(n_samples, seed=0, scale=0.1, offset=0.0):
    return scale * torch.randn(n_samples, generator=torch.Generator().manual_seed(seed)) + offset


def torchaudio_fbank(wav, sample_rate=16000, n_mels=128):
    return fbank(
        (wav - wav.mean())[None],
        htk_compat=True,
        sample_frequency=sample_rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=n_mels,
        dither=0.0,
        frame_shift=10,
    )


def padded(wavs, filling=0.0):
    width = max(len(wav) for wav in wavs)
    batch = torch.full((len(wavs), width), filling)
    for row, wav in zip(batch, wavs, strict=True):
        row[: len(wav)] = wav
    return batch, torch.tensor([len(wav) / width for wav in wavs])


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(400, 6000), min_size=1, max_size=4),
    scale=st.sampled_from([1e-3, 0.1, 1.0]),
    offset=st.sampled_from([0.0, -0.5]),
)
def test_every_clip_of_a_padded_batch_is_what_torchaudio_gives(lengths, scale, offset):
    wavs = [clip(n, seed, scale, offset) for seed, n in enumerate(lengths)]
    feats = KaldiFbank()(*padded(wavs, filling=7.0))
    assert feats.shape == (len(wavs), n_frames_of(max(lengths)), 128)
    for row, wav in zip(feats, wavs, strict=True):
        expected = torchaudio_fbank(wav)
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-3, rtol=0)
        assert (row[len(expected) :] == 0).all()


@pytest.mark.parametrize(("sample_rate", "n_mels"), [(16000, 64), (8000, 40), (22050, 80), (32000, 128), (44100, 128)])
def test_other_sample_rates_and_numbers_of_mels(sample_rate, n_mels):
    wav = clip(sample_rate)
    feats = KaldiFbank(sample_rate, n_mels)(wav[None])
    torch.testing.assert_close(feats[0], torchaudio_fbank(wav, sample_rate, n_mels), atol=1e-3, rtol=0)


def test_published_figures():
    wavs = [published_clip(0), published_clip(1)]
    feats = GlobalNorm()(KaldiFbank(n_frames=1056)(*padded(wavs)))
    found = feats[:, ::37, ::5][:, [0, 2, 4, 8]][:, :, [0, 11, 25]]
    torch.testing.assert_close(found, torch.tensor(PUBLISHED), atol=5e-4, rtol=0)
    assert feats[0, 998:].unique().item() == pytest.approx(4.6476 / 4.5699)


def test_n_frames_cuts_and_fills():
    wav = clip(16000)
    whole = KaldiFbank()(wav[None])
    assert whole.shape == (1, 98, 128)
    # cutting takes nothing but the end away: the mean is still that of the whole clip
    torch.testing.assert_close(KaldiFbank(n_frames=30)(wav[None]), whole[:, :30])
    filled = KaldiFbank(n_frames=100)(wav[None])
    torch.testing.assert_close(filled[:, :98], whole)
    assert filled.shape == (1, 100, 128)
    assert (filled[:, 98:] == 0).all()


def test_clip_shorter_than_a_frame_is_one_frame_of_it_filled_with_zeros():
    wav = clip(250, offset=0.3)
    expected = torchaudio_fbank(torch.cat([wav - wav.mean(), torch.zeros(150)]))
    torch.testing.assert_close(KaldiFbank()(wav[None])[0], expected, atol=1e-3, rtol=0)
    batch = KaldiFbank()(*padded([clip(2000), wav]))
    torch.testing.assert_close(batch[1, :1], expected, atol=1e-3, rtol=0)
    assert (batch[1, 1:] == 0).all()


def test_silence_is_the_floor():
    feats = KaldiFbank()(torch.full((1, 800), 0.25))
    torch.testing.assert_close(feats, torch.full((1, 3, 128), float(np.log(np.finfo("float32").eps))))


@given(n_frames=st.integers(1, 5000), sample_rate=st.sampled_from([8000, 11025, 16000, 44100]))
def test_sample_and_frame_counts_are_inverse(n_frames, sample_rate):
    n_samples = n_samples_for(n_frames, sample_rate)
    assert n_frames_of(n_samples, sample_rate) == n_frames
    assert n_frames_of(n_samples - 1, sample_rate) == max(1, n_frames - 1)
    assert n_frames_of(torch.tensor([n_samples, 0]), sample_rate).tolist() == [n_frames, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    wavs, compute_features = clip(16000)[None], KaldiFbank()
    with torch.autocast("cpu", dtype=dtype):
        feats = compute_features(wavs)
    assert feats.dtype == torch.float32
    assert torch.equal(feats, compute_features(wavs))


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
def test_float32_switch_is_put_back():
    def fail():
        with full_float32(torch.device("cuda")):  # the switch exists without a GPU
            assert not torch.backends.cuda.matmul.allow_tf32
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("tf32")
def test_gpu_agrees_with_torchaudio_with_tf32_on():
    wav = clip(16000)
    feats = KaldiFbank().cuda()(wav[None].cuda())
    torch.testing.assert_close(feats[0].cpu(), torchaudio_fbank(wav), atol=2e-3, rtol=0)


@given(width=st.integers(1, 3_000_000), data=st.data())
def test_true_lengths_survive_the_relative_form(width, data):
    n_samples = data.draw(st.integers(0, width))
    wavs = torch.empty(1).expand(1, width)
    assert true_lengths(wavs, torch.tensor([n_samples / width])).item() == n_samples
    assert true_lengths(wavs).item() == width


def test_remove_mean_of_an_empty_clip_is_zero():
    assert torch.equal(remove_mean(torch.ones(1, 5), torch.tensor([0])), torch.zeros(1, 5))


def test_nothing_is_saved():
    assert not KaldiFbank().state_dict()
    assert not GlobalNorm().state_dict()


def test_global_norm():
    torch.testing.assert_close(GlobalNorm(mean=1.0, std=2.0)(torch.tensor([[[5.0]]]), None), torch.tensor([[[2.0]]]))


@pytest.mark.parametrize("arguments", [{"sample_rate": 0}, {"n_mels": 3}, {"n_frames": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="KaldiFbank needs"):
        KaldiFbank(**arguments)
    with pytest.raises(ValueError, match="positive std"):
        GlobalNorm(std=0)


def test_waveform_without_batch():
    with pytest.raises(ValueError, match=r"\[batch, samples\]"):
        KaldiFbank()(torch.zeros(800))


def test_tf32_is_off_while_any_thread_needs_it_off():
    device, before, wrong = torch.device("cuda"), torch.backends.cuda.matmul.allow_tf32, []
    torch.backends.cuda.matmul.allow_tf32 = True

    def work(seed):
        pauses = np.random.default_rng(seed).uniform(0, 1e-4, 100)
        for pause in pauses:
            with full_float32(device):
                time.sleep(pause)
                wrong.extend([seed] * torch.backends.cuda.matmul.allow_tf32)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_the_operator_of_products_is_known_to_autograd_and_the_compiler():
    torch.library.opcheck(_float32_matmul, (torch.randn(5, 3, requires_grad=True), torch.randn(3, 4, requires_grad=True)))
