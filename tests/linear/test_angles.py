import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_lens.errors import InputError
from sd_lens.linear.angles import acute_angles


@given(st.floats(0, 360, allow_nan=False), st.floats(0.1, 100))
def test_angles_are_acute_and_blind_to_length(degrees, length):
    turned = length * torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
    acute = min(degrees % 180, 180 - degrees % 180)
    assert acute_angles(turned[None], torch.tensor([1.0, 0.0])).item() == pytest.approx(acute, abs=2e-5)


def test_tiny_angles_keep_their_digits():
    u = torch.tensor([[1.0, 1e-9]], dtype=torch.float64)
    assert acute_angles(u, torch.tensor([1.0, 0.0], dtype=torch.float64)).item() == pytest.approx(math.degrees(1e-9))


@pytest.mark.parametrize("bad", [torch.zeros(2), torch.tensor([1.0, math.nan]), torch.ones(3)])
def test_directions_without_an_angle_are_an_error(bad):
    with pytest.raises(InputError, match=r"zero or not finite|cannot be compared"):
        acute_angles(torch.eye(2), bad)
