"""A model as a flat graph of functional operators, and the edits on it that ONNX export needs.

Works on the graph module that :mod:`torch.export` returns, so that the edited graph stays an ordinary PyTorch module:
what is exported can be run and compared, operator for operator.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lightning_obc.errors import ExportError
from lightning_obc.export.ops import StoredCodes, operators

Sample = Union[Tensor, Sequence[Any], Mapping[str, Any]]
aten = torch.ops.aten
CONVOLUTIONS = frozenset(
    op
    for family in (aten.conv1d, aten.conv2d, aten.conv3d)
    for op in (getattr(family, "default", None), getattr(family, "padding", None))
    if op is not None
)
LINEAR = frozenset({aten.linear.default})
_NORM = aten._native_batch_norm_legit_no_training.default


@dataclass
class Graph:
    """An edited graph.

    Attributes:
        module: Runs like the model in evaluation mode, on the same arguments.
        arguments: The positional and keyword arguments it was traced with.
        shapes: Dynamic shapes of the arguments, in the form :func:`torch.export.export` takes.
        weights: Name of a weight in the graph by the node that dequantizes it.
    """

    module: GraphModule
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    shapes: Any
    weights: dict[Node, str] = field(default_factory=dict)


def arguments_of(sample: Sample) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A sample as positional and keyword arguments: a tensor, a sequence of arguments, or a mapping of them."""
    if isinstance(sample, Tensor):
        return (sample,), {}
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return tuple(sample), {}


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, every submodule's own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def without_noise() -> Iterator[None]:
    """Inside, two warnings about PyTorch's own recurrent layers stay silent; every other one is shown.

    * Tracing LSTM and GRU replaces their list of flattened weights, a cache of views for cuDNN: "tensor attributes …
      _flat_weights … were assigned during export". The weights are parameters, and are registered.
    * The exporter's loops over time steps call ``torch._check_is_size``, which PyTorch has marked as outgoing. No
      option of the export avoids the call, and no user can.
    """
    with warnings.catch_warnings():
        flat = r"The tensor attributes? (self\.)?\S*_flat_weights\[\d+\].* assigned during export"
        warnings.filterwarnings("ignore", flat, UserWarning)
        warnings.filterwarnings("ignore", r"_check_is_size will be removed", FutureWarning)
        yield


def trace(model: nn.Module, sample: Sample, *, dynamic_batch: bool = True, decompose: bool = True) -> Graph:
    """Trace a model in evaluation mode into functional operators; the model is left as it was.

    Args:
        model: Traced on its own device.
        sample: Its arguments.
        dynamic_batch: Leave the first dimension of every input open.
        decompose: Into core operators that change nothing in place; without, operators are those of the model's code.

    Raises:
        ExportError: The model cannot be traced (data-dependent control flow, unsupported inputs).
    """
    model = getattr(model, "_orig_mod", model)
    args, kwargs = arguments_of(sample)
    shapes = None
    if dynamic_batch:
        # A batch of one would be taken for a constant.
        args, kwargs = _map_tensors(_at_least_two, args), _map_tensors(_at_least_two, kwargs)
        names = (_map_tensors(_batch_dimension, args), _map_tensors(_batch_dimension, kwargs))
        shapes = names[1] if not args else names[0] if not kwargs else None
    try:
        with evaluation(model), torch.no_grad(), without_noise():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
            # Checks of inputs, which the file has no use for. For a forward of **kwargs they name variables that are
            # not there, and decomposing the program would run them.
            program._guards_code = []
            program = program.run_decompositions({}) if decompose else program
            module = program.module(check_guards=False)
    except Exception as error:
        raise ExportError(
            "The model cannot be traced",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            expected="a forward pass that torch.export can follow on the sample",
            remedy="try dynamic_batch=False; see torch.export's documentation on data-dependent control flow",
        ) from error
    assert isinstance(module, GraphModule)
    return Graph(module, (args, kwargs), shapes)


def _map_tensors(function: Any, tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: _map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map_tensors(function, value) for value in tree)
    return None if function is _batch_dimension else tree


def _at_least_two(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == 1 else tensor


def _batch_dimension(tensor: Tensor) -> Any:
    return {0: torch.export.Dim("batch", min=1)} if tensor.dim() else None


def module_name(node: Node) -> str:
    """Dotted name of the innermost module that a node was traced from."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def users(node: Node) -> list[Node]:
    return list(node.users)


def set_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    """Store a tensor under a dotted name, making the modules on the way."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    module.register_buffer(last, value)


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer under a dotted name."""
    for part in name.split("."):
        module = getattr(module, part)
    assert isinstance(module, Tensor)
    return module


def insert_tensor(graph: Graph, name: str, value: Tensor, before: Node) -> Node:
    """Store a tensor in the graph module and read it before a node. A name in use gets a number.

    A tensor that is stored already, such as the codes of a weight with several uses, is read from there.
    """
    if (known := _stored_name(graph, value)) is not None:
        with graph.module.graph.inserting_before(before):
            return graph.module.graph.get_attr(known)
    taken = {str(node.target) for node in graph.module.graph.nodes if node.op == "get_attr"}
    unique, count = name, 1
    while unique in taken or unique in dict(graph.module.named_parameters()):
        unique, count = f"{name}_{count}", count + 1
    set_buffer(graph.module, unique, value.detach())
    with graph.module.graph.inserting_before(before):
        return graph.module.graph.get_attr(unique)


def _stored_name(graph: Graph, value: Tensor) -> str | None:
    """The buffer that is this very tensor, not one of equal numbers."""
    for name, buffer in graph.module.named_buffers():
        same = buffer.dtype == value.dtype and buffer.shape == value.shape and buffer.stride() == value.stride()
        if same and buffer.numel() and buffer.data_ptr() == value.data_ptr():
            return name
    return None


def dequantize_weights(graph: Graph, stored: Mapping[str, StoredCodes]) -> None:
    """Replace every use of the named weights by their codes and one dequantize node per use.

    Args:
        graph: Edited in place.
        stored: By the name of the parameter in the model.
    """
    dequantize, _ = operators()
    for node in list(graph.module.graph.nodes):
        if node.op != "get_attr" or str(node.target) not in stored:
            continue
        name = str(node.target)
        for user in users(node):
            new = _insert_dequantize(graph, dequantize, name, stored[name], user)
            user.replace_input_with(node, new)
        graph.module.graph.erase_node(node)
    graph.module.graph.lint()


def _insert_dequantize(graph: Graph, dequantize: Any, name: str, codes: StoredCodes, before: Node) -> Node:
    parts = [
        insert_tensor(graph, f"{name}_{part}", getattr(codes, part), before)
        for part in ("codes", "scale", "zero_point")
    ]
    with graph.module.graph.inserting_before(before):
        node = graph.module.graph.call_function(dequantize, (*parts, codes.axis, codes.block))
    graph.weights[node] = name
    return node


def fold_batch_norms(graph: Graph) -> list[str]:
    """Fold batch-norms into the convolutions before them; codes stay, scales take the norm's factor per channel.

    A norm stays where folding would not be exact in integers: its factor is zero somewhere, or scales do not run along
    the output channels.

    Returns:
        Names of the folded normalisation layers.
    """
    folded = []
    for node in list(graph.module.graph.nodes):
        if node.op != "call_function" or node.target is not _NORM:
            continue
        convolution = node.args[0]
        outputs = [user for user in users(node) if user.args[1] == 0]
        alone = isinstance(convolution, Node) and len(users(convolution)) == 1 and len(outputs) == len(users(node)) == 1
        if not alone or convolution.target not in CONVOLUTIONS or not _fold(graph, convolution, node):
            continue
        outputs[0].replace_all_uses_with(convolution)
        graph.module.graph.erase_node(outputs[0])
        graph.module.graph.erase_node(node)
        folded.append(module_name(node))
    graph.module.graph.eliminate_dead_code()
    return folded


def _read(graph: Graph, node: Any) -> Tensor | None:
    return tensor_at(graph.module, str(node.target)).detach() if isinstance(node, Node) else None


def _fold(graph: Graph, convolution: Node, norm: Node) -> bool:
    """Put the norm's factor into the weight and its shift into the bias of a convolution."""
    gamma, beta, mean, variance = (_read(graph, argument) for argument in norm.args[1:5])
    epsilon: Any = norm.args[6]
    assert mean is not None
    assert variance is not None
    factor = (variance.double() + epsilon).rsqrt()
    if gamma is not None:
        factor = factor * gamma.double()
    weight = convolution.args[1]
    assert isinstance(weight, Node)
    if bool((factor == 0).any()) or not _scale_weight(graph, weight, factor, convolution):
        return False
    old = _read(graph, convolution.args[2]) if len(convolution.args) > 2 else None
    shift = -mean.double() * factor if old is None else (old.double() - mean.double()) * factor
    shift = shift if beta is None else shift + beta.double()
    bias = insert_tensor(graph, f"{module_name(convolution)}.folded_bias", shift.to(mean.dtype), convolution)
    convolution.args = (*convolution.args[:2], bias, *convolution.args[3:])
    return True


def _scale_weight(graph: Graph, weight: Node, factor: Tensor, convolution: Node) -> bool:
    if weight not in graph.weights:
        old = _read(graph, weight)
        assert old is not None
        value = (old.double() * factor.reshape(-1, *[1] * (old.dim() - 1))).to(old.dtype)
        new = insert_tensor(graph, f"{module_name(convolution)}.folded_weight", value, convolution)
        convolution.replace_input_with(weight, new)
        return True
    codes, scale, zero, axis, block = weight.args
    old, zeros = _read(graph, scale), _read(graph, zero)
    assert old is not None
    assert zeros is not None
    assert isinstance(axis, int)
    if old.dim() == 0:
        old, zeros, axis = old.expand(len(factor)), zeros.expand(len(factor)).contiguous(), 0
    if not block and axis != 0:
        return False
    if block and axis == 0:
        return False
    value = (old.double() * factor.reshape(-1, *[1] * (old.dim() - 1))).to(old.dtype)
    name = graph.weights[weight]
    weight.args = (
        codes,
        insert_tensor(graph, f"{name}_folded_scale", value, weight),
        insert_tensor(graph, f"{name}_folded_zero_point", zeros, weight),
        axis,
        block,
    )
    return True


def finish(graph: Graph) -> Graph:
    """Drop what the edits left unused; the module becomes a plain one that can be exported again."""
    graph.module.graph.eliminate_dead_code()
    graph.module.graph.lint()
    # The traced module refuses train() and eval(); a new one takes over exactly the tensors that its graph reads.
    module = GraphModule(graph.module, graph.module.graph)
    return replace(graph, module=module.eval())
