from __future__ import annotations

import numpy as np
import pytest

from scripts.measure.features import hu_histogram
from scripts.measure.obedience import Tissue, dice, label_histograms, median


def test_histograms_of_labels_are_those_of_their_voxels() -> None:
    rng = np.random.default_rng(0)
    hu = rng.normal(0, 900, (70, 6, 5)).astype(np.float32)  # more than two slabs; some beyond -1000..1000
    labels = rng.choice([0, 1, 7, 200, 255], hu.shape).astype(np.uint8)
    found = label_histograms(hu, labels)
    assert found.shape == (256, 2001) and found.sum() == hu.size
    assert set(np.flatnonzero(found.sum(1))) == {0, 1, 7, 200, 255}
    for label in (0, 1, 7, 200, 255):
        mine = hu[labels == label]
        assert found[label] / mine.size == pytest.approx(hu_histogram(mine))
        assert found[label, 0] == (np.rint(mine) <= -1000).sum() > 0
        middle = np.sort(np.rint(mine.clip(-1000, 1000)))[(mine.size - 1) // 2]
        assert median(found[label]) == middle
    halves = label_histograms(hu[:33], labels[:33]) + label_histograms(hu[33:], labels[33:])
    assert np.array_equal(halves, found)


def test_a_tissue_is_a_band_of_hu_inside_the_map() -> None:
    hu = np.array([-901, -900, -500, 199.9, 200, 3000])
    inside, outside = np.full(6, 200, np.uint8), np.zeros(6, np.uint8)
    assert Tissue(above=200).within(hu, inside).tolist() == [False] * 4 + [True] * 2
    assert Tissue(above=-900, below=-500).within(hu, inside).tolist() == [False, True, False, False, False, False]
    assert Tissue(below=-900).within(hu, inside).tolist() == [True] + [False] * 5
    assert not Tissue().within(hu, outside).any() and Tissue().within(hu, inside).all()


def test_dice_is_what_masks_share() -> None:
    a, b = np.zeros((2, 10), bool)
    assert dice(a, b) is None
    a[:4] = True
    assert dice(a, b) == 0 and dice(a, a) == 1
    b[2:5] = True
    assert dice(a, b) == dice(b, a) == pytest.approx(2 * 2 / (4 + 3))
