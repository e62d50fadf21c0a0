"""New CT volumes, from seeds or for label maps, in HU, with a datalist and a contact sheet."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from scripts.common.errors import UserError
from scripts.common.files import read_json, write_json
from scripts.common.progress import progress_bar
from scripts.data.labels import read_labels
from scripts.data.nifti import read_nifti, save_nifti, write_like
from scripts.measure.pictures import in_grey, label_planes, save_sheet, three_planes
from scripts.networks.generation import Generator
from scripts.networks.whole_volumes import NotFiniteError, finite
from scripts.use.maps import LABEL, on_grid
from scripts.use.outputs import Output
from scripts.use.wanted import GROUP, Wanted, asked_grid, checked_seed, warn
from scripts.use.workflow import VolumeWorkflow

logger = logging.getLogger(__name__)

DATALIST, SHEET = "datalist.json", "contact_sheet.png"
SHOWN = 16  # volumes in the contact sheet


class Seeds(Dataset):
    """What is to be generated from seeds: volumes of one grid.

    Args:
        num_volumes: how many.
        wanted: what else is told of them.
        dim: X, Y, Z in voxels.
        spacing: mm along these axes.
        random_seed: of the first; the others follow it.
        output_prefix: how the names begin.

    Raises:
        UserError: where there is nothing to do, a seed is no whole number, or no volume can have this grid. One that
            lies far from what was trained on is warned of.
    """

    def __init__(
        self,
        num_volumes: int,
        wanted: Wanted,
        dim: Sequence[int],
        spacing: Sequence[float],
        random_seed: int = 0,
        output_prefix: str = "unet_3d",
    ) -> None:
        if type(num_volumes) is not int or num_volumes < 1:
            raise UserError(f"num_volumes is {num_volumes!r}; use a whole number from 1")
        first = checked_seed(random_seed)
        self.dim, self.spacing = asked_grid(dim, spacing, wanted.multiple)
        warn(wanted.unfamiliar(self.dim, self.spacing))
        seeds = range(first, first + num_volumes)
        self.data = [{"name": f"{output_prefix}_seed{s:05d}", "image": f"seed {s}", "seed": s} for s in seeds]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A volume: its `seed`; its `name`; as `image` what messages call it; `dim`, `spacing` (mm) and `affine`."""
        return {**self.data[index], "dim": self.dim, "spacing": self.spacing, "affine": np.diag([*self.spacing, 1.0])}

    def largest(self) -> tuple[str, list[int]]:
        """X, Y, Z of each volume, in voxels, and a text that says so."""
        return f"{GROUP}#dim is {self.dim}", self.dim


class Generation(VolumeWorkflow):
    """Writes volumes, (X, Y, Z) int16, HU for CT, with `datalist.json` and `contact_sheet.png`.

    Those of seeds are in RAS. Those for label maps have the grids of their maps and nothing where the maps are 0; the
    maps come beside them, as uint8.

    Args:
        output: the folder of the volumes.
        generator: makes them.
        wanted: what is told of them.
        kwargs: of `WholeVolumes`; the items are those of `Seeds`, or, for a generator with a ControlNet, `LabelMaps`.
    """

    verb = "generated"
    remedy = "use a smaller diffusion_unet_inference#dim or val_sliding_window_patch_size"

    def __init__(self, *, output: Output, generator: Generator, wanted: Wanted, **kwargs: Any) -> None:
        networks = (generator.unet, generator.autoencoder, generator.controlnet)
        network = nn.ModuleList([network for network in networks if network is not None])
        super().__init__(network=network, inferer=generator.inferer, **kwargs)
        self.output, self.generator, self.wanted = output, generator, wanted
        self.of_maps = generator.controlnet is not None
        if self.of_maps:
            self.remedy = "use label maps of fewer voxels, or a smaller val_sliding_window_patch_size"

    def described(self, volume: dict[str, Any]) -> str:
        """What is computed."""
        return f"a volume of {' x '.join(map(str, volume['dim']))}"

    def process(self, volume: dict[str, Any]) -> None:
        """Generate and write one volume."""
        name, conditions = volume["name"], self.wanted.conditions(volume["spacing"])
        for note in volume.get("notes", ()):
            logger.warning("%s: %s", volume["image"], note)
        place = f"{self.state.iteration}/{self.state.epoch_length} {name}"
        with progress_bar(self.generator.steps, place, "step") as bar:
            maps = volume.get("maps", {})
            latent = self.generator.latent(volume["seed"], volume["dim"], conditions, bar.update, **maps)
        if not latent.isfinite().all():
            raise NotFiniteError("the latent is not finite (NaN or infinite)")
        voxels = self._decoded(latent, volume["dim"], place)
        if self.of_maps:
            voxels = on_grid(voxels, volume, self.wanted.intensity.window[0])
            _save(volume["labels"], volume, self._label(name))
        _save(voxels.numpy(), volume, self.output.path(name))
        self.output.finished(name, volume["image"])

    def _decoded(self, latent: torch.Tensor, dim: Sequence[int], place: str) -> torch.Tensor:
        """A latent as a volume, (X, Y, Z) int16."""
        voxels = torch.empty(*dim, dtype=torch.int16)
        with progress_bar(self.inferer.count(dim), place, "window") as bar:
            for x, slab in self.generator.slabs(latent, bar.update):
                if not finite(slab):
                    raise NotFiniteError("the decoded volume is not finite (NaN or infinite)")
                slab.clamp_(min=0)  # MRI too, which has no limit above
                voxels[x : x + len(slab)] = self.wanted.intensity.restore(slab, torch.int16)
                del slab  # not to be held while the next ones are computed
        return voxels

    def _label(self, name: str) -> Path:
        return self.output.folder / f"{name}{LABEL}"

    def conclude(self, findings: list[None]) -> None:
        """Write the datalist of all volumes that are there, and the contact sheet of the first of them."""
        names = self.output.names()
        if not names:
            return
        folder = self.output.folder
        sources = self._sources() if self.of_maps else {}
        write_json(folder / DATALIST, {"training": [self._item(name, sources) for name in names]})
        planes = {name: self._picture(name) for name in names[:SHOWN]}
        below = ", each below its label map" if self.of_maps else ""
        title = f"{len(planes)} of {len(names)} generated volumes{below}"
        save_sheet(planes, folder / SHEET, title, self.wanted.intensity.range)
        print(f"\nvolumes   {folder}\ndatalist  {folder / DATALIST}\npicture   {folder / SHEET}")

    def _item(self, name: str, sources: Mapping[str, str]) -> dict[str, str]:
        """The entry of a volume in the datalist."""
        files = {"image": self.output.path(name)} | ({"label": self._label(name)} if self.of_maps else {})
        item = {key: str(file.relative_to(self.output.folder)) for key, file in files.items()}
        item["class"] = self.wanted.kind
        return item | ({"source_label": sources[item["label"]]} if item.get("label") in sources else {})

    def _sources(self) -> dict[str, str]:
        """The files that label maps came from, also those of earlier runs, by what the datalist calls the maps."""
        try:
            earlier = read_json(self.output.folder / DATALIST)["training"]
            found = {item["label"]: item["source_label"] for item in earlier}
        except (OSError, ValueError, KeyError, TypeError):
            found = {}
        return found | {f"{item['name']}{LABEL}": item["image"] for item in self.data_loader.dataset.data}

    def _picture(self, name: str) -> np.ndarray:
        """The three central planes of a volume, beneath those of its label map where it has one."""
        voxels, affine = read_nifti(self.output.path(name), self.wanted.kind)
        spacing = nib.affines.voxel_sizes(affine).round(5)  # float32 in the file
        planes = three_planes(self.wanted.intensity.normalise(voxels).numpy(), spacing)
        if not self.of_maps:
            return planes
        return np.concatenate([label_planes(read_labels(self._label(name))[0], spacing), in_grey(planes)])


def _save(data: np.ndarray, volume: Mapping[str, Any], path: Path) -> None:
    """Write what was made for an item: on the grid of its file where it has that, else in RAS."""
    if volume.get("own_grid"):
        write_like(volume["image"], data, path, akin=data.dtype == np.uint8)
        return
    image = nib.Nifti1Image(data, volume["affine"])
    image.header.set_xyzt_units("mm")
    save_nifti(image, path)
