"""Teachers of any make: their answers against NumPy, their fingerprints, their cost, and what is warned of."""

import copy
import json
import shutil
import warnings
from collections import OrderedDict

import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.teachers import SHAPE, scripted
from helpers.toys import CLASSES, FEATURES, Toys, boost, control, curve, make_teacher, settings_for
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil import AdaptedTeacher, AveragedTeacher, FrozenTeacher, OnnxTeacher, TorchScriptTeacher, UserError
from bdistil.boosting.checks.data import check_outputs, check_task
from bdistil.cli.app import main
from bdistil.metrics.cost import measure_cost
from bdistil.models.timm import TimmTeacher
from bdistil.storage.run_directory import RunDirectory
from bdistil.storage.weights import load_weights, save_weights
from bdistil.teachers.checks import (
    some_inputs,
    warn_of_guessing,
    warn_of_inputs,
    warn_of_probabilities,
)
from bdistil.teachers.wrappers import comes_trained


def conv_net():
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    ).eval()  # fmt: skip


def graph(path, nodes, weights, *, inputs=FEATURES, outputs=CLASSES, batch="n", domains=("",), external=False):
    """An ONNX file x (batch, inputs) -> answers (batch, outputs), made without torch."""
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *np.atleast_1d(inputs).tolist()])
    y = helper.make_tensor_value_info("answers", TensorProto.FLOAT, [batch, outputs])
    imports = [helper.make_opsetid(domain, 1 if domain else 17) for domain in domains]
    made = helper.make_graph(nodes, "teacher", [x], [y], tensors)
    model = helper.make_model(made, opset_imports=imports, ir_version=9)
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return str(path)


def linear_graph(path, seed=0, softmax=False, **options):
    """Logits (or probabilities) of a linear model; gives also its weights."""
    random = np.random.default_rng(seed)
    weights = {
        "w": random.normal(size=(FEATURES, CLASSES)).astype("f4"),
        "b": random.normal(size=CLASSES).astype("f4"),
    }
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["logits" if softmax else "answers"])]
    nodes += [helper.make_node("Softmax", ["logits"], ["answers"])] if softmax else []
    return graph(path, nodes, weights, **options), weights


# ---- TorchScript


def test_a_torchscript_file_answers_as_the_module_that_it_was_made_of(tmp_path):
    net, x = conv_net(), torch.randn(5, *SHAPE)
    teacher = FrozenTeacher(TorchScriptTeacher(scripted(net, tmp_path / "net.ts")))
    assert comes_trained(teacher.module)
    assert not any(p.requires_grad for p in teacher.parameters())
    torch.testing.assert_close(teacher(x), net(x))


def test_a_torchscript_file_costs_what_the_module_costs(tmp_path):
    net = conv_net()
    cost = measure_cost(TorchScriptTeacher(scripted(net, tmp_path / "net.ts")), (torch.randn(1, *SHAPE),))
    assert cost.macs == 3 * 3 * 4 * 9 + 36 * 3
    assert (cost.params, cost.uncounted) == (measure_cost(net, (torch.randn(1, *SHAPE),)).params, {})


def test_fingerprints_of_torchscript_are_of_weights_constants_and_code(tmp_path):
    net, other = conv_net(), conv_net()
    other[1].running_mean += 1
    paths = [
        scripted(net, tmp_path / "0.ts"),
        scripted(other, tmp_path / "1.ts"),
        scripted(net, tmp_path / "2.ts", frozen=True),  # weights are constants of the code
        scripted(other, tmp_path / "3.ts", frozen=True),
        scripted(nn.Sequential(*net, nn.Tanh()), tmp_path / "4.ts"),  # the same weights
    ]
    prints = [FrozenTeacher(TorchScriptTeacher(path)).fingerprint for path in paths]
    assert len(set(prints)) == len(prints)
    again = [FrozenTeacher(TorchScriptTeacher(shutil.copy(path, tmp_path / "copy.ts"))).fingerprint for path in paths]
    assert again == prints


def test_fingerprints_are_of_buffers_names_and_modes_of_answering():
    net, other = conv_net(), conv_net()
    assert FrozenTeacher(net).fingerprint == FrozenTeacher(other).fingerprint
    other[1].running_mean += 1
    renamed = nn.Sequential(OrderedDict((f"layer{name}", part) for name, part in conv_net().named_children()))
    prints = [FrozenTeacher(teacher).fingerprint for teacher in (
        net, other, renamed, AdaptedTeacher(conv_net()), AdaptedTeacher(conv_net(), size=9),
        AdaptedTeacher(conv_net(), probabilities=True),
    )]  # fmt: skip
    assert len(set(prints)) == len(prints)


def test_a_frozen_teacher_never_trains(tmp_path):
    """A file that was saved in train mode is no other."""
    nets = [nn.Sequential(nn.Flatten(), nn.Dropout(0.9)).train() for _ in range(3)]
    path, x = tmp_path / "net.ts", torch.ones(5, *SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nets[2]), path)
    for teacher in (FrozenTeacher(nets[0]).train(), FrozenTeacher(nets[1]), TorchScriptTeacher(str(path))):
        assert torch.equal(teacher(x), x.flatten(1))
        assert not teacher(x).requires_grad


def test_a_frozen_teacher_goes_back_to_eval_mode():
    """The module inside is the user's, who may have it in train mode."""
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())
    teacher, x = FrozenTeacher(network), torch.randn(8, 4)
    before = teacher(x)
    network.train()
    assert torch.equal(teacher(x), before)
    assert int(network[0].num_batches_tracked) == 0


def test_work_that_is_not_counted_is_named_in_torchscript_too(tmp_path):
    class Waves(nn.Module):
        def forward(self, x):
            return torch.fft.rfft(x.flatten(1)).real

    teacher = TorchScriptTeacher(scripted(Waves(), tmp_path / "net.ts"))
    with pytest.raises(UserError, match=r"multiply-adds are not counted: aten::_fft_r2c x1"):
        measure_cost(teacher, (torch.randn(1, *SHAPE),))


def test_what_is_no_torchscript_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match=r"a file of torch\.jit\.save, got"):
        TorchScriptTeacher(str(tmp_path / "text"))
    with pytest.raises(UserError, match="which is not there"):
        TorchScriptTeacher(str(tmp_path / "no"))


def test_a_run_with_a_torchscript_teacher_is_the_run_with_its_module(tmp_path):
    teacher = make_teacher().eval()
    path = scripted(teacher, tmp_path / "net.ts", example=torch.randn(2, FEATURES))
    rows = []
    for name, given in (("module", make_teacher()), ("script", TorchScriptTeacher(path))):
        boost(tmp_path / name, teacher=given, settings=settings_for(2))
        rows.append(curve(tmp_path / name))
    for one, other in zip(*rows, strict=True):
        for column in ("macs", "params", "val_accuracy", "val_loss", "test_accuracy", "rms_error", "train_macs"):
            assert float(one[column] or 0) == pytest.approx(float(other[column] or 0), rel=1e-4), column


# ---- ONNX


def test_an_onnx_file_answers_as_numpy_does_for_any_batch(tmp_path):
    path, weights = linear_graph(tmp_path / "t.onnx")
    teacher = FrozenTeacher(OnnxTeacher(path))
    for batch in (1, 7, 64):
        x = torch.randn(batch, FEATURES)
        expected = x.numpy() @ weights["w"] + weights["b"]
        np.testing.assert_allclose(teacher(x).numpy(), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(copy.deepcopy(teacher)(x).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_an_onnx_graph_whose_batch_is_fixed_is_refused_with_the_way_out(tmp_path):
    path, _ = linear_graph(tmp_path / "t.onnx", batch=16)
    with pytest.raises(UserError, match=r"exactly 16 \(input 'x': \[16, 8\]\)[\s\S]*dynamic batch"):
        OnnxTeacher(path)


def test_bad_onnx_files_inputs_and_outputs_are_named(tmp_path):
    path, _ = linear_graph(tmp_path / "t.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(UserError, match="an ONNX file, got"):
        OnnxTeacher(str(tmp_path / "text.onnx"))
    with pytest.raises(UserError, match=r"`output` to be one of \['answers'\] in .*got 'logits'"):
        OnnxTeacher(path, output="logits")
    with pytest.raises(UserError, match=r"takes 'x' of shape \['n', 8\] and type tensor.*got x of shape \(2, 5\)"):
        OnnxTeacher(path)(torch.randn(2, 5))


@pytest.mark.parametrize("external", [False, True])
def test_fingerprints_of_onnx_are_of_the_file_and_its_weights(tmp_path, external):
    def print_of(seed, folder):
        (tmp_path / folder).mkdir()
        path, _ = linear_graph(tmp_path / folder / "t.onnx", seed, external=external)
        assert (tmp_path / folder / "weights.bin").exists() == external
        return FrozenTeacher(OnnxTeacher(path)).fingerprint

    assert print_of(0, "one") == print_of(0, "two") != print_of(1, "three")


def test_the_cost_of_an_onnx_graph_is_that_of_its_products(tmp_path):
    random = np.random.default_rng(0)
    weights = {
        "k": random.normal(size=(6, 2, 3, 3)).astype("f4"),  # grouped: 4 channels in 2 groups
        "u": random.normal(size=(6, 5, 2, 2)).astype("f4"),
        "m": random.normal(size=(5 * 12 * 12, CLASSES)).astype("f4"),
        "shape": np.array([0, -1]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], group=2),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ConvTranspose", ["r", "u"], ["d"], strides=[2, 2]),
        helper.make_node("Reshape", ["d", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "m"], ["answers"]),
    ]
    path = graph(tmp_path / "t.onnx", nodes, weights, inputs=[4, 8, 8])
    cost = measure_cost(FrozenTeacher(OnnxTeacher(path)), (torch.randn(1, 4, 8, 8),))
    assert cost.macs == 6 * 36 * 2 * 9 + 6 * 36 * 5 * 4 + 720 * CLASSES
    assert cost.params == sum(value.size for value in weights.values())
    assert cost.weight_bytes == sum(value.nbytes for value in weights.values())


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cost_of_an_onnx_product_whose_first_factor_is_turned(tmp_path, batch):
    weights = {"w": np.ones((FEATURES, CLASSES), "f4")}
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"]),
        helper.make_node("Gemm", ["turned", "w"], ["answers"], transA=1),
    ]
    teacher = OnnxTeacher(graph(tmp_path / "t.onnx", nodes, weights))
    assert measure_cost(teacher, (torch.randn(batch, FEATURES),)).macs == batch * FEATURES * CLASSES


def test_what_cannot_be_counted_is_warned_of_and_recorded(tmp_path):
    """A recurrent ONNX teacher: a line says what the MACs lack."""
    random = np.random.default_rng(0)
    hidden, steps = 3, 2
    weights = {
        "w": random.normal(size=(1, 4 * hidden, FEATURES // steps)).astype("f4"),
        "r": random.normal(size=(1, 4 * hidden, hidden)).astype("f4"),
        "m": random.normal(size=(hidden, CLASSES)).astype("f4"),
        "steps": np.array([0, steps, FEATURES // steps]),
        "flat": np.array([-1, hidden]),
    }
    nodes = [
        helper.make_node("Reshape", ["x", "steps"], ["s"]),
        helper.make_node("Transpose", ["s"], ["t"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["t", "w", "r"], ["", "h"], hidden_size=hidden),
        helper.make_node("Reshape", ["h", "flat"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["answers"]),
    ]
    teacher = OnnxTeacher(graph(tmp_path / "t.onnx", nodes, weights))
    with pytest.warns(UserWarning, match=r"MACs of the teacher lack .*\{'onnx::LSTM': 1\}"):
        boost(tmp_path / "run", teacher=teacher, settings=settings_for(1), trainer={"epochs": 1})
    figures = RunDirectory(tmp_path / "run").read("teacher")
    assert figures["uncounted"] == {"onnx::LSTM": 1}
    assert figures["macs"] == hidden * CLASSES


def any_graph(path, nodes, given, outputs, weights=()):
    """An ONNX file with any input and outputs."""
    made = helper.make_graph(nodes, "teacher", [given], outputs, list(weights))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(made, opset_imports=imports, ir_version=8), path)
    return str(path)


def product(kind=TensorProto.FLOAT, shape=("n", FEATURES)):
    """Input, nodes and weights of the logits x @ w, of any type of x."""
    w = np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype("f4")
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["f", "w"], ["logits"]),
    ]
    given = helper.make_tensor_value_info("x", kind, shape)
    return w, given, nodes, [numpy_helper.from_array(w, "w")]


LOGITS = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])


def test_an_onnx_input_of_unknown_rank_is_taken_and_counted(tmp_path):
    w, given, nodes, weights = product(shape=None)
    teacher = OnnxTeacher(any_graph(tmp_path / "t.onnx", nodes, given, [LOGITS], weights))
    x = torch.randn(3, FEATURES)
    np.testing.assert_allclose(teacher(x).numpy(), x.numpy() @ w, rtol=1e-5, atol=1e-5)
    assert measure_cost(teacher, (x[:1],)).macs == FEATURES * CLASSES


def test_outputs_of_scikit_learn(tmp_path):
    """Labels beside probabilities, or a ZipMap, as its converter writes them."""
    w, given, nodes, weights = product()
    zipped = helper.make_node(
        "ZipMap", ["logits"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=list(range(CLASSES))
    )
    label = helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0)
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    maps = helper.make_value_info(
        "maps", helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, tensor))
    )
    labels = helper.make_tensor_value_info("label", TensorProto.INT64, ["n"])
    path = any_graph(tmp_path / "zip.onnx", [*nodes, label, zipped], given, [labels, maps], weights)
    with pytest.raises(UserError, match=r"got 'maps' of type seq\(map\(.*ZipMap of scikit-learn: .*'zipmap': False"):
        OnnxTeacher(path)
    path = any_graph(tmp_path / "all.onnx", [*nodes, label, zipped], given, [labels, maps, LOGITS], weights)
    with pytest.raises(UserError, match=r"got 'maps'.*Or give `output`, one of \['logits'\]"):
        OnnxTeacher(path, output="maps")
    x = torch.randn(3, FEATURES)
    np.testing.assert_allclose(OnnxTeacher(path)(x).numpy(), x.numpy() @ w, rtol=1e-5, atol=1e-5)
    assert OnnxTeacher(path, output="label")(x).shape == (3,)
    measure_cost(OnnxTeacher(path), (x,), uncounted="record")


@pytest.mark.parametrize("kind", ["UINT8", "INT8", "INT32", "INT64", "BOOL"])
def test_an_onnx_input_of_integers_takes_integers_only(tmp_path, kind):
    w, given, nodes, weights = product(getattr(TensorProto, kind))
    teacher = OnnxTeacher(any_graph(tmp_path / "t.onnx", nodes, given, [LOGITS], weights))
    x = torch.randint(2, (4, FEATURES))
    np.testing.assert_allclose(teacher(x).numpy(), x.numpy() @ w, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"takes integers \(tensor\(\w+\)\) as 'x', got x of torch\.float32"):
        teacher(x.float())
    if kind in ("UINT8", "INT8", "BOOL"):
        with pytest.raises(UserError, match=r"in -?\d+ … \d+ \(tensor\(\w+\)\), got x in -?\d+ … 300"):
            teacher(torch.full((1, FEATURES), 300))


@pytest.mark.parametrize("kind", ["FLOAT16", "DOUBLE"])
def test_an_onnx_input_of_another_precision(tmp_path, kind):
    w, given, nodes, weights = product(getattr(TensorProto, kind))
    teacher = OnnxTeacher(any_graph(tmp_path / "t.onnx", nodes, given, [LOGITS], weights))
    x = torch.randn(4, FEATURES)
    np.testing.assert_allclose(teacher(x).numpy(), x.numpy() @ w, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(teacher(x.bfloat16()).numpy(), x.numpy() @ w, rtol=5e-2, atol=5e-2)


def test_a_text_input_is_refused(tmp_path):
    _, given, nodes, weights = product(TensorProto.STRING)
    with pytest.raises(UserError, match=r"one input, a tensor of numbers, got 'x' of type tensor\(string\)"):
        OnnxTeacher(any_graph(tmp_path / "t.onnx", nodes, given, [LOGITS], weights))


# ---- modules of any precision


class Noted(nn.Sequential):
    """Has state that is no tensor."""

    def get_extra_state(self):
        return {"note": "v1", "parts": [torch.ones(2), object()]}

    def set_extra_state(self, state):
        pass


def quantised(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own successor of it is a package of its own
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)


ODD = {
    "half": lambda net: net.half(), "bfloat16": lambda net: net.bfloat16(), "double": lambda net: net.double(),
    "int8": quantised, "compiled": lambda net: torch.compile(net, backend="eager"),
    "extra state": lambda net: Noted(*net),
    "adapted": lambda net: AdaptedTeacher(net.half(), data_mean=0.5),
    "averaged": lambda net: AveragedTeacher([net.half(), make_teacher(3), make_teacher(4).double()], of="logits"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "state"), [*((name, "cached") for name in ODD), ("half", "recompute"), ("compiled", "recompute")]
)
def test_teachers_of_any_precision_answer(tmp_path, name, state):
    teacher, x = ODD[name](make_teacher().eval()), torch.randn(6, FEATURES)
    answers = FrozenTeacher(teacher)(x)
    assert answers.dtype is torch.float32
    if name not in ("adapted", "averaged"):
        torch.testing.assert_close(answers, make_teacher().eval()(x), rtol=0.05, atol=0.05)
    settings = settings_for(1, state=state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The MACs of the teacher lack")  # int8 products
        run = boost(tmp_path, teacher=teacher, settings=settings, trainer={"epochs": 1})
    assert len(run.ensemble) == 1


def test_fingerprints_of_odd_teachers():
    prints = {name: FrozenTeacher(odd(make_teacher())).fingerprint for name, odd in ODD.items()}
    again = {name: FrozenTeacher(odd(make_teacher())).fingerprint for name, odd in ODD.items()}
    other = {name: FrozenTeacher(odd(make_teacher(5))).fingerprint for name, odd in ODD.items()}
    assert prints == again
    assert all(prints[name] != other[name] for name in ODD)
    assert prints["compiled"] == FrozenTeacher(make_teacher()).fingerprint
    assert len(set(prints.values())) == len(prints)


def test_int8_on_another_device_is_one_sentence():
    """A device without data stands for a GPU."""
    with pytest.raises(UserError, match=r"Sequential does not run on this device: quantized::.*cpu"):
        FrozenTeacher(quantised(make_teacher()))(torch.zeros(2, FEATURES, device="meta"))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # once in a process
def test_fingerprints_of_int8_per_channel():
    def print_of(factor):
        torch.manual_seed(0)
        weights = torch.quantize_per_channel(torch.randn(3, 4), factor * torch.ones(3), torch.zeros(3), 0, torch.qint8)
        net = nn.Linear(4, 3)
        net.register_buffer("packed", weights)
        return FrozenTeacher(net).fingerprint

    assert print_of(0.1) == print_of(0.1) != print_of(0.2)


def test_a_torchscript_file_that_does_not_take_x_says_so(tmp_path):
    teacher = TorchScriptTeacher(
        scripted(conv_net().half(), tmp_path / "net.ts", example=torch.randn(2, *SHAPE).half())
    )
    assert FrozenTeacher(teacher)(torch.randn(5, *SHAPE)).shape == (5, 3)
    with pytest.raises(UserError, match=r"net\.ts does not take x of shape \(5, 1, 8, 8\) and type torch\.float32: "):
        teacher(torch.randn(5, *SHAPE))


# ---- several teachers, other inputs, other answers


def test_several_teachers_answer_with_the_mean_of_their_probabilities_or_logits():
    nets, x = [make_teacher(seed).eval() for seed in (1, 2, 3)], torch.randn(6, FEATURES)
    logits = np.stack([net(x).detach().numpy() for net in nets]).astype("f8")
    soft = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    averaged = FrozenTeacher(AveragedTeacher(nets))(x)
    np.testing.assert_allclose(averaged.exp().numpy(), soft.mean(0), rtol=1e-5)
    plain = FrozenTeacher(AveragedTeacher(nets, of="logits"))
    np.testing.assert_allclose(plain(x).numpy(), logits.mean(0), rtol=1e-4, atol=1e-6)
    assert plain.fingerprint != FrozenTeacher(AveragedTeacher(nets)).fingerprint
    with pytest.raises(UserError, match="one network or more"):
        AveragedTeacher([])


def test_means_and_logarithms_are_float32_in_mixed_precision():
    nets, x = [nn.Linear(FEATURES, CLASSES) for _ in range(2)], torch.randn(5, FEATURES)
    with torch.autocast("cpu", torch.bfloat16):
        answers = [net(x).float() for net in nets]
        mean = AveragedTeacher(nets)(x)
        logs = AdaptedTeacher(nn.Sequential(nets[0], nn.Sigmoid()), probabilities=True)(x)
    torch.testing.assert_close(mean, torch.stack([a.softmax(-1) for a in answers]).mean(0).log())
    assert logs.dtype is torch.float32


def test_another_normalisation_and_size_are_handled():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
    mean, std, data_mean, data_std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], [0.1, 0.2, 0.3], [1.0, 2.0, 3.0]
    x = torch.randn(4, 3, 8, 8)
    columns = [np.array(v, "f8").reshape(1, 3, 1, 1) for v in (mean, std, data_mean, data_std)]
    pixels = x.numpy() * columns[3] + columns[2]
    wanted = torch.from_numpy((pixels - columns[0]) / columns[1]).float()
    teacher = AdaptedTeacher(net, mean, std, data_mean, data_std)
    torch.testing.assert_close(teacher(x), net(wanted), rtol=1e-4, atol=1e-5)
    sized = AdaptedTeacher(nn.Flatten(), mean, std, data_mean, data_std, size=(4, 12))
    expected = F.interpolate(wanted, (4, 12), mode="bilinear", antialias=True).flatten(1)
    torch.testing.assert_close(sized(x), expected, rtol=1e-4, atol=1e-4)
    assert len({FrozenTeacher(AdaptedTeacher(net, mean, std, size=s)).fingerprint for s in (None, 4, 8)}) == 3


def test_channels_may_be_the_last_axis():
    x = torch.randn(2, 5, 3)
    teacher = AdaptedTeacher(nn.Identity(), mean=[1.0, 2.0, 3.0], std=[1.0, 2.0, 4.0], axis=-1)
    torch.testing.assert_close(teacher(x), (x - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([1.0, 2.0, 4.0]))


def test_probabilities_become_their_logarithms_and_are_warned_of(tmp_path):
    path, weights = linear_graph(tmp_path / "t.onnx", softmax=True)
    x = torch.randn(6, FEATURES)
    logits = x.numpy() @ weights["w"] + weights["b"]
    adapted = AdaptedTeacher(OnnxTeacher(path), probabilities=True)(x)
    centred = adapted - adapted.mean(1, keepdim=True)
    np.testing.assert_allclose(centred.numpy(), logits - logits.mean(1, keepdims=True), rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match=r"look like probabilities.*AdaptedTeacher\(network, probabilities=True\)"):
        warn_of_probabilities(OnnxTeacher(path)(x))
    warn_of_probabilities(adapted)
    warn_of_probabilities(torch.tensor([[1.5, -0.5], [0.5, 0.5]]))  # they sum to 1, and one is negative
    warn_of_probabilities(torch.tensor([[0.5, 0.5], [0.5, 0.6]]))
    with pytest.warns(UserWarning, match="look like probabilities"):
        check_outputs(OnnxTeacher(path), nn.Linear(FEATURES, CLASSES), x[:2])
    check_outputs(OnnxTeacher(path), nn.Linear(FEATURES, CLASSES), x[:2], "regression")


def test_a_std_of_zero_is_refused():
    with pytest.raises(UserError, match="`std`, `data_std` and `size` > 0"):
        AdaptedTeacher(nn.Identity(), std=0.0)


# ---- what is suspicious


class Declared:
    """A data module that says how its images were normalised."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=CLASSES).state_dict(), path)
    return TimmTeacher("test_resnet", CLASSES, checkpoint=str(path))  # timm says: mean 0.5, sd 0.5, 160 x 160


@pytest.mark.parametrize(
    ("adapt", "data", "x", "warned"),
    [
        (None, Declared(0.5, 0.5), torch.randn(8, 3, 160, 160), None),
        (
            None,
            Declared([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            torch.randn(8, 3, 160, 160),
            "The data module declares",
        ),
        (None, object(), 255 * torch.rand(8, 3, 160, 160), r"reads some of mean 12\d"),
        (None, object(), torch.rand(8, 3, 160, 160), r"reads some of mean 0\.[45]\d* and sd 0\.[23]"),
        (None, object(), torch.randn(8, 3, 32, 32), r"images of \(160, 160\), and reads some of \(32, 32\)"),
        ({"size": 160}, object(), torch.rand(8, 3, 32, 32), None),
        (
            {"size": 160, "data_std": 0.1},
            object(),
            torch.rand(8, 3, 32, 32),
            r"of mean -0\.[89]\d* and sd 0\.0",
        ),
        ({"size": 160}, Declared(0.5, 0.25), torch.rand(8, 3, 32, 32), "The data module declares"),
        ({"size": 160, "data_mean": 0.5, "data_std": 0.25}, Declared(0.5, 0.25), 2 * torch.randn(8, 3, 32, 32), None),
        (None, Declared([0.5, 0.5, 0.47], 0.5), torch.randn(8, 3, 160, 160), "The data module declares"),
        (None, Declared([0.5, 0.5, 0.49], 0.5), torch.randn(8, 3, 160, 160), None),
        (None, object(), torch.randn(8, 3, 160, 160) + 1.1, r"reads some of mean 1\.1 and"),
        (None, object(), torch.randn(8, 3, 160, 160) * 2.5, r"reads some of mean \S+ and sd 2\.[45]"),
    ],
)
def test_inputs_that_a_teacher_was_not_trained_on_are_warned_of(trained, adapt, data, x, warned):
    teacher = trained if adapt is None else AdaptedTeacher(trained, **adapt)
    if warned is None:
        warn_of_inputs(teacher, data, x)
    else:
        with pytest.warns(UserWarning, match=warned):
            warn_of_inputs(teacher, data, x)


def test_nothing_is_said_of_a_teacher_that_says_nothing():
    warn_of_inputs(AdaptedTeacher(nn.Flatten(), size=8), Declared(0.5, 0.25), torch.randn(8, 3, 32, 32))
    warn_of_inputs(make_teacher(), Declared(0.0, 1.0), 1000 * torch.rand(8, FEATURES))


def test_a_teacher_that_guesses_is_warned_of():
    """Three standard errors of a guess among four classes are 0.12990 of 100 samples."""
    with pytest.warns(UserWarning, match=r"right for 38\.0% of 100 .* among 4 classes"):
        warn_of_guessing("classification", 0.25 + 0.1298, 4, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also what the suite passes over
        warn_of_guessing("classification", 0.25 + 0.1300, 4, 100)


def test_functions_are_no_part_of_a_fingerprint():
    """They have another name in every process."""
    prints = []
    for identity in (lambda x: x, lambda x: x, "mine", "yours"):
        network = nn.Linear(2, 2)
        nn.init.ones_(network.weight)
        nn.init.ones_(network.bias)
        network.identity = identity
        prints.append(FrozenTeacher(network).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_graph_of_torch_export_is_a_teacher():
    network = make_teacher().eval()
    x = torch.randn(5, FEATURES)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    teacher = FrozenTeacher(program.module())
    assert torch.equal(teacher.train()(x), network(x))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_of_a_regression_that_answers_worse_than_the_mean_is_warned_of():
    with pytest.warns(UserWarning, match=r"R² -12\.7 on the validation part"):
        warn_of_guessing("regression", -12.7, 1, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_guessing("regression", 0.01, 1, 100)


def test_a_run_warns_of_a_teacher_that_guesses(tmp_path):
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_teacher()

        def forward(self, x):
            return self.net(x).roll(2, -1)

    with pytest.warns(UserWarning, match=r"right for \d\.\d% of 64 validation samples"):
        boost(tmp_path, teacher=Shuffled(), settings=settings_for(1))


def test_a_run_looks_at_its_inputs(tmp_path):
    loader = DataLoader(TensorDataset(torch.arange(130.0), torch.zeros(130)), batch_size=2)
    assert some_inputs(loader).tolist() == list(range(0, 130, 3))
    data = Toys()
    data.mean, data.std = 0.5, 0.5
    with pytest.warns(UserWarning, match="The data module declares a normalisation"):
        control(tmp_path, teacher=AdaptedTeacher(make_teacher())).boosting.check(data)


def test_a_probability_of_zero_is_a_small_one():
    """A logarithm of -87 for the zeros of a forest would outweigh all other logits of a sample."""
    logs = AdaptedTeacher(nn.Identity(), probabilities=True)(torch.tensor([[0.99, 0.01, 0.0]]))
    np.testing.assert_allclose(logs.numpy(), np.log([[0.99, 0.01, 1e-7]]), rtol=1e-5)


def test_probabilities_inside_another_teacher_are_refused_for_other_tasks():
    sigmoid = AdaptedTeacher(nn.Sigmoid(), probabilities=True)
    for inside, message in (
        (AveragedTeacher([nn.Identity(), sigmoid], of="logits"), r"AdaptedTeacher\(\.\.\., probabilities=True\)"),
        (AdaptedTeacher(sigmoid), r"AdaptedTeacher\(\.\.\., probabilities=True\)"),
        (AveragedTeacher([AveragedTeacher([nn.Identity()])], of="logits"), r"of='probabilities'"),
    ):
        check_task("classification", inside)
        with pytest.raises(UserError, match=message):
            check_task("multilabel", inside)


def test_weights_leave_an_adapted_teacher_its_own_settings(tmp_path):
    """A teacher trained on normalised data, then used on raw data."""
    net, x = make_teacher().eval(), torch.randn(6, FEATURES)
    save_weights(AdaptedTeacher(net), tmp_path / "t.safetensors")
    teacher = AdaptedTeacher(make_teacher(3).eval(), data_mean=-5.0, data_std=0.1)
    load_weights(teacher, tmp_path / "t.safetensors", "checkpoint")
    torch.testing.assert_close(teacher(10 * x + 50), net(x), rtol=1e-4, atol=1e-4)


def test_a_run_warns_of_sigmoids_and_of_answers_that_depend_on_the_batch(tmp_path):
    class Toys01(Toys):
        def __init__(self):
            super().__init__()
            self.parts = {name: (x, (x[:, :4] > 0).long()) for name, (x, _) in self.parts.items()}

    settings = settings_for(1, task="multilabel")
    with pytest.warns(UserWarning, match=r"outputs are in 0 … 1: they look like probabilities of a sigmoid"):
        control(
            tmp_path / "sigmoid", teacher=nn.Sequential(make_teacher(), nn.Sigmoid()), settings=settings
        ).boosting.check(Toys01())
    whole = nn.Sequential(nn.BatchNorm1d(FEATURES, track_running_stats=False), make_teacher())
    with pytest.warns(UserWarning, match="answers a sample differently among other samples"):
        control(tmp_path / "batch", teacher=whole).boosting.check(Toys())


# ---- from a recipe


def fitted(tmp_path, teacher):
    """The run of a recipe with a teacher, one student of 5,000 digits."""
    config = {
        "seed_everything": 0, "tracking": {"mode": "disabled"},
        "model": {
            "teacher": teacher,
            "student": {"class_path": "bdistil.models.convnets.ConvStudent"},
            "boosting": {"rounds": 1},
        },
        "data": {"class_path": "bdistil.data.digits.Digits", "init_args": {"batch_size": 500}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(config))
    run = RunDirectory(tmp_path / "run")
    assert main(["fit", "--config", str(tmp_path / "recipe.yaml"), "--run_dir", str(run.root)]) == 0
    return run


def test_foreign_teachers_come_trained_in_a_recipe(tmp_path):
    """Two files, one of ONNX and one of TorchScript, averaged and adapted, from YAML alone."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    script = scripted(net, tmp_path / "net.ts", example=torch.randn(2, 1, 28, 28))
    weights = {"w": np.random.default_rng(0).normal(size=(784, 10)).astype("f4")}
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["answers"])]
    path = graph(tmp_path / "t.onnx", nodes, weights, inputs=[1, 28, 28], outputs=10)
    networks = [
        {"class_path": "bdistil.OnnxTeacher", "init_args": {"path": path}},
        {"class_path": "bdistil.TorchScriptTeacher", "init_args": {"path": script}},
    ]
    averaged = {"class_path": "bdistil.AveragedTeacher", "init_args": {"networks": networks}}
    adapted = {"class_path": "bdistil.AdaptedTeacher", "init_args": {"network": averaged, "mean": 0.1, "std": 0.3}}
    run = fitted(tmp_path, {"network": adapted})
    assert run.committed() == 1
    assert not run.teacher.exists()
    assert run.read("teacher")["macs"] == 2 * 7840


def test_a_trained_network_of_an_average_is_used_as_it_is(tmp_path):
    """The other one is trained by the recipe."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    script = scripted(net, tmp_path / "net.ts", example=torch.randn(2, 1, 28, 28))
    networks = [
        {"class_path": "bdistil.TorchScriptTeacher", "init_args": {"path": script}},
        {"class_path": "bdistil.models.StridedConvNet", "init_args": {"channels": [4, 8]}},
    ]
    averaged = {"class_path": "bdistil.AveragedTeacher", "init_args": {"networks": networks}}
    run = fitted(tmp_path, {"network": averaged, "epochs": 1})
    weights = load_file(run.teacher)
    torch.testing.assert_close(weights["networks.0.network.1.weight"], net[1].weight, rtol=0, atol=0)
    assert any(name.startswith("networks.1.") for name in weights)


class LinearProbe(nn.Module):
    """A backbone that is frozen, and a layer on it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.BatchNorm1d(16))
        self.head = nn.Linear(16, 10)
        self.backbone.requires_grad_(False)

    def forward(self, x):
        return self.head(self.backbone(x))


def test_what_a_teacher_has_frozen_stays_so_when_the_recipe_trains_it(tmp_path):
    run = fitted(tmp_path, {"network": {"class_path": f"{__name__}.LinearProbe"}, "epochs": 1})
    weights, fresh = load_file(run.teacher), LinearProbe()
    for name, value in fresh.backbone.state_dict().items():
        assert torch.equal(weights[f"backbone.{name}"], value), name
    assert not torch.equal(weights["head.weight"], fresh.head.weight)


class Frozen(LinearProbe):
    """Nothing of it can be trained."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


def test_a_teacher_without_anything_to_train_is_refused(tmp_path, capsys):
    with pytest.raises(AssertionError):
        fitted(tmp_path, {"network": {"class_path": f"{__name__}.Frozen"}, "epochs": 1})
    assert "Expected a teacher with parameters to train, got one in which all are frozen." in capsys.readouterr().err
