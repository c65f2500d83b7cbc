import math

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_misfm.architectures import cpu_attention
from nnunetv2_misfm.architectures.anisotropy import Size3
from nnunetv2_misfm.architectures.window_attention import WindowAttention

BATCH, WINDOWS, HEADS, TOKENS, HEAD_DIM = 2, 5, 3, 6, 4
SCALE = 256 / 205  # of dropout with a probability of 0.2, rounded to 51/256
CHUNKINGS = pytest.mark.parametrize("windows_per_chunk", [1, 2, WINDOWS, 100])
MASKING = pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
Inputs = dict[str, Tensor]


def inputs(dtype: torch.dtype = torch.float64, head_dim: int = HEAD_DIM, tokens: int = TOKENS) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(BATCH, WINDOWS * HEADS, tokens, head_dim, generator=generator, dtype=torch.float64)
        for name in ("query", "key", "value")
    }
    made["bias"] = torch.randn(HEADS, tokens, tokens, generator=generator, dtype=torch.float64)
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()}


def random_mask(masked: bool) -> Tensor | None:
    """Hides a third of the keys, differently in each window; nobody is hidden from itself."""
    if not masked:
        return None
    hidden = torch.rand(WINDOWS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)) < 1 / 3
    return -100.0 * (hidden & ~torch.eye(TOKENS, dtype=torch.bool))


def slow_attention(given: Inputs, mask: Tensor | None, keep: Tensor | None = None) -> Tensor:
    """Sample by sample, window by window, head by head; `keep` (B, W * h, N, N) multiplies the weights."""
    rows = []
    for sample in range(BATCH):
        for window in range(WINDOWS):
            for head in range(HEADS):
                row = window * HEADS + head
                query, key, value = (given[name][sample, row] for name in ("query", "key", "value"))
                logits = query @ key.T / math.sqrt(query.shape[-1]) + given["bias"][head]
                if mask is not None:
                    logits = logits + mask[window]
                weights = logits.exp() / logits.exp().sum(1, keepdim=True)
                rows.append((weights if keep is None else weights * keep[sample, row]) @ value)
    return torch.stack(rows).view(given["query"].shape)


def gradients(attended: Tensor, given: Inputs) -> Inputs:
    """Of the product of the output with fixed random numbers."""
    upstream = torch.randn(attended.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad(attended, list(given.values()), upstream.to(attended.dtype))
    return dict(zip(given, found, strict=True))


def chunk(monkeypatch: pytest.MonkeyPatch, windows: int, tokens: int = TOKENS) -> None:
    monkeypatch.setattr(cpu_attention, "CHUNK_ENTRIES", windows * HEADS * tokens**2)


@CHUNKINGS
@MASKING
def test_output_and_gradients_are_those_of_a_slow_loop(
    monkeypatch: pytest.MonkeyPatch, windows_per_chunk: int, masked: bool
) -> None:
    chunk(monkeypatch, windows_per_chunk)
    given, mask = inputs(), random_mask(masked)
    attended, expected = cpu_attention.attend(**given, mask=mask, dropout=0.0), slow_attention(given, mask)
    torch.testing.assert_close(attended, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradients(attended, given), gradients(expected, given), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("entries", "steps"),
    [(1, [1] * 5), (HEADS * TOKENS**2 * 2 + 1, [2, 2, 1]), (1 << 20, [5])],
)
def test_a_chunk_holds_as_many_whole_windows_of_a_sample_as_fit(
    monkeypatch: pytest.MonkeyPatch, entries: int, steps: list[int]
) -> None:
    monkeypatch.setattr(cpu_attention, "CHUNK_ENTRIES", entries)
    sizes = []
    softmax = cpu_attention._softmax

    def spy(query: Tensor, *args: object) -> Tensor:
        sizes.append(len(query) // HEADS)
        return softmax(query, *args)

    monkeypatch.setattr(cpu_attention, "_softmax", spy)
    cpu_attention.attend(**inputs(), mask=random_mask(True), dropout=0.0)
    assert sizes == steps * BATCH


@CHUNKINGS
@MASKING
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_those_of_finite_differences(
    monkeypatch: pytest.MonkeyPatch, windows_per_chunk: int, masked: bool, dropout: float
) -> None:
    chunk(monkeypatch, windows_per_chunk)

    def same_draws(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return cpu_attention.attend(*tensors, random_mask(masked), dropout)

    assert torch.autograd.gradcheck(same_draws, tuple(inputs().values()), fast_mode=True)


@CHUNKINGS
@MASKING
def test_dropout_zeroes_a_fifth_of_the_weights_scales_the_rest_and_is_repeated_backward(
    monkeypatch: pytest.MonkeyPatch, windows_per_chunk: int, masked: bool
) -> None:
    chunk(monkeypatch, windows_per_chunk)
    given, mask = inputs(head_dim=TOKENS), random_mask(masked)
    identity = torch.eye(TOKENS, dtype=torch.float64).expand_as(given["value"])
    torch.manual_seed(4)
    dropped = cpu_attention.attend(**{**given, "value": identity}, mask=mask, dropout=0.2)  # the weights themselves
    kept = (dropped != 0).double() * SCALE
    assert (kept == 0).double().mean().item() == pytest.approx(51 / 256, abs=0.05)
    assert all((weights == 0).any() for weights in kept.flatten(0, 1))  # in every window and head
    torch.manual_seed(4)
    attended, expected = cpu_attention.attend(**given, mask=mask, dropout=0.2), slow_attention(given, mask, kept)
    torch.testing.assert_close(attended, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradients(attended, given), gradients(expected, given), atol=1e-12, rtol=0)


def test_the_share_dropped_is_51_of_256_in_every_window_and_head() -> None:
    tokens = 64
    given = inputs(head_dim=tokens, tokens=tokens)
    identity = torch.eye(tokens, dtype=torch.float64).expand_as(given["value"])
    torch.manual_seed(5)
    dropped = cpu_attention.attend(**{**given, "value": identity}, mask=None, dropout=0.2) == 0
    assert dropped.double().mean().item() == pytest.approx(51 / 256, abs=0.005)
    # 4,096 weights each: five standard deviations are 0.031
    assert (dropped.double().mean((2, 3)) - 51 / 256).abs().max() < 0.031


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.01)])
@MASKING
def test_lower_precision_stays_near_double(dtype: torch.dtype, tolerance: float, masked: bool) -> None:
    exact, given, mask = inputs(), inputs(dtype), random_mask(masked)
    given["bias"] = given["bias"].detach().float().requires_grad_()  # parameters stay in float32 under autocast
    attended, expected = cpu_attention.attend(**given, mask=mask, dropout=0.0), slow_attention(exact, mask)
    assert attended.dtype == dtype
    torch.testing.assert_close(attended.double(), expected, atol=tolerance, rtol=tolerance)
    found, wanted = gradients(attended, given), gradients(expected, exact)
    assert {name: gradient.dtype for name, gradient in found.items()} == {
        name: tensor.dtype for name, tensor in given.items()
    }
    torch.testing.assert_close(found, wanted, atol=5 * tolerance, rtol=tolerance, check_dtype=False)


@pytest.mark.parametrize(("dropout", "random_bytes"), [(0.0, 0), (0.2, BATCH * WINDOWS * HEADS * TOKENS**2)])
def test_of_the_attention_matrix_a_byte_per_weight_is_kept_and_only_with_dropout(
    monkeypatch: pytest.MonkeyPatch, dropout: float, random_bytes: int
) -> None:
    chunk(monkeypatch, 2)
    given, mask = inputs(), random_mask(True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
        cpu_attention.attend(**given, mask=mask, dropout=dropout)
    assert sum(tensor.numel() for tensor in saved if tensor.dtype == torch.int8) == random_bytes
    floats = sum(tensor.numel() for tensor in saved if tensor.is_floating_point())
    assert floats == sum(tensor.numel() for tensor in given.values()) + mask.numel()


def attention(mask_padding: bool) -> WindowAttention:
    torch.manual_seed(0)
    made = WindowAttention(8, 2, window_size=3, mask_padding=mask_padding, attention_dropout=0.0, dropout=0.0)
    nn.init.normal_(made.relative_position_bias_table)
    return made.double().train()


def output_and_gradients(module: nn.Module, grid: Size3, shift: Size3) -> list[Tensor]:
    tokens = torch.randn(2, *grid, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    window = (min(3, grid[0]), min(3, grid[1]), min(3, grid[2]))
    attended = module(tokens, window, shift)
    generator = torch.Generator().manual_seed(2)
    attended.backward(torch.randn(attended.shape, generator=generator, dtype=torch.float64))
    return [attended.detach(), tokens.grad] + [parameter.grad for parameter in module.parameters()]


GEOMETRIES = pytest.mark.parametrize(
    ("grid", "shift", "mask_padding"),
    [
        ((6, 3, 6), (0, 0, 0), False),
        ((5, 2, 6), (0, 0, 0), False),
        ((5, 2, 6), (0, 0, 0), True),
        ((6, 4, 3), (1, 1, 0), False),
        ((6, 4, 3), (1, 1, 0), True),
    ],
)


@GEOMETRIES
def test_pytorchs_attention_gives_the_same_outputs_and_gradients(
    monkeypatch: pytest.MonkeyPatch, grid: Size3, shift: Size3, mask_padding: bool
) -> None:
    expected = output_and_gradients(attention(mask_padding), grid, shift)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(cpu_attention, "attend", None)
    torch.testing.assert_close(output_and_gradients(attention(mask_padding), grid, shift), expected)


@GEOMETRIES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_pytorchs_attention_predicts_the_same(
    monkeypatch: pytest.MonkeyPatch, grid: Size3, shift: Size3, mask_padding: bool, mode: type
) -> None:
    module = attention(mask_padding).eval()
    tokens = torch.randn(2, *grid, 8, dtype=torch.float64)
    window = (3, min(3, grid[1]), 3)
    expected = module(tokens, window, shift)
    monkeypatch.setattr(cpu_attention, "attend", None)
    with mode():
        torch.testing.assert_close(module(tokens, window, shift), expected)
    with pytest.raises(TypeError):  # with gradients it is the one that was just put out of order
        module(tokens, window, shift)


def test_compiled_it_gives_the_same() -> None:
    grid, shift = (6, 4, 3), (1, 1, 0)
    expected = output_and_gradients(attention(mask_padding=True), grid, shift)
    torch._dynamo.reset()
    compiled = torch.compile(attention(mask_padding=True), backend="eager", fullgraph=True)
    torch.testing.assert_close(output_and_gradients(compiled, grid, shift), expected)


def test_gradient_of_the_bias_in_half_precision_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    windows, heads, tokens = 200, 2, 8
    query, key, value, grad = (torch.randn(1, windows * heads, tokens, 4, generator=generator) for _ in range(4))
    gradients = []
    for entries in (heads * tokens**2, windows * heads * tokens**2):
        monkeypatch.setattr(cpu_attention, "CHUNK_ENTRIES", entries)
        bias = torch.zeros(heads, tokens, tokens, dtype=torch.bfloat16, requires_grad=True)
        inputs = (query.bfloat16(), key.bfloat16(), value.bfloat16())
        cpu_attention.attend(*inputs, bias, None, 0.0).backward(grad.bfloat16())
        gradients.append(bias.grad.float())
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()
