import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_lens.errors import InputError, NumericalError
from sd_lens.linear import eigenpairs
from sd_lens.linear.eigenpairs import nearest_eigenpair, rayleigh_quotient
from sd_lens.linear.maps import from_matrix
from tests import tiny


def matrix_with(values, vectors):
    return vectors @ torch.diag(values) @ torch.linalg.inv(vectors)


def random(n, seed):
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=["dense", "arnoldi"])
def way(request, monkeypatch):
    if request.param == "arnoldi":
        monkeypatch.setattr(eigenpairs, "_LARGEST_DENSE", 0)
    return request.param


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), which=st.integers(0, 7))
def test_the_planted_eigenvector_is_found(seed, which):
    values = torch.tensor([-9.0, 5, 3, -2, 1, 0.5, 12, -0.1], dtype=torch.float64)
    vectors = torch.linalg.qr(random(8, seed)).Q + 0.1 * random(8, seed + 1)
    M = from_matrix(matrix_with(values, vectors))
    found = nearest_eigenpair(M, vectors[:, which] + 0.02 * random(8, seed + 2)[0])
    assert found.value == pytest.approx(complex(values[which]), rel=1e-6)
    cosine = abs(float(found.vector.real @ vectors[:, which] / vectors[:, which].norm()))
    assert cosine == pytest.approx(1, abs=1e-9)
    assert found.residual < 1e-8


def test_both_ways_agree_on_a_nearby_eigenvector(way):
    d = 60
    vectors = torch.linalg.qr(random(d, 0)).Q
    values = torch.linspace(-30, 20, d, dtype=torch.float64)
    M = from_matrix(matrix_with(values, vectors) + 0.05 * random(d, 1) / math.sqrt(d))
    direction = vectors[:, 7] + 0.1 * vectors[:, 30]
    found = nearest_eigenpair(M, direction, tol=1e-8)
    all_values, all_vectors = torch.linalg.eig(M.dense())
    unit = direction / direction.norm()
    expected = int((unit.to(all_vectors.dtype) @ all_vectors).abs().argmax())
    assert found.value == pytest.approx(complex(all_values[expected]), rel=1e-6)
    assert found.residual < 1e-8
    assert found.angle < 10


def test_a_rotation_is_compared_with_its_plane(way):
    """Rotation and growth in the plane of axes 0 and 1: eigenvalues 2 +- 3i, and every vector of the plane is at 0."""
    M = torch.diag(torch.tensor([0, 0, 7.0, -1], dtype=torch.float64))
    M[:2, :2] = torch.tensor([[2.0, -3], [3, 2]])
    for degrees in (0, 20, 77):
        a = math.radians(degrees)
        direction = torch.tensor([math.cos(a), math.sin(a), 0.3, 0], dtype=torch.float64)
        found = nearest_eigenpair(from_matrix(M), direction)
        assert found.value == pytest.approx(2 + 3j)
        assert found.angle == pytest.approx(math.degrees(math.atan(0.3)), abs=1e-6)


def test_the_papers_variant_takes_the_real_part():
    M = torch.diag(torch.tensor([0, 0, 7.0], dtype=torch.float64))
    M[:2, :2] = torch.tensor([[2.0, -12], [3, 2]])  # eigenvectors (2, -+ i): the largest entry is real
    direction = torch.tensor([1.0, 1, 0], dtype=torch.float64)
    assert nearest_eigenpair(from_matrix(M), direction).angle == pytest.approx(0, abs=1e-5)
    assert nearest_eigenpair(from_matrix(M), direction, "real").angle == pytest.approx(45)


def test_angles_ignore_length_and_sign_of_the_direction(way):
    M = from_matrix(random(12, 3))
    direction = random(12, 4)[0]
    one, other = nearest_eigenpair(M, direction), nearest_eigenpair(M, -50 * direction)
    assert one.value == pytest.approx(other.value)
    assert one.angle == pytest.approx(other.angle)


def test_an_invariant_direction_ends_the_iteration_at_once(way):
    M = from_matrix(torch.diag(torch.tensor([4.0, -3, 2])))
    found = nearest_eigenpair(M, torch.tensor([0.0, 2, 0]))
    assert (found.value, found.angle) == (pytest.approx(-3), pytest.approx(0, abs=1e-5))


def test_the_rayleigh_quotient_is_the_length_gained_along_the_direction():
    M, u = random(9, 5), random(9, 6)[0]
    assert rayleigh_quotient(from_matrix(M), u) == pytest.approx(float(u @ M @ u / (u @ u)))


@pytest.mark.parametrize(
    ("shape", "direction"), [((3, 4), torch.ones(4)), ((3, 3), torch.ones(4)), ((3, 3), torch.zeros(3))]
)
def test_unusable_maps_and_directions_are_named(shape, direction):
    with pytest.raises(InputError, match="expected a square map and a direction of its width"):
        tiny.unchecked(nearest_eigenpair)(from_matrix(torch.ones(shape)), direction)


def test_what_is_not_finite_is_an_error(way):
    with pytest.raises(NumericalError, match="not finite"):
        nearest_eigenpair(from_matrix(torch.full((4, 4), torch.nan)), torch.ones(4))


def test_giving_up_is_said(monkeypatch):
    monkeypatch.setattr(eigenpairs, "_LARGEST_DENSE", 0)
    monkeypatch.setattr(eigenpairs, "_MOST_STEPS", 5)
    with pytest.raises(NumericalError, match="nearest eigenvector not found: residual .* after 5 products"):
        nearest_eigenpair(from_matrix(random(80, 7)), random(80, 8)[0], tol=1e-12)
