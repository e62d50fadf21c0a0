"""Volumes into latents, as NV-Generate-CTMR's diffusion training reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from scripts.common.errors import UserError
from scripts.common.files import read_json, write_json
from scripts.data.nifti import save_nifti
from scripts.measure.latents import LatentHealth
from scripts.networks.windows import joined
from scripts.use.outputs import Output
from scripts.use.workflow import VolumeWorkflow

DATALIST, STATISTICS = "datalist.json", "latent_stats.json"


class Encoding(VolumeWorkflow):
    """Writes the posterior mean of each volume, `<name>_emb.nii.gz`, (X, Y, Z, C) float32, and a JSON file beside it.

    That file, `<name>_emb.nii.gz.json`, holds `dim` and `spacing` (mm) of the volume after reorientation to RAS (and
    resampling), `modality`, the weights and their SHA-256, the bundle's version, and `scale_factor`, 1 / std over the
    latents of the whole set. A datalist of the latents and `latent_stats.json` come beside them.

    Args:
        output: the folder of the latents.
        save_sigma: write the posterior standard deviation too, as `<name>_emb_sigma.nii.gz`.
        resize_multiple: resample each volume so that its sizes are the nearest multiples of this number, as
            NV-Generate-CTMR does with 128; None keeps the size.
        kwargs: of `WholeVolumes`; the network has `encode`.

    Raises:
        UserError: for a `resize_multiple` that is no positive integer.
    """

    verb = "encoded"

    def __init__(
        self, *, output: Output, save_sigma: bool = False, resize_multiple: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if resize_multiple is not None and (not isinstance(resize_multiple, int) or resize_multiple < 1):
            raise UserError(f"resize_multiple is {resize_multiple!r}; use a positive integer, e.g. 128")
        self.output, self.save_sigma, self.resize_multiple = output, save_sigma, resize_multiple

    def process(self, volume: dict[str, Any]) -> None:
        """Write the latents of one volume, and what is known of them."""
        if self.resize_multiple is not None:
            volume = resized(volume, self.resize_multiple)
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
            "split": volume["split"],
            "content": "posterior mean",
            **self.output.facts,
            "latent_sums": latents.sums(),
        }
        if self.save_sigma:
            save_nifti(_image(sigma, volume["affine"]), self.output.folder / f"{volume['name']}_emb_sigma.nii.gz")
        write_json(self.output.sidecar(volume["name"]), facts)
        save_nifti(_image(mu, volume["affine"]), path)
        self.output.finished(volume["name"], volume["image"])

    def conclude(self, findings: list[None]) -> None:
        """Write the statistics and the datalist of all latents that are there, also those of earlier runs."""
        facts = [_read(self.output.sidecar(name)) for name in self.output.names()]
        if not facts:
            return
        statistics = LatentHealth.merged([LatentHealth.from_sums(f["latent_sums"]) for f in facts]).statistics()
        datalist: dict[str, list[dict[str, str]]] = {"training": []}
        for fact in facts:
            if fact.get("scale_factor") != statistics["scale_factor"]:
                write_json(self.output.sidecar(fact["name"]), fact | {"scale_factor": statistics["scale_factor"]})
            item = {"image": f"{fact['name']}.nii.gz", "modality": fact["modality"]}
            datalist.setdefault(fact["split"], []).append(item)
        write_json(self.output.folder / STATISTICS, {**statistics, "volumes": len(facts), **self.output.facts})
        write_json(self.output.folder / DATALIST, datalist)


def _read(sidecar: Path) -> dict[str, Any]:
    try:
        content = read_json(sidecar)
        if missing := {"name", "split", "modality", "latent_sums"} - content.keys():
            raise KeyError(min(missing))
        return content
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{sidecar}: is damaged; remove it and its latent, and encode that volume again") from error


def _image(latent: torch.Tensor, affine: np.ndarray) -> nib.Nifti1Image:
    """(1, C, X, Y, Z) as an image with the channels last, where the reference looks for them."""
    return nib.Nifti1Image(np.ascontiguousarray(latent[0].permute(1, 2, 3, 0).numpy()), affine)


def resized(volume: dict[str, Any], multiple: int) -> dict[str, Any]:
    """A volume resampled (trilinear) to the nearest sizes that are multiples of `multiple`, at least one of it."""
    size = volume["voxels"].shape[2:]
    wanted = [max(round(n / multiple), 1) * multiple for n in size]
    clipped = torch.from_numpy(volume["intensity"].clipped(volume["voxels"].numpy())).float()
    step = np.array(size) / wanted  # old voxels for one new one
    change = np.diag([*step, 1.0])
    change[:3, 3] = (step - 1) / 2  # voxels are areas: the first one's centre moves
    return volume | {
        "voxels": F.interpolate(clipped, wanted, mode="trilinear", align_corners=False),
        "affine": volume["affine"] @ change,
        "spacing": [float(s * q) for s, q in zip(volume["spacing"], step, strict=True)],
    }
