"""PyTorch's 2:4 layout and checks without a GPU: conversions on the CPU, shapes on a fake device."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed_models import compress_
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    _calculate_meta_reordering_scatter_offsets,
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from lightning_obc.errors import BackendError
from lightning_obc.export import semi_structured
from lightning_obc.export.semi_structured import reason_against, to_semi_structured, to_sparse

KINDS = {"cusparselt": SparseSemiStructuredTensorCUSPARSELT, "cutlass": SparseSemiStructuredTensorCUTLASS}
# Positions of the two entries that are stored when fewer than two are not zero.
FILLED = {(): (2, 3), (0,): (0, 2), (1,): (1, 2), (2,): (2, 3), (3,): (2, 3)}


def pruned(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A weight that our 2:4 sweep pruned; with some groups emptier than that."""
    torch.manual_seed(rows + columns)
    model = nn.Sequential(nn.Linear(columns, rows))
    (weight,) = compress_(model, None, "2:4").values()
    matrix = model[0].weight.detach()
    if dtype == torch.int8:
        codes = torch.randint(1, 128, matrix.shape, dtype=torch.int8)
        matrix = torch.where(weight.mask[0], codes, 0)
    matrix = matrix.to(dtype)
    matrix[0, :8] = 0
    matrix[1, :4] = torch.where(matrix[1, :4] == matrix[1, :4].max(), matrix[1, :4], 0)
    return matrix


def stored(matrix: Tensor, nibbles: int) -> tuple[Tensor, Tensor]:
    """Values and metadata by hand: two positions of two bits for every four entries, the first ones lowest."""
    rows, columns = matrix.shape
    values, words = [], []
    for row in matrix.reshape(rows, columns // 4, 4):
        places = []
        for group in row.tolist():
            found = tuple(index for index, value in enumerate(group) if value != 0)
            places.append(FILLED.get(found, found))
        values.append([value for group, place in zip(row, places, strict=True) for value in group[list(place)]])
        bits = [a | b << 2 for a, b in places]
        chunks = [bits[start : start + nibbles] for start in range(0, len(bits), nibbles)]
        words.append([sum(bit << (4 * index) for index, bit in enumerate(chunk)) for chunk in chunks])
    return torch.stack([torch.stack(row) for row in values]), torch.tensor(words)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (96, 128), (64, 192)], ids=str)
def test_our_masks_survive_the_conversion_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    if dtype == torch.int8 and shape[1] % 128:
        shape = (shape[0], 128)
    matrix = pruned(*shape, dtype)
    values, metadata = sparse_semi_structured_from_dense_cutlass(matrix)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, metadata), matrix)
    nibbles = metadata.element_size() * 2
    expected, words = stored(matrix, nibbles)
    assert torch.equal(values, expected)
    offsets = _calculate_meta_reordering_scatter_offsets(shape[0], words.shape[1], metadata.dtype, metadata.device)
    plain = metadata.reshape(-1)[offsets].reshape(words.shape).long()
    assert torch.equal(plain & ((1 << 4 * nibbles) - 1), words)


@pytest.mark.parametrize("kernel", list(KINDS))
def test_what_we_refuse_is_what_pytorch_refuses(kernel: str) -> None:
    """Shapes and dtypes of a CUDA tensor, checked by PyTorch itself before its kernels are called."""
    seen = set()
    for rows, columns, dtype in itertools.product((8, 16, 32, 48, 64), (8, 16, 48, 64, 128), semi_structured._DTYPES):
        with FakeTensorMode():
            weight = torch.empty(rows, columns, dtype=dtype, device="cuda")
            try:
                KINDS[kernel]._validate_device_dim_dtype_shape(weight)
                refused = False
            except RuntimeError:
                refused = True
        reason = reason_against(torch.zeros(rows, columns, dtype=dtype), kernel)
        assert (reason is not None) == refused, (rows, columns, dtype)
        seen.add(refused)
    assert seen == {True, False}
    with FakeTensorMode(), pytest.raises(RuntimeError):
        KINDS[kernel]._validate_device_dim_dtype_shape(torch.empty(64, 64, dtype=torch.float64, device="cuda"))


@pytest.mark.parametrize("dtype", semi_structured._DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_shapes_and_dtypes_of_converted_layers_on_a_fake_device(
    dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch traces CUTLASS's layer without a GPU; cuSPARSELt's compression has no such rule."""
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    with FakeTensorMode(), torch.no_grad():
        layer = nn.Linear(128, 64, bias=bias, dtype=dtype, device="cuda")
        sparse = to_sparse(layer.weight)
        assert isinstance(sparse, SparseSemiStructuredTensorCUTLASS)
        layer.weight = nn.Parameter(sparse, requires_grad=False)
        for shape in ((10,), (3,), (2, 3), (1, 1)):
            y = layer(torch.empty(*shape, 128, dtype=dtype, device="cuda"))
            assert (tuple(y.shape), y.dtype, y.device.type) == ((*shape, 64), dtype, "cuda")


def test_old_gpus_are_refused_by_their_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(64, 64, dtype=torch.float16, device="cuda"))
        with pytest.raises(BackendError, match=r"capability \(7, 5\)"):
            to_semi_structured(model)


def test_each_reason_against_a_layer_in_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 40), nn.Linear(40, 64))
    compress_(model, None, "2:4", layers=["0", "2", "3", "4"])
    for index in (0, 1, 3, 4):
        model[index].half()
    result = to_semi_structured(model, timer=lambda module, x: 1.0, convert=lambda weight: weight.detach().clone())
    reasons = [layer.reason for layer in result.layers]
    assert result.converted == []
    assert "1.00× is below 1.05×" in reasons[0]
    assert "its zeros are not 2:4" in reasons[1]
    assert "float32; float16 or bfloat16 is needed" in reasons[2]
    assert "(40, 64) is no multiple of 32×64" in reasons[3]
    assert "(64, 40) is no multiple of 32×64" in reasons[4]


def test_the_default_kernel_is_pytorchs_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda dense: calls.append(dense) or dense)
    weight = torch.zeros(64, 32).half().t()
    to_sparse(weight)
    assert calls[0].is_contiguous()
