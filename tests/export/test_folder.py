"""An exported folder that was tampered with, or comes from an untrusted place."""

import json
import shutil
import zipfile

import onnx
import pytest
from helpers.export_runs import L, change_manifest, exported_mlps

from bdistil import UserError
from bdistil.export.folder import seal
from bdistil.export.run import ExportOptions, export_run
from bdistil.runner import ExportedEnsemble, ExportError


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return exported_mlps(tmp_path_factory.mktemp("mlp"))


@pytest.fixture
def folder(mlp, tmp_path):
    shutil.copytree(mlp[1], tmp_path / "out")
    return tmp_path / "out"


def hash_of(folder, number):
    return json.loads((folder / "manifest.json").read_text())["stages"][number]["sha256"]


def refuses(folder, *message):
    with pytest.raises(ExportError) as caught:
        ExportedEnsemble.load(folder)
    for part in message:
        assert part in str(caught.value)


def test_a_missing_stage_is_named_with_its_hash(folder):
    (folder / "stage_02.onnx").unlink()
    refuses(folder, "stage_02.onnx is missing", hash_of(folder, 1))


def test_a_truncated_stage_is_named_with_its_hash(folder):
    path = folder / "stage_03.onnx"
    path.write_bytes(path.read_bytes()[:-7])
    refuses(folder, "stage_03.onnx is", " of ", hash_of(folder, 2))


def test_swapped_stages_are_named_with_their_hashes(folder):
    one, two = folder / "stage_02.onnx", folder / "stage_03.onnx"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    refuses(folder, "stage_02.onnx is", hash_of(folder, 1), hash_of(folder, 2))


def test_stages_swapped_in_the_manifest_read_other_tensors(folder):
    change_manifest(folder, lambda m: m["stages"][1].update(m["stages"][2] | {"inputs": m["stages"][1]["inputs"]}))
    refuses(folder, "stage_03.onnx reads")


def test_stages_in_another_order_read_what_is_not_there_yet(folder):
    change_manifest(folder, lambda m: m["stages"].insert(1, m["stages"].pop(2)))
    refuses(folder, "stage_03.onnx reads ['features_2', 'total_2'], which no stage before it gives")


@pytest.mark.parametrize("shape", [["batch", L - 1], ["batch", L + 1], ["batch", L, 1], [], ["batch", "L"]])
def test_arrays_that_are_none_of_the_graph_are_refused(folder, shape):
    """The runner makes them by the manifest, and lets onnxruntime write into them."""
    change_manifest(folder, lambda m: m["stages"][0]["outputs"][0].update(shape=shape))
    refuses(folder, "stage_01.onnx has total_1 as", f"the manifest has {shape}")


@pytest.mark.parametrize("name", ["../out2/stage_01.onnx", "/etc/passwd", "..", "", "a/b.onnx", "..\\x.onnx"])
def test_no_path_leaves_the_folder(folder, name):
    shutil.copytree(folder, folder.with_name("out2"))
    change_manifest(folder, lambda m: m["stages"][0].update(file=name))
    refuses(folder, "no path may leave it", repr(name))


def test_no_link_leaves_the_folder(folder):
    target = folder.with_name("elsewhere.onnx")
    (folder / "stage_01.onnx").rename(target)
    (folder / "stage_01.onnx").symlink_to(target)
    refuses(folder, "no path may leave it")


def test_a_graph_cannot_read_weights_from_another_file(folder, monkeypatch):
    """ONNX knows weights in files beside the graph; a graph of ours has none, and one is refused."""
    secret = folder.with_name("secret.bin")
    secret.write_bytes(bytes(4 * 6 * 8))
    monkeypatch.chdir(folder)
    path = folder / "stage_01.onnx"
    graph = onnx.load(str(path))
    weight = next(t for t in graph.graph.initializer if list(t.dims) == [8, 6])
    for key, value in (("location", "../secret.bin"), ("offset", "0"), ("length", str(4 * 6 * 8))):
        weight.external_data.add(key=key, value=value)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    path.write_bytes(graph.SerializeToString())
    change_manifest(folder, lambda m: m["stages"][0].update(seal(path)))
    refuses(folder, "stage_01.onnx cannot be run")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": "x", "version": 1}', '{"format": "bdistil-export", "version": 2}']
)
def test_what_is_no_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    refuses(folder, "manifest.json")


def test_a_manifest_that_is_not_whole_is_refused(folder):
    change_manifest(folder, lambda m: m.pop("times"))
    refuses(folder, "manifest.json is incomplete")


def test_nothing_in_a_folder_is_a_pickle(mlp, tmp_path):
    run, out = mlp
    export_run(run, tmp_path / "pt2", ExportOptions(format="torch"))
    files = [
        (path.name, path.read_bytes())
        for folder in (out, tmp_path / "pt2")
        for path in folder.rglob("*")
        if path.is_file()
    ]
    for name, _ in list(files):
        if name.endswith(".pt2"):
            archive = zipfile.ZipFile(tmp_path / "pt2" / name)
            files += [(entry, archive.read(entry)) for entry in archive.namelist()]
    assert len(files) > 20
    for name, data in files:
        assert data[:2] not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), name
        assert not (name.endswith(".pt") and data), name
        if not name.endswith(".pt2"):
            assert data[:4] != b"PK\x03\x04", name


def test_an_export_is_replaced_but_no_file_of_the_users(mlp, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        export_run(mlp[0], out, ExportOptions(overwrite=True))
    (out / "app.py").write_text("")
    with pytest.raises(UserError, match=r"to hold nothing but an export, .* got app\.py"):
        export_run(mlp[0], out, ExportOptions(overwrite=True))
    assert (out / "app.py").exists()


def test_a_link_is_not_replaced(mlp, tmp_path):
    export_run(mlp[0], tmp_path / "real", ExportOptions())
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match=r"got the link .*link\. Give its target, .*real\."):
        export_run(mlp[0], tmp_path / "link", ExportOptions(overwrite=True))


@pytest.mark.parametrize("other", ["link", "folder"])
def test_links_and_empty_folders_of_the_users_are_kept(mlp, tmp_path, other):
    out = tmp_path / "out"
    export_run(mlp[0], out, ExportOptions())
    if other == "link":
        (out / other).symlink_to(tmp_path / "nowhere")
    else:
        (out / other).mkdir()
    with pytest.raises(UserError, match=rf"to hold nothing but an export, .* got {other}\."):
        export_run(mlp[0], out, ExportOptions(overwrite=True))
