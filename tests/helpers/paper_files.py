"""Small files in the true format of the data sets of the paper, written byte by byte where a library would differ."""

import gzip
import struct
import zlib

import numpy as np


class OldPickle:
    """Writes what cPickle of Python 2 wrote with protocol 2: strings are SHORT_BINSTRING, arrays name numpy.core."""

    def __init__(self):
        self.out = b"\x80\x02"

    def value(self, value):
        kind = type(value).__name__
        getattr(self, {"ndarray": "array"}.get(kind, kind))(value)

    def str(self, value):
        self.bytes(value.encode("latin1"))

    def bytes(self, value):
        short = len(value) < 256
        self.out += (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value

    def int(self, value):
        self.out += b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)

    def list(self, values):
        self.out += b"]("
        for value in values:
            self.value(value)
        self.out += b"e"

    def dict(self, values):
        self.out += b"}("
        for key, value in values.items():
            self.value(key)
            self.value(value)
        self.out += b"u"

    def array(self, array):
        self.out += b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R("
        self.int(1)
        for side in array.shape:
            self.int(side)
        self.out += b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        self.out += b"J\xff\xff\xff\xff" * 2 + b"K\x00tb\x89"
        self.bytes(array.tobytes())
        self.out += b"tb"


def old_pickle(value):
    """Bytes of a pickle of Python 2."""
    writer = OldPickle()
    writer.value(value)
    return writer.out + b"."


def pattern(number):
    """An image (3072,) that shows a swap of planes or axes: red is 8 x, green is 8 y, blue is 7 times its number."""
    y, x = np.mgrid[0:32, 0:32]
    return np.stack([8 * x, 8 * y, np.full((32, 32), 7 * number % 256)]).astype(np.uint8).reshape(-1)


def write_cifar10(root, each=4):
    """Six files of `each` times ten images, in the order of the labels."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        labels = [i % 10 for i in range(10 * each)]
        rows = np.stack([pattern(number * len(labels) + i) for i in range(len(labels))])
        batch = {"batch_label": f"batch {number + 1}", "labels": labels, "data": rows,
                 "filenames": [f"image_{i}.png" for i in range(len(labels))]}  # fmt: skip
        (folder / name).write_bytes(old_pickle(batch))
    return folder


def write_cifar100(root, each=2):
    """A training file of `each` times a hundred images and a test file of one hundred."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 100 * each), ("test", 100)):
        fine = [33 * i % 100 for i in range(count)]
        batch = {"filenames": [], "batch_label": "batch", "fine_labels": fine, "coarse_labels": [f // 5 for f in fine],
                 "data": np.stack([pattern(i) for i in range(count)])}  # fmt: skip
        (folder / name).write_bytes(old_pickle(batch))
    return folder


def png(pixels):
    """A PNG file of uint8 pixels, (H, W, 3) or grey (H, W)."""

    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    high, wide = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", wide, high, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


WNIDS = ("n01440764", "n01443537")


def _picture(label, number, noise):
    """6 wide, 8 high: red is 100 times the label, green says the number; or noise."""
    if noise:
        return png(np.random.default_rng([label, number]).integers(0, 256, (8, 6, 3), np.uint8))
    return png(np.full((8, 6, 3), [100 * label, 50 * number, 200], np.uint8))


def write_imagenet(root, noise=False):
    """A folder a class: five training images, one of them grey and deeper down, and two of the validation part."""
    for label, wnid in enumerate(WNIDS):
        for part, count in (("train", 4), ("val", 2)):
            folder = root / "imagenet" / part / wnid
            (folder / "deeper").mkdir(parents=True, exist_ok=True)
            for number in range(count):
                (folder / f"{number}.png").write_bytes(_picture(label, number, noise))
        train = root / "imagenet" / "train" / wnid
        (train / "deeper" / "grey.PNG").write_bytes(png(np.full((8, 6), 77, np.uint8)))
        (train / "notes.txt").write_text("not an image\n")
    return root / "imagenet"


def write_tiny_imagenet(root, noise=False):
    """Training images below `images`, those of the validation part in one folder with a table."""
    base = root / "tiny-imagenet-200"
    rows = []
    (base / "val" / "images").mkdir(parents=True, exist_ok=True)
    for label, wnid in enumerate(WNIDS):
        folder = base / "train" / wnid / "images"
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t5\t5\n")
        for number in range(5):
            (folder / f"{wnid}_{number}.JPEG").write_bytes(_picture(label, number, noise))
        for number in (2 * label, 2 * label + 1):
            (base / "val" / "images" / f"val_{number}.JPEG").write_bytes(_picture(label, number % 2, noise))
            rows.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t5\t5\n")
    (base / "val" / "val_annotations.txt").write_text("".join(reversed(rows)))
    return base


def wav(samples, rate=16000, channels=1, bits=16, kind=1, extra=b""):
    """A RIFF file of 16-bit samples, whose header may be wrong; `extra` are chunks before the samples."""
    data = np.asarray(samples, "<i2").tobytes()
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * channels * 2, channels * 2, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + extra + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


SPEAKERS = {"aaaaaaaa": "train", "bbbbbbbb": "train", "cccccccc": "val", "dddddddd": "test"}


def write_speech(root):
    """Clips of all keywords and three other words by four speakers, two lists, and a recording of noise."""
    folder = root / "speech_commands_v0.01"
    lists = {"train": [], "val": [], "test": []}
    keywords = ["go", "no", "on", "up", "bed", "cat", "dog", "off", "one", "six", "two", "yes"]
    for number, word in enumerate([*keywords, "marvin", "zero", "backward"]):
        (folder / word).mkdir(parents=True, exist_ok=True)
        for speaker, part in SPEAKERS.items():
            length = 11146 if part == "val" else 16000
            random = np.random.default_rng([number, len(lists[part])])
            clip = 4000 * np.sin(np.arange(length) * (0.02 + 0.01 * number)) + random.normal(0, 300, length)
            name = f"{word}/{speaker}_nohash_0.wav"
            (folder / name).write_bytes(wav(clip.astype(np.int16)))
            lists[part].append(name)
    (folder / "_background_noise_").mkdir(exist_ok=True)
    (folder / "_background_noise_" / "white.wav").write_bytes(wav(np.zeros(24000)))
    for name, part in (("validation_list.txt", "val"), ("testing_list.txt", "test")):
        (folder / name).write_text("".join(f"{clip}\n" for clip in lists[part]))
    return folder


def write_dsa(root, activities=(1, 19), segments=(1,)):
    """Segments of all eight subjects; the first value is 10 times the activity plus the subject."""
    for activity in activities:
        for subject in range(1, 9):
            for segment in segments:
                random = np.random.default_rng([activity, subject, segment])
                values = 10 * activity + subject + random.normal(0, 0.1, (125, 45)).cumsum(0)
                values[0, 0] = 10 * activity + subject
                file = root / "dsa" / "data" / f"a{activity:02}" / f"p{subject}" / f"s{segment:02}.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("".join(",".join(f"{value:.5g}" for value in row) + "\n" for row in values))
    return root / "dsa" / "data"


def write_har(root):
    """Two windows of each training subject, four for the test: 1000 times the signal, the window, the step."""
    folder = root / "UCI HAR Dataset"
    subjects = (1, 3, 5, 6, 7, 8, 11, 14, 15, 16, 17, 19, 21, 22, 23, 25, 26, 27, 28, 29, 30)
    signals = [f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz"]
    for part, count in (("train", 42), ("test", 4)):
        (folder / part / "Inertial Signals").mkdir(parents=True, exist_ok=True)
        for number, signal in enumerate(signals):
            rows = 1000 * number + np.arange(count)[:, None] + np.arange(128) / 1000
            text = "".join("  " + " ".join(f"{value:.7e}" for value in row) + "\n" for row in rows)
            (folder / part / "Inertial Signals" / f"{signal}_{part}.txt").write_text(text)
        (folder / part / f"y_{part}.txt").write_text("".join(f"{i % 6 + 1}\n" for i in range(count)))
        (folder / part / f"subject_{part}.txt").write_text("".join(f"{subjects[i % 21]}\n" for i in range(count)))
    return folder


def write_mnist(root, train=40, test=20):
    """The four idx files of MNIST; pixel (y, x) of image i is (8 y + x + i) mod 256, its label i mod 10."""
    folder = root / "mnist"
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:28, :28]
    for name, count in (("train", train), ("t10k", test)):
        numbers = np.arange(count)
        images = ((8 * y + x + numbers[:, None, None]) % 256).astype(np.uint8)
        header = struct.pack(">iiii", 0x00000803, count, 28, 28)
        labels = struct.pack(">ii", 0x00000801, count) + (numbers % 10).astype(np.uint8).tobytes()
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder
