"""Products of matrices where something is 1 wide, as they are computed on GPUs."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpkit.compile.inductor import thin_product


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=3, max_size=3), st.sampled_from([None, 1, 4]), st.booleans(), st.booleans())
def test_they_are_those_of_torch(sizes, batch, first_turned, second_turned):
    rows, inner, columns = sizes
    generator = torch.Generator().manual_seed(0)
    leading = () if batch is None else (batch,)
    one = torch.randn(
        *leading, *((inner, rows) if first_turned else (rows, inner)), generator=generator, dtype=torch.float64
    )
    two = torch.randn(
        *leading, *((columns, inner) if second_turned else (inner, columns)), generator=generator, dtype=torch.float64
    )
    one, two = one.mT if first_turned else one, two.mT if second_turned else two
    product = thin_product(one, two)
    if min(sizes) > 1:
        assert product is None
    else:
        torch.testing.assert_close(product, one @ two, rtol=1e-12, atol=1e-12)


def test_narrow_dtypes_are_left_to_the_library():
    """It adds in float32."""
    assert thin_product(torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(4, 1, dtype=torch.bfloat16)) is None
