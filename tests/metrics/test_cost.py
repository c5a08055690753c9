"""Costs against closed forms next to the network, torch's formulas on the meta device, and fvcore."""

import copy
import logging
import warnings
from math import prod

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from bdistil.errors import UserError
from bdistil.metrics.cost import FORMULAS, latency_ms, measure_cost, training_macs


class Call(nn.Module):
    """A function as a module, to try operators that no layer runs."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, *inputs):
        return self.function(*self.parts, *inputs)


def oracle(module, *inputs):
    """Multiply-adds by torch, which counts 2 each; on the meta device it also counts recurrent nets and attention."""
    module = copy.deepcopy(module).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        module(*(x.to("meta") for x in inputs))
    return counter.get_total_flops() // 2


def tiny_vit():
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.SiLU(inplace=True),  # 16 x 16
        nn.Conv2d(8, 12, 3, padding="same", groups=4), nn.GroupNorm(2, 12), nn.Hardswish(), nn.MaxPool2d(2),  # 8 x 8
        nn.ConvTranspose2d(12, 4, 2, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


CONV_NET = 256 * 8 * 3 * 9 + 256 * 12 * 2 * 9 + 64 * 12 * 4 * 4 + 4 * 5
STEPS = 99
# Patches; in each of 2 blocks qkv, both products of attention over 17 tokens, projection, MLP; head.
VIT = 16 * 32 * 192 + 2 * 17 * (3 * 32 * 32 + 2 * 17 * 32 + 32 * 32 + 2 * 32 * 128) + 32 * 10
# qkv and projection, both products of attention over 7 tokens, MLP; batch of 2.
ENCODER = 2 * 7 * (4 * 32 * 32 + 2 * 7 * 32 + 2 * 32 * 64)

COUNTED_BY_TORCH = {
    "conv": (conv_net, (2, 3, 32, 32), 2 * CONV_NET),
    "unbatched conv": (lambda: nn.Conv2d(3, 4, 3), (3, 8, 8), 36 * 4 * 27),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 2)), (3, 6), 3 * (6 * 7 + 7 * 2)),
    "lstm": (lambda: nn.LSTM(32, 64, batch_first=True), (1, STEPS, 32), 2_433_024),
    "lstm, two ways, 2 layers": (
        lambda: nn.LSTM(5, 6, 2, bidirectional=True, bias=False), (7, 3, 5), 21 * 2 * 4 * (6 * (5 + 6) + 6 * (12 + 6)),
    ),
    "lstm, unbatched": (lambda: nn.LSTM(5, 6), (7, 5), 7 * 4 * 6 * 11),
    "gru": (lambda: nn.GRU(32, 64, batch_first=True), (1, STEPS, 32), STEPS * 3 * 64 * (32 + 64)),
    "tanh": (lambda: nn.RNN(32, 64), (STEPS, 1, 32), STEPS * 64 * (32 + 64)),
    "relu": (lambda: nn.RNN(4, 3, 2, nonlinearity="relu"), (5, 2, 4), 10 * 3 * (4 + 3 + 3 + 3)),
    "lstm cell": (lambda: nn.LSTMCell(4, 5), (2, 4), 2 * 4 * 5 * (4 + 5)),
    "vit, fused attention": (tiny_vit, (1, 3, 32, 32), VIT),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (2, 7, 32), ENCODER),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED_BY_TORCH)
def test_macs_equal_the_closed_form_and_the_oracle(name):
    make, shape, expected = COUNTED_BY_TORCH[name]
    module, x = make(), torch.randn(shape)
    cost = measure_cost(module, (x,))
    assert cost.macs == expected == oracle(module, x)
    assert cost.by_module[""] == expected
    assert cost.uncounted == {}
    assert cost.params == sum(p.numel() for p in module.parameters())


def plain_conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip


@pytest.mark.parametrize("make", [plain_conv_net, lambda: timm.create_model("test_resnet")], ids=["conv", "resnet"])
def test_macs_equal_those_of_fvcore(make):
    """An independent count, from a trace of the module; fvcore also counts norms and pools, which are free here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing fvcore scripts a function, which torch deprecates
        from fvcore.nn import FlopCountAnalysis

        module, x = make().eval(), torch.randn(2, 3, 32, 32)
        counted = FlopCountAnalysis(module, x).unsupported_ops_warnings(False).tracer_warnings("none").by_operator()
        assert measure_cost(module, (x,)).macs == counted["conv"] + counted["linear"] > 10_000


def packed(lengths, net, x):
    return net(pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False))[0].data


def attended(mask, need_weights, attention, x):
    return attention(x, x, x, attn_mask=mask, need_weights=need_weights)


def attention_net():
    return nn.MultiheadAttention(32, 4, batch_first=True)


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x @ x.T

    @staticmethod
    def backward(ctx, grad):
        return grad


ATTENTION = 7 * 4 * 32 * 32 + 2 * 7 * 7 * 32
CLOSED_FORM = {
    "lstm with projection": (nn.LSTM(5, 6, proj_size=3), [(7, 2, 5)], 14 * (4 * 6 * (5 + 3) + 6 * 3)),
    "packed lstm": (Call(lambda n, x: packed([3, 7], n, x), nn.LSTM(5, 6, batch_first=True)), [(2, 7, 5)], 10 * 264),
    "packed gru": (Call(lambda n, x: packed([4, 2], n, x), nn.GRU(5, 6, batch_first=True)), [(2, 7, 5)], 6 * 198),
    "attention": (Call(lambda n, x: attended(None, True, n, x), attention_net()), [(1, 7, 32)], ATTENTION),
    "attention, additive mask": (
        Call(lambda n, x: attended(torch.zeros(7, 7), True, n, x), attention_net()), [(1, 7, 32)], ATTENTION,
    ),
    "attention, no weights": (Call(lambda n, x: attended(None, False, n, x), attention_net()), [(1, 7, 32)], ATTENTION),
    "sdpa": (Call(nn.functional.scaled_dot_product_attention), [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)], 6 * 35 * 12),
    "matmul, broadcast": (Call(torch.matmul), [(4, 5), (3, 5, 6)], 3 * 4 * 5 * 6),
    "vectors": (Call(lambda a, b: (a @ b, torch.dot(b, b), torch.inner(a, a))), [(4, 5), (5,)], 20 + 5 + 80),
    "baddbmm": (Call(torch.baddbmm), [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
    "einsum": (Call(lambda a, b: torch.einsum("b i ..., i j -> b j ...", a, b)), [(2, 4, 3, 3), (4, 6)], 18 * 4 * 6),
    "tensordot": (Call(lambda a, b: torch.tensordot(a, b, ([1, 2], [0, 1]))), [(5, 3, 4), (3, 4, 7)], 5 * 12 * 7),
    "work that no output depends on": (
        Call(lambda a, b, x: (a(x), b(x))[1], nn.Linear(4, 6), nn.Linear(4, 5)), [(1, 4)], 24 + 20,
    ),
    "checkpointed": (Call(lambda a, x: torch.utils.checkpoint.checkpoint(a, x, use_reentrant=False), nn.Linear(4, 6)),
                     [(1, 4)], 24),
    "autograd function": (Call(Function.apply), [(3, 4)], 3 * 3 * 4),
    "shared layer": (Call(lambda a, b, x: a(x) + b(x), *[nn.Linear(4, 6)] * 2), [(1, 4)], 48),
    "free operators": (Call(lambda x: x.masked_fill_(x > 0, 2).floor_().clamp_(0, 1).softmax(-1).topk(2)), [(1, 4)], 0),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # of torch, which runs them without oneDNN
@pytest.mark.parametrize("name", CLOSED_FORM)
def test_macs_equal_the_closed_form(name):
    module, shapes, expected = CLOSED_FORM[name]
    assert measure_cost(module, tuple(torch.randn(shape) for shape in shapes)).macs == expected


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_frozen_transformer_is_not_cheaper(frozen, padded):
    """In eval mode and frozen, torch would take a fused path, with nested tensors where there is padding."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    net = nn.TransformerEncoder(layer, 2).eval().requires_grad_(not frozen)
    mask = torch.arange(7).expand(2, 7) > 4 if padded else None
    module = Call(lambda net, x, mask: net(x, src_key_padding_mask=mask), net)
    cost = measure_cost(module, (torch.randn(2, 7, 32), mask))
    assert cost.macs == 2 * ENCODER
    assert torch.backends.mha.get_fastpath_enabled()


def test_inputs_may_be_lists_none_and_numbers():
    def student(layer, x, features, factor, nothing=None):
        return {"logits": layer(x) + features[0] * factor, "features": features}

    x = torch.randn(1, 4)
    cost = measure_cost(Call(student, nn.Linear(4, 6)), (x, [torch.randn(1, 6), None], 2, None))
    assert cost.macs == 24


def test_by_module_splits_the_macs():
    net = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 3)))
    assert measure_cost(net, (torch.randn(1, 4),)).by_module == {"": 42, "0": 24, "1": 18, "1.0": 0, "1.1": 18}


def test_shared_parameters_count_once_and_bytes_follow_the_type():
    layer = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    cost = measure_cost(nn.Sequential(layer, layer), (torch.randn(1, 4, dtype=torch.bfloat16),))
    assert (cost.params, cost.weight_bytes, cost.macs) == (16, 32, 32)


UNCOUNTED = {
    "fft": (torch.fft.fft, "aten::_fft_r2c"),
    "cdist": (lambda x: torch.cdist(x, x), "aten::_cdist_forward"),
}


@pytest.mark.parametrize("name", UNCOUNTED)
def test_an_uncounted_operator_is_an_error_or_is_recorded(name):
    function, operator = UNCOUNTED[name]
    module, x = Call(lambda layer, x: (function(layer(x)), function(x)), nn.Linear(4, 4)), torch.randn(3, 4)
    with pytest.raises(UserError, match=rf'Call runs .*not counted: {operator} x2.*pass uncounted="record"'):
        measure_cost(module, (x,))
    cost = measure_cost(module, (x,), uncounted="record")
    assert cost.uncounted == {operator: 2}
    assert cost.macs == 48


def test_inputs_that_are_no_tuple_are_an_error():
    with pytest.raises(UserError, match=r"tuple of positional arguments, such as \(x,\), got .*Tensor"):
        measure_cost(nn.Linear(4, 4), torch.randn(3, 4))


class Restless(nn.Module):
    """Everything that measuring could disturb: statistics, random numbers, modes, buffers, a cache, merged weights."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.frozen = nn.Linear(4, 4).requires_grad_(False).eval()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.cache = {}

    def eval(self):
        self.frozen.weight += 1  # as adapters do that merge into the weights for inference
        return super().eval()

    def forward(self, x):
        self.calls += 1
        self.last = x.mean()
        self.new = self.cache["x"] = self.frozen(self.net(x))
        return self.new + torch.rand(())


def everything(module):
    return {
        "state": {key: value.tolist() for key, value in module.state_dict().items()},
        "modes": {name: part.training for name, part in module.named_modules()},
        "grads": {name: (p.requires_grad, p.grad) for name, p in module.named_parameters()},
        "attributes": {name: sorted(vars(part)) for name, part in module.named_modules()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
        "cache": dict(module.cache),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("measure", [measure_cost, lambda *given: latency_ms(*given, repeats=2, warmup=1)])
@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_left_as_it_was_found(measure, fails):
    module, x = Restless(), torch.randn(3, 5 if fails else 4)
    handle, kept = module.net.register_forward_hook(lambda *_: None), x.clone()
    before = everything(module)
    if fails:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            measure(module, (x,))
    else:
        measure(module, (x,))
    assert everything(module) == before
    assert torch.equal(x, kept), "the module, which writes in place, wrote to what was given"
    handle.remove()
    assert not module.net._forward_hooks
    module(torch.randn(3, 4)).sum().backward()  # nothing of inference mode is left inside


@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_counting_is_the_same_in_any_mode_of_autograd(outside):
    module, seen = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), []
    loss = module(torch.randn(3, 4)).sum()
    module.register_forward_hook(lambda *_: seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled())))
    with outside():
        assert measure_cost(module, (torch.randn(1, 4),)).macs == 16
    assert seen == [(False, False)] * 2
    loss.backward()  # nothing that it saved was written to


def test_counting_logs_nothing(caplog):
    with caplog.at_level(logging.DEBUG):
        measure_cost(tiny_vit(), (torch.randn(1, 3, 32, 32),))
    assert not caplog.records


def conv_bn_relu():
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())


ACTIVATIONS = {
    # Two of the three maps live at once: the input of a layer and its output. The image is not an activation.
    "chain": (conv_bn_relu(), (1, 1, 28, 28), 2 * 16 * 28 * 28 * 4),
    # The second layer's input and output; the first layer's is freed.
    "mlp": (nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 50), nn.Linear(50, 1)), (2, 4), 2 * 150 * 4),
    # `a` is kept for the sum, so it lives with both maps of the second layer.
    "branch": (Call(lambda f, g, x: (a := f(x), g(g(a)) + a)[1], nn.Linear(8, 8), nn.Linear(8, 8)), (1, 8), 3 * 8 * 4),
    "views and work in place": (Call(lambda x: (x + 1).relu_().view(-1)[:2]), (1, 8), 8 * 4),
    "half precision": (nn.Linear(4, 4).double(), (3, 4), 3 * 4 * 8),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("training", [False, True])
def test_activation_bytes_by_hand(name, training):
    module, shape, expected = ACTIVATIONS[name]
    x = torch.randn(shape, dtype=next(module.parameters(), torch.zeros(())).dtype)
    assert measure_cost(module.train(training), (x,)).activation_bytes == expected


def test_macs_grow_with_the_batch():
    net = conv_net()
    one, four = (measure_cost(net, (torch.randn(n, 3, 32, 32),)) for n in (1, 4))
    assert four.macs == 4 * one.macs
    assert four.activation_bytes == 4 * one.activation_bytes
    assert four.weight_bytes == one.weight_bytes == 4 * one.params


def test_latency_is_the_median_of_passes_in_eval_mode(monkeypatch):
    times, seen = iter([0, 100, 0, 1, 0, 5, 0, 2]), []
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    net = nn.Sequential(nn.Dropout(0.5))
    net.register_forward_hook(lambda m, *_: seen.append((m.training, torch.is_inference_mode_enabled())))
    assert latency_ms(net, (torch.randn(2),), repeats=3, warmup=1) == 2000
    assert seen == [(False, True)] * 4
    assert net.training
    assert net[0].training


def test_training_macs():
    assert training_macs(student=10, samples_seen=7) == 3 * 10 * 7
    assert training_macs(student=10, links=4, samples_seen=7, teacher=100, teacher_samples=5) == 7 * 34 + 500


def test_three_forward_passes_are_near_what_torch_counts():
    net, shape = nn.Sequential(*(nn.Conv2d(c, 16, 3, padding=1) for c in (1, 16, 16, 16))), (1, 1, 28, 28)
    forward = measure_cost(net, (torch.randn(shape),)).macs
    with FlopCounterMode(display=False) as counter:
        net.to("meta")(torch.randn(shape, device="meta")).sum().backward()
    first = prod((28, 28, 16, 9))  # the gradient to the image is not needed
    assert counter.get_total_flops() // 2 == 3 * forward - first


def test_formulas_of_recurrent_layers_that_run_on_gpus():
    """The arguments as torch's counter passes them, tensors as their shapes; a GPU test counts a real pass."""
    x, weights = torch.Size((7, 3, 5)), [torch.Size(shape) for shape in ((24, 5), (24, 6), (24,), (24,))]
    state = torch.Size((1, 3, 6))
    assert FORMULAS[torch.ops.aten._cudnn_rnn](x, weights, 4, None, state, state, 2, 6, out_shape=None) == 2 * 21 * 264
    assert FORMULAS[torch.ops.aten.miopen_rnn](x, weights, 4, state, state, 2, 6, out_shape=None) == 2 * 21 * 264
    assert FORMULAS[torch.ops.aten._lstm_mps](x, [state, state], weights, True, 1, out_shape=None) == 2 * 21 * 264


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["conv", "lstm", "vit, fused attention"])
def test_a_gpu_counts_the_same_and_keeps_its_random_state(name):
    make, shape, expected = COUNTED_BY_TORCH[name]
    module, x = make().cuda(), torch.randn(shape, device="cuda")
    before = torch.cuda.get_rng_state()
    assert measure_cost(Call(lambda net, x: (net(x), torch.rand_like(x)), module), (x,)).macs == expected
    assert latency_ms(module, (x,), repeats=3) > 0
    assert torch.equal(torch.cuda.get_rng_state(), before)
