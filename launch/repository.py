"""The model repository that Triton reads: links to models, with their descriptions added."""

import shutil
from collections.abc import Iterable
from pathlib import Path


def assemble(repository: Path, sources: Iterable[Path]) -> list[str]:
    """Fill `repository` with links to the models of `sources`, and return the models' names.

    If two models have the same name, the last one is used. Each configuration gets the parameters
    of the model's `1/description.pbtxt`, if there is one: network, source of the weights, ….

    The sources are not changed, and may be read-only. Other files in a model's folder, such as its
    engines, are kept; folders of models that no source contains any more are removed.
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
            # Remove links of an earlier start, maybe to another source; keep the link to an engine.
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
