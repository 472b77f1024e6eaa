"""The model: image → pixel_embed → fold → depth × (inner, fold, outer) → norm → pool → head.

Parameter names, constructor arguments and behaviour are timm's (timm.models.tnt, 1.0.31), so weights go both ways with
``load_state_dict``. What the paper studies and timm cannot build comes as keyword-only arguments of ``TNT``.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tnt_fast import attention, dispatch, reference

update_model_input_size: Any
try:
    from timm.models._input import update_model_input_size
except ImportError:  # before timm 1.0.31, which keeps no record of a model's input
    update_model_input_size = None

__all__ = ["TNT"]


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_heads(what: str, heads: int, width_name: str, width: int) -> None:
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    _require(
        heads >= 1 and width % heads == 0,
        f"{what}={heads} does not divide {width_name}={width}; accepted: {', '.join(map(str, divisors))}",
    )


class Attention(nn.Module):
    """Multi-head self-attention over ``(B, T, dim)``, queries and keys from one Linear, values from another.

    ``attn_drop`` sees the attention probabilities ``(B, H, T, T)``: hook it to look at them.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.head_dim = hidden_dim // num_heads
        self.scale = self.head_dim**-0.5

        self.qk = nn.Linear(dim, hidden_dim * 2, bias=qkv_bias, **dd)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop, inplace=True)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop, inplace=True)
        self.attn_backend = "eager"

    def forward(self, x: Tensor, fused: bool = False) -> Tensor:
        """``fused``: on the fused path, where "auto" is PyTorch's fused attention."""
        if not torch.jit.is_scripting():
            quick = not (fused or self.training) and self.attn_backend == "auto" and attention.only_infers(x)
            backend = self._backend(fused or quick)
            if backend != "eager":
                return self._attend(x, backend, quick)
        weights = self.attn_drop(reference.attention_weights(self.qk(x), self.num_heads))
        return self.proj_drop(self.proj(reference.attend(weights, self.v(x))))

    @torch.jit.unused
    def _backend(self, fused: bool) -> str:
        """What computes this attention: "eager", too, where somebody drops or looks at the probabilities."""
        drop = self.attn_drop
        if self.attn_backend == "eager" or (self.attn_backend == "auto" and not fused) or dispatch.is_looked_at(drop):
            return "eager"
        return "sdpa" if self.attn_backend == "auto" else self.attn_backend

    @torch.jit.unused
    def _attend(self, x: Tensor, backend: str, quick: bool) -> Tensor:
        (B, T, _), H = x.shape, self.num_heads
        qk, v = self._at_once(x) if quick else (self.qk(x), self.v(x))  # whatever these are: widths as the reference finds them
        q, k = qk.reshape(B, T, 2, H, qk.shape[-1] // 2 // H).unbind(2)
        v = v.reshape(B, T, H, v.shape[-1] // H)
        return self.proj_drop(self.proj(attention.attend(q, k, v, backend).flatten(2)))

    @torch.jit.unused
    def _at_once(self, x: Tensor) -> tuple[Tensor, ...]:
        """What qk and v give, in one product where that is faster and they are nothing but Linears that it takes."""
        layers, joined = (self.qk, self.v), not attention.mkl_is_fast()
        if joined and all([dispatch.is_plain_linear(layer, x) and attention.has_onednn(layer.weight) for layer in layers]):
            return attention.linears(x, [layer.weight for layer in layers], [layer.bias for layer in layers])
        return self.qk(x), self.v(x)


class AttentionMaps(NamedTuple):
    """Attention probabilities of chosen blocks, whose rows (last axis) sum to one: see ``TNT.forward_attention``."""

    inner: Tensor
    outer: Tensor


class SqueezeExcite(nn.Module):
    """Channel attention over the outer MLP's output (paper, Table 12; layout and names of the authors' release)."""

    def __init__(self, dim: int, ratio: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        hidden = int(dim * ratio)
        self.fc = nn.Sequential(
            nn.LayerNorm(dim, **dd), nn.Linear(dim, hidden, **dd), nn.ReLU(), nn.Linear(hidden, dim, **dd), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(dim=1, keepdim=True)) * x


class Block(nn.Module):
    """One TNT block: inner transformer, fold, outer transformer. ``(pixel, patch)`` in, ``(pixel, patch)`` out.

    Args:
        dim, dim_out: C and E. num_pixel: S. num_heads_in, num_heads_out: heads inside and outside.
        mlp_ratio, inner_mlp_ratio: hidden width of the outer and the inner MLP over E and C (timm fixes the inner at 4).
        drop_path: rate, per patch inside, per image outside; the fold is never dropped (as in timm).
        legacy: fold with one norm over each pixel and a bias; else with a norm on each side and none.
        has_inner: False leaves an ordinary ViT block (paper, Table 5). se_ratio: above 0 adds SE (paper, Table 12).
    """

    has_inner: Final[bool]
    has_se: Final[bool]

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_pixel: int,
        num_heads_in: int = 4,
        num_heads_out: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        legacy: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        inner_mlp_ratio: float = 4.0,
        has_inner: bool = True,
        se_ratio: float = 0.0,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.has_inner = has_inner
        self.has_se = se_ratio > 0
        self.recompute = "none"
        self.legacy = legacy

        if has_inner:
            self.norm_in = norm_layer(dim, **dd)
            self.attn_in = Attention(dim, dim, num_heads_in, qkv_bias, attn_drop, proj_drop, **dd)
            self.norm_mlp_in = norm_layer(dim, **dd)
            self.mlp_in = Mlp(dim, int(dim * inner_mlp_ratio), dim, act_layer=act_layer, drop=proj_drop, **dd)
            self.norm1_proj = norm_layer(dim if legacy else dim * num_pixel, **dd)
            self.proj = nn.Linear(dim * num_pixel, dim_out, bias=legacy, **dd)
            self.norm2_proj = None if legacy else norm_layer(dim_out, **dd)

        self.norm_out = norm_layer(dim_out, **dd)
        self.attn_out = Attention(dim_out, dim_out, num_heads_out, qkv_bias, attn_drop, proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm_mlp = norm_layer(dim_out, **dd)
        self.mlp = Mlp(dim_out, int(dim_out * mlp_ratio), dim_out, act_layer=act_layer, drop=proj_drop, **dd)
        if self.has_se:
            self.se_layer = SqueezeExcite(dim_out, se_ratio, **dd)

    def forward(self, pixel: Tensor, patch: Tensor, fused: bool = False) -> tuple[Tensor, Tensor]:
        if self.has_inner:
            if fused and not torch.jit.is_scripting():
                return self._fused(pixel, patch, fused)
            pixel = self.inner(pixel, fused)
            patch = self.fold(pixel, patch, fused)
        return pixel, self.outer(patch, fused)

    @torch.jit.unused
    def _fused(self, pixel: Tensor, patch: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
        """As one operation where that can be."""
        outer: Any = None
        if type(self) is Block and not any([name in self.__dict__ for name in ("inner", "fold", "outer")]):
            if _is_chosen(fused):
                whole, outer = fused.block(self, patch)  # type: ignore[attr-defined]
                if whole is not None:
                    return whole(pixel, patch, *self._scales(pixel), *self._scales(patch))
            elif (given := dispatch.block_arguments(self, patch)) is not None:
                inner_attn_scale, inner_mlp_scale = self._scales(pixel)
                attn_scale, mlp_scale = self._scales(patch)
                return dispatch.kernel("block").trusted(
                    pixel=pixel, patch=patch, **given, inner_attn_scale=inner_attn_scale, inner_mlp_scale=inner_mlp_scale,
                    attn_scale=attn_scale, mlp_scale=mlp_scale,
                )  # fmt: skip
        pixel = self.inner(pixel, fused)
        patch = self.fold(pixel, patch, fused)
        return pixel, self.outer(patch, True) if outer is None else outer(patch, None, *self._scales(patch))

    def inner(self, pixel: Tensor, fused: bool = False) -> Tensor:
        """``reference.inner`` over the pixels ``(B·N, S, C)`` of every patch."""
        if fused and not torch.jit.is_scripting():
            return self._fused_inner(pixel, fused)
        pixel = pixel + self.drop_path(self.attn_in(self.norm_in(pixel)))
        x = self.norm_mlp_in(pixel)
        return pixel + self.drop_path(self.mlp_in(x) if torch.jit.is_scripting() else self._mlp("mlp_in", x))

    def fold(self, pixel: Tensor, patch: Tensor, fused: bool = False) -> Tensor:
        """``reference.fold``: add the projected pixels onto the patches ``(B, 1 + N, E)``."""
        if fused and not torch.jit.is_scripting():
            return _fused_fold(self, pixel, patch, fused)
        B, T = patch.shape[0], patch.shape[1]
        if self.norm2_proj is None:
            x = self.proj(self.norm1_proj(pixel).reshape(B, T - 1, pixel.shape[1] * pixel.shape[2]))
        else:
            x = self.norm2_proj(self.proj(self.norm1_proj(pixel.reshape(B, T - 1, pixel.shape[1] * pixel.shape[2]))))
        return torch.cat([patch[:, :1], patch[:, 1:] + x], dim=1)

    def outer(self, patch: Tensor, fused: bool = False) -> Tensor:
        """``reference.outer`` over the patches ``(B, 1 + N, E)``, with SE where the block has it."""
        if fused and not torch.jit.is_scripting():
            given = dispatch.outer_arguments(self, patch)
            if given is not None:
                return self._fused_transformer("outer", given, patch=patch)
            patch = patch + self.drop_path(self._attn_out(self.norm_out(patch)))
        else:
            patch = patch + self.drop_path(self.attn_out(self.norm_out(patch)))
        x = self.norm_mlp(patch)
        x = self.mlp(x) if torch.jit.is_scripting() else self._mlp("mlp", x)
        if self.has_se:
            x = x + self.se_layer(x)
        return patch + self.drop_path(x)

    @torch.jit.unused
    def _mlp(self, name: str, x: Tensor) -> Tensor:
        """What the MLP gives, to the bit; GELU in place where that can be: new pages take a CPU longer than GELU itself."""
        mlp: Any = getattr(self, name)
        if attention.only_infers(x) and dispatch.is_plain_mlp(self, name, x):
            return mlp.fc2(torch.ops.aten.gelu_(mlp.fc1(x)))
        return mlp(x)

    @torch.jit.unused
    def _fused_inner(self, pixel: Tensor, fused: bool) -> Tensor:
        if type(self) is Block and _is_chosen(fused):
            inner = fused.settled("inner", self, self._inner_arguments)  # type: ignore[attr-defined]
            return inner(pixel, *self._scales(pixel))
        return self._fused_transformer("inner", self._inner_arguments(), pixel=pixel)

    @torch.jit.unused
    def _attn_out(self, x: Tensor) -> Tensor:
        return self.attn_out(x, True) if isinstance(self.attn_out, Attention) else self.attn_out(x)

    @torch.jit.unused
    def _fused_transformer(self, operation: str, given: dict[str, Any], **activation: Tensor) -> Tensor:
        attn_scale, mlp_scale = self._scales(next(iter(activation.values())))
        return dispatch.kernel(operation).trusted(**activation, **given, attn_scale=attn_scale, mlp_scale=mlp_scale)

    @torch.jit.unused
    def _scales(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of the attention and of the MLP, as ``_drop_path_scale`` draws them."""
        drop_path: Any = self._modules["drop_path"]
        if type(drop_path) is nn.Identity:
            return None, None
        return _drop_path_scale(drop_path, x), _drop_path_scale(drop_path, x)

    @torch.jit.ignore
    def _inner_arguments(self) -> dict[str, Any]:
        return transformer_arguments(self.norm_in, self.attn_in, self.norm_mlp_in, self.mlp_in)

    @torch.jit.ignore
    def outer_arguments(self) -> dict[str, Any]:
        """What the fused ``outer`` is given besides the patches and drop-path's factors."""
        return transformer_arguments(self.norm_out, self.attn_out, self.norm_mlp, self.mlp) | {"recompute": self.recompute}

    @torch.jit.ignore
    def block_arguments(self, outer: dict[str, Any]) -> dict[str, Any] | None:
        """What the fused ``block`` is given besides activations and factors, ``outer``'s, too; None: there are several eps."""
        inner, fold = self._inner_arguments(), _fold_arguments(self)
        if not inner["eps"] == fold.pop("eps") == outer["eps"]:
            return None
        of_inner = dict(inner_weights=reference.InnerWeights(*inner["weights"]), inner_heads=inner["num_heads"])
        return outer | of_inner | dict(fold_weights=reference.FoldWeights(*fold.values()))

    @torch.jit.ignore
    def fused_arguments(self) -> dict[str, dict[str, Any]]:
        """What each fused operation of the block is given besides activations and drop-path's factors, by its name."""
        if not self.has_inner:
            return {}
        return {"inner": self._inner_arguments(), "fold": _fold_arguments(self)}


def transformer_arguments(norm1: Any, attn: Any, norm2: Any, mlp: Any) -> dict[str, Any]:
    a, m = attn._modules, mlp._modules
    layers = (norm1, a["qk"], a["v"], a["proj"], norm2, m["fc1"], m["fc2"])
    weights = reference.TransformerWeights(*[x for layer in layers for x in _weight_and_bias(layer)])
    return dict(weights=weights, num_heads=attn.num_heads, eps=norm1.eps)


def _is_chosen(fused: Any) -> bool:
    """Whether the model has been found as it was, so that what ``dispatch.Chosen`` remembers of it can be taken."""
    return isinstance(fused, dispatch.Chosen) and not torch.compiler.is_compiling()


def _weight_and_bias(layer: Any) -> tuple[Any, Any]:
    """Past ``Module.__getattr__``, which is slow: a forward asks hundreds of times."""
    own = layer._parameters
    return (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (layer.weight, layer.bias)


def _fold_arguments(owner: Any) -> dict[str, Any]:
    """Of a block, or of the model for its stem."""
    norm1, norm2 = owner.norm1_proj, owner.norm2_proj
    names = ("norm1_weight", "norm1_bias", "proj_weight", "proj_bias", "norm2_weight", "norm2_bias")
    second = (None, None) if norm2 is None else _weight_and_bias(norm2)
    found = (*_weight_and_bias(norm1), *_weight_and_bias(owner.proj), *second)
    return {**dict(zip(names, found, strict=True)), "eps": norm1.eps}


def _drop_path_scale(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """The factors ``(rows of x,)`` that timm's DropPath would draw: 0, or 1 / keep; None if it is off."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.drop_prob == 0.0:
        return None
    keep = 1 - drop_path.drop_prob
    scale = x.new_empty((x.shape[0],)).bernoulli_(keep)
    return scale.div_(keep) if keep > 0.0 and drop_path.scale_by_keep else scale


def _fused_fold(owner: nn.Module, pixel: Tensor, patch: Tensor, fused: Any) -> Tensor:
    if _is_chosen(fused):
        return fused.settled("fold", owner, lambda: _fold_arguments(owner))(pixel, patch)
    return dispatch.kernel("fold").trusted(pixel=pixel, patch=patch, **_fold_arguments(owner))


class PixelEmbed(nn.Module):
    """Image ``(B, in_chans, H, W)`` to pixel tokens ``(B·N, S, in_dim)``: ``reference.pixel_embed``.

    Args:
        img_size, patch_size, patch_stride: in image pixels, int or (vertical, horizontal). ``patch_stride`` smaller than the
            patch makes neighbouring patches overlap; None: they touch.
        strict_img_size: False takes images of any size that the patches cover.
        stride: of the 7×7 convolution; divides patch and patch stride. S = (patch / stride)².
        legacy: zero padding at the image border only (else at every patch border).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        in_dim: int = 48,
        stride: int = 4,
        legacy: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        patch_stride: int | tuple[int, int] | None = None,
        strict_img_size: bool = True,
    ):
        super().__init__()
        self.strict_img_size = strict_img_size
        self.patch_size: tuple[int, int] = to_2tuple(patch_size)
        self.patch_stride: tuple[int, int] = self.patch_size if patch_stride is None else to_2tuple(patch_stride)
        for axis, patch, step in zip(("height", "width"), self.patch_size, self.patch_stride, strict=True):
            _require(patch >= 1, f"patch_size {patch} ({axis}) is not positive")
            divisors = ", ".join(str(d) for d in range(1, patch + 1) if patch % d == 0)
            _require(
                stride >= 1 and patch % stride == 0,
                f"first_stride={stride} does not divide the patch {axis} {patch}; accepted: {divisors}",
            )
            _require(
                1 <= step <= patch and step % stride == 0,
                f"patch_stride {step} ({axis}) must be a multiple of first_stride={stride}, at most the patch {axis} {patch}",
            )
        self.set_input_size(to_2tuple(img_size))
        self.in_chans = in_chans
        self.in_dim = in_dim
        self.stride = stride
        self.legacy = legacy
        self.new_patch_size = (self.patch_size[0] // stride, self.patch_size[1] // stride)
        self.pixel_step = (self.patch_stride[0] // stride, self.patch_stride[1] // stride)
        self.proj = nn.Conv2d(in_chans, in_dim, kernel_size=7, padding=3, stride=stride, device=device, dtype=dtype)

    @torch.jit.ignore
    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Take images of another height and width.

        Raises:
            ValueError: patches do not cover them.
        """
        self._check_covered(img_size)
        self.img_size: tuple[int, int] = img_size
        self.grid_size = self.dynamic_feat_size(img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    @torch.jit.unused
    def _check_covered(self, img_size: tuple[int, int]) -> None:
        for axis, image, patch, step in zip(("height", "width"), img_size, self.patch_size, self.patch_stride, strict=True):
            below = patch + max(image - patch, 0) // step * step
            _require(
                image >= patch and (image - patch) % step == 0,
                f"img_size {image} ({axis}) is not covered by patches of {patch} every {step}; "
                f"accepted near it: {below}, {below + step}",
            )

    def feat_ratio(self, as_scalar: bool = True) -> tuple[int, int] | int:
        return max(self.patch_stride) if as_scalar else self.patch_stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        return (
            (img_size[0] - self.patch_size[0]) // self.patch_stride[0] + 1,
            (img_size[1] - self.patch_size[1]) // self.patch_stride[1] + 1,
        )

    def extra_repr(self) -> str:
        return f"img_size={self.img_size}, patch_size={self.patch_size}, patch_stride={self.patch_stride}, legacy={self.legacy}"

    def forward(self, x: Tensor, pixel_pos: Tensor | None, fused: bool = False) -> Tensor:
        if not torch.jit.is_scripting():  # a symbolic trace cannot check, a script keeps PyTorch's own errors
            self._check_image(x)
            if fused:
                return self._fused(x, pixel_pos, fused)
        if self.legacy:
            x = reference.cut_patches(self.proj(x), self.new_patch_size, self.pixel_step)
        else:
            x = self.proj(reference.cut_patches(x, self.patch_size, self.patch_stride))
        if pixel_pos is not None:
            x = x + pixel_pos
        return reference.as_pixels(x)

    @torch.jit.unused
    def _fused(self, x: Tensor, pixel_pos: Tensor | None, fused: bool) -> Tensor:
        if _is_chosen(fused):
            chosen: Any = fused
            found = chosen.settled("pixel_embed", self, lambda: self.fused_arguments(pixel_pos))
            if found.given["pixel_pos"] is pixel_pos:
                return found(x)
        return dispatch.kernel("pixel_embed").trusted(image=x, **self.fused_arguments(pixel_pos))

    @torch.jit.ignore
    def fused_arguments(self, pixel_pos: Tensor | None) -> dict[str, Any]:
        """What the fused operation is given besides the image."""
        return dict(
            weight=self.proj.weight, bias=self.proj.bias, pixel_pos=pixel_pos, patch_size=self.patch_size, stride=self.stride,
            patch_stride=self.patch_stride, legacy=self.legacy,
        )  # fmt: skip

    @torch.jit.unused
    def _check_image(self, x: Tensor) -> None:
        if isinstance(x, torch.fx.Proxy):
            return
        weight = self.proj.weight
        if self.strict_img_size and x.dtype == weight.dtype and tuple(x.shape[1:]) == (self.in_chans, *self.img_size):
            return  # before any message is put together
        expected = f"(batch, {self.in_chans}, {self.img_size[0]}, {self.img_size[1]})"
        _require(x.ndim == 4, f"the image has shape {tuple(x.shape)}; this model takes {expected}")
        _require(
            x.shape[1] == self.in_chans,
            f"the image has {x.shape[1]} channels (shape {tuple(x.shape)}); this model takes {expected}: "
            f"convert the image, or build the model with in_chans={x.shape[1]}",
        )
        if not self.strict_img_size:
            self._check_covered((x.shape[2], x.shape[3]))
        _require(
            not self.strict_img_size or tuple(x.shape[2:]) == tuple(self.img_size),
            f"the image is {x.shape[2]}×{x.shape[3]} (height×width); this model takes {self.img_size[0]}×{self.img_size[1]}: "
            f"resize the image, or call model.set_input_size(({x.shape[2]}, {x.shape[3]})), which resamples the positions; "
            "a model built with dynamic_img_size=True takes images of any size",
        )
        if x.dtype != weight.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise TypeError(
                f"the image is {x.dtype}, the weights are {weight.dtype}: cast it with image.to({weight.dtype}) "
                "(after scaling it to the model's mean and std)"
            )


class PatchEmbed(nn.Conv2d):
    """A ViT's linear embedding of each patch: image ``(B, in_chans, H, W)`` → ``(B, 1 + N, E)``, zeros for the class token."""

    def forward(self, x: Tensor) -> Tensor:
        x = self._conv_forward(x, self.weight, self.bias)
        return nn.functional.pad(x.flatten(2).transpose(1, 2), (0, 0, 1, 0))


class TNT(nn.Module):
    """Transformer in Transformer (Han et al. 2021, arXiv:2103.00112), a drop-in for timm's.

    The arguments are timm's, in timm's order; the keyword-only ones are what the paper studies and timm cannot build.

    Args:
        img_size: height and width of the input in pixels, int or pair; patches have to cover it exactly.
        patch_size: int or pair. in_chans, num_classes: 0 classes leave the pooled features.
        global_pool: "token", "avg" (of the patches) or "" (all tokens).
        embed_dim, inner_dim: E and C. depth: blocks. num_heads_inner, num_heads_outer: they divide C and E.
        mlp_ratio: of the outer MLP. qkv_bias: biases of q, k and v.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: in [0, 1), as in timm.
        norm_layer: called with a width. first_stride: of the stem convolution; S = (patch / stride)².
        legacy: timm's and mmpretrain's older stem and fold. device, dtype: of the parameters.

    Keyword Args:
        backend: "auto" (fused where it can be, else the reference with one warning), "fused" (or an error), "reference".
            Also an attribute.
        attn_backend: of the outer attention: "auto" (PyTorch's scaled_dot_product_attention on the fused path, and to evaluate
            without gradients in float32 on a CPU, q, k and v in one product; else timm's products and softmax), "sdpa",
            "xformers", "eager". The fused path has a kernel of its own in the place of PyTorch's for about 200 tokens in half
            precision on Hopper. ``set_attn_backend`` changes it.
        recompute: what the gradients of the fused outer transformer compute again instead of keeping it: "none"; "mlp", the
            result of fc1, which GELU reads; "all" but the attention. An image of TNT-S keeps 20.8, 13.5 or 6.2 MB, then, under
            autocast in half precision. ``set_recompute`` changes it. A block whose outer submodules were replaced or hooked,
            or that runs the reference, keeps what PyTorch keeps: a warning says so, or an error where backend="fused".
        inner_blocks: indices of the blocks with an inner transformer and fold, from 0 as in ``blocks.i``; None: all. The
            paper's Table 5 counts from 1: its {1, 4, 8, 12} is ``(0, 3, 7, 11)`` here.
        inner_mlp_ratio: of the inner MLP (timm: always 4).
        patch_stride: smaller than the patch, neighbouring patches share pixels; None: patches touch.
        use_pixel_pos, use_patch_pos: position encodings (Table 6).
        use_patch_embed: add a ViT's linear embedding of each patch to its token (``from_vit``; the paper has none).
        dynamic_img_size: take images of any size that the patches cover; patch positions are resampled (bicubic) in each
            forward. ``set_input_size`` does it once.
        se_ratio: above 0, squeeze-and-excitation after the outer MLP (Table 12; the authors take 0.25).

    Shapes: image ``(B, in_chans, H, W)`` → ``forward_features`` ``(B, 1 + N, E)`` → logits ``(B, num_classes)``.

    Raises:
        ValueError: sizes that do not fit each other; the message names the value and what is accepted.
    """

    dynamic_img_size: Final[bool]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        inner_dim: int = 48,
        depth: int = 12,
        num_heads_inner: int = 4,
        num_heads_outer: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        first_stride: int = 4,
        legacy: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        attn_backend: str = "auto",
        recompute: str = "none",
        inner_blocks: Iterable[int] | None = None,
        inner_mlp_ratio: float = 4.0,
        patch_stride: int | tuple[int, int] | None = None,
        use_pixel_pos: bool = True,
        use_patch_pos: bool = True,
        use_patch_embed: bool = False,
        se_ratio: float = 0.0,
        dynamic_img_size: bool = False,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dispatch.check_backend(backend)
        attention.check_backend(attn_backend)
        dispatch.check_recompute(recompute)
        _check_pool(global_pool)
        for name, value in (("in_chans", in_chans), ("depth", depth), ("inner_dim", inner_dim), ("embed_dim", embed_dim)):
            _require(value >= 1, f"{name}={value} must be at least 1")
        _require(num_classes >= 0, f"num_classes={num_classes} must be 0 (no head) or more")
        _check_heads("num_heads_inner", num_heads_inner, "inner_dim", inner_dim)
        _check_heads("num_heads_outer", num_heads_outer, "embed_dim", embed_dim)
        for name, ratio, width in (
            ("mlp_ratio", mlp_ratio, embed_dim), ("inner_mlp_ratio", inner_mlp_ratio, inner_dim),
            ("se_ratio", se_ratio or 1.0, embed_dim),
        ):  # fmt: skip
            _require(int(width * ratio) >= 1, f"{name}={ratio} leaves no hidden channel at a width of {width}")
        for name, rate in (
            ("drop_rate", drop_rate), ("pos_drop_rate", pos_drop_rate), ("proj_drop_rate", proj_drop_rate),
            ("attn_drop_rate", attn_drop_rate), ("drop_path_rate", drop_path_rate),
        ):  # fmt: skip
            _require(0.0 <= rate < 1.0, f"{name}={rate} must be in [0, 1)")
        inner_at = set(range(depth)) if inner_blocks is None else set(inner_blocks)
        _require(
            inner_at <= set(range(depth)),
            f"inner_blocks={sorted(inner_at)} names blocks outside 0 to {depth - 1} (they count from 0, the paper from 1)",
        )

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False
        self.backend = backend
        self._look = dispatch.Look()
        self.dynamic_img_size = dynamic_img_size

        self.pixel_embed = PixelEmbed(
            img_size, patch_size, in_chans, inner_dim, first_stride, legacy, **dd,
            patch_stride=patch_stride, strict_img_size=not dynamic_img_size,
        )  # fmt: skip
        self.num_patches = self.pixel_embed.num_patches
        height, width = self.pixel_embed.new_patch_size
        num_pixel = height * width

        # construction and initialisation draw random numbers in timm's order: the same seed gives the same weights
        self.norm1_proj = norm_layer(num_pixel * inner_dim, **dd)
        self.proj = nn.Linear(num_pixel * inner_dim, embed_dim, **dd)
        self.norm2_proj = norm_layer(embed_dim, **dd)

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        self.patch_pos = nn.Parameter(torch.zeros(1, self.num_patches + 1, embed_dim, **dd)) if use_patch_pos else None
        self.pixel_pos = nn.Parameter(torch.zeros(1, inner_dim, height, width, **dd)) if use_pixel_pos else None
        self.pos_drop = nn.Dropout(p=pos_drop_rate)
        embed = self.pixel_embed
        self.patch_embed = (
            PatchEmbed(in_chans, embed_dim, embed.patch_size, embed.patch_stride, **dd) if use_patch_embed else None
        )

        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            Block(
                dim=inner_dim,
                dim_out=embed_dim,
                num_pixel=num_pixel,
                num_heads_in=num_heads_inner,
                num_heads_out=num_heads_outer,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=rates[i],
                norm_layer=norm_layer,
                legacy=legacy,
                **dd,
                inner_mlp_ratio=inner_mlp_ratio,
                has_inner=i in inner_at,
                se_ratio=se_ratio,
            )
            for i in range(depth)
        )
        self.set_attn_backend(attn_backend)
        self.set_recompute(recompute)
        reduction = self.pixel_embed.feat_ratio()
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=reduction) for i in range(depth)]

        self.norm = norm_layer(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

        trunc_normal_(self.cls_token, std=0.02)
        if use_patch_pos:
            trunc_normal_(self.patch_pos, std=0.02)
        if use_pixel_pos:
            trunc_normal_(self.pixel_pos, std=0.02)
        self.apply(self._init_weights)

    def _init_weights(self, m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.LayerNorm) and m.elementwise_affine:
            nn.init.ones_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Take images of another height and width from now on: the patch positions are resampled (bicubic), as in timm's ViT.

        Build optimizers afterwards: the positions are a new parameter.

        Args:
            img_size: int or pair; None: as it is. patch_size: None, or as it is, for the pixels of a patch are the width of
                ``proj``.

        Raises:
            ValueError: patches do not cover the image, or another patch size; the model is as before.
        """
        embed = self.pixel_embed
        _require(
            patch_size is None or to_2tuple(patch_size) == embed.patch_size,
            f"patch_size={patch_size} cannot be changed: the pixels of a patch are the width of proj; this model has "
            f"{embed.patch_size}, build another with patch_size={patch_size}",
        )
        before = embed.grid_size
        embed.set_input_size(embed.img_size if img_size is None else to_2tuple(img_size))
        self.num_patches = embed.num_patches
        if self.patch_pos is not None and embed.grid_size != before:
            with torch.no_grad():
                resampled = resample_abs_pos_embed(self.patch_pos, list(embed.grid_size), list(before), num_prefix_tokens=1)
            self.patch_pos = nn.Parameter(resampled, requires_grad=self.patch_pos.requires_grad)
        if update_model_input_size is not None:
            update_model_input_size(self, embed.img_size)

    @torch.jit.ignore
    def sizes(self, image: Tensor | None = None) -> dict[str, int | bool]:
        """What the kernels' limits depend on; sizes by the paper's letters (M: hidden width of the inner MLP)."""
        embed = self.pixel_embed
        rows, columns = embed.dynamic_feat_size(self.image_size(image))
        inner: Any = None
        for block in self.blocks:
            inner = block if getattr(block, "has_inner", False) else inner
        return {
            "channels": self.in_chans, "stride": embed.stride, "legacy": embed.legacy, "N": rows * columns,
            "S": embed.new_patch_size[0] * embed.new_patch_size[1], "C": embed.proj.weight.shape[0],
            "E": self.cls_token.shape[-1], "H": inner.attn_in.num_heads if inner else 1,
            "M": inner.mlp_in.fc1.weight.shape[0] if inner else 4 * embed.proj.weight.shape[0],
        }  # fmt: skip

    @torch.jit.ignore
    def image_size(self, image: Tensor | None = None) -> tuple[int, int]:
        """Height and width of what a forward takes."""
        if image is None or not self.dynamic_img_size or image.ndim != 4:
            return self.pixel_embed.img_size
        return (image.shape[2], image.shape[3])

    @torch.jit.ignore
    def fused_arguments(self) -> dict[str, dict[str, Any]]:
        """What each fused operation of the stem is given besides activations, by its name."""
        return {"pixel_embed": self.pixel_embed.fused_arguments(self.pixel_pos), "fold": _fold_arguments(self)}

    @torch.jit.ignore
    def set_attn_backend(self, backend: str) -> None:
        """What computes the outer attention of all blocks; see the constructor's ``attn_backend``."""
        attention.check_backend(backend)
        blocks: Any = self.blocks
        for block in blocks:
            block.attn_out.attn_backend = backend

    @torch.jit.ignore
    def set_recompute(self, recompute: str) -> None:
        """What the gradients of all blocks' outer transformers compute again; see the constructor's ``recompute``."""
        dispatch.check_recompute(recompute)
        blocks: Any = self.blocks
        for block in blocks:
            block.recompute = recompute

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"patch_pos", "pixel_pos", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^cls_token|patch_pos|pixel_pos|pixel_embed|patch_embed|norm[12]_proj|proj",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for ``num_classes`` (0: none), on the model's device and dtype."""
        _require(num_classes >= 0, f"num_classes={num_classes} must be 0 (no head) or more")
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.cls_token
        head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
        self.head = head.train(self.training)

    def _stem(self, pixel: Tensor, fused: bool = False, image: Tensor | None = None) -> Tensor:
        """The first fold, onto ``[cls; 0] + patch_pos``: ``(B, 1 + N, E)``.

        ``image``: for its own size, where sizes vary, and for the patch embedding, where the model has one.
        """
        patch_pos, num_patches = self.patch_pos, self.num_patches
        if self.dynamic_img_size and image is not None:
            grid = self.pixel_embed.dynamic_feat_size((image.shape[2], image.shape[3]))
            num_patches = grid[0] * grid[1]
            if patch_pos is not None:
                before = self.pixel_embed.grid_size
                patch_pos = resample_abs_pos_embed(patch_pos, [grid[0], grid[1]], [before[0], before[1]], num_prefix_tokens=1)
        base = nn.functional.pad(self.cls_token, (0, 0, 0, num_patches))
        if patch_pos is not None:
            base = base + patch_pos
        patch = base.expand(pixel.shape[0] // num_patches, -1, -1)
        if self.patch_embed is not None:
            assert image is not None
            patch = patch + self.patch_embed(image)
        if fused and not torch.jit.is_scripting():
            return self.pos_drop(_fused_fold(self, pixel, patch, fused))
        flat = pixel.reshape(patch.shape[0], num_patches, pixel.shape[1] * pixel.shape[2])
        x = self.norm2_proj(self.proj(self.norm1_proj(flat)))
        return self.pos_drop(torch.cat([patch[:, :1], patch[:, 1:] + x], dim=1))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen blocks (timm's API).

        Args:
            x: image. indices: the last n blocks (int), those of a list, or all (None).
            return_prefix_tokens: pair each map with its class token ``(B, 1, E)``.
            norm: apply the final norm to the intermediates. stop_early: leave after the last block asked for.
            output_fmt: "NCHW" ``(B, E, rows, columns)`` or "NLC" ``(B, N, E)``. intermediates_only: no final features.

        Returns:
            Final tokens ``(B, 1 + N, E)`` and the list of intermediates, or the list alone.
        """
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        fused = self._fused(x)
        pixel = self.pixel_embed(x, self.pixel_pos, fused=fused)
        patch = self._stem(pixel, fused, x)
        blocks = self.blocks if torch.jit.is_scripting() or not stop_early else self.blocks[: max_index + 1]
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                pixel, patch = checkpoint(partial(block, fused=fused), pixel, patch)
            else:
                pixel, patch = block(pixel, patch, fused=fused)
            if i in take_indices:
                intermediates.append(self.norm(patch) if norm else patch)

        prefix_tokens = [y[:, : self.num_prefix_tokens] for y in intermediates]
        intermediates = [y[:, self.num_prefix_tokens :] for y in intermediates]
        if output_fmt == "NCHW":
            rows, columns = self.pixel_embed.grid_size
            if self.dynamic_img_size:
                rows, columns = self.pixel_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
            intermediates = [
                y.reshape(y.shape[0], rows, columns, self.embed_dim).permute(0, 3, 1, 2).contiguous() for y in intermediates
            ]
        if not torch.jit.is_scripting() and return_prefix_tokens:
            intermediates = list(zip(intermediates, prefix_tokens, strict=True))
        if intermediates_only:
            return intermediates
        return self.norm(patch), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the given intermediates do not need; returns their indices (timm's API)."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def _fused(self, x: Tensor) -> bool:
        if torch.jit.is_scripting():
            assert self.backend != "fused", "a scripted TNT runs the reference; use torch.compile or torch.export for fused"
            return False
        else:
            return dispatch.choose(self, x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image ``(B, in_chans, H, W)`` → normalised tokens ``(B, 1 + N, E)``, class token first."""
        fused = self._fused(x)
        pixel = self.pixel_embed(x, self.pixel_pos, fused=fused)
        patch = self._stem(pixel, fused, x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                pixel, patch = checkpoint(partial(block, fused=fused), pixel, patch)
            else:
                pixel, patch = block(pixel, patch, fused=fused)
        return self.norm(patch)

    @torch.jit.ignore
    @torch.no_grad()
    def forward_attention(self, image: Tensor, blocks: Iterable[int] | None = None) -> AttentionMaps:
        """The attention of chosen blocks, on either backend, computed anew from what each operation is given.

        The model and the path that it takes stay as they are. Memory holds the maps asked for and, while they are computed, a
        few copies of those of one image in one block.

        Args:
            image: ``(B, in_chans, H, W)``.
            blocks: indices from 0 as in ``blocks.i``, or from -1 backwards; None: all. The forward ends after the last of them.

        Returns:
            ``(inner, outer)``, softmax probabilities ``(blocks, B, N, H, S, S)`` and ``(blocks, B, H, 1 + N, 1 + N)``, class
            token first, in the order of the model's blocks, without gradients. Blocks without an inner transformer
            (``inner_blocks``) are left out of ``inner``. In training the maps are those before ``attn_drop``, of activations
            that are dropped as in any forward.

        Raises:
            ValueError: a block that is not there, or whose attention was replaced by one of another class.
        """
        chosen = self._chosen(blocks)
        with_inner = [i for i in chosen if self.blocks[i].has_inner]
        fused = self._fused(image)
        pixel = self.pixel_embed(image, self.pixel_pos, fused=fused)
        patch = self._stem(pixel, fused, image)
        images, patches = patch.shape[0], patch.shape[1] - 1
        inner: Any = None
        outer: Any = None
        until: Any = self.blocks[: chosen[-1] + 1]
        for i, block in enumerate(until):
            before, tokens = pixel, patch
            pixel, patch = block(before, tokens, fused=fused)
            if i in with_inner:
                inner = _keep_attention(inner, with_inner, i, block.norm_in, block.attn_in, before, patches)
                tokens = block.fold(pixel, tokens, fused)  # the same as in the block: a fold draws nothing
            if i in chosen:
                outer = _keep_attention(outer, chosen, i, block.norm_out, block.attn_out, tokens, 1)
        if inner is None:
            heads, pixels = self.sizes(image)["H"], pixel.shape[1]
            inner = pixel.new_empty(0, pixel.shape[0], heads, pixels, pixels)
        return AttentionMaps(inner.unflatten(1, (images, patches)), outer)

    @torch.jit.ignore
    def as_maps(self, tokens: Tensor) -> Tensor:
        """Tokens of any layer as maps of the image: the ``reshape_transform`` that pytorch-grad-cam asks for.

        Patches ``(B, 1 + N, E)`` become ``(B, E, rows, columns)``, without the class token; pixels ``(B·N, S, C)`` become
        ``(B, C, rows · h, columns · w)``, h × w of each patch, side by side where patches overlap.

        Raises:
            ValueError: tokens of neither shape; of images of another size, call ``set_input_size`` first.
        """
        embed, shape = self.pixel_embed, tuple(tokens.shape)
        (rows, columns), (h, w), N = embed.grid_size, embed.new_patch_size, embed.num_patches
        if shape[1:] == (1 + N, self.embed_dim):
            return tokens[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))
        _require(
            shape[1:] == (h * w, embed.in_dim) and shape[0] % N == 0,
            f"tokens have shape {shape}; accepted: patches (B, {1 + N}, {self.embed_dim}), "
            f"pixels (B·{N}, {h * w}, {embed.in_dim})",
        )
        maps = tokens.unflatten(1, (h, w)).unflatten(0, (-1, rows, columns))  # [B, rows, columns, h, w, C]
        return maps.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3, 4)

    @torch.jit.ignore
    def _chosen(self, blocks: Iterable[int] | None) -> list[int]:
        """The indices of the blocks asked for, from 0, each once and in order."""
        depth = len(self.blocks)
        _require(blocks is None or isinstance(blocks, Iterable), f"blocks={blocks!r} is no list of indices, such as [0, -1]")
        asked = list(range(depth)) if blocks is None else list(blocks)
        wrong = [i for i in asked if not (isinstance(i, int) and -depth <= i < depth)]
        _require(
            bool(asked) and not wrong,
            f"blocks={asked} names {', '.join(map(repr, wrong)) or 'none'}; "
            f"accepted: indices from 0 to {depth - 1}, or from -1 back to {-depth}",
        )
        return sorted({i % depth for i in asked})

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens ``(B, 1 + N, E)`` → pooled features (``pre_logits``) ``(B, E)`` or logits ``(B, num_classes)``."""
        if self.global_pool:
            x = x[:, self.num_prefix_tokens :].mean(dim=1) if self.global_pool == "avg" else x[:, 0]
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _keep_attention(maps: Any, blocks: list[int], block: int, norm: nn.Module, attn: Any, x: Tensor, rows: int) -> Tensor:
    """``maps`` of the blocks asked for, with those of one over ``x`` in their place, computed so many rows at a time.

    With the first block, memory for all is taken.
    """
    _require(
        isinstance(attn, Attention),
        f"the attention of block {block} is a {type(attn).__name__}; its probabilities are known of tnt_fast's own alone",
    )
    qk = attn.qk(norm(x))
    for start in range(0, max(len(x), 1), rows):
        weights = reference.attention_weights(qk[start : start + rows], attn.num_heads)
        if maps is None:
            maps = weights.new_empty(len(blocks), len(x), *weights.shape[1:])
        maps[blocks.index(block), start : start + rows] = weights
    return maps


def _check_pool(global_pool: str) -> None:
    _require(global_pool in ("", "token", "avg"), f"global_pool={global_pool!r} is unknown; accepted: '', 'token', 'avg'")
