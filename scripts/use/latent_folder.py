"""What encode.json writes: latents with their side files, label maps beside them, and the lists of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.common.files import read_json, write_json
from scripts.measure.latents import LatentHealth
from scripts.use.outputs import HasFacts, Output

DATALIST, DATALIST_CONTROLNET, STATISTICS = "datalist.json", "datalist_controlnet.json", "latent_stats.json"
FOLDS = 5  # of a cross-validation; fold 0 is held back by default


class LatentFolder(Output):
    """The results of volumes: `<name>_emb.nii.gz` with its side file, and where there is a map, `<name>_label.nii.gz`.

    Latents and label maps are results by themselves: each is made where it is not there.

    Args:
        folder: where they go.
        data: all volumes: `name`; `image`, and perhaps `label`, the paths of the files; perhaps `split`, its list.
        weights: the latents come from them.
        settings: the latents depend on them.
        body_label: the label maps depend on it.
        bundle_version: as for `Output`; so are `computed_in` and `overwrite`.

    Attributes:
        labels: of the label maps; None where no volume has one.

    Raises:
        UserError: as `Output` does; and where a label map would be written over its source.
    """

    def __init__(
        self,
        folder: str,
        data: Sequence[Mapping[str, str]],
        weights: HasFacts,
        settings: Mapping[str, Any],
        body_label: int | None = None,
        bundle_version: str = "",
        computed_in: str = "",
        overwrite: bool = False,
    ) -> None:
        self.sources = {entry["name"]: entry["label"] for entry in data if "label" in entry}
        self.splits = {entry["name"]: entry["split"] for entry in data if "split" in entry}
        for name, source in self.sources.items():
            if Path(source).resolve() == Path(folder, f"{name}_label.nii.gz").resolve():
                raise UserError(f"{source}: would be written over by what is made of it; give another output_dir")
        super().__init__(folder, "_emb", weights, settings, bundle_version, computed_in, overwrite, sidecars=True)
        self.labels = None
        if self.sources:
            of_labels = {"body_label": body_label}
            self.labels = Output(
                folder, "_label", weights, of_labels, bundle_version, overwrite=overwrite, corrected=True
            )

    def complete(self, name: str, source: str) -> bool:
        """Whether the latent of the volume `name` of the file `source` is done, and its label map where it has one.

        Raises:
            UserError: as `done` does.
        """
        outputs: list[tuple[Output, str]] = [(self, source)]
        if self.labels is not None and name in self.sources:
            outputs.append((self.labels, self.sources[name]))
        try:
            whole = [output.done(name, source) for output, source in outputs]
        except UserError:
            for output in filter(None, (self, self.labels)):
                output.forget()
            raise
        return all(whole)

    def write_lists(self) -> None:
        """Write statistics and datalists of all that is there, also of what earlier runs made.

        A latent of an earlier run is in the list that its volume is in now, where a datalist says that.
        """
        facts = [_read(self.sidecar(name)) for name in self.names()]
        if not facts:
            return
        statistics = LatentHealth.merged([LatentHealth.from_sums(f["latent_sums"]) for f in facts]).statistics()
        datalist: dict[str, list[dict[str, str]]] = {"training": []}
        for fact in facts:
            was = dict(fact)
            fact["scale_factor"] = statistics["scale_factor"]
            fact["split"] = self.splits.get(fact["name"], fact["split"])
            if fact != was:
                write_json(self.sidecar(fact["name"]), fact)
            item = {"image": f"{fact['name']}.nii.gz", "modality": fact["modality"]}
            datalist.setdefault(fact["split"], []).append(item)
        write_json(self.folder / STATISTICS, {**statistics, "volumes": len(facts), **self.facts})
        write_json(self.folder / DATALIST, datalist)
        if self.labels is not None:
            mapped = set(self.labels.names())
            write_json(self.folder / DATALIST_CONTROLNET, _paired([fact for fact in facts if fact["name"] in mapped]))


def _paired(facts: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """A datalist of latents and label maps as NV-Generate-CTMR's ControlNet training reads it.

    It has no list `validation`: what is to validate has fold 0, and is in the list `training`. Where there is nothing
    to validate, the folds are dealt evenly, in order.
    """
    held_back = any(fact["split"] == "validation" for fact in facts)
    datalist: dict[str, list[dict[str, Any]]] = {"training": []}
    dealt = 0
    for fact in facts:
        item = {"image": f"{fact['name']}_emb.nii.gz", "label": f"{fact['name']}_label.nii.gz"}
        item |= {key: fact[key] for key in ("dim", "spacing", "modality")}
        if fact["split"] == "testing":
            datalist.setdefault("testing", []).append(item)
            continue
        fold = 0
        if fact["split"] == "training":
            fold = 1 + dealt % (FOLDS - 1) if held_back else dealt % FOLDS
            dealt += 1
        datalist["training"].append(item | {"fold": fold})
    return datalist


def _read(sidecar: Path) -> dict[str, Any]:
    try:
        content = read_json(sidecar)
        if missing := {"name", "split", "modality", "latent_sums"} - content.keys():
            raise KeyError(min(missing))
        return content
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{sidecar}: is damaged; remove it and its latent, and encode that volume again") from error
