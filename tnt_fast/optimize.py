"""optimize_for_inference: a copy of a model that only infers, its weights laid out once for the machine that they are on.

Where the fused path can be taken, the copy takes it, with the choice and the arguments of the operations made once and the
weights of q, k and v in one piece. Elsewhere, on a CPU above all, it computes the same functions as the reference in fewer and
larger steps. With n = LN(x):

    inner   s = (n·M) nᵀ, M = W_qᵀ W_k / √D     the scores of all heads: a product, then one of 16·H rows a patch
            x + (softmax(s) n)·N, N = W_o W_v   no copy between heads and channels: values and projection are one product
    outer   q, k, v = n·W in one product, PyTorch's fused attention

A bias of k adds the same to a row of scores, which softmax leaves out; that of v is added once, since the rows sum to one.
LayerNorm keeps its affine part: a product that had it would have a bias for it, which takes longer. On a CPU products are
oneDNN's, with GELU or the sum behind them inside; on Intel's, in float32, they are MKL's, with these in place, but those of few
channels with GELU. Logits that are the class token's ask the last outer transformer for nothing but that token, of the fused
path where there are more than a few images.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from tnt_fast import attention, dispatch, reference
from tnt_fast.tnt import TNT, Block

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PIECE = 8  # images at once on a CPU: what is between two operations then stays in its caches
FEW = 2  # images, of which the fused path's launches cost more than their work


def optimize_for_inference(model: TNT, dtype: torch.dtype | None = None) -> "OptimizedTNT":
    """A copy of a model for inference alone, faster and with the same outputs up to rounding; the model stays as it is.

    On a GPU where the fused path can be taken (``why_not_fused``), and elsewhere with ``backend="fused"``, that path, with its
    checks made now. Else PyTorch's operations on repacked weights, on a CPU with the products of oneDNN, on Intel's in float32
    with MKL's; where PyTorch was built without, or the CPU has no instructions for the dtype, with PyTorch's own.

    Args:
        model: in evaluation mode, on the device to infer on. Other sizes of images (``set_input_size``), another head or other
            weights: change the model, and optimise it anew. ``attn_backend`` is not looked at where the path is not fused:
            attention is PyTorch's fused one.
        dtype: of weights and computation; None: the model's. bfloat16 is the faster one on a CPU that has it (AVX512-BF16,
            AMX). Autocast does not change it.

    Returns:
        A module with ``forward``, ``forward_features`` and ``forward_head`` as ``TNT`` has them, without gradients. It takes
        images of any floating dtype. ``torch.compile(fullgraph=True)`` goes through; on a CPU the compiler's products take the
        place of oneDNN's, and it is better left as it is.

    Raises:
        TypeError: not a ``TNT`` (timm's: ``from_timm``), or another dtype than float32, bfloat16, float16 and float64.
        ValueError: the model is in training mode, or its parts were replaced or hooked, which the copy would pass over: all of
            them are named.
        RuntimeError: ``backend="fused"`` cannot run.
    """
    _check(model, dtype)
    with torch.no_grad():
        return OptimizedTNT(model, dtype or model.cls_token.dtype).eval()


def _check(model: Any, dtype: torch.dtype | None) -> None:
    if type(model) is not TNT:
        raise TypeError(
            f"optimize_for_inference takes a tnt_fast.TNT, got a {type(model).__module__}.{type(model).__qualname__}; timm's "
            "TNT becomes one by tnt_fast.from_timm, a wrapped one is inside of the wrapper"
        )
    if dtype not in (None, *DTYPES):
        raise TypeError(f"dtype={dtype} is not accepted; accepted: {', '.join(map(str, DTYPES))}, None (the model's)")
    if training := [name or "the model" for name, module in model.named_modules() if module.training]:
        raise ValueError(f"{training[0]} is in training mode, and the copy only infers: call model.eval() first")
    reasons = [
        f"blocks.{i} is a {type(block).__module__}.{type(block).__qualname__}; the copy computes TNT blocks"
        for i, block in enumerate(model.blocks)
        if type(block) is not Block
    ]
    reasons = reasons or dispatch.changes(model)
    if reasons:
        raise ValueError(
            "optimize_for_inference cannot keep what was done to the model:\n"
            + "".join(f"  - {reason}\n" for reason in reasons)
            + "Undo it, or take the model itself."
        )


def _frozen(x: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(x.detach().to(dtype, copy=True).contiguous(), requires_grad=False)


def _narrow(weight: Tensor) -> bool:
    """Whether what it is for has the few channels of a pixel."""
    return weight.shape[-1] < 64


class Product(nn.Module):
    """x Wᵀ + b over the last axis, with GELU or the sum with ``plus``, which may be lost, behind."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False):
        super().__init__()
        self.weight, self.bias, self.gelu = _frozen(weight, dtype), None if bias is None else _frozen(bias, dtype), gelu
        # bias and GELU in passes of their own are a third of a product of few channels
        self.by_mkl = weight.is_cpu and dtype == torch.float32 and attention.mkl_is_fast() and not (gelu and _narrow(weight))
        self.by_onednn = not self.by_mkl and attention.has_onednn(self.weight)

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling():
            if self.by_onednn:
                return attention.onednn_linear(x, self.weight, self.bias, self.gelu, plus)
            if self.by_mkl:
                return attention.mkl_linear(x, self.weight, self.bias, self.gelu, plus)
        x = F.linear(x, self.weight, self.bias)
        x = F.gelu(x) if self.gelu else x
        return x if plus is None else plus + x


class Norm(nn.Module):
    """LayerNorm, of narrow rows in half precision on a CPU in float32: two casts are faster than what PyTorch has for these."""

    def __init__(self, norm: Any, dtype: torch.dtype):
        super().__init__()
        if norm.weight.is_cpu and _narrow(norm.weight) and dtype in (torch.bfloat16, torch.float16):
            dtype = torch.float32
        self.weight, self.eps = _frozen(norm.weight, dtype), norm.eps
        self.bias = None if norm.bias is None else _frozen(norm.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)


def _softmax(x: Tensor) -> Tensor:
    """In float32 at least: in half precision on a CPU that is faster, too."""
    return x.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


class Perceptron(nn.Module):
    """x + MLP(LN(x)); ``after``: what else is added, of the MLP's result."""

    def __init__(self, norm: Any, mlp: Any, dtype: torch.dtype, after: nn.Module | None = None):
        super().__init__()
        self.norm, self.fc1 = Norm(norm, dtype), Product(mlp.fc1.weight, mlp.fc1.bias, dtype, gelu=True)
        self.fc2 = Product(mlp.fc2.weight, mlp.fc2.bias, dtype)
        self.after = None if after is None else copy.deepcopy(after).to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(self.norm(x))
        if self.after is None:
            return self.fc2(h, plus=x)
        h = self.fc2(h)
        return x + h + self.after(h)


class Inner(nn.Module):
    """``reference.inner``."""

    def __init__(self, norm1: Any, attn: Any, norm2: Any, mlp: Any, dtype: torch.dtype):
        super().__init__()
        self.num_heads = attn.num_heads
        C, H, D = attn.v.weight.shape[1], attn.num_heads, attn.head_dim
        (q, k), v = attn.qk.weight.double().view(2, H, D, C), attn.v.weight.double().view(H, D, C)
        out = attn.proj.weight.double()
        scores, values = torch.einsum("hdi,hdj->hji", q, k), torch.einsum("ohd,hdi->ohi", out.view(-1, H, D), v)
        scores_bias, bias = None, attn.proj.bias
        if attn.qk.bias is not None:
            q_bias = attn.qk.bias.double().view(2, H, D)[0]
            scores_bias = torch.einsum("hd,hdj->hj", q_bias, k).reshape(-1) * D**-0.5
            bias = out @ attn.v.bias.double() + (0 if bias is None else bias.double())
        self.norm = Norm(norm1, dtype)
        self.scores = Product(scores.reshape(-1, C) * D**-0.5, scores_bias, dtype)
        self.values = Product(values.reshape(-1, H * C), bias, dtype)
        self.mlp = Perceptron(norm2, mlp, dtype)

    def forward(self, x: Tensor) -> Tensor:
        P, S, C = x.shape
        n = self.norm(x)
        weights = _softmax(torch.bmm(self.scores(n).view(P, S * self.num_heads, C), n.transpose(1, 2)))
        return self.mlp(self.values(torch.bmm(weights, n).view(P, S, self.num_heads * C), plus=x))


class Outer(nn.Module):
    """``reference.outer``, and squeeze-and-excitation where the block has it."""

    def __init__(self, block: Any, dtype: torch.dtype):
        super().__init__()
        attn = block.attn_out
        self.num_heads, scale = attn.num_heads, attn.head_dim**-0.5

        def joined(qk: Tensor, v: Tensor) -> Tensor:
            q, k = qk.double().chunk(2)
            return torch.cat((q * scale, k, v.double()))

        bias = None if attn.qk.bias is None else joined(attn.qk.bias, attn.v.bias)
        self.norm, self.qkv = Norm(block.norm_out, dtype), Product(joined(attn.qk.weight, attn.v.weight), bias, dtype)
        # PyTorch's fused attention casts what it multiplies on a CPU; oneDNN's products do not
        self.by_products = self.qkv.by_onednn and dtype != torch.float32
        self.proj = Product(attn.proj.weight, attn.proj.bias, dtype)
        self.mlp = Perceptron(block.norm_mlp, block.mlp, dtype, block.se_layer if block.has_se else None)

    def forward(self, x: Tensor, first: bool = False) -> Tensor:
        """``first``: of the first token alone, ``(B, 1, E)``."""
        n = self.norm(x)
        attended = self._attended_by_first(n) if first else self._attended(n)
        return self.mlp(self.proj(attended, plus=x[:, :1].contiguous() if first else x))

    def _attended(self, n: Tensor) -> Tensor:
        (B, T, E), H = n.shape, self.num_heads
        q, k, v = self.qkv(n).view(B, T, 3, H, E // H).permute(2, 0, 3, 1, 4).unbind(0)
        if self.by_products:
            attended = _softmax(q @ k.transpose(-2, -1)) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return attended.transpose(1, 2).reshape(n.shape)

    def _attended_by_first(self, n: Tensor) -> Tensor:
        """Of one query the matrices of k and v fit around the attention: none of the other tokens goes through them."""
        (B, _, E), H = n.shape, self.num_heads
        weight, bias = self.qkv.weight, self.qkv.bias
        _, k, v = weight.view(3, H, E // H, E).unbind(0)
        q = F.linear(n[:, 0], weight[:E], None if bias is None else bias[:E]).view(B, H, E // H)
        weights = _softmax(torch.einsum("bhd,hde->bhe", q, k) @ n.transpose(1, 2))
        attended = torch.einsum("bhe,hde->bhd", weights @ n, v).reshape(B, 1, E)
        return attended if bias is None else attended + bias[2 * E :]


class Fold(nn.Module):
    """``reference.fold``, in place: the patches are the copy's own."""

    def __init__(self, owner: Any, dtype: torch.dtype):
        super().__init__()
        norm, second = owner.norm1_proj, owner.norm2_proj
        self.width = len(norm.weight)
        self.norm1, self.proj = Norm(norm, dtype), Product(owner.proj.weight, owner.proj.bias, dtype)
        self.norm2 = None if second is None else Norm(second, dtype)

    def forward(self, pixel: Tensor, patch: Tensor) -> Tensor:
        (P, S, C), (B, T, _) = pixel.shape, patch.shape
        x = self.proj(self.norm1(pixel.view(P * S * C // self.width, self.width)).view(B, T - 1, S * C))
        patch[:, 1:] += x if self.norm2 is None else self.norm2(x)
        return patch


class PackedBlock(nn.Module):
    """A block by PyTorch's operations."""

    def __init__(self, block: Any, dtype: torch.dtype):
        super().__init__()
        self.inner, self.fold = None, None
        if block.has_inner:
            self.inner = Inner(block.norm_in, block.attn_in, block.norm_mlp_in, block.mlp_in, dtype)
            self.fold = Fold(block, dtype)
        self.outer = Outer(block, dtype)

    def forward(self, pixel: Tensor, patch: Tensor, first: bool = False) -> tuple[Tensor, Tensor]:
        """``first``: of the patches the first token alone."""
        if self.inner is not None and self.fold is not None:
            pixel = self.inner(pixel)
            patch = self.fold(pixel, patch)
        return pixel, self.outer(patch, first)


class Operation(nn.Module):
    """An operation, fused or the reference's, with all that it is given but activations."""

    def __init__(self, name: str, given: dict[str, Any], dtype: torch.dtype, fused: bool = True):
        super().__init__()
        self.operation, self.fused = name, fused
        found = {key: _frozen(x, dtype) if isinstance(x, Tensor) else x for key, x in reference.by_name(given).items()}
        for pair in (("qk_weight", "v_weight"), ("qk_bias", "v_bias")):
            parts = [found[key] for key in pair if found.get(key) is not None]
            if len(parts) == 2:  # one behind the other, so that outer's product needs no copy of them
                for key, piece in zip(pair, torch.cat(parts).split([len(part) for part in parts]), strict=True):
                    found[key].data = piece
        for key, x in found.items():
            if isinstance(x, nn.Parameter):
                self.register_parameter(key, x)
        self.given = reference.in_records(found)
        self._settled: Any = None

    def forward(self, **activations: Tensor) -> Any:
        if not self.fused:
            return getattr(reference, self.operation)(**activations, **self.given)
        if torch.compiler.is_compiling():
            return dispatch.kernel(self.operation).trusted(**activations, **self.given)
        if self._settled is None:
            self._settled = dispatch.kernel(self.operation).settled(self.given)
        return self._settled(*activations.values())  # named in the operation's order


class FusedBlock(nn.Module):
    """A block by the fused operations: as one where that can be, else with the outer transformer, too, where it can be.

    One that may be asked for its ``first`` token alone has what that takes beside it.
    """

    def __init__(self, block: Any, dtype: torch.dtype, first: bool = False):
        super().__init__()
        given, weight = block.fused_arguments(), block.norm_out.weight
        patch = weight.new_empty(1, 1, len(weight))
        of_outer, whole = dispatch.outer_arguments(block, patch), dispatch.block_arguments(block, patch) if given else None
        self.whole = self.inner = self.fold = self.outer = None
        self.packed = Outer(block, dtype) if first or of_outer is None else None
        if whole is not None:
            self.whole = Operation("block", whole, dtype)
        elif of_outer is not None:
            self.outer = Operation("outer", of_outer, dtype)
        if given and (whole is None or first):
            self.inner, self.fold = (Operation(name, given[name], dtype) for name in ("inner", "fold"))

    def forward(self, pixel: Tensor, patch: Tensor, first: bool = False) -> tuple[Tensor, Tensor]:
        """``first``: of the patches the first token alone."""
        if self.whole is not None and not first:
            return self.whole(pixel=pixel, patch=patch)
        if self.inner is not None and self.fold is not None:
            pixel = self.inner(pixel=pixel)
            patch = self.fold(pixel=pixel, patch=patch)
        if self.outer is not None and not first:
            return pixel, self.outer(patch=patch)
        assert self.packed is not None
        return pixel, self.packed(patch, first)


class OptimizedTNT(nn.Module):
    """What ``optimize_for_inference`` makes: it only infers, on the device and in the dtype that it was made for."""

    def __init__(self, model: TNT, dtype: torch.dtype):
        super().__init__()
        embed = model.pixel_embed
        self.in_chans, self.img_size, self.grid_size = model.in_chans, embed.img_size, embed.grid_size
        self.patch_size, self.patch_stride = embed.patch_size, embed.patch_stride
        self.dynamic_img_size, self.num_prefix_tokens = model.dynamic_img_size, model.num_prefix_tokens
        self.num_classes, self.global_pool, self.embed_dim = model.num_classes, model.global_pool, model.embed_dim
        self.num_features = self.head_hidden_size = model.num_features
        self.device, self.dtype = model.cls_token.device, dtype

        as_computed = copy.deepcopy(model).to(dtype).requires_grad_(False)
        image = torch.empty(1, self.in_chans, *self.img_size, device=self.device, dtype=dtype)
        with torch.autocast(self.device.type, enabled=False):
            self.fused = dispatch.choose(as_computed, image, warn=False)
            source, made = (as_computed, FusedBlock) if self.fused else (model, PackedBlock)
            stem = source.fused_arguments()
            self.pixel_embed = Operation("pixel_embed", stem["pixel_embed"], dtype, self.fused)
            self.stem = Operation("fold", stem["fold"], dtype) if self.fused else Fold(source, dtype)
            self.blocks = nn.ModuleList(made(block, dtype) for block in source.blocks[:-1])
            last = source.blocks[-1]
            # squeeze-and-excitation asks for the mean of all
            self.one_token = self.global_pool == "token" and not last.has_se
            self.blocks.append(FusedBlock(last, dtype, self.one_token) if self.fused else PackedBlock(last, dtype))
        tokens = F.pad(model.cls_token, (0, 0, 0, model.num_patches))
        self.tokens = _frozen(tokens if model.patch_pos is None else tokens + model.patch_pos, dtype)
        self.patch_embed, self.norm, self.head = as_computed.patch_embed, as_computed.norm, as_computed.head
        for name in ("pretrained_cfg", "default_cfg"):
            if hasattr(model, name):
                setattr(self, name, copy.deepcopy(getattr(model, name)))

    def extra_repr(self) -> str:
        return f"{'fused' if self.fused else 'packed'}, {self.device}, {self.dtype}"

    def train(self, mode: bool = True) -> "OptimizedTNT":
        """Raises: RuntimeError: for training."""
        if mode:
            raise RuntimeError(
                "a copy of optimize_for_inference only infers: its weights are merged, so that none of the model's is left "
                "to learn. Train the model that it was made of, and optimise that again"
            )
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "OptimizedTNT":
        """Raises: RuntimeError: where gradients are asked for."""
        return super().requires_grad_(False) if not requires_grad else self.train()

    def _apply(self, fn: Any, recurse: bool = True) -> "OptimizedTNT":
        moved = fn(self.tokens[:0].detach())
        if (moved.device, moved.dtype) != (self.device, self.dtype):
            raise RuntimeError(
                f"a copy of optimize_for_inference stays where it was made ({self.device}, {self.dtype}), for which its "
                f"weights are laid out; move the model that it was made of to {moved.device}, {moved.dtype} and optimise that"
            )
        return super()._apply(fn, recurse)

    def _grid(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of an image's patches.

        Raises:
            ValueError, TypeError: the copy does not take it.
        """
        taken = f"(batch, {self.in_chans}, {self.img_size[0]}, {self.img_size[1]})"
        if image.ndim != 4 or image.shape[1] != self.in_chans or not self.dynamic_img_size and image.shape[2:] != self.img_size:
            raise ValueError(
                f"the image has shape {tuple(image.shape)}; this copy takes {taken}: resize the image, or change the model "
                "that it was made of (set_input_size, dynamic_img_size=True) and optimise that again"
            )
        if not image.is_floating_point():
            raise TypeError(f"the image is {image.dtype}; scale it to the model's mean and std first, which makes it floating")
        if image.device != self.device:
            raise ValueError(f"the image is on {str(image.device)!r}, this copy on {str(self.device)!r}: move the image")
        if image.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "the image requires gradients, and a copy of optimize_for_inference has none: ask the model that it was made "
                "of, or call this one inside of torch.no_grad()"
            )
        sides = []
        for side, patch, step in zip(image.shape[2:], self.patch_size, self.patch_stride, strict=True):
            if side < patch or (side - patch) % step:
                raise ValueError(
                    f"the image has shape {tuple(image.shape)}, which patches of {self.patch_size} every {self.patch_stride} "
                    f"do not cover; this copy takes {taken}, and other sizes that they cover"
                )
            sides.append((side - patch) // step + 1)
        return sides[0], sides[1]

    def forward_features(self, x: Tensor) -> Tensor:
        """Image ``(B, in_chans, H, W)`` → normalised tokens ``(B, 1 + N, E)``, class token first."""
        return self._features(x)

    def _features(self, x: Tensor, first: bool = False) -> Tensor:
        grid = self._grid(x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            tokens = self.tokens
            if grid != self.grid_size:
                tokens = resample_abs_pos_embed(tokens, list(grid), list(self.grid_size), num_prefix_tokens=1)
            x = x.to(self.dtype)
            if x.device.type != "cpu" or torch.compiler.is_compiling() or len(x) <= PIECE:
                return self._tokens(x, tokens, first)
            return torch.cat([self._tokens(piece, tokens, first) for piece in x.split(PIECE)])

    def _tokens(self, x: Tensor, tokens: Tensor, first: bool) -> Tensor:
        pixel = self.pixel_embed(image=x)
        if self.patch_embed is not None:
            patch = tokens + self.patch_embed(x)
        else:
            patch = tokens.expand(len(x), -1, -1) if self.fused else tokens.repeat(len(x), 1, 1)
        patch = self.stem(pixel=pixel, patch=patch) if self.fused else self.stem(pixel, patch)
        *blocks, last = self.blocks
        for block in blocks:
            pixel, patch = block(pixel, patch)
        _, patch = last(pixel, patch, first and not (self.fused and len(x) <= FEW))
        return self.norm(patch)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens ``(B, 1 + N, E)`` → pooled features (``pre_logits``) ``(B, E)`` or logits ``(B, num_classes)``."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if self.global_pool:
                x = x[:, self.num_prefix_tokens :].mean(dim=1) if self.global_pool == "avg" else x[:, 0]
            return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self._features(x, first=self.one_token))
