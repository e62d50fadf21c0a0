"""New CT volumes from seeds: latents by the diffusion model, decoded, in HU, with a datalist and a contact sheet."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from scripts.common.errors import UserError
from scripts.common.files import write_json
from scripts.common.progress import progress_bar
from scripts.data.nifti import read_nifti, save_nifti
from scripts.measure.pictures import save_sheet, three_planes
from scripts.networks.generation import Generator
from scripts.networks.whole_volumes import NotFiniteError
from scripts.use.outputs import Output
from scripts.use.wanted import Wanted
from scripts.use.workflow import VolumeWorkflow

DATALIST, SHEET = "datalist.json", "contact_sheet.png"
SHOWN = 16  # volumes in the contact sheet


class Seeds(Dataset):
    """What is to be generated: for each volume its `seed`, its `name`, and as `image` what messages call it.

    Args:
        num_volumes: how many.
        random_seed: of the first; the others follow it.
        output_prefix: how the names begin.

    Raises:
        UserError: where these are no whole numbers, or there is nothing to do.
    """

    def __init__(self, num_volumes: int, random_seed: int = 0, output_prefix: str = "unet_3d") -> None:
        if type(num_volumes) is not int or num_volumes < 1:
            raise UserError(f"num_volumes is {num_volumes!r}; use a whole number from 1")
        if type(random_seed) is not int or random_seed < 0:
            raise UserError(f"diffusion_unet_inference#random_seed is {random_seed!r}; use a whole number from 0")
        seeds = range(random_seed, random_seed + num_volumes)
        self.data = [{"name": f"{output_prefix}_seed{s:05d}", "image": f"seed {s}", "seed": s} for s in seeds]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.data[index])


class Generation(VolumeWorkflow):
    """Writes a volume for each seed, (X, Y, Z) int16 in RAS, HU for CT; `datalist.json`, and `contact_sheet.png`.

    Args:
        output: the folder of the volumes.
        generator: makes them.
        wanted: their geometry and conditions.
        kwargs: of `WholeVolumes`.
    """

    verb = "generated"
    remedy = "use a smaller diffusion_unet_inference#dim or val_sliding_window_patch_size"

    def __init__(self, *, output: Output, generator: Generator, wanted: Wanted, **kwargs: Any) -> None:
        network = nn.ModuleList([generator.unet, generator.autoencoder])
        super().__init__(network=network, inferer=generator.inferer, **kwargs)
        self.output, self.generator, self.wanted = output, generator, wanted

    def described(self, volume: dict[str, Any]) -> str:
        """What is computed."""
        return f"a volume of {' x '.join(map(str, self.wanted.dim))}"

    def process(self, volume: dict[str, Any]) -> None:
        """Generate and write one volume."""
        dim, intensity = self.wanted.dim, self.wanted.intensity
        place = f"{self.state.iteration}/{self.state.epoch_length} {volume['name']}"
        with progress_bar(self.generator.steps, place, "step") as bar:
            latent = self.generator.latent(volume["seed"], dim, self.wanted.conditions(), bar.update)
        if not latent.isfinite().all():
            raise NotFiniteError("the latent is not finite (NaN or infinite)")
        voxels = torch.empty(dim, dtype=torch.int16)
        with progress_bar(self.inferer.count(dim), place, "window") as bar:
            for x, slab in self.generator.slabs(latent, bar.update):
                if not slab.isfinite().all():
                    raise NotFiniteError("the decoded volume is not finite (NaN or infinite)")
                slab.clamp_(min=0)  # MRI too, which has no limit above
                voxels[x : x + len(slab)] = intensity.restore(slab, torch.int16)
        image = nib.Nifti1Image(voxels.numpy(), np.diag([*self.wanted.spacing, 1.0]))
        image.header.set_xyzt_units("mm")
        save_nifti(image, self.output.path(volume["name"]))
        self.output.finished(volume["name"])

    def conclude(self, findings: list[None]) -> None:
        """Write the datalist of all volumes that are there, and the contact sheet of the first of them."""
        files = {name: self.output.path(name) for name in self.output.names()}
        if not files:
            return
        folder, kind, intensity = self.output.folder, self.wanted.kind, self.wanted.intensity
        items = [{"image": str(file.relative_to(folder)), "class": kind} for file in files.values()]
        write_json(folder / DATALIST, {"training": items})
        planes = {}
        for name in list(files)[:SHOWN]:
            volume = intensity.normalise(read_nifti(files[name], kind)[0]).numpy()
            planes[name] = three_planes(volume, self.wanted.spacing)
        title = f"{len(planes)} of {len(files)} generated volumes"
        save_sheet(planes, folder / SHEET, title, intensity.range)
        print(f"\nvolumes   {folder}\ndatalist  {folder / DATALIST}\npicture   {folder / SHEET}")
