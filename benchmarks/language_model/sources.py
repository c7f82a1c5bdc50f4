"""The data of the tasks: records from packages that ordinary registries carry, or from the hub."""

import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import click

Record = dict[str, str]

_VADER = "vaderSentiment==3.3.2"
_RATINGS = "hutto_ICWSM_2014"
_CLEAR = 0.8  # of ratings from -4 to 4: how far from 0 a review is clearly for or against
_WORDNET = Path("usr/share/wordnet")

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen",
    "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def reviews(folder: Path, file: str) -> Iterator[Record]:
    """Yield ``text`` and ``sentiment`` (positive or negative) of reviews that people rated.

    Args:
        folder: where the archive is downloaded to.
        file: a file of C. Hutto's and E. Gilbert's ratings (ICWSM 2014), which the source
            distribution of vaderSentiment carries.
    """
    extracted = folder / _RATINGS / file
    if not extracted.exists():
        _extract(_source_distribution(folder), f"{_RATINGS}.tar.gz", folder)
        _extract(folder / f"{_RATINGS}.tar.gz", file, folder / _RATINGS)
    for line in extracted.read_text("utf-8-sig").splitlines():
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= _CLEAR:
            sentiment = "positive" if float(rating) > 0 else "negative"
            yield {"text": " ".join(text.split()), "sentiment": sentiment}


def wordnet(folder: Path, parts: Sequence[str]) -> Iterator[Record]:
    """Yield ``definition``, ``example``, ``word``, ``part`` and ``lexicographer_file`` of WordNet.

    A record is a meaning with an example that contains the word; where there is none, ``example``
    and ``word`` are missing.

    Args:
        folder: where the Debian package wordnet-base is unpacked, unless it is installed.
        parts: parts of speech: noun, verb, adj, adv.
    """
    root = next((root for root in (folder, Path("/")) if (root / _WORDNET).is_dir()), folder)
    if not (root / _WORDNET).is_dir():
        _run(["apt-get", "download", "wordnet-base"], folder, "WordNet (wordnet-base)")
        (package,) = folder.glob("wordnet-base_*.deb")
        _run(["dpkg-deb", "-x", package.name, "."], folder, "WordNet (wordnet-base)")
    for part in parts:
        for line in (root / _WORDNET / f"data.{part}").read_text("utf-8").splitlines():
            if not line.startswith(" "):  # the licence
                yield _meaning(line, part)


def _meaning(line: str, part: str) -> Record:
    """Read a line of WordNet's data files, whose format is in the manual page wndb(5)."""
    fields, _, gloss = line.partition(" | ")
    _, lexicographer_file, _, count, *rest = fields.split()
    words = [word.replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
    record = {
        "definition": re.sub(r'[;:,]?\s*".*', "", gloss).strip(),
        "lexicographer_file": lexicographer_file,
        "part": part,
    }
    for example in re.findall(r'"([^"]+)"', gloss):
        for word in words:
            if re.search(rf"\b{re.escape(word)}\b", example):
                return {**record, "example": example, "word": word}
    return record


def debian(folder: Path) -> Iterator[Record]:
    """Yield ``description``, ``section`` and ``source`` (package) of the packages that apt knows.

    Args:
        folder: a folder to run apt-cache in.
    """
    available = _run(["apt-cache", "dumpavail"], folder, "the descriptions of Debian packages")
    for paragraph in available.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Source|Section|Description): (.*)$", paragraph, re.M))
        if {"Package", "Section", "Description"} <= fields.keys():
            yield {
                "description": fields["Description"],
                "section": fields["Section"].rpartition("/")[2],
                "source": (fields.get("Source") or fields["Package"]).partition(" ")[0],
            }


def sums(folder: Path, largest: int) -> Iterator[Record]:
    """Yield ``first``, ``second`` and their ``sum`` in words, for all numbers from 1 to largest."""
    for first, second in product(range(1, largest + 1), repeat=2):
        words = (in_words(number) for number in (first, second, first + second))
        yield dict(zip(("first", "second", "sum"), words, strict=True))


def in_words(number: int) -> str:
    """Return a number from 0 to 99 in words, such as ``forty-two``."""
    if number < len(_ONES):
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


def hub(folder: Path, path: str, split: str, name: str | None = None) -> Iterator[Record]:
    """Yield the rows of a data set on the Hugging Face hub, with all fields as text."""
    import datasets

    for row in datasets.load_dataset(path, name, split=split, cache_dir=str(folder / "hub")):
        yield {field: str(value) for field, value in row.items()}


SOURCES: dict[str, Callable[..., Iterator[Record]]] = {
    source.__name__: source for source in (reviews, wordnet, debian, sums, hub)
}


def download(requirement: str, folder: Path, *options: str) -> None:
    """Download one file of a package index with pip, without what it depends on.

    Raises:
        ClickException: if pip fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
    _run([*command, "--dest", str(folder), requirement], folder, requirement)


def _source_distribution(folder: Path) -> Path:
    # The wheel leaves out the ratings.
    download(_VADER, folder, "--no-binary", ":all:")
    (archive,) = (path for path in folder.glob("*.tar.gz") if path.name.lower().startswith("vader"))
    return archive


def _extract(archive: Path, name: str, folder: Path) -> None:
    """Write the one member of an archive that has this file name into a folder."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(archive) as members:
        member = next(it for it in members if Path(it.name).name == name)
        content = members.extractfile(member)
        assert content
        (folder / name).write_bytes(content.read())


def _run(command: Sequence[str], folder: Path, what: str) -> str:
    """Run a command in a folder and return what it prints."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise click.ClickException(
            f"There is no {command[0]} here to get {what} with. Run this on Debian or Ubuntu, or "
            f"take another source for the task in benchmarks/language_model/tasks.yaml."
        ) from error
    except subprocess.CalledProcessError as error:
        raise click.ClickException(
            f"Could not get {what}: `{' '.join(command)}` says {error.stderr.strip()}"
        ) from error
    return done.stdout
