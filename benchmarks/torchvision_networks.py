"""Whole torchvision networks, 2:4 and then 4 bits on every layer with weights, checked on every layer of the plan.

    python benchmarks/torchvision_networks.py --name torchvision_networks
    python benchmarks/torchvision_networks.py --networks resnet50 --resume

Weights and images are random, and the images as small as the networks take: this shows that nothing of a network is
left out or goes wrong, and what it costs, not how accurate a compressed network is. The engine (OBS) solves every
layer whose sweep takes at most ``--limit`` operations; wider layers are solved in the order of their columns
(SparseGPT, GPTQ), those with more than ``--widest`` inputs by magnitude and rounding to nearest. A check that fails
ends the run without figures for that network.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.files import replacing
from lightning_obc.layers import select_layers, unsupported_layers
from lightning_obc.planning import StagePlan, plan_stage

FOLDER = Path(__file__).parent / "results"
# Parameters of two and more dimensions that are no weights of a layer.
NO_LAYERS = ("layer_scale", "class_token", "pos_embedding", "relative_position_bias_table")
# A plan's memory: the statistics of a whole network would be 2.8 GiB, of which one layer's are 2.3 GiB.
CALIBRATION = obc.Calibration(memory="1 GiB")


class CheckError(Exception):
    """What was promised does not hold."""


@dataclass(frozen=True)
class Case:
    """A network with random weights, the size of its images, and whether it detects objects."""

    make: Callable[[], nn.Module]
    size: int = 64
    detects: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().eval()
        for parameter in model.parameters():
            # Some heads start at zero, which would make every check of them empty.
            if parameter.dim() > 1 and not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.02)
        return model

    def batches(self) -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        images = [torch.rand(2, 3, self.size, self.size, generator=generator) for _ in range(2)]
        return [(list(pair), None) for pair in images] if self.detects else images

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Any:
        """What the first batch gives; of a detector, whose detections are as many as it likes, the tensors' names."""
        batch = self.batches()[0]
        if not self.detects:
            output = model(batch)
            check(bool(output.isfinite().all()), "outputs are not finite")
            return tuple(output.shape)
        found = model(batch[0])
        check(all(bool(value.isfinite().all()) for image in found for value in image.values()), "not finite")
        return [{key: tuple(value.shape[1:]) for key, value in image.items()} for image in found]


def cases() -> dict[str, Case]:
    from torchvision import models

    def detector(name: str, **settings: Any) -> nn.Module:
        return getattr(models.detection, name)(weights=None, weights_backbone=None, num_classes=5, **settings)

    return {
        "resnet18": Case(models.resnet18),
        "resnet50": Case(models.resnet50),
        "mobilenet_v3_small": Case(models.mobilenet_v3_small),
        "efficientnet_b0": Case(models.efficientnet_b0),
        "convnext_tiny": Case(models.convnext_tiny),
        "vit_b_16": Case(lambda: models.vit_b_16(image_size=32), 32),
        "swin_t": Case(models.swin_t),
        "fasterrcnn": Case(
            lambda: detector("fasterrcnn_mobilenet_v3_large_320_fpn", min_size=64, max_size=64), detects=True
        ),
        "ssdlite": Case(lambda: detector("ssdlite320_mobilenet_v3_large"), detects=True),
    }


def check(holds: bool, what: str) -> None:
    if not holds:
        raise CheckError(what)


def left_over(model: nn.Module, planned: Mapping[str, nn.Module]) -> list[str]:
    """Parameters with two and more dimensions that no layer of a plan stands for, and that are weights of a layer."""
    weights = {id(module.weight) for module in planned.values()}
    rest = [key for key, p in model.named_parameters() if p.dim() > 1 and id(p) not in weights]
    check(set(unsupported_layers(model)) == {key.rpartition(".")[0] for key in rest}, "the plan hides modules")
    return [key for key in rest if key.rpartition(".")[2] not in NO_LAYERS]


def recipe(model: nn.Module, limit: float, widest: int) -> tuple[obc.Prune, obc.Quantize]:
    """2:4 and 4 bits; which solver a layer gets depends on its size."""
    layers = plan_stage(model, obc.Quantize(4)).layers
    wide = [x.name for x in layers if x.sweep_flops > limit]
    widest_of_all = {x.name for x in layers if x.name in wide and x.shape.columns > widest}
    pruner = {name: {"solver": "magnitude" if name in widest_of_all else "sparsegpt"} for name in wide}
    rounder = {name: {"solver": "rtn" if name in widest_of_all else "gptq"} for name in wide}
    return obc.Prune("2:4", misfit="skip", overrides=pruner), obc.Quantize(4, overrides=rounder)


def check_layers(model: nn.Module, prune: StagePlan, quantize: StagePlan) -> None:
    """Zeros and grids on every layer that the plans promise."""
    weights = {key: module.weight for key, module in select_layers(model).items()}
    check(set(weights) == set(quantize.modules), "layers of the plan are not those of the network")
    for key, weight in weights.items():
        rows = weight.detach().movedim(1, -1)  # [rows, …, channels]: runs of channels at one kernel position.
        check(bool(rows.isfinite().all()), f"{key} is not finite")
        check(all(len(row.unique()) <= 16 for row in rows), f"{key} has more than 16 values in a row")
        if key in prune.modules:
            check(int((rows.reshape(-1, 4) != 0).sum(1).max()) <= 2, f"{key} is not 2:4")


def check_state(model: nn.Module, before: Mapping[str, Tensor], planned: Mapping[str, nn.Module]) -> None:
    """Keys and shapes as before; what is no weight of a planned layer, bit for bit."""
    after = model.state_dict()
    check(list(after) == list(before), "state-dict keys have changed")
    check(all(after[key].shape == value.shape for key, value in before.items()), "shapes have changed")
    ids = {id(module.weight) for module in planned.values()}
    compressed = {key for key, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in ids}
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    check(changed == compressed, f"changed, or not: {sorted(changed ^ compressed)}")


def run(name: str, case: Case, limit: float, widest: int) -> dict[str, Any]:
    """Compress a whole network; plain figures.

    Raises:
        CheckError: Something does not hold.
    """
    model = case.model()
    before, shapes = copy.deepcopy(model.state_dict()), case.outputs(model)
    stages = recipe(model, limit, widest)
    plans = [plan_stage(model, stage, CALIBRATION) for stage in stages]
    prune, quantize = plans
    check(left_over(model, quantize.modules) == [], "weights are in no plan")
    check(set(prune.modules) | set(prune.skipped) == set(quantize.modules), "weights are in no plan")
    started, process = time.perf_counter(), time.process_time()
    report = obc.compress(model, case.batches(), list(stages), calibration=CALIBRATION, on_failure="raise")
    seconds, cpu = time.perf_counter() - started, time.process_time() - process
    for plan, stage in zip(plans, report.stages, strict=True):
        check([row.name for row in stage.layers] == [layer.name for layer in plan.layers], "layers are missing")
        check(all(row.compressed for row in stage.layers), "layers were kept")
    check_layers(model, prune, quantize)
    check_state(model, before, quantize.modules)
    found = case.outputs(model)
    check(found == shapes if not case.detects else [set(x) for x in found] == [set(x) for x in shapes], "outputs")
    return {
        "seconds": seconds,
        "process_seconds": cpu,
        "passes": [len(plan.passes) for plan in plans],
        "skipped": dict(prune.skipped),
        "layers": [_layer(layer, plans, report) for layer in quantize.layers],
    }


def _layer(layer: Any, plans: list[StagePlan], report: Any) -> dict[str, Any]:
    """One layer: its problem, and by which solver, how long and with which error it was solved."""
    found: dict[str, Any] = {"name": layer.name, "type": type(layer.module).__name__}
    found |= {"groups": layer.shape.groups, "rows": layer.shape.rows, "columns": layer.shape.columns}
    found["sweep_flops"] = layer.sweep_flops
    for label, plan, stage in zip(("prune", "quantize"), plans, report.stages, strict=True):
        planned = next((x for x in plan.layers if x.name == layer.name), None)
        row = next((x for x in stage.layers if x.name == layer.name), None)
        if planned is not None and row is not None:
            solver = getattr(planned.stage, "solver", "obs")
            figures = {"solver": solver, "seconds": round(row.seconds, 3)}
            figures["relative_error"] = float(f"{row.relative_error:.4g}")
            found[label] = figures | {"status": row.status}
    return found


def table(networks: Mapping[str, Any]) -> str:
    head = (
        "| network | layers with weights | 2:4 by OBS / SparseGPT / magnitude | no 2:4 | "
        "4 bits by OBS / GPTQ / nearest | solving, 2:4 + 4 bits [s] | whole run [s] | CPU time [s] |"
    )
    lines = [head, "|" + "---|" * 8]
    for name, network in networks.items():
        layers = network["layers"]

        def count(stage: str, *solvers: str, layers: Any = layers) -> str:
            names = [layer[stage]["solver"] for layer in layers if stage in layer]
            return " / ".join(str(names.count(solver)) for solver in solvers)

        solving = [sum(x[stage]["seconds"] for x in layers if stage in x) for stage in ("prune", "quantize")]
        lines.append(
            f"| {name} | {len(layers)} | {count('prune', 'obs', 'sparsegpt', 'magnitude')} | {len(network['skipped'])} "
            f"| {count('quantize', 'obs', 'gptq', 'rtn')} | {solving[0]:.0f} + {solving[1]:.0f} "
            f"| {network['seconds']:.0f} | {network['process_seconds']:.0f} |"
        )
    return "\n".join(lines)


def report(stored: Mapping[str, Any], expected: int) -> str:
    networks = stored["networks"]
    missing = "" if len(networks) == expected else f"**{len(networks)} of {expected} networks.**\n\n"
    note = f"{stored['note']}\n\n" if stored.get("note") else ""
    kinds = {
        "depthwise" if layer["groups"] > 1 else f"{layer['name']} of {name}"
        for name, network in networks.items()
        for layer in network["layers"]
        if layer["name"] in network["skipped"]
    }
    depthwise = ["depthwise convolutions (one input channel per group)"] if "depthwise" in kinds else []
    skipped = [*depthwise, *sorted(kinds - {"depthwise"})]
    return (
        f"{stored['machine']}\n\n{note}{missing}"
        "Random weights, four random images of 64×64 (vit_b_16: 32×32). Every layer with weights is pruned to 2:4, "
        "then quantized to 4 bits, zeros kept. Checked after each run, on every layer: at most two of four consecutive "
        "inputs differ from zero, at most 16 values in an output channel, no layer was kept dense; nothing else in the "
        "state dict has changed, and outputs have the same shapes.\n\n"
        f"OBS solves layers whose sweep takes at most {stored['limit']:.2g} operations (⅔·R·d³), the others are solved "
        f"in column order, and by magnitude or to the nearest above {stored['widest']} inputs.\n\n"
        f"{table(networks)}\n\n"
        '"no 2:4": the number of input channels is no multiple of four, and the layer is quantized only: '
        f"{', '.join(skipped)}. The JSON file beside this one lists the solver, the time and the relative output error "
        "of every layer.\n"
    )


def write(name: str, stored: Mapping[str, Any], expected: int) -> None:
    for ending, text in ((".json", _json(stored)), (".md", report(stored, expected))):
        with replacing(FOLDER / f"{name}{ending}") as path:
            path.write_text(text)


def _json(stored: Mapping[str, Any]) -> str:
    """One line per layer."""
    lines = json.dumps(stored).replace(', "layers": [', ',\n"layers": [\n').replace('}, {"name": ', '},\n{"name": ')
    assert json.loads(lines) == stored
    return lines


def main(arguments: list[str]) -> int:
    from machine import describe

    known = cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--limit", type=float, default=1.5e11, help="most operations of one OBS sweep")
    parser.add_argument("--widest", type=int, default=4608, help="most inputs of a layer solved in column order")
    parser.add_argument("--resume", action="store_true", help="keep the networks that the results of NAME hold")
    parser.add_argument("--note", default="", help="what the reader should know about the machine")
    parser.add_argument("--name", default="torchvision_networks", help="write benchmarks/results/NAME.md and NAME.json")
    args = parser.parse_args(arguments)
    same = {"machine": describe(), "limit": args.limit, "widest": args.widest, "note": args.note}
    kept = earlier(args.name, same) if args.resume else {}
    for name in args.networks:
        try:
            kept[name] = run(name, known[name], args.limit, args.widest)
        except CheckError as error:
            print(f"{name}: a check is red, no figures: {error}", file=sys.stderr)
            return 1
        print(f"{name}: {len(kept[name]['layers'])} layers, {kept[name]['seconds']:.0f} s", flush=True)
        ordered = {key: kept[key] for key in known if key in kept}
        write(args.name, same | {"networks": ordered}, len(known))
    return 0


def earlier(name: str, same: Mapping[str, Any]) -> dict[str, Any]:
    """Networks of an earlier run with the same settings on the same machine."""
    path = FOLDER / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    alike = all(stored.get(key) == value for key, value in same.items())
    return dict(stored["networks"]) if alike else {}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
