"""Networks of timm by name, as teachers and as students."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.models.inputs import Expectation
from bdistil.models.student import Student
from bdistil.storage.weights import load_weights


class TimmTeacher(nn.Module):
    """A network of timm as a teacher: maps images (B, C, H, W) to logits (B, L).

    Args:
        name: as `timm.list_models()` has it, with or without a tag of pretrained weights.
        outputs: L; as many as timm's own weights have by default.
        in_channels: C.
        checkpoint: a safetensors file, or one of `torch.save`, with weights of this network, as timm names them.
        pretrained: fetch timm's weights, where a hub is reachable.
        options: what else timm takes for this network, for example ``{"img_size": 28}`` of a ViT.

    Raises:
        UserError: the name, an option or the file is wrong, or there is no way to the pretrained weights.
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
        _one_source(checkpoint, pretrained)
        self.network = build_timm(name, outputs, in_channels, pretrained, options)
        if checkpoint:
            load_weights(self.network, Path(checkpoint), "checkpoint")
        own: Any = self.network.pretrained_cfg
        self.trained = bool(checkpoint) or (pretrained and outputs in (None, own["num_classes"]))
        self.expects = (
            Expectation(tuple(own["mean"]), tuple(own["std"]), tuple(own["input_size"][1:]))
            if checkpoint or pretrained
            else None
        )
        # A file that timm wrote is also taken as `model.teacher.checkpoint`, whose names begin with `network.`.
        self.register_load_state_dict_pre_hook(_named_as_here)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L) of images (B, C, H, W)."""
        logits: Tensor = self.network(x)
        return logits


def _named_as_here(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    names = [name for name in state if name.startswith(prefix)]
    if not any(name.startswith(f"{prefix}network.") for name in names):
        for name in names:
            state[f"{prefix}network.{name.removeprefix(prefix)}"] = state.pop(name)


class TimmBody(nn.Module):
    """A network of timm up to what its classifier reads, (B, D).

    Args:
        network: its classifier is taken out and replaced by nothing.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D) of images (B, C, H, W)."""
        maps = self.network.forward_features(x)  # type: ignore[operator]
        features: Tensor = self.network.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        return features


class TimmStudent(Student):
    """A network of timm as a student: what its classifier reads is exported to later students, before links join.

    Args:
        name: as `timm.list_models()` has it.
        outputs: L.
        in_channels: C.
        checkpoint: weights to start from; a classifier of another L in the file is left out.
        pretrained: start from timm's weights, where a hub is reachable.
        options: what else timm takes for this network.
        width: factor on its width, for wider rungs of the ladder: networks of the ResNet, ConvNeXt and ViT families.

    Raises:
        UserError: as of `TimmTeacher`, or the network has no single classifier, or can not be widened.
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
        _one_source(checkpoint, pretrained)
        network = build_timm(name, outputs, in_channels, pretrained, options)
        if width != 1:
            if checkpoint or pretrained:
                raise UserError(
                    f"Weights of {name!r} do not fit a network of width x{width:g}. Leave out `checkpoint` and "
                    "`pretrained`, or the rungs with a `width` from the ladder."
                )
            wider = {**(options or {}), **widened(network, name, width)}
            network = build_timm(name, outputs, in_channels, False, wider)
        place, head = _classifier(network, name)
        if checkpoint:
            load_weights(network, Path(checkpoint), "checkpoint", new=[f"{place}.{key}" for key in head.state_dict()])
        size = (options or {}).get("img_size", network.pretrained_cfg["input_size"][1:])  # type: ignore[index]
        super().__init__(*_taken_apart(network, place, head, name, _one_image(in_channels, size)))


def build_timm(
    name: str, outputs: int | None, in_channels: int, pretrained: bool, options: Mapping[str, Any] | None
) -> nn.Module:
    """A network of timm, its arguments as of `TimmTeacher`; the one place that calls `timm.create_model`.

    Raises:
        UserError: the name or an option is wrong, or there is no way to the pretrained weights.
    """
    import timm

    if ":" not in name and not timm.is_model(name):
        raise UserError(_unknown(name, timm.list_models()))
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


def _one_source(checkpoint: str | None, pretrained: bool) -> None:
    if checkpoint and pretrained:
        raise UserError(f"Expected `checkpoint` or `pretrained`, got both ({checkpoint!r}). Leave one out.")


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.partition(".")[0], known, 3, 0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"Expected `name` to be a network of timm (see timm.list_models()), got {name!r}.{hint}"


def _classifier(network: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Dotted name of the classifier, and the classifier: linear, or a convolution of 1x1."""
    head = network.get_classifier() if hasattr(network, "forward_head") else None  # type: ignore[operator]
    places = [place for place, module in network.named_modules() if module is head]
    if not places or not isinstance(head, nn.Linear | nn.Conv2d):
        raise UserError(_inseparable(name, f"its classifier is a {type(head).__name__}"))
    return places[0], head


def _inseparable(name: str, why: str) -> str:
    return (
        f"Expected a network of timm whose answers are one linear classifier on what forward_head() gives, got "
        f"{name!r}: {why}. Take another one, or give Student(body, head) your own parts of it."
    )


@torch.no_grad()
def _taken_apart(network: nn.Module, place: str, head: nn.Module, name: str, x: Tensor) -> tuple[nn.Module, nn.Linear]:
    """Body and head, after a look at one image x whether the two together answer as the network does."""
    linear = head if isinstance(head, nn.Linear) else _as_linear(head)
    whole = network.eval()(x)
    network.set_submodule(place, nn.Identity())
    body = TimmBody(network)
    try:
        same = torch.allclose(whole, linear(body(x)), rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
    except (RuntimeError, TypeError) as error:
        raise UserError(_inseparable(name, str(error))) from error
    if not same:
        raise UserError(_inseparable(name, "the two together answer otherwise than the network"))
    return body.train(), linear.train()


def _as_linear(convolution: nn.Module) -> nn.Linear:
    """A classifier that is a convolution of 1x1, as the linear layer that it is."""
    weight: Any = convolution.weight
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=convolution.bias is not None)
    linear.load_state_dict({key: value.flatten(1) if value.ndim > 1 else value for key, value in
                            convolution.state_dict().items()})  # fmt: skip
    return linear


def _one_image(channels: int, size: int | Sequence[int]) -> Tensor:
    """Noise of the same values at every call (1, C, H, W); the random state stays as it is."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def widened(network: nn.Module, name: str, width: float) -> dict[str, Any]:
    """Options of timm for the same network, `width` times as wide.

    Raises:
        UserError: it is of a family without such an option.
    """
    from timm.models.convnext import ConvNeXt
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

    info: Any = network.feature_info if isinstance(network, ResNet | ConvNeXt) else None
    if isinstance(network, VisionTransformer):
        blocks: Any = network.blocks
        heads = int(blocks[0].attn.num_heads)
        return {"embed_dim": heads * max(1, round(network.embed_dim * width / heads))}
    if isinstance(network, ConvNeXt):
        return {"dims": tuple(max(1, round(stage["num_chs"] * width)) for stage in info)}
    if isinstance(network, ResNet):
        layer: Any = network.layer1
        expansion = layer[0].expansion
        stages = [stage["num_chs"] for stage in info if stage["module"].startswith("layer")]
        return {"channels": tuple(max(1, round(chs / expansion * width)) for chs in stages)}
    raise UserError(
        f"Expected a network of the ResNet, ConvNeXt or ViT families for a rung of width x{width:g}, got {name!r}, a "
        f"{type(network).__name__}. Leave such rungs out of the ladder, or write make_student(round, width=1.0) that "
        "takes another name of timm for a wider one."
    )
