"""Volumes into latents, as NV-Generate-CTMR's diffusion training reads them."""

from __future__ import annotations

import json
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from scripts.files import write_json
from scripts.inference import VolumeEvaluator
from scripts.metrics import LatentHealth
from scripts.nifti import save_nifti
from scripts.outputs import Output

DATALIST, STATISTICS = "datalist.json", "latent_stats.json"


class Encoding(VolumeEvaluator):
    """Writes the posterior mean of each volume, `<name>_emb.nii.gz`, (X, Y, Z, C) float32, and a JSON file beside it.

    That file, `<name>_emb.nii.gz.json`, holds `dim` and `spacing` (mm) of the volume after reorientation to RAS (and
    resampling), `modality`, the weights and their SHA-256, the bundle's version, and `scale_factor`, 1 / std over the
    latents of the whole set. A datalist of the latents and `latent_stats.json` come beside them.

    Args:
        output: where to.
        save_sigma: write the posterior standard deviation too, as `<name>_emb_sigma.nii.gz`.
        resize_multiple: resample each volume so that its sizes are the nearest multiples of this number, as
            NV-Generate-CTMR does with 128; None keeps the size.
        kwargs: of `VolumeEvaluator`; the network has `encode`.
    """

    participle = "encoded"

    def __init__(
        self, *, output: Output, save_sigma: bool = False, resize_multiple: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.output, self.save_sigma, self.resize_multiple = output, save_sigma, resize_multiple

    def process(self, volume: dict[str, Any]) -> None:
        if self.resize_multiple is not None:
            volume = resized(volume, self.resize_multiple)
        parts = [slab for _, slab in self.slabs(volume, self.network.encode)]  # type: ignore[arg-type]
        mu, sigma = (torch.cat(slabs, dim=2) for slabs in zip(*parts, strict=True))
        latents = LatentHealth()
        latents.update(mu, sigma)
        path = self.output.path(volume["name"])
        facts = {
            "dim": list(volume["voxels"].shape[2:]),
            "spacing": volume["spacing"],
            "modality": volume["class"],
            "source": volume["image"],
            "content": "posterior mean",
            **self.output.facts,
            "latent_sums": latents.sums(),
        }
        if self.save_sigma:
            save_nifti(_image(sigma, volume["affine"]), path.with_name(path.name.replace("_emb.nii", "_emb_sigma.nii")))
        write_json(self.output.sidecar(volume["name"]), facts)
        save_nifti(_image(mu, volume["affine"]), path)  # last: it says that all is there

    def conclude(self, gathered: None) -> None:
        """The statistics and the datalist of all latents that are there, also those of earlier runs."""
        entries = [e for e in self.data_loader.dataset.data if self.output.path(e["name"]).is_file()]  # type: ignore[union-attr]
        if not entries:
            return
        facts = [json.loads(self.output.sidecar(e["name"]).read_text(encoding="utf-8")) for e in entries]
        latents = LatentHealth.merged([LatentHealth.from_sums(fact["latent_sums"]) for fact in facts])
        statistics = latents.statistics()
        for entry, fact in zip(entries, facts, strict=True):
            if fact.get("scale_factor") != statistics["scale_factor"]:
                write_json(self.output.sidecar(entry["name"]), fact | {"scale_factor": statistics["scale_factor"]})
        write_json(self.output.folder / STATISTICS, {**statistics, "volumes": len(entries), **self.output.facts})
        datalist: dict[str, list[dict[str, str]]] = {"training": []}
        for entry in entries:
            item = {"image": f"{entry['name']}.nii.gz", "modality": entry["class"]}
            datalist.setdefault(entry["split"], []).append(item)
        write_json(self.output.folder / DATALIST, datalist)


def _image(latent: torch.Tensor, affine: np.ndarray) -> nib.Nifti1Image:
    return nib.Nifti1Image(np.ascontiguousarray(latent[0].permute(1, 2, 3, 0).numpy()), affine)


def resized(volume: dict[str, Any], multiple: int) -> dict[str, Any]:
    """A volume resampled (trilinear) to the nearest sizes that are multiples of `multiple`, at least one of it."""
    size = volume["voxels"].shape[2:]
    wanted = [max(round(n / multiple), 1) * multiple for n in size]
    clipped = torch.from_numpy(volume["intensity"].clipped(volume["voxels"].numpy())).float()
    step = np.array(size) / wanted
    change = np.diag([*step, 1.0])
    change[:3, 3] = (step - 1) / 2  # voxels are areas: the first one's centre moves
    return volume | {
        "voxels": F.interpolate(clipped, wanted, mode="trilinear", align_corners=False),
        "affine": volume["affine"] @ change,
        "spacing": [float(s * q) for s, q in zip(volume["spacing"], step, strict=True)],
    }
