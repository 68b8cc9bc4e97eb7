"""The transformer by itself: sizes, scanned against written out, rematerialisation, dtypes, masks, adapters, refusals."""

import pytest

from tests.helpers.wan import assert_agrees_with_scan


@pytest.mark.parametrize("change", [{"unroll": True}, {"remat": "dots"}])
def test_scan_unroll_and_other_remat_agree(change):
    assert_agrees_with_scan(change)
