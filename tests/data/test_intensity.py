from __future__ import annotations

import numpy as np
import pytest
import torch

from scripts.common.errors import UserError
from scripts.data.intensity import CT_WINDOW, Intensity


def test_ct_goes_to_0_1_and_back() -> None:
    hu = np.array([-3000, -1000, -999, 0, 1000, 3000], np.int16)
    intensity = Intensity.for_volume(hu, "ct")
    assert intensity == Intensity(CT_WINDOW, clip=True) and intensity.range == 2000
    values = intensity.normalise(hu)
    assert values.tolist() == pytest.approx([0, 0, 0.0005, 0.5, 1, 1])
    assert intensity.restore(values, torch.int16).tolist() == [-1000, -1000, -999, 0, 1000, 1000]
    assert intensity.clipped(hu).tolist() == [-1000, -1000, -999, 0, 1000, 1000] and hu[0] == -3000
    assert torch.equal(intensity.normalise(torch.from_numpy(hu)), values)


def test_mri_has_its_own_window_and_is_not_clipped() -> None:
    data = np.arange(2001, dtype=np.float32)
    intensity = Intensity.for_volume(data, "mri")
    assert intensity.window == (0.0, 1990.0) and not intensity.clip
    assert float(intensity.normalise(data)[-1]) == pytest.approx(2000 / 1990)
    assert torch.allclose(
        intensity.restore(intensity.normalise(data), torch.float32), torch.from_numpy(data), atol=1e-3
    )
    with pytest.raises(UserError, match=r"is constant \(99.5 % of its voxels are 3\)"):
        Intensity.for_volume(np.full(5, 3.0), "mri")
