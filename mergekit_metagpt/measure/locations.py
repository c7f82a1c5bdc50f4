"""Where a model is: in a directory, which may be in the cache of the hub, or only on the hub."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import huggingface_hub
from huggingface_hub.errors import HFValidationError, SafetensorsParsingError
from mergekit.common import ModelPath
from mergekit.options import MergeOptions

from mergekit_metagpt.measure.headers import Header, read_header, require_file
from mergekit_metagpt.wording import BadInputError, reason


@dataclass(frozen=True)
class Directory:
    """A directory that holds a model."""

    path: str
    model: str  # its name in messages
    # What MergeKit looks for, in this order; and the ways out if it is broken, or not there.
    kinds: ClassVar[tuple[str, ...]] = ("model.safetensors", "pytorch_model.bin")
    if_broken: ClassVar[str] = "save or download it again"
    if_none: ClassVar[str] = "correct the path, or download it again"

    def file(self, name: str) -> str:
        """Return the path of a file."""
        return os.path.join(self.path, name)

    def holds(self, name: str) -> bool:
        """Return whether there is such a file."""
        return os.path.exists(self.file(name))

    def text(self, name: str) -> str:
        """Return the content of a file."""
        require_file(self.file(name))
        return Path(self.file(name)).read_text(encoding="utf-8")

    def headers(self, name: str) -> Mapping[str, Header]:
        """Return the headers of a weight file."""
        return read_header(self.file(name), self.model)


@dataclass(frozen=True)
class Repository:
    """A model on the hub at one commit, with the methods of a directory."""

    id: str
    commit: str  # what its revision was when it was looked up
    sizes: Mapping[str, int]  # of its files, in bytes
    model: str  # its name in messages
    path: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]] = ("model.safetensors",)
    if_broken: ClassVar[str] = "choose another revision"
    if_none: ClassVar[str] = "run hf download first, so that other files can be checked"

    def file(self, name: str) -> str:
        """Return the path of a file in the hub's file system."""
        return f"{self.id}@{self.commit}/{name}"

    def holds(self, name: str) -> bool:
        """Return whether there is such a file."""
        return name in self.sizes

    def text(self, name: str) -> str:
        """Return the content of a file."""
        return self.read(self.file(name), 0, self.sizes[name]).decode()

    def headers(self, name: str) -> Mapping[str, Header]:
        """Return the headers of a weight file."""
        file, size = self.file(name), self.sizes.get(name)
        if size is None:
            raise BadInputError(f"File {file} of model {self.model} is missing; {self.if_broken}.")
        with self._asking(file):
            found = huggingface_hub.parse_safetensors_file_metadata(
                self.id, name, revision=self.commit
            )
            first = 8 + int.from_bytes(self.read(file, 0, 8), "little")
            headers = {
                name: Header(tuple(t.shape), t.dtype, file, *(first + n for n in t.data_offsets))
                for name, t in found.tensors.items()
            }
            if max((header.end for header in headers.values()), default=first) != size:
                raise SafetensorsParsingError
            return headers

    def read(self, file: str, start: int, end: int) -> bytes:
        """Return the bytes of a file from one place to another."""
        with self._asking(file):
            system = huggingface_hub.HfFileSystem()
            data: bytes = system.cat_file(file, start, end, cache_type="none")
            if len(data) != end - start:
                raise EOFError(f"{len(data)} bytes came instead of {end - start}")
            return data

    @contextmanager
    def _asking(self, file: str) -> Iterator[None]:
        what = f"File {file} of model {self.model}"
        try:
            yield
        except BadInputError:
            raise
        except SafetensorsParsingError:
            raise BadInputError(
                f"{what} is truncated, or no safetensors file; {self.if_broken}."
            ) from None
        except Exception as error:  # of the hub's client, or of its connection
            raise BadInputError(
                f"{what} cannot be read from the hub ({reason(error)}); run the command again, or "
                f"hf download {self.id} first."
            ) from None


def locate(model: ModelPath, options: MergeOptions) -> Directory | Repository:
    """Return where a model is; the hub is asked for its commit, unless it is in a directory."""
    path, cache = model.path, options.transformers_cache

    def stored(file: str, revision: str | None) -> str | None:
        it = huggingface_hub.try_to_load_from_cache(path, file, cache, revision)
        return it if isinstance(it, str) else None

    if os.path.isdir(path):
        return Directory(path, str(model))
    if os.path.exists(path):
        raise BadInputError(
            f"Model {model} is a file; name the directory that holds it, or merge files with "
            "mergekit-pytorch."
        )
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            # MergeKit asks the hub for a list of files even if the model was downloaded.
            names = ("config.json", "adapter_config.json")
            here = next(filter(None, (stored(name, model.revision) for name in names)), None)
            said, way = "is no directory here, and", "correct the name, or download the model first"
            if here:
                said = "is downloaded, but"
                way = f"write its directory {os.path.dirname(here)} in the merge config"
            raise BadInputError(
                f"Model {model} {said} the hub cannot be asked for it offline (HF_HUB_OFFLINE is "
                f"set); {way}."
            )
        # Other requests are repeated for half a minute if they fail; this one is not.
        info = huggingface_hub.model_info(
            path, revision=model.revision, files_metadata=True, timeout=10
        )
    except BadInputError:
        raise
    except HFValidationError:
        raise BadInputError(
            f"Model directory {model} does not exist; correct the path in the merge config, or "
            "write one that has a + or @ as {model: {path: PATH}}."
        ) from None
    except Exception as error:  # of the hub's client, or of its connection
        raise BadInputError(
            f"Model {model} is no directory here, and cannot be found on the hub "
            f"({reason(error)}); correct the name, run hf auth login if it is gated, or check the "
            "connection."
        ) from None
    commit = str(info.sha)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    # What MergeKit would download.
    weights = [file for file in sizes if file.endswith(".safetensors")]
    weights = weights or [file for file in sizes if file.endswith(".bin")]
    found = [stored(file, commit) for file in weights]
    if found and all(found):
        return Directory(str(Path(str(found[0])).parents[weights[0].count("/")]), str(model))
    return Repository(info.id, commit, sizes, str(model))
