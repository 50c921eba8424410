"""Wire format of rows: where each field lies, that no two overlap, and what the metadata costs."""

from __future__ import annotations

import pytest
import torch

from fluid_hf.moe.rows import RowFormat

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SIZES = [(1, 1), (5, 3), (7, 1), (16, 8), (33, 5)]


def test_hand_written_layout() -> None:
    # 5 bfloat16 are 10 bytes, padded to 16; 3 ids are 6 bytes, to 22, padded to 24; 3 float32 end at 36, padded to 48.
    form = RowFormat(5, 3, torch.bfloat16)
    rows = form.new_rows(4, CPU)
    assert rows.shape == (4, 48) and rows.dtype == torch.uint8
    assert [field.storage_offset() * field.element_size() for field in fields(form, rows)] == [0, 16, 24]
    assert [tuple(field.shape) for field in fields(form, rows)] == [(4, 5), (4, 3), (4, 3)]
    # On the way back there are no ids: 16 bytes, 3 float32 end at 28, padded to 32.
    back = form.new_gradient_rows(4, CPU)
    assert back.shape == (4, 32) and back.dtype == torch.uint8
    assert form.weight_gradients_of(back).storage_offset() * 4 == 16


def test_hand_written_layout_in_float64() -> None:
    # 3 float64 are 24 bytes; 1 id ends at 26, padded to 32; 1 float64 weight ends at 40, padded to 48; back 32.
    form = RowFormat(3, 1, torch.float64)
    assert (form.stride, form.gradient_stride, form.weight_dtype) == (48, 32, torch.float64)


def fields(form: RowFormat, rows: torch.Tensor) -> list[torch.Tensor]:
    return [form.hidden_of(rows), form.ids_of(rows), form.weights_of(rows)]


def gradient_fields(form: RowFormat, rows: torch.Tensor) -> list[torch.Tensor]:
    return [form.hidden_of(rows), form.weight_gradients_of(rows)]


def values_like(field: torch.Tensor, start: int) -> torch.Tensor:
    """Distinct values, exact in every type used."""
    return (torch.arange(field.numel()) % 200 + start).view(field.shape).to(field.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "top_k"), SIZES)
def test_values_written_are_read_back(hidden: int, top_k: int, dtype: torch.dtype) -> None:
    form = RowFormat(hidden, top_k, dtype)
    for views in (fields(form, form.new_rows(3, CPU)), gradient_fields(form, form.new_gradient_rows(3, CPU))):
        written = [values_like(view, start) for start, view in enumerate(views)]
        for view, values in zip(views, written, strict=True):
            view.copy_(values)
        assert all(torch.equal(view, values) for view, values in zip(views, written, strict=True))


def bytes_of(buffer: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """Which bytes of a buffer a view writes."""
    buffer.zero_()
    view.view(INTEGERS[view.element_size()]).fill_(-1)  # every bit set
    return buffer != 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "top_k"), SIZES)
def test_fields_do_not_overlap(hidden: int, top_k: int, dtype: torch.dtype) -> None:
    form = RowFormat(hidden, top_k, dtype)
    rows, back = form.new_rows(2, CPU), form.new_gradient_rows(2, CPU)
    for buffer, views in ((rows, fields(form, rows)), (back, gradient_fields(form, back))):
        touched = torch.zeros(buffer.shape, dtype=torch.int64)
        for view in views:
            touched += bytes_of(buffer, view).long()
        assert touched.max() == 1
        assert touched.sum() == sum(view.numel() * view.element_size() for view in views)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "top_k"), SIZES)
def test_alignment(hidden: int, top_k: int, dtype: torch.dtype) -> None:
    form = RowFormat(hidden, top_k, dtype)
    assert form.stride % 16 == 0 and form.gradient_stride % 16 == 0
    rows, back = form.new_rows(2, CPU), form.new_gradient_rows(2, CPU)
    for field in (*fields(form, rows), *gradient_fields(form, back)):
        assert field.storage_offset() * field.element_size() % 8 == 0
        assert field.stride(1) == 1
    assert form.hidden_of(rows).stride(0) * dtype.itemsize == form.stride


def test_missing_expert_and_weights_survive_the_wire() -> None:
    form = RowFormat(3, 2, torch.bfloat16)
    rows = form.new_rows(2, CPU)
    form.ids_of(rows).copy_(torch.tensor([[-1, 32767], [0, -1]]))
    form.weights_of(rows).copy_(torch.tensor([[0.1, 1e-30], [1.0, 0.0]]))
    carried = rows.clone()  # the bytes, as a message carries them
    assert form.ids_of(carried).tolist() == [[-1, 32767], [0, -1]]
    assert torch.equal(form.weights_of(carried), torch.tensor([[0.1, 1e-30], [1.0, 0.0]]))  # float32 exactly


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    form = RowFormat(7, 3, torch.bfloat16)
    assert [tuple(field.shape) for field in fields(form, form.new_rows(rows, CPU))] == [(rows, 7), (rows, 3), (rows, 3)]
    assert form.weight_gradients_of(form.new_gradient_rows(rows, CPU)).shape == (rows, 3)


def test_share_of_metadata() -> None:
    # H 2048 in bfloat16 is 4096 bytes; 8 ids are 16 and 8 weights 32: 4144, a multiple of 16. Back: 4096 + 32.
    form = RowFormat(2048, 8, torch.bfloat16)
    assert (form.stride, form.gradient_stride) == (4144, 4128)
    assert form.stride <= 1.03 * 4096 and form.gradient_stride <= 1.03 * 4096
