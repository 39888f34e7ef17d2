"""What structured pruning gains once the channels have left, in ONNX Runtime: ResNet-18, and a transformer.

    python -m benchmarks.structured --folder structured --out benchmarks/results

In every residual block the inner channels of least norm leave: the second convolution no longer reads them, the first
one no longer makes them. In "sums too" the channels of the residual sums leave as well: none of their readers reads
them. In the transformer hidden channels of the MLPs leave, and then whole heads too. Weights are random, since which
channels leave changes neither size nor speed. A file with the same zeros, but whole layers, runs beside each. Outputs
are compared with the masked model's before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.artifacts import environment
from lightning_obc.export import benchmark, benchmark_table, export_onnx, open_session, shrink

IMAGE = (1, 3, 224, 224)
TOKENS = (1, 196, 384)


def unread_(layers: Iterable[nn.Module], share: float, run: int = 1) -> None:
    """Zero the same input channels of some layers, in runs of consecutive ones: those of least norm together."""
    weights = [layer.weight for layer in layers]
    assert all(isinstance(weight, nn.Parameter) for weight in weights)
    with torch.no_grad():
        norms = sum(
            (weight.flatten(2) if weight.dim() > 2 else weight[..., None]).square().sum((0, 2)) for weight in weights
        )
        assert isinstance(norms, Tensor)
        order = norms.reshape(-1, run).sum(1).argsort()
        gone = order[: round(share * len(order))]
        for weight in weights:
            weight[:, (gone[:, None] * run + torch.arange(run)).flatten()] = 0


def resnet(share: float, sums: bool = False) -> nn.Module:
    """ResNet-18 whose blocks do not read a share of their inner channels, nor of the sums between them."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18().eval()
    unread = dict(model.named_modules())
    for name, module in unread.items():
        if name.endswith("conv2"):
            unread_([module], share)
    for stage in range(1, 5) if sums else ():
        following = [f"layer{stage + 1}.0.conv1", f"layer{stage + 1}.0.downsample.0"] if stage < 4 else ["fc"]
        own = [f"layer{stage}.1.conv1"] + (["layer1.0.conv1"] if stage == 1 else [])
        unread_([unread[name] for name in (*own, *following)], share)
    return model


class Block(nn.Module):
    """A layer of a vision transformer of small size: 6 heads of 64, 1536 hidden channels."""

    def __init__(self, width: int = 384, heads: int = 6) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        y = nn.functional.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4).unbind(0))
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))
        y = self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return x + y


def transformer(share: float, heads: bool = False) -> nn.Module:
    """Six such layers whose MLPs do not read a share of their hidden channels, nor their attention of its heads."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(6))).eval()
    for block in model:
        assert isinstance(block, Block)
        unread_([block.down], share)
        if heads:
            unread_([block.proj], share, run=block.head_dim)
    return model


def write(
    folder: Path, name: str, make: Callable[[float, bool], nn.Module], x: Tensor, parts: tuple[str, str]
) -> dict[str, Path]:
    """Dense, masked and smaller models as files; those that are there are taken as they are.

    Raises:
        SystemExit: A smaller file computes something else than the masked model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {"float32": folder / f"{name}-dense.onnx"}
    if not files["float32"].exists():
        export_onnx(make(0.0, False), x, files["float32"])
    for share, also in ((0.25, False), (0.5, False), (0.75, False), (0.5, True)):
        model = make(share, also)
        small = shrink(model, x).model
        for kind, one in (("zeros alone", model), ("channels gone", small)):
            if kind == "zeros alone" and share != 0.5:
                continue
            path = folder / f"{name}-{kind.replace(' ', '-')}-{share:g}{'-all' if also else ''}.onnx"
            files[f"{100 * share:.0f} % of {parts[also]}, {kind}"] = path
            if not path.exists():
                export_onnx(one, x, path)
            with torch.no_grad():
                expected = model(x).numpy()
            session = open_session(path, threads=1)
            (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            if np.abs(found - expected).max() > 1e-4 * np.abs(expected).max():
                raise SystemExit(f"{path} computes something else")
    return files


NETWORKS = {
    "ResNet-18, random weights, 224×224, batch 1": (
        *("resnet", resnet, IMAGE),
        ("inner channels", "inner channels and of all residual sums"),
    ),
    "Transformer, 6 layers of width 384, 196 tokens, random weights, batch 1": (
        *("transformer", transformer, TOKENS),
        ("hidden channels of the MLPs", "hidden channels and of the heads"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where files are written")
    parser.add_argument("--out", type=Path, help="measure the files and write the tables here")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    arguments = parser.parse_args()
    where, tables = environment(arguments.threads), []
    for title, (name, make, shape, parts) in NETWORKS.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        files = write(arguments.folder, name, make, x, parts)
        if arguments.out is not None:
            measured = benchmark(files, batch=1, rounds=arguments.rounds, threads=arguments.threads)
            tables.append(benchmark_table(measured, title))
            print(tables[-1], flush=True)
    if not tables:
        return
    head = (
        f"Measured on {where['processor']} with {where['threads']} thread(s) of ONNX Runtime {where['onnxruntime']}; "
        f"PyTorch {where['torch']}. The files run in turns; the speed-up is the median over rounds of the dense file's "
        'time over this one\'s. "Zeros alone" are the same zeros in whole layers.'
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(["# Structured pruning, channels gone", head, *tables])
    (arguments.out / "structured.md").write_text(f"{text}\n")


if __name__ == "__main__":
    main()
