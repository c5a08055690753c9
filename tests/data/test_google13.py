"""Google-13 from small files in the true format: features, split, cache, and what is refused."""

import io
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.paper_files import wav, write_speech

from bdistil.data import google13
from bdistil.data.google13 import (
    KEYWORDS,
    Google13,
    clip_features,
    label_of,
    log_mel,
    mel_filters,
    read_split,
    read_wav,
)
from bdistil.data.readers import feature_cache
from bdistil.data.readers.feature_cache import cached_features
from bdistil.errors import UserError


def tone(hertz, samples, loud=8000):
    return np.round(loud * np.sin(2 * np.pi * hertz * np.arange(samples) / 16000)).astype(np.int16)


def left_padded(clip):
    return np.pad(clip, (16000 - len(clip), 0))


def noise(samples, seed=0):
    return np.random.default_rng(seed).integers(-3000, 3000, samples).astype(np.int16)


# ---- features


@pytest.mark.parametrize(
    "clip", [tone(440, 16000), noise(16000), left_padded(noise(11146)), np.zeros(16000, np.int16)], ids=range(4)
)
def test_log_mel_is_that_of_python_speech_features(clip):
    reference = pytest.importorskip("python_speech_features")
    energies, _ = reference.fbank(clip, 16000, winlen=0.025, winstep=0.01, nfilt=32, nfft=512, lowfreq=0, preemph=0.97,
                                  winfunc=np.hamming)  # fmt: skip
    expected = np.log(energies + 1e-10)
    found = log_mel(clip)
    assert found.shape == expected.shape == (99, 32)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-4


def test_log_mel_of_one_step_by_hand():
    """The sums of a discrete Fourier transform written out, for step 40 of some noise."""
    clip = noise(16000).astype(np.float64)
    emphasised = [clip[0], *(clip[i] - 0.97 * clip[i - 1] for i in range(1, 16000))]
    frame = [emphasised[6400 + i] * (0.54 - 0.46 * np.cos(2 * np.pi * i / 399)) for i in range(400)]
    angles = np.outer(np.arange(257), np.arange(400)) * 2 * np.pi / 512
    power = ((np.cos(angles) @ frame) ** 2 + (np.sin(angles) @ frame) ** 2) / 512
    expected = np.log(power @ mel_filters() + 1e-10)
    assert np.abs(log_mel(noise(16000))[40] - expected).max() < 1e-4


def test_silence_and_padding():
    features = log_mel(left_padded(noise(8000)))
    assert np.allclose(features[:48], np.log(np.finfo(float).eps + 1e-10), atol=1e-5)
    assert round(float(features[0, 0]), 2) == -23.03
    assert features[51:].min() > 0


# ---- sound files


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (wav(noise(100), channels=2), "got 2 channels"),
        (wav(noise(100), rate=8000), "8000 Hz, 16 bits"),
        (wav(noise(100), bits=8), "8 bits"),
        (wav(noise(100), kind=3), "unknown format: 3"),
        (wav(noise(16001)), "1 … 16000 samples of two bytes, got 16001"),
        (wav(noise(0)), "got 0 in 0 bytes"),
        (wav(noise(100))[:-20], "got 100 in 180 bytes"),
        (wav(noise(100))[:36], "chunk and/or data chunk missing"),
        (b"", "to be a sound file"),
        (b"<html>not found</html>", "does not start with RIFF"),
    ],
)
def test_a_wrong_sound_file_is_named(tmp_path, content, why):
    (tmp_path / "one.wav").write_bytes(content)
    with pytest.raises(UserError, match=rf"one\.wav.*{why}"):
        clip_features(tmp_path / "one.wav")


def test_a_chunk_of_odd_length_before_the_samples(tmp_path):
    clip = noise(100)
    (tmp_path / "more.wav").write_bytes(wav(clip, extra=b"LIST" + struct.pack("<I", 3) + b"abc\0"))
    assert read_wav(tmp_path / "more.wav").tolist() == clip.tolist()


# ---- the data set


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("speech")
    write_speech(root)
    return root


def opened(root, **options):
    module = Google13(str(root), partial=True, **options)
    module.setup("fit")
    return module


def test_labels():
    named = {"go": 1, "no": 2, "on": 3, "up": 4, "bed": 5, "cat": 6, "dog": 7, "off": 8, "one": 9, "six": 10,
             "two": 11, "yes": 12, "marvin": 0, "backward": 0, "zero": 0}  # fmt: skip
    assert {word: label_of(f"{word}/a.wav") for word in named} == named


def test_the_official_split(root):
    folder = root / "speech_commands_v0.01"
    split = read_split(folder)
    assert split["val"] == sorted((folder / "validation_list.txt").read_text().split())
    assert split["test"] == sorted((folder / "testing_list.txt").read_text().split())
    everything = sorted(f"{p.parent.name}/{p.name}" for p in folder.glob("[a-z]*/*.wav"))
    assert sorted(clip for clips in split.values() for clip in clips) == everything
    assert not any("_background_noise_" in clip for clips in split.values() for clip in clips)


def test_parts_are_standardised_by_the_training_part(root):
    module = opened(root)
    split = read_split(root / "speech_commands_v0.01")
    raw = {part: np.stack([clip_features(root / "speech_commands_v0.01" / clip) for clip in clips])
           for part, clips in split.items()}  # fmt: skip
    mean, spread = raw["train"].mean((0, 1), np.float64), raw["train"].std((0, 1), np.float64)
    for part, clips in split.items():
        x, y = module.parts[part].tensors
        assert np.allclose(x, (raw[part] - mean) / spread, atol=1e-4)
        assert y.tolist() == [label_of(clip) for clip in clips]
    x, y = next(iter(module.train_dataloader()))
    assert (x.shape[1:], x.dtype, y.dtype) == ((99, 32), torch.float32, torch.int64)


def test_missing_clips_and_lists(tmp_path):
    with pytest.raises(UserError, match=r"(?s)v0\.01 was not found in .*: expected validation_list\.txt.*curl -L http"):
        opened(tmp_path)
    folder = write_speech(tmp_path)
    with pytest.raises(UserError, match=r"51,088 clips in train, but \d+ are in .*partial=true"):
        Google13(str(tmp_path)).setup()
    clip = (folder / "testing_list.txt").read_text().split()[0]
    (folder / clip).unlink()
    with pytest.raises(UserError, match=rf"not complete: .* lacks {clip}\. "):
        opened(tmp_path)
    (folder / "testing_list.txt").unlink()
    with pytest.raises(UserError, match=r"not complete: .* lacks testing_list\.txt"):
        opened(tmp_path)


def test_a_damaged_clip_is_named_also_where_processes_read(tmp_path, monkeypatch):
    folder = write_speech(tmp_path)
    (folder / "go" / "aaaaaaaa_nohash_0.wav").write_bytes(wav(noise(100), rate=8000))
    for few in (10**6, 1):
        monkeypatch.setattr(feature_cache, "FEW", few)
        with pytest.raises(UserError, match=r"^Expected .*go/aaaaaaaa_nohash_0\.wav to be mono.* 8000 Hz"):
            opened(tmp_path)
        assert not [path for path in (tmp_path / "features").iterdir() if path.suffix == ".npy"]


# ---- the cache


@pytest.fixture
def files(tmp_path):
    files = [tmp_path / f"{number:03}.txt" for number in range(70)]
    for number, file in enumerate(files):
        file.write_text(f"{number}")
    return files


def number_in(path):
    """A feature of its file: the number in it, and its process."""
    time.sleep(0.01)  # so that no process takes all
    return np.array([float(path.read_text()), os.getpid()])


def computed(tmp_path, files, spec=None):
    return np.array(cached_features(tmp_path / "cache", "numbers", spec or {"version": 1}, files, number_in))


def test_features_come_in_order_from_several_processes(tmp_path, files, monkeypatch):
    monkeypatch.setattr(feature_cache, "cores", lambda: 2)
    state = torch.get_rng_state()
    out = computed(tmp_path, files)
    assert out[:, 0].tolist() == list(range(70))
    assert out.dtype == np.float32
    assert len(set(out[:, 1])) == 2
    assert np.float32(os.getpid()) not in out[:, 1]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_cache_is_made_again_when_anything_changes(tmp_path, files, monkeypatch):
    calls = []
    monkeypatch.setattr(feature_cache, "cores", lambda: 1)
    write = feature_cache._write
    monkeypatch.setattr(feature_cache, "_write", lambda *args: (calls.append(1), write(*args)))
    computed(tmp_path, files)
    computed(tmp_path, files)
    assert len(calls) == 1
    files[3].write_text("33")
    assert computed(tmp_path, files)[3, 0] == 33
    os.utime(files[4], (0, 0))
    computed(tmp_path, files)
    assert computed(tmp_path, files[:-1]).shape == (69, 2)
    computed(tmp_path, files[:-1], {"version": 2})
    assert len(calls) == 5
    (kept,) = (tmp_path / "cache").glob("numbers-*")  # one version is kept
    whole = kept.read_bytes()
    for content in (b"", b"\x93NUMPY", whole[:-1]):
        kept.write_bytes(content)
        assert computed(tmp_path, files[:-1], {"version": 2})[5, 0] == 5
    assert len(calls) == 8


def test_those_who_ask_at_the_same_time_compute_once(tmp_path, files, monkeypatch):
    calls = []
    monkeypatch.setattr(feature_cache, "cores", lambda: 1)
    write = feature_cache._write
    monkeypatch.setattr(feature_cache, "_write", lambda *args: (calls.append(1), write(*args)))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: computed(tmp_path, files), range(3)))
    assert len(calls) == 1
    assert all(np.array_equal(features, found[0]) for features in found)


def test_a_bar_where_somebody_watches(tmp_path, files, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(feature_cache, "cores", lambda: 1)
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    computed(tmp_path, files)
    assert "Features of numbers" in terminal.getvalue()
    assert "100%" in terminal.getvalue()


def test_a_cache_that_was_killed_is_made_again(tmp_path, files, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_cache, "cores", lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            computed(tmp_path, files)
    (tmp_path / "cache" / ".numbers-0123.npy").touch()  # left by a kill -9
    assert not list((tmp_path / "cache").glob("numbers-*"))
    assert computed(tmp_path, files)[7, 0] == 7
    assert not list((tmp_path / "cache").glob(".numbers-*"))


def test_a_cache_that_cannot_be_written(tmp_path, files):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        UserError, match=r"features of numbers cannot be kept in .*cache .*Give another folder as `cache`"
    ):
        computed(tmp_path, files)


def test_keywords_and_published_counts():
    assert len(KEYWORDS) == len(set(KEYWORDS)) == 12
    assert google13.CLIPS == {"train": 51_088, "val": 6_798, "test": 6_835}
