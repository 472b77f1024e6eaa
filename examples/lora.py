"""LoRA (https://arxiv.org/abs/2106.09685) through peft: adapters learn beside frozen linears, then are merged into a plain TNT.

python examples/lora.py photos/ --val-fraction 0.2 --model tnt_s_patch16_224.in1k --out runs/lora

While it trains, wrapped linears of the inner blocks are reasons against the fused path (``tnt_fast.why_not_fused`` names them);
those of the outer blocks, which may be changed, are not: ``--only-outer``. What comes out is fused as any other TNT.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tnt_fast
from tnt_fast.checkpoints import FORMAT, save_checkpoint
from tnt_fast.data import DataSet, Images, Order
from tnt_fast.dispatch import find_device
from tnt_fast.recipe import Config
from tnt_fast.variants import load_tnt

INNER, OUTER = ("attn_in", "mlp_in"), ("attn_out", "mlp")


def adapted(model: tnt_fast.TNT, rank: int, only_outer: bool = False) -> peft.PeftModel:
    """The model with adapters at the linears of attention and MLP in each block; they and the head are what trains."""
    blocks = "|".join(OUTER if only_outer else INNER + OUTER)
    linears = rf"blocks\.\d+\.({blocks})\.(qk|v|proj|fc1|fc2)"
    return peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears, modules_to_save=["head"])
    )


@torch.inference_mode()
def logits(model: nn.Module, images: Images, batch_size: int, device: torch.device) -> Tensor:
    model.eval()
    return torch.cat([model(image.to(device)).cpu() for image, _ in DataLoader(images, batch_size)])


def lora(args: argparse.Namespace) -> int:
    if args.model is None and args.checkpoint is None:
        raise ValueError("no weights to start from are named; give --checkpoint FILE, or --model tnt_s_patch16_224.in1k")
    config = Config(
        args.data, val_fraction=args.val_fraction, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed,
        mixup=0.0, cutmix=0.0,
    )  # fmt: skip
    config.check()
    device = find_device(args.device)
    data = DataSet(config, args.out)
    torch.manual_seed(config.seed)
    loaded = load_tnt(args.model, args.checkpoint, num_classes=len(data.classes))
    train_set, val_set = data.images(loaded.data_config)
    config = config.settled(len(train_set))
    model = adapted(loaded.model.to(device), args.rank, args.only_outer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"weights: {loaded.said}")
    print(f"{sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} parameters train")

    optimizer = torch.optim.AdamW(trained, config.lr, weight_decay=config.weight_decay)
    order = Order(len(train_set), config.batch_size, config.seed)
    targets = torch.tensor(val_set.targets)
    for epoch in range(config.epochs):
        train_set.epoch = order.epoch = epoch
        model.train()
        total = 0.0
        for image, target in DataLoader(train_set, config.batch_size, sampler=order, num_workers=args.workers):
            loss = nn.functional.cross_entropy(model(image.to(device)), target.to(device), label_smoothing=config.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(target)
        learnt = logits(model, val_set, config.batch_size, device)
        accuracy = (learnt.argmax(1) == targets).float().mean().item()
        print(f"epoch {epoch + 1}/{config.epochs}  loss {total / len(train_set):.4f}  held out: accuracy {accuracy:.2%}")

    merged = model.merge_and_unload()
    apart = (logits(merged, val_set, config.batch_size, device) - learnt).abs().max().item()
    print(f"merged: the held-out logits differ by at most {apart:.1e}")
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "format": FORMAT, "model": loaded.name, "model_kwargs": loaded.sizes, "state_dict": merged.state_dict(),
        "classes": data.classes, "data_config": loaded.data_config, "grid_size": merged.pixel_embed.grid_size,
        "version": tnt_fast.__version__,
    }  # fmt: skip
    save_checkpoint(checkpoint, args.out / "merged.pt")
    print(f"'tnt-fast classify' reads {args.out / 'merged.pt'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    command = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = command.add_argument
    add("data", help="what 'tnt-fast train' takes")
    add("--val-fraction", type=float, default=0.0, help="part of each class to hold out, of data that are not divided yet")
    add("--checkpoint", help="file of 'tnt-fast train', or of timm or the authors with --model")
    add("--model", help="such as tnt_s_patch16_224.in1k, whose hosted weights are taken where there is no checkpoint")
    add("--rank", type=int, default=8, help="of the adapters")
    add("--only-outer", action="store_true", help="no adapters in the inner blocks, whose kernels then go on fused")
    add("--epochs", type=int, default=10, help="passes over the training images")
    add("--batch-size", type=int, default=0, help="images a step; 0: as 'tnt-fast train' chooses")
    add("--lr", type=float, default=1e-3, help="learning rate")
    add("--seed", type=int, default=0, help="of order, augmentation, adapters")
    add("--workers", type=int, default=2, help="processes that read images")
    add("--device", help="such as cpu, cuda:0; default: a GPU if there is one")
    add("--out", type=Path, default=Path("runs/lora"), help="folder for merged.pt")
    args = command.parse_args(argv)
    try:
        return lora(args)
    except (ValueError, OSError) as error:
        command.exit(2, f"{command.prog}: {type(error).__name__}: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
