"""Volumes into their reconstructions, in the geometry they came in."""

from __future__ import annotations

from typing import Any

import torch

from scripts.data.nifti import write_like
from scripts.use.outputs import Output
from scripts.use.workflow import VolumeWorkflow


class Reconstruction(VolumeWorkflow):
    """Writes the reconstruction of each volume in the shape, affine, orientation and header of its file.

    CT is HU as int16, within -1000..1000; MRI int16 where its values are whole numbers, else float32.

    Args:
        output: the folder of the reconstructions.
        kwargs: of `WholeVolumes`. The network gives one tensor; where it gives several, the first is taken.
    """

    verb = "reconstructed"

    def __init__(self, *, output: Output, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.output = output

    def process(self, volume: dict[str, Any]) -> None:
        """Write the reconstruction of one volume."""
        voxels, intensity = volume["voxels"], volume["intensity"]
        dtype = torch.int16 if volume["class"] == "ct" else voxels.dtype
        restored = torch.empty(voxels.shape[2:], dtype=dtype)
        for x, (slab, *_) in self.slabs(volume, self.network):  # (1, 1, x, Y, Z): never the whole volume in float32
            restored[x : x + slab.shape[2]] = intensity.restore(slab[0, 0], dtype)
            del slab  # not to be held while the next ones are computed
        write_like(volume["image"], restored.numpy(), self.output.path(volume["name"]))
        self.output.finished(volume["name"], volume["image"])
