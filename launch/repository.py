"""The model repository that Triton reads: links to models, and their descriptions put in."""

import shutil
from collections.abc import Iterable
from pathlib import Path


def assemble(repository: Path, sources: Iterable[Path]) -> list[str]:
    """Make `repository` hold the models of `sources`, by links; of two of one name the last.

    Each configuration gets the parameters of the model's `1/description.pbtxt`, if there is one:
    the network and where its weights are from, for those who ask Triton for the model.

    The sources stay as they are, and may be read-only. What else is in a model's folder, such as
    its engines, stays; folders of models that no source has any more are removed.

    Returns:
        The models' names.
    """
    models = {
        config.parent.name: config.parent
        for source in sources
        for config in sorted(source.glob("*/config.pbtxt"))
    }
    repository.mkdir(parents=True, exist_ok=True)
    for found in repository.iterdir():
        if not found.is_dir() or found.is_symlink():
            found.unlink()
        elif found.name not in models:
            shutil.rmtree(found)
    for name, model in models.items():
        served = repository / name
        for link in served.rglob("*"):
            # Of an earlier start, maybe to another source; the engines' builder may link its own.
            if link.is_symlink() and not link.resolve().is_relative_to(repository.resolve()):
                link.unlink()
        description = model / "1" / "description.pbtxt"
        for file in filter(Path.is_file, model.rglob("*")):
            target = served / file.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            if description.is_file() and target.parent in (served, served / "configs"):
                target.write_bytes(file.read_bytes() + description.read_bytes())
            else:
                target.symlink_to(file.absolute())
    return sorted(models)
