"""A calibration's finished blocks in a folder, so that one that was killed goes on where it was.

For each block a safetensors file of what was decided, and one of the hidden states before the next
block. Files are replaced whole, the hidden states last: they say which block is next.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gpu_poor import memory
from gpu_poor.chains import Chain
from gpu_poor.files import replace_whole, write_safetensors
from gpu_poor.folds import Decided, Fold
from gpu_poor.nn.base import Stored
from gpu_poor.plan import Plan, Target
from gpu_poor.receipt import version
from gpu_poor.strategies import Recipe

JOB, STREAMS = "job.json", "hidden-states.safetensors"


class WorkFolder:
    """The state of one calibration.

    Args:
        folder: made if it is not there.
        job: :func:`fingerprint` of what is being done.

    Raises:
        ValueError: the folder has the state of another calibration.
    """

    def __init__(self, folder: str | Path, job: str):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / JOB
        if path.exists():
            found = _read_json(path).get("job")
            if found != job:
                raise ValueError(
                    f"{self.folder} holds the state of another calibration (model, data or options "
                    "differ): pass another folder, or empty this one"
                )
            # Of a run that was killed while it wrote; the last is how safetensors names its own.
            for pattern in (f".{JOB}.*", f".{STREAMS}.*", ".block-*.*", ".tmp??????"):
                for stray in self.folder.glob(pattern):
                    stray.unlink()
        replace_whole(path, lambda name: Path(name).write_text(json.dumps({"job": job}) + "\n"))

    def save(
        self, i: int, targets: Iterable[Target], done: Decided, prefix: str, streams: dict
    ) -> None:
        """Keep block ``i``: of ``done`` what belongs to it, and the hidden states after it."""
        tensors: dict[str, Tensor] = {}
        for target in targets:
            if (stored := done.stored.get(memory.identity(target.module.weight))) is not None:
                tensors[f"weight|{target.name}"] = stored.weight.detach()
                if stored.scale is not None:
                    tensors[f"scale|{target.name}"] = stored.scale
                if stored.input_scale is not None:
                    tensors[f"input scale|{target.name}"] = stored.input_scale
        for name, (_, factors) in done.norms.items():
            if name.startswith(f"{prefix}."):
                tensors[f"norm|{name}"] = factors
        for name, (chain, factors) in done.sources.items():
            if name.startswith(f"{prefix}."):
                tensors[f"source|{name}|{chain.source}|{chain.linear}"] = factors
        unreached = json.dumps([n for n in done.unreached if n.startswith(f"{prefix}.")])
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        replace_whole(
            self._block(i),
            lambda name: save_file(tensors, name, {"unreached": unreached}),
        )
        names = [f"{kind}|{b}" for kind, states in streams.items() for b in range(len(states))]
        replace_whole(
            self.folder / STREAMS,
            lambda name: write_safetensors(name, names, _Every(streams), {"next": str(i + 1)}),
        )

    def load(self, plan: Plan, folds: list[Fold], done: Decided, streams: dict) -> int:
        """Fill in what is known, and return the number of the block that is next.

        Raises:
            ValueError: a file is damaged.
        """
        path = self.folder / STREAMS
        if not path.exists():
            return 0
        targets = {target.name: target for target in plan.targets}
        by_norm = {fold.norm: fold for fold in folds}
        try:
            with safe_open(path, framework="pt") as file:
                following = int(file.metadata()["next"])
                for kind, states in streams.items():
                    for b in range(len(states)):
                        states[b] = file.get_tensor(f"{kind}|{b}")
            for i in range(following):
                self._load_block(i, targets, by_norm, done)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.folder} is damaged: {error}; empty it to start anew"
            ) from error
        return following

    def _load_block(self, i: int, targets: dict[str, Target], by_norm, done: Decided) -> None:
        with safe_open(self._block(i), framework="pt") as file:
            done.unreached += json.loads(file.metadata()["unreached"])
            names = list(file.keys())
            for key in names:
                kind, name, *rest = key.split("|")
                if kind == "weight":
                    target = targets[name]
                    weight = nn.Parameter(file.get_tensor(key), requires_grad=False)
                    scales = (f"scale|{name}", f"input scale|{name}")
                    scales = [file.get_tensor(s) if s in names else None for s in scales]
                    shape = tuple(target.rows()["weight"].shape)
                    done.stored[memory.identity(target.module.weight)] = Stored(
                        weight, scales[0], target.form, shape, scales[1]
                    )
                elif kind == "norm":
                    done.norms[name] = by_norm[name], file.get_tensor(key)
                elif kind == "source":
                    done.sources[name] = Chain(*rest), file.get_tensor(key)

    def _block(self, i: int) -> Path:
        return self.folder / f"block-{i:04}.safetensors"


class _Every:
    """The hidden states of all streams, as often as asked for, one at a time."""

    def __init__(self, streams: dict):
        self.streams = streams

    def __iter__(self):
        return itertools.chain.from_iterable(self.streams.values())


def fingerprint(
    model: nn.Module, plan: Plan, recipe: Recipe, rows: list[Tensor], activation: str
) -> str:
    """Tells one calibration from another: version, options, data, some values of each parameter."""
    digest = hashlib.sha256()
    options = [version(), type(model).__name__, activation]
    options += [f"{part.name} {vars(part)}" for part in recipe if part is not None]
    options += [f"{t.name} {t.form.name} {tuple(t.module.weight.shape)}" for t in plan.targets
                if t.is_linear]  # fmt: skip
    digest.update(json.dumps(options).encode())
    for row in rows:
        digest.update(row.contiguous().numpy().tobytes())
    for parameter in model.parameters():  # norms and biases change the activations, too
        some = parameter.detach().flatten()[:256].float().cpu()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; empty the folder to start anew") from error
    return found if isinstance(found, dict) else {}
