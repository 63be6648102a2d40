"""What a component remembers of the files that it was read from, so that they can go out again as they were."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """The folder, or the file, of a checkpoint, and the content of its small files.

    The content is kept because the folder may be gone when the component is written: configurations, tokenizers and
    scheduler files are what training does not change, and other programs read more of them than is read here.

    Attributes:
        path: the folder or the GGUF file. Its weights are read again where they are needed.
        variant: of the weights' file names, see `pretrained.load`.
        files: (name within the folder, content) of the small files.
        moved: (name, folder) of the parts of a pipeline that lie elsewhere; their files have names as if they did not.
    """

    path: Path
    variant: str | None = None
    files: tuple[tuple[str, bytes], ...] = ()
    moved: tuple[tuple[str, Path], ...] = ()

    def content(self, name: str) -> bytes | None:
        """The file of that name, None where there was none."""
        return dict(self.files).get(name)

    def below(self, folder: str) -> "Source":
        """The source of one part of a pipeline: its folder, with names within it."""
        start = f"{folder}/"
        inside = tuple((name.removeprefix(start), data) for name, data in self.files if name.startswith(start))
        return Source(dict(self.moved).get(folder, self.path / folder), self.variant, inside)
