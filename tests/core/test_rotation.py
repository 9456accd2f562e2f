"""The rotation: laws of orthogonal maps, the paper's formula in loops, and numbers found by hand."""

import math

import pytest
import torch

from saferope_core import bounded, fixed_generator, fold, planes, rotate_by_generator, skew, turn
from saferope_core.maths import exponential

HEADS, WIDTH = 3, 32
RANKS = (2, 5, 8)
LAPACK = 30 * WIDTH * torch.finfo(torch.float64).eps  # residuals that LAPACK's own tests take for right: 30 n ε ‖A‖
TIGHT = 1e-10  # float64; torch.matrix_exp itself is off by 1e-11 for single matrices of norm 0.01 to 0.05
# Of a vector's length, in units of ε, for two products of D terms and an exponential: 2 D from the sums, the rest for
# the series.
ROUNDING = 10 * WIDTH


def bits(x):
    """The bit patterns of x, so that -0.0 differs from 0.0 and NaN equals itself."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def example(rank, dtype=torch.float64, tokens=6, batch=2):
    """x, basis, generator, scale, in the letters of the functions."""
    basis = torch.linalg.qr(torch.randn(HEADS, WIDTH, rank, dtype=torch.float64))[0].to(dtype)
    generator = skew(torch.randn(HEADS, rank, rank, dtype=dtype))
    x = torch.randn(batch, HEADS, tokens, WIDTH, dtype=dtype)
    return x, basis, generator, torch.rand(batch, HEADS, tokens, dtype=dtype)


def turned(x, basis, generator, scale):
    theta, directions = fold(generator, basis)
    return turn(x, directions, theta, scale)


FORMS = pytest.mark.parametrize("form", [turned, rotate_by_generator], ids=["planes", "eigenvectors"])


def orthogonality_error(matrix):
    return (matrix.mT @ matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype)).abs().max().item()


@FORMS
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_is_orthogonal(form, rank, dtype):
    _, basis, generator, _ = example(rank, dtype)
    identity = torch.eye(WIDTH, dtype=dtype).expand(1, HEADS, WIDTH, WIDTH)
    matrix = form(identity, basis, generator, torch.full((1, HEADS, WIDTH), 0.8, dtype=dtype))
    allowed = ROUNDING * torch.finfo(dtype).eps
    assert orthogonality_error(matrix) < allowed
    # control: the first two terms of the series are not a rotation, and the check sees it
    series = torch.eye(WIDTH, dtype=dtype) + 0.8 * basis @ generator @ basis.mT
    assert orthogonality_error(series) > 100 * allowed


@FORMS
@pytest.mark.parametrize("rank", RANKS)
def test_equals_the_formula_in_loops(form, rank, naive_turn):
    x, basis, generator, scale = example(rank)
    expected = naive_turn(x, basis, generator, scale)
    torch.testing.assert_close(form(x, basis, generator, scale), expected, rtol=0, atol=TIGHT)
    assert (form(x, basis, -generator, scale) - expected).abs().max() > 0.1  # control: the sense of rotation matters


@FORMS
def test_quarter_turn_by_hand(form):
    """U = (e1, e2), A e1 = π/2 e2. At scale 1: e1 becomes e2, e2 becomes −e1, e3 stays; at 1/3 it is 30 degrees."""
    basis = torch.eye(WIDTH, dtype=torch.float64)[None, :, :2]
    generator = fixed_generator(2, math.pi / 2, 1).double()
    x = torch.eye(WIDTH, dtype=torch.float64)[None, None, :3]
    full = form(x, basis, generator, torch.ones(1, 1, 3, dtype=torch.float64))[0, 0]
    torch.testing.assert_close(full, torch.stack((x[0, 0, 1], -x[0, 0, 0], x[0, 0, 2])))
    third = form(x, basis, generator, torch.full((1, 1, 3), 1 / 3, dtype=torch.float64))[0, 0, 0]
    torch.testing.assert_close(third[:2], torch.tensor([math.sqrt(3) / 2, 0.5], dtype=torch.float64))


@FORMS
def test_keeps_norms(form):
    x, basis, generator, scale = example(5, torch.float32)
    result = form(x, basis, generator, scale)
    torch.testing.assert_close(
        result.norm(dim=-1), x.norm(dim=-1), rtol=ROUNDING * torch.finfo(torch.float32).eps, atol=0
    )
    assert (result - x).abs().max() > 0.1


@FORMS
def test_inverse_generator_undoes(form):
    x, basis, generator, scale = example(5)
    there = form(x, basis, generator, scale)
    torch.testing.assert_close(form(there, basis, -generator, scale), x, rtol=0, atol=TIGHT)


@FORMS
def test_vector_orthogonal_to_the_basis_returns_bit_for_bit(form):
    """In coordinates where orthogonal means exact zeros, so that rounding plays no part."""
    x, _, generator, _ = example(5, torch.float32)
    basis = torch.zeros(HEADS, WIDTH, 5)
    basis[:, :5] = torch.linalg.qr(torch.randn(HEADS, 5, 5))[0]
    x[..., :5] = 0
    scale = torch.ones(x.shape[:3])
    assert torch.equal(bits(form(x, basis, generator, scale)), bits(x))
    x[..., 0] = 1
    assert not (form(x, basis, generator, scale) == x).all(-1).any()


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scale_0_returns_bit_for_bit(form, dtype):
    x, basis, generator, scale = example(5, torch.float32)
    x = x.to(dtype)
    x[0, 0, 0, :3] = torch.tensor([-0.0, float("inf"), float("nan")])  # what x + 0 * anything would not survive
    scale[:, :, ::2] = 0
    result = form(x, basis, generator, scale)
    assert torch.equal(bits(result[:, :, ::2]), bits(x[:, :, ::2]))
    assert not (result[:, :, 1::2] == x[:, :, 1::2]).all(-1).any()


def test_generator_form_without_any_token_to_turn():
    x, basis, generator, scale = example(5)
    assert torch.equal(rotate_by_generator(x, basis, generator, 0 * scale), x)


@FORMS
def test_nan_is_not_hidden_and_does_not_spread(form):
    x, basis, generator, scale = example(5, torch.float32)
    x[0, 1, 2, 3] = float("nan")
    broken = form(x, basis, generator, scale).isnan().any(-1)
    assert broken[0, 1, 2] and broken.sum() == 1


@FORMS
def test_batch_and_tokens_permute_through(form):
    x, basis, generator, scale = example(5)
    order = torch.randperm(x.shape[2])
    result = form(x.flip(0)[:, :, order], basis, generator, scale.flip(0)[:, :, order])
    torch.testing.assert_close(result, form(x, basis, generator, scale).flip(0)[:, :, order], rtol=0, atol=TIGHT)


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded(form, dtype):
    x, basis, generator, scale = example(5, torch.float32)
    x = x.to(dtype)
    result = form(x, basis, generator, scale)
    assert result.dtype == dtype
    assert (result - form(x.float(), basis, generator, scale).to(dtype)).abs().max() == 0.0
    coarse = form(x, basis.to(dtype), generator.to(dtype), scale.to(dtype))
    assert (result - coarse).abs().max() > 0  # control: half precision anywhere inside would show


def test_float64_stays_float64():
    x, basis, generator, scale = example(5)
    assert turned(x, basis.float(), generator.float(), scale).dtype == torch.float64


@FORMS
def test_autocast_and_inference_mode_change_nothing(form):
    x, basis, generator, scale = example(5, torch.float32)
    expected = form(x, basis, generator, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x[0, 0] @ basis[0]).dtype == torch.bfloat16  # control: autocast is at work
        assert torch.equal(form(x, basis, generator, scale), expected)
    with torch.inference_mode():
        assert torch.equal(form(x, basis, generator, scale), expected)


def test_odd_rank_leaves_one_direction_unturned():
    _, basis, generator, scale = example(5)
    theta, directions = fold(generator, basis)
    assert theta.shape == (HEADS, 2) and directions.shape == (HEADS, WIDTH, 5)
    left_over = directions[..., 4].expand(2, 6, HEADS, WIDTH).transpose(1, 2)
    torch.testing.assert_close(turn(left_over, directions, theta, scale), left_over, rtol=0, atol=LAPACK)
    in_a_plane = directions[..., 0].expand(2, 6, HEADS, WIDTH).transpose(1, 2)
    assert (turn(in_a_plane, directions, theta, scale) - in_a_plane).abs().max() > 0.1


@pytest.mark.parametrize("rank", RANKS)
def test_folded_directions_are_another_basis_of_the_same_subspace(rank):
    x, basis, generator, scale = example(rank)
    theta, directions = fold(generator, basis)
    torch.testing.assert_close(directions @ directions.mT, basis @ basis.mT, rtol=0, atol=LAPACK)
    known = torch.einsum("bhld,hdr->bhlr", x, directions)
    torch.testing.assert_close(turn(x, directions, theta, scale, known), turn(x, directions, theta, scale))


def test_skew_is_exact():
    w = torch.randn(4, 7, 7)
    assert torch.equal(skew(w), -skew(w).mT) and not torch.equal(w, -w.mT)
    torch.testing.assert_close(skew(w) + (w + w.mT) / 2, w)


def generator_of(angles, rank):
    """A skew generator with these angles in random orthogonal planes."""
    blocks = torch.zeros(rank, rank, dtype=torch.float64)
    for p, angle in enumerate(angles):
        blocks[2 * p + 1, 2 * p], blocks[2 * p, 2 * p + 1] = angle, -angle
    frame = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))[0]
    return frame @ blocks @ frame.T


# Equal angles make the planes ambiguous; angles of 0, or small beside the others, mix the eigenvectors of +θ and −θ.
@pytest.mark.parametrize(
    ("angles", "rank"),
    [
        ((2.0, 0.7), 4),
        ((2.0, 0.7), 5),
        ((2.1, 2.1, 2.1), 6),
        ((2.1, 2.1, 2.1), 7),
        ((1.5, 0.0, 0.0), 6),
        ((1.5, 0.0), 5),
        ((0.0, 0.0), 5),
        ((0.0,), 2),
        ((1.0, 1e-9, 1e-10), 6),
        ((1e-20, 1e-20), 5),
        ((), 1),
    ],
)
def test_planes_hold_the_generator(angles, rank):
    generator = generator_of(angles, rank)
    theta, a, b = planes(generator[None])
    expected = torch.tensor(angles, dtype=torch.float64)
    torch.testing.assert_close(theta[0], expected, rtol=0, atol=LAPACK)
    torch.testing.assert_close(generator @ a[0], theta[0] * b[0], rtol=0, atol=LAPACK)
    torch.testing.assert_close(generator @ b[0], -theta[0] * a[0], rtol=0, atol=LAPACK)
    frame = torch.cat((a[0], b[0]), dim=-1)
    assert frame.shape == (rank, 2 * (rank // 2))
    if rank > 1:
        assert orthogonality_error(frame) < LAPACK


def test_planes_read_the_skew_part_only():
    generator = generator_of((2.0, 0.7), 5)[None]
    symmetric = torch.randn(5, 5, dtype=torch.float64)
    theta, _, _ = planes(generator + symmetric + symmetric.T)
    torch.testing.assert_close(theta, planes(generator)[0])


def test_generator_form_passes_gradcheck():
    basis = torch.linalg.qr(torch.randn(2, 4, 3, dtype=torch.float64))[0].requires_grad_()
    w = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(1, 2, 2, dtype=torch.float64)
    scale[..., 1] = 0  # not gathered; a constant, so that finite differences do not cross the jump of the gather
    assert torch.autograd.gradcheck(lambda x, u, w: rotate_by_generator(x, u, skew(w), scale), (x, basis, w))
    inside = scale.clamp(min=0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: rotate_by_generator(x, basis, skew(w), s), (inside,))


def test_both_forms_pass_the_same_gradient_to_x():
    x, basis, generator, scale = example(5)
    x.requires_grad_()
    gradients = []
    for form in (turned, rotate_by_generator):
        (gradient,) = torch.autograd.grad(form(x, basis, generator, scale).pow(3).sum(), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=0, atol=TIGHT)


def repeats(function, tries=3):
    """Whether `function` gives the same bits every time, on two threads."""
    torch.set_num_threads(2)
    first, *more = (function() for _ in range(tries))
    return all(torch.equal(bits(first), bits(again)) for again in more)


def backward_steps(tensor):
    """Names of the steps of autograd's way back from `tensor`."""
    names, left = set(), [tensor.grad_fn]
    while left:
        step = left.pop()
        names.add(step.name())
        left += [following for following, _ in step.next_functions if following is not None]
    return names


IN_ANY_ORDER = "IndexBackward0"  # of x[index]: adds up the rows of an index that comes again as the threads reach them


def test_the_gradient_repeats_bit_for_bit_on_two_threads():
    """A head's gradient is a sum over thousands of tokens: in whatever order the threads come, no training repeats."""
    heads, rank, tokens = 3, 8, 2000
    x, basis = torch.randn(1, heads, tokens, 16), torch.linalg.qr(torch.randn(heads, 16, rank))[0]
    generator = skew(torch.randn(heads, rank, rank)).requires_grad_()
    scale = torch.rand(1, heads, tokens) + 0.1
    result = (rotate_by_generator(x, basis, generator, scale) * torch.randn_like(x)).sum()
    assert repeats(lambda: torch.autograd.grad(result, generator, retain_graph=True)[0])
    assert IN_ANY_ORDER not in backward_steps(result)


def test_what_would_not_repeat_is_seen():
    """Controls, by construction: a sum in two orders, and a head's gradient added up in any order."""
    orders = iter(([1.0, 1e8, -1e8], [1e8, -1e8, 1.0]))
    assert not repeats(lambda: sum(torch.tensor(next(orders)).unbind()), tries=2)
    heads = torch.randn(3, 8, 8, requires_grad=True)
    assert IN_ANY_ORDER in backward_steps(heads[torch.tensor([0, 0, 1])].sum())


@pytest.mark.parametrize("rank", RANKS)
def test_a_bound_holds_wide_planes_and_leaves_the_others(rank):
    """Against the planes themselves, put together again with their angles cut."""
    generator = 4 * skew(torch.randn(50, rank, rank, dtype=torch.float64))
    theta, a, b = planes(generator)
    bound = theta.median().item()
    held = bounded(generator, bound)
    assert torch.equal(held, -held.mT)
    cut = theta.clamp(max=bound)[:, None]
    expected = torch.einsum("nip,njp->nij", cut * b, a) - torch.einsum("nip,njp->nij", cut * a, b)
    torch.testing.assert_close(held, expected, rtol=0, atol=1e-9)
    assert (theta > 1.2 * bound).any() and (theta < 0.8 * bound).any(), "control: both kinds"
    assert not torch.allclose(held, generator, atol=0.1)


def test_a_wide_bound_changes_rounding_alone():
    generator = skew(torch.randn(20, 6, 6))
    torch.testing.assert_close(bounded(generator, 100.0), generator, rtol=0, atol=1e-5)
    assert not bounded(torch.zeros(2, 4, 4), 1.0).any()


def test_equal_frequencies_have_a_gradient():
    """Of generators whose planes turn alike, and of zero: divided differences divide by nothing."""
    x, basis, _, scale = example(4)
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    alike = torch.block_diag(quarter, quarter).expand(HEADS, 4, 4)
    for generator in (alike.clone(), torch.zeros(HEADS, 4, 4, dtype=torch.float64)):
        generator.requires_grad_()
        assert torch.autograd.gradcheck(lambda a: rotate_by_generator(x, basis, skew(a), scale), (generator,))
        ours = torch.autograd.grad(rotate_by_generator(x, basis, skew(generator), scale).cos().sum(), generator)[0]
        matrices = torch.matrix_exp(scale[..., None, None] * skew(generator)[:, None])
        moved = torch.einsum("bhlij,hdj,bhld->bhli", matrices, basis, x) - torch.einsum("hdi,bhld->bhli", basis, x)
        other = torch.autograd.grad((x + torch.einsum("bhli,hdi->bhld", moved, basis)).cos().sum(), generator)[0]
        torch.testing.assert_close(ours, other)
        assert other.abs().max() > 1e-2, "control"


def gradients_of(form, x, basis, generator, scale):
    """By x, basis and generator, of a sum that weighs every number otherwise."""
    given = [each.clone().requires_grad_() for each in (x, basis, generator)]
    return torch.autograd.grad(form(*given, scale).cos().sum(), given)


def by_matrix_exp(x, basis, generator, scale):
    """The formula, a matrix for every token."""
    matrices = torch.matrix_exp(scale[..., None, None] * skew(generator)[:, None])
    coordinates = torch.einsum("bhld,hdi->bhli", x, basis)
    moved = torch.einsum("bhlij,bhlj->bhli", matrices, coordinates) - coordinates
    return x + torch.einsum("bhli,hdi->bhld", moved, basis)


NEAR_BY = (0.0, 1e-9, 0.5 * exponential.NEAR, 2 * exponential.NEAR, 1e-3, 0.5)


@pytest.mark.parametrize("apart", NEAR_BY)
def test_frequencies_near_each_other_have_the_series_gradient(apart, monkeypatch):
    x, basis, _, scale = example(5)
    generator = torch.stack([generator_of((1.0, 1.0 + apart), 5) for _ in range(HEADS)])
    expected = gradients_of(by_matrix_exp, x, basis, generator, scale)
    for ours, other in zip(gradients_of(rotate_by_generator, x, basis, generator, scale), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=10 * TIGHT)  # sums over 12 tokens
    monkeypatch.setattr(exponential, "NEAR", 10.0)  # control: the trapezoidal rule for all, wrong by s² / 12 and more
    wrong = gradients_of(rotate_by_generator, x, basis, generator, scale)[2]
    assert (wrong - expected[2]).abs().max() > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_tokens_that_stay_add_nothing_to_the_gradient(share, monkeypatch):
    """On a CPU they are left out, as many as each head has; a GPU's static shapes take all tokens."""
    x, basis, generator, scale = example(5, tokens=40)
    scale = scale * (torch.rand_like(scale) < share)
    scale[:, 0] = 0  # a head that turns nothing
    taken = []
    real = exponential._places
    monkeypatch.setattr(exponential, "_places", lambda gradient: taken.append(real(gradient)) or taken[-1])
    found = gradients_of(rotate_by_generator, x, basis, generator, scale)
    most = int((scale != 0).sum((0, 2)).max())
    assert taken[0].shape == (HEADS, most)
    monkeypatch.setattr(exponential, "_places", lambda gradient: None)
    for ours, other in zip(found, gradients_of(rotate_by_generator, x, basis, generator, scale), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=TIGHT)
    assert bool(found[2].abs().max() > 0.1) == (share > 0), "control"
    assert not found[2][0].any()


def test_the_gradient_by_the_scale_is_that_of_the_formula():
    x, basis, generator, scale = example(5)
    found = []
    for form in (rotate_by_generator, by_matrix_exp):
        s = scale.clone().requires_grad_()
        found.append(torch.autograd.grad(form(x, basis, generator, s).cos().sum(), s)[0])
    torch.testing.assert_close(*found, rtol=0, atol=10 * TIGHT)
    assert found[1].abs().max() > 0.1, "control"
