"""Subspaces from Gram matrices against the SVD of the vectors themselves."""

import numpy as np
import pytest
import torch

from saferope_core import GramSum, contrastive_basis, extended, orthonormal, relative_basis, unsafe_basis
from saferope_core.maths.subspace import SmallGramSum

HEADS, WIDTH, RANK = 2, 16, 5
LAPACK = 30 * torch.finfo(torch.float64).eps  # n ‖A‖ times this is a residual that LAPACK's own tests take for right


def projector(basis):
    return basis @ basis.mT


def streamed(x, batches):
    total = GramSum(HEADS, WIDTH)
    for part in x.chunk(batches):
        total.add(part)
    return total


def spread_vectors(count=200):
    """Vectors [n, H, D] whose directions differ in size, so that the leading subspace is well defined."""
    sizes = torch.linspace(3, 0.2, WIDTH, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(HEADS, WIDTH, WIDTH, dtype=torch.float64))[0]
    return torch.einsum("hde,nhe->nhd", turn, torch.randn(count, HEADS, WIDTH, dtype=torch.float64) * sizes)


def test_basis_equals_the_svd_of_all_vectors_together():
    x = spread_vectors()
    basis, values = unsafe_basis(streamed(x, 7).gram, RANK)
    for h in range(HEADS):
        left, sizes, _ = torch.linalg.svd(x[:, h].T, full_matrices=False)
        torch.testing.assert_close(values[h], sizes[:RANK])
        torch.testing.assert_close(projector(basis[h]), projector(left[:, :RANK]))
        torch.testing.assert_close((basis[h] * left[:, :RANK]).sum(0).abs(), torch.ones(RANK, dtype=torch.float64))
        trailing = left[:, -RANK:]
        assert (projector(basis[h]) - projector(trailing)).abs().max() > 0.1  # control
    torch.testing.assert_close(basis.mT @ basis, torch.eye(RANK, dtype=torch.float64).expand(HEADS, -1, -1))


def test_sign_of_the_columns_is_fixed():
    """A fixed generator turns column 1 towards column 2: on every machine the same way."""
    basis, _ = unsafe_basis(streamed(spread_vectors(), 1).gram, RANK)
    peaks = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    assert (peaks > 0).all()


def test_gram_is_the_sum_however_the_vectors_arrive():
    x = spread_vectors()
    whole = streamed(x, 1)
    torch.testing.assert_close(streamed(x, 9).gram, whole.gram)
    merged = streamed(x[:120], 2) + streamed(x[120:], 3)
    torch.testing.assert_close(merged.gram, whole.gram)
    assert merged.count.tolist() == whole.count.tolist() == [200, 200]
    assert merged.gram.dtype == torch.float64


def test_gram_sums_half_precision_in_float64():
    x = spread_vectors().bfloat16().requires_grad_()
    total = streamed(x, 4)
    torch.testing.assert_close(total.gram, streamed(x.detach().double(), 1).gram)
    assert not total.gram.requires_grad


def test_too_few_vectors_show_in_the_singular_values():
    basis, values = unsafe_basis(streamed(spread_vectors(3), 1).gram, RANK)
    assert (values[:, :3] > 0.1).all()
    assert (values[:, 3:] <= (LAPACK * WIDTH) ** 0.5 * values[:, :1]).all(), "roots of a Gram matrix's rounding"
    torch.testing.assert_close(basis.mT @ basis, torch.eye(RANK, dtype=torch.float64).expand(HEADS, -1, -1))


def test_contrastive_basis_leaves_out_what_safe_vectors_share():
    """Unsafe vectors live on e1 (most), e2, e3; safe ones on e1 as well: the contrast is e2, e3."""
    unsafe = torch.diag_embed(torch.tensor([4.0, 2.0, 1.0] + [0.0] * 13)).expand(HEADS, -1, -1)
    safe = torch.diag_embed(torch.tensor([9.0, 0.0, 0.0] + [0.1] * 13)).expand(HEADS, -1, -1)
    basis = contrastive_basis(unsafe, safe, 2)
    expected = torch.eye(WIDTH, dtype=torch.float64)[:, 1:3].expand(HEADS, -1, -1)
    torch.testing.assert_close(basis, expected)
    assert unsafe_basis(unsafe, 2)[0][:, 0].abs().max() > 0.999  # control: the plain basis takes e1
    torch.testing.assert_close(contrastive_basis(10 * unsafe, 0.1 * safe, 2), basis)  # counts of vectors do not matter


def energy(basis, gram):
    """tr(Uᵀ G U) / tr G: the mean LRS of the vectors behind a Gram matrix, where they are of one length."""
    return torch.einsum("hdr,hde,her->h", basis, gram, basis) / gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def test_relative_basis_spans_the_generalised_eigenvectors():
    """Against NumPy's solver for matrices that need not be symmetric."""
    unsafe, safe = (streamed(spread_vectors(), 1).gram for _ in range(2))
    basis = relative_basis(unsafe, safe, RANK, torch.tensor([20.0, 5.0]))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(RANK, dtype=torch.float64).expand(HEADS, -1, -1))
    for h in range(HEADS):
        a, b = (gram[h].numpy() / gram[h].trace().item() for gram in (unsafe, safe))
        values, vectors = np.linalg.eig(np.linalg.solve(b + np.eye(WIDTH) / (20, 5)[h], a))
        leading = np.linalg.qr(vectors.real[:, values.real.argsort()[::-1][:RANK]])[0]
        torch.testing.assert_close(projector(basis[h]), torch.from_numpy(leading @ leading.T), rtol=0, atol=1e-9)
    few = relative_basis(unsafe, safe, RANK, torch.full((HEADS,), 1e-9))
    torch.testing.assert_close(projector(few), projector(unsafe_basis(unsafe, RANK)[0]), rtol=0, atol=1e-6)
    assert (projector(basis) - projector(few)).abs().max() > 0.01, "control: the count decides"
    scaled = relative_basis(7 * unsafe, 0.1 * safe, RANK, torch.tensor([20.0, 5.0]))
    torch.testing.assert_close(scaled, basis)  # how long vectors are does not matter


def test_relative_basis_tells_by_energy_that_the_others_do_not_see():
    """Dimension 1 has most of the energy of both sides, dimension 5 little of it, nearly all of the unsafe side."""
    unsafe, safe = (torch.full((WIDTH,), each, dtype=torch.float64) for each in (1.0, 8.0))
    unsafe[0], safe[0], unsafe[4], safe[4] = 1000, 900, 3, 0.01
    grams = [torch.diag(each).expand(HEADS, -1, -1) for each in (unsafe, safe)]
    basis = relative_basis(*grams, 1, torch.full((HEADS,), 1e4))
    assert basis[:, 4].abs().min() > 0.99
    assert (energy(basis, grams[0]) / energy(basis, grams[1])).min() > 100
    assert contrastive_basis(*grams, 1)[:, 0].abs().min() > 0.99, "control: the difference of shares is largest in 1"
    assert relative_basis(*grams, 1, torch.ones(HEADS))[:, 0].abs().min() > 0.99, "so for one vector"


def test_more_columns_lie_outside_also_where_all_that_is_left_is_negative():
    """A difference of Gram matrices that is positive in one dimension alone, and that one is taken already."""
    basis = torch.eye(WIDTH, dtype=torch.float64)[:, :1].expand(HEADS, -1, -1)
    difference = torch.diag(-torch.arange(WIDTH, dtype=torch.float64)).expand(HEADS, -1, -1)
    wider = extended(basis, difference, 3)
    torch.testing.assert_close(wider.mT @ wider, torch.eye(4, dtype=torch.float64).expand(HEADS, -1, -1))
    assert wider[:, 1:4].norm(dim=(1, 2)).min() == pytest.approx(3**0.5), "the least negative of them: 1, 2 and 3"


@pytest.mark.parametrize("rank", [0, -1, WIDTH + 1])
def test_rank_must_fit(rank):
    with pytest.raises(ValueError, match=f"rank is {rank}, expected 1 to 16"):
        unsafe_basis(torch.eye(WIDTH).expand(HEADS, -1, -1), rank)


def test_damaged_or_empty_grams_are_refused():
    gram = torch.eye(WIDTH).repeat(HEADS, 1, 1)
    with pytest.raises(ValueError, match="the safe Gram matrix of a head has trace 0"):
        contrastive_basis(gram, 0 * gram, 2)
    gram[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        unsafe_basis(gram, 2)
    with pytest.raises(ValueError, match="the unsafe Gram matrix of a head has trace 0 or NaN"):
        contrastive_basis(gram, torch.eye(WIDTH).expand(HEADS, -1, -1), 2)


def test_orthonormal_finds_the_nearest_basis():
    basis = torch.linalg.qr(torch.randn(HEADS, WIDTH, RANK))[0]
    rounded = basis.half().float()
    restored = orthonormal(rounded)
    identity = torch.eye(RANK).expand(HEADS, -1, -1)
    torch.testing.assert_close(restored.mT @ restored, identity, rtol=0, atol=1e-6)
    assert (rounded.mT @ rounded - identity).abs().max() > 1e-5  # control
    assert (restored - basis).norm() < (rounded - basis).norm() * 1.01


@pytest.mark.parametrize("noise", [0.0, 1e-4, 4e-4, 0.05, 1.0])
def test_the_polar_factor_is_the_svd_s_however_far_it_is(noise):
    """Near ones go another way than far ones; both are U V^T of the SVD."""
    basis = torch.linalg.qr(torch.randn(7, 32, 5, dtype=torch.float64)).Q
    basis += noise * torch.randn_like(basis)
    left, _, right = torch.linalg.svd(basis, full_matrices=False)
    found = orthonormal(basis)
    torch.testing.assert_close(found, left @ right, rtol=0, atol=32 * LAPACK)
    torch.testing.assert_close(
        found.mT @ found, torch.eye(5, dtype=torch.float64).expand(7, -1, -1), rtol=0, atol=32 * LAPACK
    )
    assert orthonormal(basis[:0]).shape == (0, 32, 5)


def test_a_small_sum_is_the_sum_in_float32():
    """A quarter of the bytes, symmetric, off by the rounding of each addition; control: one addition less shows."""
    whole, small = GramSum(HEADS, WIDTH), SmallGramSum(HEADS, WIDTH)
    for count in (50, 3, 20):
        before, x = small.gram, torch.randn(count, HEADS, WIDTH)
        whole.add(x)
        small.add(x)
    assert torch.equal(small.gram, small.gram.mT) and small.gram.dtype == torch.float64
    bound = 3 * torch.finfo(torch.float32).eps * whole.gram.diagonal(dim1=-2, dim2=-1).max()
    assert (small.gram - whole.gram).abs().max() <= bound < (before - whole.gram).abs().max()
    assert small.held.nbytes < 0.3 * whole.gram.nbytes
