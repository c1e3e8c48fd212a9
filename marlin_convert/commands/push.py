"""The story of `push`: prove that the files are the verified ones, write the card, commit once, compare.

Everything that can be wrong with the checkpoint is found before the Hub is asked anything; the Hub's own
refusals are found before anything is uploaded. A branch is then changed by one commit, or not at all.
"""

import hashlib
import logging
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from marlin_convert import __version__, card
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.reader import json_file
from marlin_convert.errors import ConvertError, OptionError, SourceError
from marlin_convert.hub import Source, is_repository
from marlin_convert.hub_calls import aside, hub_errors, hub_sentence
from marlin_convert.release import Checked, File, Progress, Release, check

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

log = logging.getLogger("marlin_convert")

# Layouts that --also writes, each to a branch of its name.
ALSO = ("gptq", "compressed-tensors")

# What a repository has of its own; it stays as it is.
KEPT = ".gitattributes"

SCRATCH_HINT = "it is made in the temporary directory: see that it has room, or name another one with TMPDIR."

# Seconds that the Hub may be silent; its client would wait for ever.
PATIENCE = 300.0

_BRANCH = re.compile(r"(?!refs/)(?!.*(\.\.|//|\.lock$))[A-Za-z0-9_][\w./-]{0,100}(?<![./])", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")


@dataclass(frozen=True)
class Job:
    """What is asked of one push; `private` is None where a new repository takes the default."""

    checkpoint: Path
    repository: str
    branch: str = "main"
    private: bool | None = None
    create_pr: bool = False
    message: str | None = None
    base_model: str | None = None
    license: str | None = None
    also: tuple[str, ...] = ()
    allow_unverified: bool = False


@dataclass(frozen=True)
class Pushed:
    """What became of one branch."""

    branch: str
    commit: str
    url: str
    changed: bool
    removed: list[str]
    pull_request: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What was prepared and, unless it was a dry run, what the Hub holds now."""

    releases: list[Release]
    warnings: list[str]
    pushed: list[Pushed]


def push(job: Job, *, dry_run: bool = False, progress: Progress = lambda names: names) -> Outcome:
    """Publish a verified checkpoint; ConvertError says what stood in the way, and then no branch has changed.

    Branches of --also come first, so that the card of the main one never names a branch that is not there.
    """
    _check_request(job)
    with ExitStack() as stack:
        releases, warnings = _prepare(job, stack, progress)
        for warning in warnings:
            log.warning("warning: %s", warning)
        for name in releases[-1].left:
            log.warning("not pushed: %s is not in the manifest", name)
        # a directory of --also is gone after this
        pushed = [] if dry_run else _publish(job, releases)
    return Outcome(releases, warnings, pushed)


def _check_request(job: Job) -> None:
    checkpoint, repository = str(job.checkpoint), job.repository
    if not job.checkpoint.is_dir():
        if Path(repository).is_dir() and is_repository(checkpoint):
            raise ConvertError(
                f"'{repository}' is the directory and {checkpoint!r} the repository.",
                f"swap them: marlin-convert push {repository} {checkpoint}",
            )
        raise SourceError(
            f"'{checkpoint}' is not a directory.", "give the directory that quantize has written."
        )
    if not is_repository(repository):
        raise ConvertError(
            f"{repository!r} is not the name of a repository.",
            f"it looks like 'you/{job.checkpoint.resolve().name}': whose it is, and what it is called.",
        )
    for name, value, form in (
        ("--base-model", job.base_model, is_repository),
        ("--license", job.license, _LICENSE.fullmatch),
        ("--revision", job.branch, _BRANCH.fullmatch),
    ):
        if value is not None and not form(value):
            raise ConvertError(
                f"{name} {value!r} is not one.",
                "a base model is 'org/name' on the Hub, a license like 'apache-2.0', a branch like 'main'.",
            )
    for name in job.also:
        if name not in ALSO:
            raise OptionError(f"--also: {name!r} is not one of {', '.join(ALSO)}.")
    if job.branch in job.also:
        raise ConvertError(f"--also {job.branch} has a branch of that name.", "choose another --revision.")


# what goes up


def _prepare(job: Job, stack: ExitStack, progress: Progress) -> tuple[list[Release], list[str]]:
    """The releases, the main one last, and what the user should know of them."""
    _check_codes(job)
    checked = check(job.checkpoint, progress)
    if checked.unverified is not None and not job.allow_unverified:
        raise ConvertError(
            f"'{job.checkpoint}' is not verified: {checked.unverified}.",
            f"marlin-convert verify {shlex.quote(str(job.checkpoint))} --source MODEL, or publish it anyway "
            "with --allow-unverified; the card will say so.",
        )
    try:
        if checked.manifest["recipe"]["format"] in job.also:
            raise ConvertError("--also names the format of the checkpoint itself.", "leave it out.")
        facts = card.facts(checked.manifest, job.base_model, job.license)
        main = _release(job, job.branch, checked, facts, checked)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(
            f"the manifest of '{job.checkpoint}' lacks what the card says ({type(error).__name__}: {error}).",
            "it was not written by this version of marlin-convert; make the checkpoint again.",
        ) from error
    releases = []
    for name in job.also:
        log.info("repacking to %s and verifying that", name)
        scratch = TemporaryDirectory(prefix="marlin-convert-", ignore_cleanup_errors=True)
        directory = Path(stack.enter_context(scratch)) / name
        _repack(job, name, directory)
        repacked = check(directory, progress)
        if repacked.unverified is not None:
            raise ConvertError(
                f"the {name} repack could not be verified: {repacked.unverified}.", SCRATCH_HINT
            )
        releases.append(_release(job, name, repacked, facts, checked))
    unverified = [f"published without verification: {checked.unverified}."] * bool(checked.unverified)
    return [*releases, main], unverified + facts.warnings


def _check_codes(job: Job) -> None:
    """ConvertError for --also of a checkpoint that has no codes: those would be others, solved for here."""
    recipe = (manifests.load(job.checkpoint) or {}).get("recipe")
    if job.also and isinstance(recipe, dict) and recipe.get("format") == "dense":
        raise ConvertError(
            f"'{job.checkpoint}' is dense: it has no codes that --also could write in another layout.",
            f"quantize it first: marlin-convert quantize {shlex.quote(str(job.checkpoint))} -o DIR "
            f"--format {job.also[0]}, and push DIR.",
        )


def _release(job: Job, branch: str, checked: Checked, facts: card.Facts, origin: Checked) -> Release:
    """What a branch will hold; `origin` is the checkpoint that was given, whose codes these are."""
    published = card.Published(
        repository=job.repository,
        branch=branch,
        manifest=checked.manifest,
        manifest_sha256=checked.files[manifests.MANIFEST].sha256,
        report=checked.report,
        origin=origin.manifest,
        measured=origin.report,
        also=tuple(name for name in ALSO if name in job.also) if checked is origin else (),
        chats=_has_chat_template(job.checkpoint),
    )
    release = Release(published, facts, checked.files, checked.left)
    _ = release.card  # written now: what it lacks is found before anybody is asked
    return release


def _has_chat_template(directory: Path) -> bool:
    """Whether a tokenizer has one, in a file of its own or, as older ones, in its config."""
    config = directory / "tokenizer_config.json"
    return any(directory.glob("chat_template*")) or (
        config.is_file() and bool(json_file(directory, config.name).get("chat_template"))
    )


def _repack(job: Job, format: str, directory: Path) -> None:
    """Write the same codes in another layout, verify them, and compare them one by one."""
    import torch

    from marlin_convert import recipe
    from marlin_convert.checkpoint.linears import Weights
    from marlin_convert.checkpoint.reader import Checkpoint
    from marlin_convert.checks import CHECKS
    from marlin_convert.commands import quantize, verify

    source = Source(job.checkpoint, job.repository, None)
    settings = recipe.load(recipe.DEFAULT).changed({"format": format})
    try:
        quantize.quantize(quantize.Job(source, directory, settings, torch.device("cpu")))
    except ConvertError as error:
        raise ConvertError(
            f"the {format} repack failed: {error}",
            SCRATCH_HINT,
        ) from error
    checks = frozenset(CHECKS) - {"generate"}
    task = verify.Job(Source(directory, job.repository, None), checks, torch.device("cpu"))
    done = verify.verify(task)
    if not done.verified:
        wanted = done.needed | done.required
        reasons = [
            f"{name}: {check.reason}"
            for name, check in done.checks.items()
            if check.status == "fail" or (check.status == "skipped" and name in wanted)
        ]
        raise ConvertError(f"the {format} repack does not pass ({'; '.join(reasons)}).", "this is a bug.")
    verify.save(done, task)
    ours, theirs = Weights(Checkpoint.open(job.checkpoint)), Weights(Checkpoint.open(directory))
    for linear in ours.packed_linears():
        one, other = ours.quantized(linear), theirs.quantized(linear)
        if not torch.equal(one.codes, other.codes) or not torch.equal(one.scales, other.scales):
            raise ConvertError(
                f"the {format} repack of {linear} has other codes or scales.", "this is a bug."
            )


# where it goes


def _publish(job: Job, releases: list[Release]) -> list[Pushed]:
    """Check token, card and repository, then one commit per release."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import get_session

    token = get_token()
    if token is None:
        raise ConvertError("there is no token for the Hub.", "run 'hf auth login', or set HF_TOKEN.")
    for release in releases:
        for name, file in release.files.items():
            if file.holds(token.encode()):
                raise ConvertError(f"{name!r} holds your Hub token.", "remove it; nothing was uploaded.")
    api = HfApi()
    get_session().timeout = PATIENCE
    with hub_errors(job.repository):
        identity = api.whoami()
        _check_token(identity)
        for release in releases:
            _check_card(api, release.card)
    if job.base_model is not None:
        with hub_errors(job.base_model):
            api.model_info(job.base_model)
    _open_repository(api, job)
    releases[-1] = _naming_branches(api, job, releases[-1])
    return [_commit(api, job, release, identity["name"]) for release in releases]


def _check_token(identity: dict[str, Any]) -> None:
    role = identity.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ConvertError(
            f"the token of {identity['name']!r} can only read.",
            "make one with write access at huggingface.co/settings/tokens, then run 'hf auth login'.",
        )


def _check_card(api: "HfApi", text: str) -> None:
    """Ask the Hub whether it takes the metadata of the card; the client would ask only after uploading."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    question = {"content": text, "repoType": "model"}
    response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=question)
    if response.status_code == 400:
        answer = response.json().get("errors", [])
        said = "; ".join(" ".join(str(error.get("message")).split())[:200] for error in answer)
        raise ConvertError(
            f"the Hub rejects the card: {said}.",
            "--license and --base-model put other values in; --dry-run shows it. Nothing was uploaded.",
        )
    hf_raise_for_status(response)


def _open_repository(api: "HfApi", job: Job) -> None:
    """Find the repository and the right to write to it, or create it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    repository = job.repository
    with hub_errors(repository):
        try:
            private = api.model_info(repository).private
        except RepositoryNotFoundError:
            private = None
            log.info("creating %s (%s)", repository, "public" if job.private is False else "private")
            api.create_repo(repository, private=job.private is not False, exist_ok=True)
        if private is not None:
            api.auth_check(repository, write=True)
    if private is not None and job.private is not None and private != job.private:
        raise ConvertError(
            f"{repository!r} exists and is {'private' if private else 'public'}.",
            "--private and --public are for a new repository; change this one on its page.",
        )


def _naming_branches(api: "HfApi", job: Job, release: Release) -> Release:
    """The main release with a card that names the branches of earlier --also as well, for what they are."""
    digest = release.checked[manifests.MANIFEST].sha256
    also, older = set(job.also), []
    with hub_errors(job.repository):
        there = {ref.name for ref in api.list_repo_refs(job.repository).branches}
        for branch in [name for name in ALSO if name in there - also - {job.branch}]:
            head, tree = _tree(api, job.repository, branch)
            if manifests.MANIFEST not in tree:
                continue
            path = Path(api.hf_hub_download(job.repository, manifests.MANIFEST, revision=head))
            source = (manifests.load(path.parent) or {}).get("source")
            if isinstance(source, dict) and source.get("manifest") == digest:
                also.add(branch)
            else:
                older.append(branch)
    if older:
        log.warning("not of these codes, and named as older: the branches %s", " and ".join(older))
    published = replace(
        release.published, also=tuple(name for name in ALSO if name in also), older=tuple(older)
    )
    return replace(release, published=published)


def _commit(api: "HfApi", job: Job, release: Release, author: str) -> Pushed:
    """Make a branch hold exactly the release, by one commit on the head it was compared with."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with hub_errors(job.repository):
        _open_branch(api, job.repository, release.branch)
        head, tree = _tree(api, job.repository, release.branch)
        landed = _landed(api, job, release, author)
        if landed is not None:
            log.info("%s holds exactly this already", landed.url)
            return landed
        stale = _stale(api, job, release, head, tree)
    size = sum(file.size for file in release.files.values())
    log.info("uploading %d files, %s bytes, to %s", len(release.files), f"{size:,}", release.branch)
    adds = [CommitOperationAdd(name, file.content) for name, file in release.files.items()]
    deletes = [CommitOperationDelete(name, is_folder=False) for name in stale]
    create_pr = job.create_pr and release.branch == job.branch
    try:
        with hub_errors(job.repository), _xet_errors():
            aside(
                lambda: api.preupload_lfs_files(
                    job.repository, adds, revision=release.branch, create_pr=create_pr
                )
            )
            for add in adds:
                if add.upload_info.sha256.hex() != release.files[add.path_in_repo].sha256:
                    raise SourceError(
                        f"{add.path_in_repo!r} changed while it was uploaded.",
                        "verify again, then push again.",
                    )
            made = api.create_commit(
                job.repository,
                [*adds, *deletes],
                commit_message=job.message
                or f"{release.format} checkpoint made by marlin-convert {__version__}",
                revision=release.branch,
                create_pr=create_pr,
                parent_commit=head,
            )
    except SourceError:
        # the commit may be there and only the answer lost
        with suppress(SourceError), hub_errors(job.repository):
            landed = _landed(api, job, release, author)
        if landed is None:
            raise
        return replace(landed, changed=True, removed=stale)
    with hub_errors(job.repository):
        _, tree = _tree(api, job.repository, made.oid)
    if not _holds(tree, release):
        raise ConvertError(
            f"{made.commit_url} is not what was pushed: {_differences(tree, release)}.",
            "look at the repository; the checkpoint here is as it was.",
        )
    return Pushed(release.branch, made.oid, made.commit_url, True, stale, made.pr_url)


def _open_branch(api: "HfApi", repository: str, branch: str) -> None:
    """Make the branch, from the first commit, which holds nothing yet, unless it is there."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        api.model_info(repository, revision=branch)
    except RevisionNotFoundError:
        first = api.list_repo_commits(repository)[-1].commit_id
        api.create_branch(repository, branch=branch, revision=first, exist_ok=True)


def _tree(api: "HfApi", repository: str, revision: str) -> tuple[str, dict[str, "RepoFile"]]:
    """The commit that a revision is, and its files."""
    from huggingface_hub.hf_api import RepoFile

    head = api.model_info(repository, revision=revision).sha
    assert head is not None
    entries = api.list_repo_tree(repository, recursive=True, revision=head)
    return head, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _landed(api: "HfApi", job: Job, release: Release, author: str) -> Pushed | None:
    """Where the release is already: on its branch or, with --create-pr, in an open pull request of ours."""
    head, tree = _tree(api, job.repository, release.branch)
    url = f"{api.endpoint}/{job.repository}/commit/"
    if _holds(tree, release):
        return Pushed(release.branch, head, url + head, False, [])
    if job.create_pr and release.branch == job.branch:
        for request in api.get_repo_discussions(
            job.repository, author=author, discussion_type="pull_request", discussion_status="open"
        ):
            head, tree = _tree(api, job.repository, f"refs/pr/{request.num}")
            if _holds(tree, release):
                page = f"{api.endpoint}/{job.repository}/discussions/{request.num}"
                return Pushed(release.branch, head, url + head, False, [], page)
    return None


def _stale(api: "HfApi", job: Job, release: Release, head: str, tree: dict[str, "RepoFile"]) -> list[str]:
    """The files of an earlier push that this one has no more; ConvertError if there is anything else."""
    ours = {KEPT, card.CARD}
    if manifests.MANIFEST in tree:
        path = Path(api.hf_hub_download(job.repository, manifests.MANIFEST, revision=head))
        earlier = manifests.load(path.parent)
        ours |= {manifests.MANIFEST, manifests.VERIFIED, *(earlier or {"files": ()})["files"]}
    foreign = sorted(tree.keys() - ours)
    if foreign:
        raise ConvertError(
            f"the branch {release.branch!r} of {job.repository!r} holds {len(foreign)} files that "
            f"marlin-convert did not put there: {', '.join(foreign[:3])}{', ...' * (len(foreign) > 3)}.",
            "choose another repository, or another branch with --revision.",
        )
    return sorted(tree.keys() - release.files.keys() - {KEPT})


@contextmanager
def _xet_errors() -> Iterator[None]:
    """Name the way out where the client uploads through Xet and the server has none."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ConvertError) or "xet" not in f"{type(error).__module__} {error}".lower():
            raise
        raise SourceError(
            f"the upload through Xet failed ({type(error).__name__}){hub_sentence(error)}.",
            "if the server has no Xet, set HF_HUB_DISABLE_XET=1; else check the network and run the same "
            "command again.",
        ) from error


def _holds(tree: dict[str, "RepoFile"], release: Release) -> bool:
    return not _differences(tree, release)


def _differences(tree: dict[str, "RepoFile"], release: Release) -> str:
    """What the files of a commit have that the release has not, or the other way about."""
    wrong = sorted((tree.keys() ^ release.files.keys()) - {KEPT})
    wrong += [
        name for name in release.files.keys() & tree.keys() if not _same(tree[name], release.files[name])
    ]
    return ", ".join(wrong)


def _same(entry: "RepoFile", file: File) -> bool:
    """Compare by what the Hub keeps of a file: the sha256 of a large one, git's sha1 of a small one."""
    if entry.lfs is not None:
        return entry.lfs.sha256 == file.sha256
    if isinstance(file.content, Path):
        return False
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % file.size + file.content).hexdigest()
