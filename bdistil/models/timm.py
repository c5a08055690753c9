"""Networks of timm by name, as teachers and as students."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.inputs import Expectation
from bdistil.models.student import Student, scaled
from bdistil.storage.weights import load_weights
from bdistil.utils.modules import eval_mode, kept_buffers
from bdistil.utils.paths import user_path
from bdistil.utils.seeding import drawn_from


class TimmTeacher(nn.Module):
    """A network of timm as a teacher: maps images (B, C, H, W) to logits (B, L).

    Args:
        name: as in `timm.list_models()`, with or without a tag of pretrained weights.
        outputs: L; that of timm's own weights by default.
        in_channels: C.
        checkpoint: a file with weights of this network under timm's names, see `bdistil.storage.load_weights`.
        pretrained: download timm's weights; a hub must be reachable.
        options: further arguments of the network in timm, for example ``{"img_size": 28}`` for a ViT.

    Raises:
        UserError: the name, an option or the file is wrong, or the pretrained weights are unreachable.

    Example:
        >>> TimmTeacher("test_resnet", outputs=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        name: str,
        outputs: int | None = None,
        in_channels: int = 3,
        checkpoint: str | None = None,
        pretrained: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = build_timm(name, outputs, in_channels, checkpoint, pretrained, options)
        if checkpoint:
            load_weights(self.network, user_path(checkpoint, "checkpoint"), "checkpoint")
        own: Any = self.network.pretrained_cfg
        self.trained = bool(checkpoint) or (pretrained and outputs in (None, own["num_classes"]))
        self.expects = (
            Expectation(tuple(own["mean"]), tuple(own["std"]), tuple(own["input_size"][1:]))
            if checkpoint or pretrained
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L) of images (B, C, H, W)."""
        logits: Tensor = self.network(x)
        return logits


class TimmStudent(Student):
    """A network of timm as a student; it exports the input of its classifier to later students.

    If the network calls its layers in sequence, its stages are those that timm lists in `feature_info`.

    Args:
        name: as in `timm.list_models()`.
        outputs: L.
        in_channels: C.
        checkpoint: weights to start from; a classifier for another L in the file is ignored.
        pretrained: start from timm's weights; a hub must be reachable.
        options: further arguments of the network in timm.
        width: factor on its width, for wider rungs of the ladder; only for the ResNet, ConvNeXt and ViT families.

    Raises:
        UserError: as for `TimmTeacher`; or the network has no single linear classifier, or cannot be widened.

    Example:
        >>> student = TimmStudent("test_resnet", outputs=10)
        >>> student.features(torch.zeros(2, 3, 32, 32)).shape == (2, student.width)
        True
    """

    def __init__(
        self,
        name: str,
        outputs: int,
        in_channels: int = 3,
        checkpoint: str | None = None,
        pretrained: bool = False,
        options: dict[str, Any] | None = None,
        width: float = 1.0,
    ) -> None:
        network = build_timm(name, outputs, in_channels, checkpoint, pretrained, options)
        if width != 1:
            if checkpoint or pretrained:
                raise UserError(
                    f"Weights of {name!r} do not fit a network of width x{width:g}. Leave out `checkpoint` and "
                    "`pretrained`, or the rungs with a `width` from the ladder."
                )
            wider = {**(options or {}), **widened(network, name, width)}
            network = build_timm(name, outputs, in_channels, None, False, wider)
        head = network.get_classifier() if hasattr(network, "get_classifier") else None  # type: ignore[operator]
        place = next((place for place, module in network.named_modules() if module is head), None)
        if place is None or not isinstance(head, nn.Linear | nn.Conv2d):
            raise _inseparable(name, f"its classifier is a {type(head).__name__}")
        if checkpoint:
            load_weights(
                network,
                user_path(checkpoint, "checkpoint"),
                "checkpoint",
                new=[f"{place}.{key}" for key in head.state_dict()],
            )
        size = (options or {}).get("img_size", network.pretrained_cfg["input_size"][1:])  # type: ignore[index]
        sides = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(0)  # the global random state stays as it is
        image = torch.rand(1, in_channels, *sides, generator=generator)
        body, linear = _split(network, head, name, image)
        stages = _stages(body, image)
        super().__init__(None if stages else body, linear, stages=stages)


def build_timm(
    name: str,
    outputs: int | None,
    in_channels: int,
    checkpoint: str | None,
    pretrained: bool,
    options: Mapping[str, Any] | None,
) -> nn.Module:
    """Makes a network of timm, without the weights of `checkpoint`; the arguments are those of `TimmTeacher`.

    Raises:
        UserError: the name or an option is wrong, both kinds of weights were given, or the pretrained weights are
            unreachable.
    """
    import timm

    if checkpoint and pretrained:
        raise UserError(f"Expected `checkpoint` or `pretrained`, got both ({checkpoint!r}). Leave one out.")
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 3, 0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UserError(f"Expected `name` to be a network of timm (see timm.list_models()), got {name!r}.{hint}")
    chosen = {"in_chans": in_channels, **({} if outputs is None else {"num_classes": outputs}), **(options or {})}
    try:
        network: nn.Module = timm.create_model(name, pretrained=pretrained, **chosen)
    except TypeError as error:
        raise UserError(f"timm does not make {name!r} with the options {chosen}: {error}.") from error
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained and ":" not in name:
            raise
        raise UserError(
            f"timm's weights of {name!r} cannot be had here ({error}). "
            "Give `checkpoint`, a file on this machine with weights of that network, and pretrained=False."
        ) from error
    return network


@torch.no_grad()
def _split(network: nn.Module, head: nn.Linear | nn.Conv2d, name: str, image: Tensor) -> tuple[nn.Module, nn.Linear]:
    """The network without its classifier, and the classifier as a linear layer.

    Some timm networks have further layers after the classifier, or several classifiers, so the composition of both
    parts is compared with the network on an image (1, C, H, W).
    """
    whole = network.eval()(image)
    if isinstance(head, nn.Linear):
        linear = head
    else:  # a 1x1 convolution of pooled features
        linear = nn.Linear(head.in_channels, head.out_channels, bias=head.bias is not None)
        linear.load_state_dict({k: v.flatten(1) if v.ndim > 1 else v for k, v in head.state_dict().items()})
    try:
        network.reset_classifier(0)  # type: ignore[operator]
        same = torch.allclose(whole, linear(network(image)), rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
    except (RuntimeError, TypeError) as error:
        raise _inseparable(name, str(error)) from error
    if not same:
        raise _inseparable(name, "the two together answer otherwise than the network")
    return network.train(), linear.train()


@torch.no_grad()
def _stages(network: nn.Module, image: Tensor) -> list[nn.Module]:
    """The layers of a network, split after those in timm's `feature_info`; none if it does more than call them.

    A vision transformer, for example, adds position embeddings between two layers.
    """
    info = network.feature_info if isinstance(network.feature_info, list) else []
    cuts, layers = [feature["module"] for feature in info], OrderedDict[str, nn.Module]()
    for name, child in network.named_children():
        inside = isinstance(child, nn.Sequential) and any(cut.startswith(f"{name}.") for cut in cuts)
        layers |= {f"{name}.{key}": part for key, part in child.named_children()} if inside else {name: child}
    stages: list[nn.Module] = [nn.Sequential()]
    for name, layer in layers.items():
        cast(nn.Sequential, stages[-1]).append(layer)
        if name in cuts:
            stages.append(nn.Sequential())
    chain, rate = nn.Sequential(*stages), float(getattr(network, "drop_rate", 0.0))
    try:
        if len(stages) < 2 or not _same(chain, network, image, training=False):
            return []
        if not _same(chain, network, image, training=True):  # some networks call the dropout as a function
            cast(nn.Sequential, stages[-1]).append(nn.Dropout(rate))
            return stages if _same(chain, network, image, training=True) else []
    except (RuntimeError, TypeError, ValueError):
        return []
    return stages


def _same(chain: nn.Module, network: nn.Module, image: Tensor, *, training: bool) -> bool:
    """Whether two modules with the same layers answer the same for an image (1, C, H, W); their state is restored."""
    images, answers = image.repeat(2, 1, 1, 1), []  # batch norm trains on two values or more
    with eval_mode(network), eval_mode(chain), kept_buffers(network):
        for module in (chain, network):
            module.train(training)
            with drawn_from("dropout"):
                answers.append(module(images))
    return torch.equal(*answers)


def _inseparable(name: str, why: str) -> UserError:
    return UserError(
        f"Expected a network of timm that is a body and one linear classifier, got {name!r}: {why}. Take another one, "
        "or give Student(body, head) your own parts of it."
    )


def widened(network: nn.Module, name: str, width: float) -> dict[str, Any]:
    """Options of timm for the same network, `width` times as wide.

    Raises:
        UserError: its family has no such option.
    """
    from timm.models.convnext import ConvNeXt
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

    info: Any = network.feature_info if isinstance(network, ResNet | ConvNeXt) else None
    if isinstance(network, VisionTransformer):
        blocks: Any = network.blocks
        heads = int(blocks[0].attn.num_heads)
        return {"embed_dim": heads * scaled([network.embed_dim // heads], width)[0]}
    if isinstance(network, ConvNeXt):
        return {"dims": tuple(scaled([stage["num_chs"] for stage in info], width))}
    if isinstance(network, ResNet):
        layer: Any = network.layer1
        expansion = layer[0].expansion
        stages = [stage["num_chs"] // expansion for stage in info if stage["module"].startswith("layer")]
        return {"channels": tuple(scaled(stages, width))}
    raise UserError(
        f"Expected a network of the ResNet, ConvNeXt or ViT families for a rung of width x{width:g}, got {name!r}, a "
        f"{type(network).__name__}. Leave such rungs out of the ladder, or write make_student(round, width=1.0) that "
        "takes another name of timm for a wider one."
    )
