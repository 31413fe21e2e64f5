"""The corrupter: what each kind does to masks, that seeds decide everything, and that nothing vanishes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from agevlm.grounding import masks
from agevlm.grounding.corrupt import KINDS, corrupt


shapes = st.tuples(st.integers(1, 30), st.integers(1, 30))
some_masks = st.lists(arrays.arrays(bool, shapes).filter(np.any), min_size=1, max_size=5)


@settings(max_examples=60)
@given(originals=some_masks, kind=st.sampled_from(KINDS), amount=st.floats(0, 1), seed=st.integers(0, 9))
def test_sizes_stay_nothing_vanishes_and_the_seed_decides(originals, kind, amount, seed):
    before = [mask.copy() for mask in originals]
    changed = corrupt(originals, kind, amount, seed)
    assert all((one == two).all() for one, two in zip(originals, before, strict=True))
    for mask, original in zip(changed, originals, strict=True):
        assert (mask is None and kind == "drop") or (mask.shape == original.shape and mask.any())
    again = corrupt(originals, kind, amount, seed)
    assert all(one is two is None or (one == two).all() for one, two in zip(changed, again, strict=True))


@given(originals=some_masks, kind=st.sampled_from(KINDS))
def test_nothing_happens_at_zero(originals, kind):
    assert all((one == two).all() for one, two in zip(corrupt(originals, kind, 0), originals, strict=True))


def _square(row=20, column=20, side=20, size=100):
    mask = np.zeros((size, size), dtype=bool)
    mask[row : row + side, column : column + side] = True
    return mask


def test_growing_shrinking_and_moving_are_in_units_of_the_object():
    for side in (10, 20, 40):
        mask = _square(side=side)
        (grown,), (shrunk,) = corrupt([mask], "dilate", 0.2), corrupt([mask], "erode", 0.2)
        assert grown.sum() == (1.4 * side) ** 2 and (grown & mask).sum() == mask.sum()
        assert shrunk.sum() == (0.6 * side) ** 2 and not (shrunk & ~mask).any()
        (moved,) = corrupt([mask], "shift", 0.5)
        away = np.array(masks.mask_box(moved)) - masks.mask_box(mask)
        assert np.hypot(*away[:2]) == pytest.approx(side / 2, abs=1)


def test_shares_of_the_rows():
    originals = [_square(row=row % 70, column=row % 60, side=10 + row % 9) for row in range(300)]
    dropped = corrupt(originals, "drop", 0.3)
    assert 60 < sum(mask is None for mask in dropped) < 120
    for kind in ("swap", "random"):
        changed = corrupt(originals, kind, 0.3)
        hit = [i for i, (one, two) in enumerate(zip(changed, originals, strict=True)) if (one != two).any()]
        assert 50 < len(hit) < 120
    swapped = corrupt(originals, "swap", 1.0)
    assert sorted(mask.tobytes() for mask in swapped) == sorted(mask.tobytes() for mask in originals)
    areas = [mask.sum() for mask in corrupt(originals, "random", 1.0)]
    assert np.allclose(areas, [mask.sum() for mask in originals], rtol=0.1)


@pytest.mark.parametrize(("kind", "amount"), [("blur", 0.1), ("drop", 1.5), ("erode", -1)])
def test_what_makes_no_sense_is_refused(kind, amount):
    with pytest.raises(ValueError, match=kind):
        corrupt([_square()], kind, amount)
