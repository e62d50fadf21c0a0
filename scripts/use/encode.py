"""Volumes into latents, and their label maps with them, as NV-Generate-CTMR's trainings read them."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from scripts.common.errors import UserError
from scripts.common.files import write_json
from scripts.data.grids import nearest_size, resized_grid
from scripts.data.labels import resampled
from scripts.data.nifti import save_nifti
from scripts.measure.latents import LatentHealth
from scripts.networks.windows import joined, padded
from scripts.use.latent_folder import LatentFolder
from scripts.use.outputs import Output
from scripts.use.workflow import VolumeWorkflow


class Encoding(VolumeWorkflow):
    """Writes the posterior mean of each volume, `<name>_emb.nii.gz`, (X, Y, Z, C) float32, and a JSON file beside it.

    That file, `<name>_emb.nii.gz.json`, holds `dim` and `spacing` (mm) of the volume after reorientation to RAS (and
    resampling), `modality`, the weights and their SHA-256, the bundle's version, and `scale_factor`, 1 / std over the
    latents of the whole set. Where a volume has a label map, this becomes `<name>_label.nii.gz`, uint8, on the grid of
    the volume as it was encoded, so that it has exactly `inferer.factor` voxels along each axis for one of the latent.
    Datalists of latents and label maps, and `latent_stats.json`, come beside them.

    Args:
        output: the folder of the latents.
        save_sigma: write the posterior standard deviation too, as `<name>_emb_sigma.nii.gz`.
        resize_multiple: resample each volume so that its sizes are the nearest multiples of this number, as
            NV-Generate-CTMR does with 128; None keeps the size.
        kwargs: of `WholeVolumes`; the network has `encode`. Where a volume has a label map, it has `labels` too, see
            `LabelledVolumes`.

    Raises:
        UserError: for a `resize_multiple` that is no positive integer.
    """

    verb = "encoded"

    def __init__(
        self, *, output: LatentFolder, save_sigma: bool = False, resize_multiple: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if resize_multiple is not None and (not isinstance(resize_multiple, int) or resize_multiple < 1):
            raise UserError(f"resize_multiple is {resize_multiple!r}; use a positive integer, e.g. 128")
        self.output, self.save_sigma, self.resize_multiple = output, save_sigma, resize_multiple

    def process(self, volume: dict[str, Any]) -> None:
        """Write what is not there of a volume: its latent, and its label map."""
        if self.resize_multiple is not None:
            volume = resized(volume, self.resize_multiple)
        if not self.output.done(volume["name"], volume["image"]):
            self._write_latent(volume)
        if self.output.labels is not None and "labels" in volume:
            self._write_labels(volume, self.output.labels)

    def _write_latent(self, volume: dict[str, Any]) -> None:
        """Write the latents of one volume, and what is known of them."""
        mu, sigma = joined(self.slabs(volume, self.network.encode))  # type: ignore[arg-type]
        latents = LatentHealth()
        latents.update(mu, sigma)
        path = self.output.path(volume["name"])
        facts = {
            "dim": list(volume["voxels"].shape[2:]),
            "spacing": volume["spacing"],
            "modality": volume["class"],
            "source": volume["image"],
            "name": volume["name"],
            "split": volume.get("split", "training"),
            "content": "posterior mean",
            **self.output.facts,
            "latent_sums": latents.sums(),
        }
        if self.save_sigma:
            save_nifti(_image(sigma, volume["affine"]), self.output.folder / f"{volume['name']}_emb_sigma.nii.gz")
        write_json(self.output.sidecar(volume["name"]), facts)
        save_nifti(_image(mu, volume["affine"]), path)
        self.output.finished(volume["name"], volume["image"])

    def _write_labels(self, volume: dict[str, Any], output: Output) -> None:
        """Write the label map of one volume; where that was padded at its ends, there is no body."""
        factor = self.inferer.factor
        labels = padded(volume["labels"], [n + -n % factor for n in volume["voxels"].shape[2:]])
        image = nib.Nifti1Image(labels[0, 0].numpy(), volume["affine"])
        save_nifti(image, output.path(volume["name"]))
        output.finished(volume["name"], volume["label"])

    def conclude(self, findings: list[None]) -> None:
        """Write the lists of all latents and label maps that are there, also those of earlier runs."""
        self.output.write_lists()


def _image(latent: torch.Tensor, affine: np.ndarray) -> nib.Nifti1Image:
    """(1, C, X, Y, Z) as an image with the channels last, where the reference looks for them."""
    return nib.Nifti1Image(np.ascontiguousarray(latent[0].permute(1, 2, 3, 0).numpy()), affine)


def resized(volume: dict[str, Any], multiple: int) -> dict[str, Any]:
    """A volume resampled (trilinear) to the nearest sizes that are multiples of `multiple`; its label map with it."""
    size = volume["voxels"].shape[2:]
    wanted = nearest_size(size, multiple)
    clipped = torch.from_numpy(volume["intensity"].clipped(volume["voxels"].numpy())).float()
    spacing, affine = resized_grid(size, wanted, volume["spacing"], volume["affine"])
    labels = {"labels": resampled(volume["labels"], wanted)} if "labels" in volume else {}
    voxels = F.interpolate(clipped, wanted, mode="trilinear", align_corners=False)
    return volume | labels | {"voxels": voxels, "affine": affine, "spacing": spacing}
