"""A model by name: a local directory, or a repository of the Hugging Face Hub and the commit it came from."""

import re
from dataclasses import dataclass
from pathlib import Path

from marlin_convert.checkpoint.reader import PICKLES, json_file
from marlin_convert.errors import SourceError, readable
from marlin_convert.hub_calls import aside, hub_errors
from marlin_convert.remote import Remote, RemoteFile

_PART = r"(?![.-])[\w.-]{1,96}(?<![.-])"
_REPOSITORY = re.compile(f"({_PART}/)?{_PART}", re.ASCII)

# What a conversion and `verify` read: never pickles, and code only if it was asked for.
_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model*",
    "*.tiktoken",
    "README.md",
    "recipe*.yaml",
    # in any case, which the patterns of the client tell apart
    *("".join(f"[{x.upper()}{x}]" if x.isalpha() else x for x in word) + "*"
      for word in ("license", "notice", "use_policy")),
]  # fmt: skip
# What a plan and `inspect` read beside the headers of the weights.
_LOOKED_AT = [
    "config.json",
    "*.safetensors.index.json",
    "quantize_config.json",
    "quant_config.json",
    "marlin_convert*.json",
]
# Second copies of the weights that some repositories carry.
_NOT = ["consolidated*", "*/*.safetensors", "original/*", "onnx/*"]


@dataclass(frozen=True)
class Source:
    """A resolved model: where its files are, what it is called, and its commit (None for a directory).

    `remote` is what is not in the directory, where a model of the Hub was only looked at.
    """

    directory: Path
    name: str
    commit: str | None
    remote: Remote | None = None


def resolve(
    model: str, revision: str | None = None, *, code: bool = False, only_look: bool = False
) -> Source:
    """The directory of MODEL, downloading it if it is a Hub id; SourceError says why it cannot be had.

    A path that exists wins over a Hub id. `code` also fetches the Python files of the repository. To
    `only_look` downloads what a plan is made from and no weights: `remote` has these.
    """
    path = Path(model)
    if model and path.is_dir():
        if revision is not None:
            raise SourceError(
                f"'{model}' is a directory; --revision is for models on the Hub.", "leave --revision out."
            )
        return Source(path, readable(path.resolve().name), None)
    if not model or path.exists() or not is_hub_id(model):
        raise SourceError(
            f"'{model}' is neither a directory nor a Hub id.",
            "give the directory that the file is in."
            if path.is_file()
            else "a Hub id looks like 'org/name'.",
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with hub_errors(model):
        try:
            config = Path(hf_hub_download(model, "config.json", revision=revision))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise _no_model(model, revision) from error
        commit = config.parent.name
        if only_look and (found := _looked_at(model, commit, code=code)):
            return found
        # the architecture first: a model that is refused is not worth its gigabytes
        from marlin_convert.models.tree import check_type

        check_type(json_file(config.parent, config.name))
        return Source(_downloaded(model, commit, _wanted(code=code)), model, commit)


def complete(source: Source, *, code: bool = False) -> None:
    """Have all files but the weights of a model that was only looked at; SourceError where that fails."""
    if source.remote is not None and source.commit is not None:
        with hub_errors(source.name):
            _downloaded(source.name, source.commit, _wanted(code=code), [*_NOT, "*.safetensors"])


def _wanted(*, code: bool) -> list[str]:
    return _FILES + (["*.py"] if code else [])


def _downloaded(model: str, commit: str, wanted: list[str], unwanted: list[str] = _NOT) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        aside(
            lambda: snapshot_download(model, revision=commit, allow_patterns=wanted, ignore_patterns=unwanted)
        )
    )


def _looked_at(model: str, commit: str, *, code: bool) -> Source | None:
    """A model by its small files and the list of the others; None where only the cache can be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import filter_repo_objects, httpx

    try:
        tree = [
            one for one in HfApi().list_repo_tree(model, revision=commit, recursive=True)
            if isinstance(one, RepoFile)
        ]  # fmt: skip
    except (OfflineModeIsEnabled, httpx.TransportError):
        return None
    wanted = {
        one.path: one
        for one in filter_repo_objects(
            tree, allow_patterns=_wanted(code=code), ignore_patterns=_NOT, key=lambda one: one.path
        )
    }
    pickles = sorted(one.path for one in tree if one.path.endswith(PICKLES))
    if pickles and not any(name.endswith(".safetensors") for name in wanted):
        raise SourceError(
            f"{model!r} has its weights in pickle files only ({pickles[0]}, {len(pickles)} in all); loading "
            "those can run code, so they are not read.",
            "look for safetensors under another --revision; or, where you trust it, load it with "
            "transformers and save it.",
        )
    directory = _downloaded(model, commit, _LOOKED_AT + (["*.py"] if code else []))
    absent = {name: one for name, one in wanted.items() if not (directory / name).exists()}
    files = {
        name: RemoteFile(model, commit, name, one.size, one.lfs.sha256 if one.lfs else one.blob_id)
        for name, one in absent.items()
        if name.endswith(".safetensors")
    }
    remote = Remote(files, sum(one.size for one in wanted.values()), sum(one.size for one in absent.values()))
    return Source(directory, model, commit, remote)


def _no_model(repository: str, revision: str | None) -> SourceError:
    """What a repository without a config.json is: empty, or something else."""
    from huggingface_hub import HfApi

    names = [
        name for name in HfApi().list_repo_files(repository, revision=revision) if name != ".gitattributes"
    ]
    if not names:
        return SourceError(
            f"{repository!r} is empty: nothing has been pushed to it.", "check its name and --revision."
        )
    more = ", ..." if len(names) > 3 else ""
    return SourceError(
        f"{repository!r} has no config.json: it holds {len(names)} other files, "
        f"{', '.join(sorted(names)[:3])}{more}.",
        "check its name and --revision; a model has its config.json beside its safetensors.",
    )


def remote_files(source: Source) -> set[str]:
    """The names of all files of a Hub model at its commit; SourceError if the Hub does not say."""
    from huggingface_hub import HfApi

    with hub_errors(source.name):
        return set(HfApi().list_repo_files(source.name, revision=source.commit))


def fetch(source: Source, name: str) -> None:
    """Have one more file of a Hub model beside the others; SourceError says why it cannot be had."""
    from huggingface_hub import hf_hub_download

    with hub_errors(source.name):
        hf_hub_download(source.name, name, revision=source.commit)


def is_hub_id(name: object) -> bool:
    """Whether `name` could be a model on the Hub: namespace/name, or name alone for the oldest ones."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None


def is_repository(name: str) -> bool:
    """Whether `name` has the form of a repository one can push to: namespace/name."""
    return "/" in name and is_hub_id(name)
