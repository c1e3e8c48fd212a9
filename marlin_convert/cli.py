"""The command line: parse, call one function, print. Heavy packages are imported inside the commands."""

import gc
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from marlin_convert import __version__, terminal
from marlin_convert.errors import ConvertError

if TYPE_CHECKING:
    import torch

    from marlin_convert.bench.stream import Server
    from marlin_convert.quantize import Job

log = logging.getLogger("marlin_convert")

CONTEXT = {"help_option_names": ["-h", "--help"]}


class Commands(click.Group):
    """A group that prints ConvertError as a sentence and a hint, and exits 130 on Ctrl-C, 143 on SIGTERM."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:
        """Run a command line; the exit codes are in every command's help."""
        words = sys.argv[1:] if args is None else list(args)
        terminal.stand_in_for_closed()
        terminal.show_every_name()
        with terminal.Ending() as ending:
            try:
                self._run(ending, words, *more, **{**kwargs, "standalone_mode": False})
            except KeyboardInterrupt:
                # a process that was told to end does not wait for threads that still upload
                terminal.leave(ending.status) if args is None else sys.exit(ending.status)

    def _run(self, ending: terminal.Ending, words: list[str], *more: Any, **kwargs: Any) -> None:
        try:
            super().main(words, *more, **kwargs)
        except ConvertError as error:
            click.echo(f"Error: {error}", err=True)
            if error.hint:
                click.echo(f"Hint: {error.hint}", err=True)
            sys.exit(1)
        except click.NoSuchOption as error:
            resembling(error).show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt) as interrupt:
            self._interrupted(words, interrupt)
        except Exception as error:
            # a signal in a lock of Python's own comes out as an error of the lock
            if ending.begun or isinstance(error.__context__, KeyboardInterrupt):
                self._interrupted(words, error)
            if not isinstance(error, OSError):
                raise
            # a disk that fails where no code can say more than it does
            where = f" ('{error.filename}')" if error.filename else ""
            click.echo(f"Error: {error.strerror or error}{where}.", err=True)
            click.echo("Hint: check the disk and its permissions, then run the same command again.", err=True)
            sys.exit(1)

    def _interrupted(self, words: Sequence[str], why: BaseException) -> NoReturn:
        with suppress(OSError):  # the terminal may be what has gone
            click.echo("Interrupted.", err=True)
            if hint := going_on(words):
                click.echo(f"Hint: {hint}", err=True)
        raise KeyboardInterrupt from why


def resembling(error: click.NoSuchOption) -> click.NoSuchOption:
    """The error, suggesting what is like the option that there is not: to click, dashes are likeness too."""
    from difflib import SequenceMatcher

    name = error.option_name.lstrip("-")
    alike = [
        option
        for option in error.possibilities or ()
        if SequenceMatcher(None, name, option.lstrip("-")).ratio() >= 0.6
    ]
    return click.NoSuchOption(error.option_name, error.message, alike, error.ctx)


def going_on(words: Sequence[str]) -> str | None:
    """How to go on with a command line that was interrupted, where it need not begin again."""
    match words:
        case ["quantize" | "sparsify" as name, *others]:
            resume = [] if "--resume" in others else ["--resume"]
            return f"go on with: {shlex.join(['marlin-convert', name, *resume, *others])}"
        case ["push", *_]:
            return "run the same command again; what is uploaded already is not uploaded twice."
    return None


def at_home(name: str) -> str:
    """A name with the home directory in place of a ~ at its beginning."""
    return os.path.expanduser(name)  # noqa: PTH111, Path makes a '.' of an empty name


class Place(click.Path):
    """A path; a ~ at its beginning is the home directory, though no shell has seen it, as in --output=~/x."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path as click gives it."""
        return super().convert(at_home(value), param, ctx)


class NameOrPlace(click.ParamType):
    """A name, or a path, of which a ~ at the beginning is the home directory."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The name or the path as text."""
        return at_home(value)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="marlin-convert")
def main() -> None:
    """Quantize Hugging Face language models to 4 bits, write them in the MARLIN layout, check, and publish.

    \b
    Example:
      marlin-convert quantize Qwen/Qwen3-0.6B -o qwen3-marlin
      marlin-convert verify qwen3-marlin --source Qwen/Qwen3-0.6B
      marlin-convert push qwen3-marlin me/Qwen3-0.6B-MARLIN --also gptq

    Exit status: 0 done, 1 it could not be done, 2 wrong usage, 3 verify found a difference, 130 interrupted,
    143 ended by SIGTERM.
    """


def output_options(command: Callable) -> Callable:
    """--json, -q and -v, the same on every command."""
    for option in (
        click.option("-v", "--verbose", count=True, help="More lines on stderr, one per linear."),
        click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors on stderr."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    ):
        command = option(command)
    return command


@contextmanager
def imports() -> Iterator[None]:
    """Import without looking for garbage: all of it stays, and the search takes a quarter of the time.

    OpenMP reads its settings then: its threads shall sleep and not spin while there is nothing for them.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def set_up_logging(quiet: bool, verbose: int) -> None:
    """Plain lines on stderr, and bars of the Hub's client, which is imported later, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(
        handlers=[terminal.AboveBars()], format="%(message)s", level=logging.WARNING, force=True
    )
    log.setLevel(level)


def block_progress(quiet: bool) -> Callable[[range, int], Iterable[int]]:
    """A bar over the blocks on a terminal, else one plain line per block."""

    def progress(blocks: range, total: int) -> Iterable[int]:
        from tqdm import tqdm

        bar = tqdm(blocks, initial=blocks.start, total=total, unit="block", disable=True if quiet else None)
        for number in bar:
            yield number
            if bar.disable:
                log.info("block %d of %d done", number + 1, total)

    return progress


def file_progress(quiet: bool) -> Callable[[Sequence[str]], Iterable[str]]:
    """A bar over the files that are checked, on a terminal."""

    def progress(names: Sequence[str]) -> Iterable[str]:
        from tqdm import tqdm

        return tqdm(names, desc="checking", unit="file", disable=True if quiet else None)

    return progress


def request_progress(quiet: bool) -> Callable[[Iterator, int], Iterable]:
    """A bar over the requests that are answered, on a terminal."""

    def progress(answered: Iterator, total: int) -> Iterable:
        from tqdm import tqdm

        return tqdm(answered, total=total, unit="request", disable=True if quiet else None)

    return progress


def pick_gpu(name: str) -> "torch.device":
    """The CUDA device of --device, for what runs on nothing else; auto is the first one."""
    import torch

    if not torch.cuda.is_available():
        raise ConvertError(
            "there is no CUDA GPU here, and what is measured runs on nothing else.",
            "run it on a machine with an NVIDIA GPU of compute capability 8.0 or later.",
        )
    device = pick_device(name)
    if device.type != "cuda":
        raise click.BadParameter(f"{name!r} is not auto, cuda or cuda:N.", param_hint="--device")
    return device


def pick_device(name: str) -> "torch.device":
    """The torch device of --device; auto is the first GPU, else the CPU with a notice."""
    import torch

    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            log.info("no CUDA GPU found, working on the CPU")
    try:
        device = torch.device("cuda:0" if name == "cuda" else name)
    except RuntimeError as error:
        raise click.BadParameter(
            f"{name!r} is not auto, cpu, cuda or cuda:N.", param_hint="--device"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{name!r} is not auto, cpu, cuda or cuda:N.", param_hint="--device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConvertError(f"there is no device {name!r}: {count} CUDA GPUs found.", "pass --device cpu.")
    return device


def check_report(report: Path | None) -> None:
    """Refuse a --report that could not be written after all the work."""
    if report and not report.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no directory '{report.parent}'.", param_hint="--report")


def parse_size(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """Bytes of a size like 5GB or 200MB."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}
    number = value.upper().rstrip("KMGB")
    unit = value.upper()[len(number) :]
    if unit not in units or not number.isdigit() or int(number) == 0:
        raise click.BadParameter(f"{value!r} is not a size like 5GB or 500MB.")
    return int(number) * units[unit]


def conversion_options(command: Callable) -> Callable:
    """What quantize and sparsify share, recipe settings among it."""
    for option in (
        click.option(
            "-o",
            "--output",
            required=True,
            type=Place(path_type=Path),
            help="Where to write. Must not exist.",
        ),
        click.option(
            "--recipe",
            type=NameOrPlace(),
            default="w4a16-g128",
            show_default=True,
            metavar="NAME|FILE",
            help="Settings to start from.",
        ),
        click.option(
            "--skip", multiple=True, metavar="PATTERN", help="Leave matching linears as they are; repeatable."
        ),
        click.option(
            "--calibration",
            type=NameOrPlace(),
            metavar="builtin|FILE|hf:DATASET[:SPLIT]",
            help="Text to calibrate on: .txt or .jsonl.",
        ),
        click.option("--samples", type=click.IntRange(1), help="Calibration sequences.  [default: 256]"),
        click.option(
            "--sequence-length", type=click.IntRange(1), help="Tokens per sequence.  [default: 2048]"
        ),
        click.option("--seed", type=int, help="Draws the calibration windows.  [default: 0]"),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float16", "bfloat16"]),
            help="Type computed in, and of dense tensors.",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="auto|cpu|cuda[:N]",
            help="Where to compute.",
        ),
        click.option("--revision", help="Branch, tag or commit of a Hub MODEL."),
        click.option(
            "--max-shard-size", default="5GB", show_default=True, callback=parse_size, help="Largest file."
        ),
        click.option("--resume", is_flag=True, help="Continue an interrupted run."),
        click.option("--overwrite", is_flag=True, help="Replace an earlier output once this is complete."),
        click.option(
            "--trust-remote-code", is_flag=True, help="Allow code from the model repository to run."
        ),
        click.option(
            "--report",
            type=Place(path_type=Path, dir_okay=False),
            help="Write an HTML page with the error of every linear.",
        ),
        click.option("--dry-run", is_flag=True, help="Print the plan and stop."),
    )[::-1]:
        command = option(command)
    return command


def convert(
    job: "Job", plan_job: Callable, story: Callable, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Print the plan of a conversion, or do it and print what was done."""
    from marlin_convert import report as reports

    if dry_run:
        _, plan = plan_job(job)
        click.echo(json.dumps(reports.plan_json(plan), indent=2) if as_json else reports.plan_text(plan, job))
        return
    done = story(job, block_progress(quiet))
    if as_json:
        click.echo(json.dumps(reports.summary(done), indent=2))
    elif not quiet:
        click.echo(reports.summary_text(done, job))


@main.command(context_settings=CONTEXT)
@click.argument("model", type=NameOrPlace())
@click.option(
    "--format",
    type=click.Choice(["marlin", "marlin-24", "gptq", "compressed-tensors"]),
    help="On-disk layout.  [default: marlin, or marlin-24 with --sparsity 2:4]",
)
@click.option(
    "--group-size",
    type=click.Choice(["128", "64", "32", "-1"]),
    help="Weights that share a scale; -1 is one per column.",
)
@click.option("--sparsity", type=click.Choice(["2:4"]), help="Prune two weights of every four as well.")
@click.option(
    "--unpruned",
    multiple=True,
    metavar="PATTERN",
    help="Matching linears are not 2:4: in marlin-24 they are stored as marlin; repeatable.",
)
@click.option(
    "--requantize", is_flag=True, help="Solve again from the dequantized weights of a quantized MODEL."
)
@conversion_options
@output_options
def quantize(
    model: str,
    output: Path,
    recipe: str,
    device: str,
    revision: str | None,
    max_shard_size: int,
    requantize: bool,
    resume: bool,
    overwrite: bool,
    trust_remote_code: bool,
    report: Path | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **settings: Any,
) -> None:
    """Quantize MODEL (a Hub id or a local directory) and write a 4-bit checkpoint.

    A MODEL that is already quantized (GPTQ, MARLIN, AWQ, compressed-tensors) is repacked: its codes are kept
    and nothing is calibrated. One that is 2:4 keeps its zeros. What cannot be done is said before anything is
    written.
    """
    set_up_logging(quiet, verbose)
    with imports():
        from marlin_convert import quantize as story
        from marlin_convert import recipe as recipes
        from marlin_convert.hub import resolve

    check_report(report)
    settings["group_size"] = int(settings["group_size"]) if settings["group_size"] else None
    settings |= {name: settings[name] or None for name in ("skip", "unpruned")}
    start = recipes.load(recipe)
    if settings["sparsity"] and not settings["format"] and start.format == "marlin":
        settings["format"] = "marlin-24"
    chosen, where = start.changed(settings), pick_device(device)
    if chosen.format == "dense":
        raise ConvertError(
            f"{recipe!r} is a recipe of sparsify.", "name a layout with --format, or sparsify."
        )
    job = story.Job(
        source=resolve(model, revision, code=trust_remote_code),
        output=output,
        recipe=chosen,
        group_size=settings["group_size"],
        device=where,
        max_shard_size=max_shard_size,
        requantize=requantize,
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        report=report,
    )
    convert(job, story.plan_job, story.quantize, dry_run, as_json, quiet)


@main.command(context_settings=CONTEXT)
@click.argument("model", type=NameOrPlace())
@click.option(
    "--method",
    type=click.Choice(["sparsegpt", "wanda", "magnitude"]),
    help="How weights are chosen; with sparsegpt the others make up for those pruned.  [default: sparsegpt]",
)
@conversion_options
@output_options
def sparsify(
    model: str,
    output: Path,
    recipe: str,
    device: str,
    revision: str | None,
    max_shard_size: int,
    resume: bool,
    overwrite: bool,
    trust_remote_code: bool,
    report: Path | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **settings: Any,
) -> None:
    """Prune the linears of MODEL to 2:4, two weights of every four, and write a dense checkpoint.

    Any tool loads it, to be fine-tuned or quantized: quantize keeps its zeros.
    """
    set_up_logging(quiet, verbose)
    with imports():
        from marlin_convert import recipe as recipes
        from marlin_convert import sparsify as story
        from marlin_convert.hub import resolve

    check_report(report)
    settings["skip"] = settings["skip"] or None
    chosen, where = recipes.load(recipe).changed(settings), pick_device(device)
    job = story.Job(
        source=resolve(model, revision, code=trust_remote_code),
        output=output,
        recipe=chosen,
        device=where,
        max_shard_size=max_shard_size,
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        report=report,
    )
    convert(job, story.plan_job, story.sparsify, dry_run, as_json, quiet)


CHECKS = ("files", "layout", "sparsity", "numbers", "kernel", "generate")


def parse_checks(context: click.Context, parameter: click.Parameter, value: str) -> frozenset[str]:
    """The names in a list like files,layout."""
    names = frozenset(name.strip() for name in value.split(","))
    if unknown := names - set(CHECKS):
        raise click.BadParameter(f"{min(unknown)!r} is not one of {', '.join(CHECKS)}.")
    return names


@main.command(context_settings=CONTEXT)
@click.argument("checkpoint", type=NameOrPlace())
@click.option(
    "--source", type=NameOrPlace(), metavar="MODEL", help="Also compare with the model it was made from."
)
@click.option(
    "--checks",
    default=",".join(name for name in CHECKS if name != "generate"),
    show_default=True,
    callback=parse_checks,
    metavar="NAME[,NAME]",
    help="Checks to run.",
)
@click.option("--require-kernel", is_flag=True, help="Exit 1 if the kernel check cannot run.")
@click.option("--strict", is_flag=True, help="Fail if a linear was rounded to nearest.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Largest relative error of a product.",
)
@click.option(
    "--text",
    type=NameOrPlace(),
    default="builtin",
    show_default=True,
    metavar="builtin|FILE|hf:DATASET[:SPLIT]",
    help="Text to run with --source; builtin is a part that calibration never uses.",
)
@click.option("--samples", type=click.IntRange(1), default=16, show_default=True, help="Sequences of it.")
@click.option(
    "--sequence-length", type=click.IntRange(2), default=1024, show_default=True, help="Tokens per sequence."
)
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to run the text."
)
@click.option("--revision", help="Branch, tag or commit of a Hub CHECKPOINT.")
@click.option("--source-revision", help="Branch, tag or commit of a Hub --source.")
@click.option("--trust-remote-code", is_flag=True, help="Allow code from the model repository to run.")
@click.option("--report", type=Place(path_type=Path, dir_okay=False), help="Also write the report here.")
@output_options
def verify(
    checkpoint: str,
    source: str | None,
    source_revision: str | None,
    device: str,
    revision: str | None,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **settings: Any,
) -> None:
    """Check CHECKPOINT (a directory or a Hub id), alone or against the model it was made from.

    \b
    files    all as in the manifest, every tensor once, no NaN, no zero scale
    layout   the same bytes when unpacked and packed; shapes, fused groups
    sparsity every quad of what is said to be 2:4
    numbers  products; with --source also weights, perplexity, divergence
    kernel   the kernel's output on a GPU

    A check that cannot run is skipped, never passed. The report is also written into a CHECKPOINT of ours.

    Exit status: 0 nothing failed, 3 a check failed, 1 a required check could not run, 2 wrong usage.
    """
    set_up_logging(quiet, verbose)
    from marlin_convert import verify as story
    from marlin_convert.checkpoint import writer
    from marlin_convert.hub import resolve

    check_report(report)
    code = settings["trust_remote_code"]
    job = story.Job(
        checkpoint=resolve(checkpoint, revision, code=code),
        source=resolve(source, source_revision, code=code) if source else None,
        device=pick_device(device),
        **settings,
    )
    if report:
        writer.check_report(report, job.checkpoint.directory)
    done = story.verify(job, block_progress(quiet))
    if as_json:
        click.echo(json.dumps(done.to_dict(), indent=2))
    elif not quiet:
        words = shlex.join([checkpoint, *(["--revision", revision] if revision else [])])
        local = job.checkpoint.commit is None
        click.echo(story.text(done, words, local=local, verbose=bool(verbose)))
    story.save(done, job, report)
    if done.failed:
        sys.exit(3)
    for name in done.could_not_run:
        raise ConvertError(f"the {name} check is required and could not run: {done.checks[name].reason}.")


def parse_formats(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """The names in a list like gptq,compressed-tensors, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in value.split(","))) if value else ()
    for name in names:
        if name not in ("gptq", "compressed-tensors"):
            raise click.BadParameter(f"{name!r} is not gptq or compressed-tensors.")
    return names


@main.command(context_settings=CONTEXT)
@click.argument("checkpoint", type=Place(path_type=Path))
@click.argument("repo_id")
@click.option("--private/--public", default=None, help="For a new repository.  [default: private]")
@click.option("--revision", "branch", default="main", show_default=True, help="Push to this branch.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--message", help="Commit message.")
@click.option("--base-model", metavar="ID", help="Hub id of the original, if it cannot be found.")
@click.option("--license", metavar="ID", help="Only if the source's card names none.")
@click.option(
    "--also",
    callback=parse_formats,
    metavar="FORMAT[,FORMAT]",
    help="Push the same codes as gptq, compressed-tensors to a branch of that name, for stock engines.",
)
@click.option("--allow-unverified", is_flag=True, help="Publish anyway; the card will say so.")
@click.option("--dry-run", is_flag=True, help="List files, sizes, hashes and the card; upload nothing.")
@output_options
def push(
    checkpoint: Path, repo_id: str, dry_run: bool, as_json: bool, quiet: bool, verbose: int, **settings: Any
) -> None:
    """Publish CHECKPOINT (a directory) to REPO_ID on the Hugging Face Hub.

    Refuses unless `verify` passed on exactly these files. What goes up is what the manifest lists, the
    manifest, the report of verify and a model card, in one commit; nothing else that lies in the directory.

    The token is HF_TOKEN or that of 'hf auth login'. After an interruption, run the same command again.
    """
    set_up_logging(quiet, verbose)
    from marlin_convert import push as story
    from marlin_convert import report as reports

    job = story.Job(checkpoint, repo_id, **settings)
    done = story.push(job, dry_run=dry_run, progress=file_progress(quiet))
    if as_json:
        click.echo(json.dumps(reports.push_json(done, job), indent=2))
    elif not quiet:
        click.echo(reports.push_text(done, job))


@main.command(context_settings=CONTEXT)
@click.argument("checkpoint", type=NameOrPlace())
@click.option("--revision", help="Branch, tag or commit of a Hub CHECKPOINT.")
@output_options
def inspect(checkpoint: str, revision: str | None, as_json: bool, quiet: bool, verbose: int) -> None:
    """Say what CHECKPOINT (a directory or a Hub id) contains, from its headers alone.

    Format, group size, linears packed and left dense, bits per weight, size on disk, recipe, source, and the
    last verification.
    """
    set_up_logging(quiet, verbose)
    from marlin_convert import inspect as story
    from marlin_convert.hub import resolve

    found = story.inspect(resolve(checkpoint, revision))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif not quiet:
        click.echo(story.text(found, checkpoint, verbose=bool(verbose)))


@main.group(context_settings=CONTEXT)
def bench() -> None:
    """Measure on this machine what the package is for."""


FIGURES = ("peak", "models", "roofline", "sustained")


def parse_figures(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """The names in a list like peak,roofline, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in value.split(","))) if value else ()
    for name in names:
        if name not in FIGURES:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(FIGURES)}.")
    return names


def parse_shapes(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[Any, ...]:
    """The layers in a list like 8B.qkv,4096x4096."""
    from marlin_convert.bench import shapes

    found = []
    for name in dict.fromkeys(name.strip() for name in value.split(",")) if value else ():
        try:
            found.append(shapes.find(name))
        except KeyError as error:
            raise click.BadParameter(f"{name!r} is no layer like 8B.qkv, and not KxN.") from error
    return tuple(found)


def parse_counts(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """The numbers in a list like 1,16, each once."""
    if value is None:
        return None
    words = [word.strip() for word in value.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise click.BadParameter(f"{value!r} is not a list of numbers like 1,16,64.")
    return tuple(dict.fromkeys(map(int, words)))


@bench.command("kernel", context_settings=CONTEXT)
@click.option(
    "-o", "--output", required=True, type=Place(path_type=Path), help="Where to write. Must not exist."
)
@click.option(
    "--figures",
    callback=parse_figures,
    metavar="NAME[,NAME]",
    help="Of peak, models, roofline, sustained.  [default: the first three; none with --shapes]",
)
@click.option(
    "--shapes",
    callback=parse_shapes,
    metavar="NAME|KxN[,...]",
    help="Layers to sweep, like 8B.qkv.  [default: of Llama-3 8B and 70B; none with --figures]",
)
@click.option(
    "--batch-sizes",
    callback=parse_counts,
    metavar="N[,N]",
    help="Of all but the figure models.  [default: powers of 2 as in the paper; 1 to 4096 for layers]",
)
@click.option(
    "--group-size",
    type=click.Choice(["128", "64", "32", "-1"]),
    default="128",
    show_default=True,
    help="Weights that share a scale; -1 is one per column.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=5,
    show_default=True,
    metavar="N",
    help="Of load, for sustained.",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cuda[:N]", help="What to measure.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output once this is complete.")
@output_options
def bench_kernel(
    output: Path,
    figures: tuple[str, ...],
    shapes: tuple[Any, ...],
    group_size: str,
    device: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **settings: Any,
) -> None:
    """Time the kernel beside cuBLAS float16 and the peers that can be imported.

    Peers are vLLM's Marlin and Machete, and Humming. Weights are cold, launches are in CUDA graphs, times are
    medians, and every product is compared with that of the dequantized weights before it is timed.

    \b
    peak       speed-up over the batch size on the paper's ideal matrix
    models     speed-up at batch 16 over the linears of seven models
    roofline   TFLOP/s over arithmetic intensity, under measured ceilings
    sustained  speed-up and clocks during minutes of load

    Every number goes into kernel.csv (sustained: sustained.csv), every figure into a PNG.
    """
    set_up_logging(quiet, verbose)
    where = pick_gpu(device)
    from marlin_convert.bench import kernel as story
    from marlin_convert.bench import measurements
    from marlin_convert.bench.shapes import LAYERS

    if not figures and not shapes:
        figures, shapes = FIGURES[:3], LAYERS
    job = story.Job(output, where, figures, shapes, group_size=int(group_size), **settings)
    done = story.run(job)
    if as_json:
        click.echo(json.dumps(measurements.as_json(done), indent=2))
    elif not quiet:
        click.echo(measurements.text(done))


def parse_server(context: click.Context, parameter: click.Parameter, value: str | None) -> "Server | None":
    """The server of an address; its key is in the environment, where no list of processes shows it."""
    from marlin_convert.bench.stream import Server

    if value is None:
        return None
    try:
        return Server.at(value, os.environ.get("OPENAI_API_KEY"))
    except ValueError as error:
        raise click.BadParameter(f"it {error}.") from error


def asks_chat(chat: bool, servers: Sequence["Server"]) -> bool:
    """Whether chats are asked for: by --chat, or by an address that ends in its endpoint."""
    said = {server.chat for server in servers} - {None} | ({True} if chat else set())
    if len(said) > 1:
        raise click.UsageError(
            "of --chat, --url and --baseline-url one asks for /chat/completions, another for /completions."
        )
    return said == {True}


def parse_positive(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """A number above 0; inf is one."""
    if not value > 0:
        raise click.BadParameter("it must be above 0.")
    return value


@bench.command("serve", context_settings=CONTEXT)
@click.option(
    "--url", required=True, callback=parse_server, help="The server, with or without /v1, or its endpoint."
)
@click.option(
    "--baseline-url", metavar="URL", callback=parse_server, help="Another one to measure and compare with."
)
@click.option("--model", metavar="NAME", help="Of the server.  [default: the first that it lists]")
@click.option("--chat", is_flag=True, help="Ask /chat/completions in place of /completions.")
@click.option(
    "--request-rate",
    type=float,
    default=math.inf,
    show_default=True,
    callback=parse_positive,
    metavar="R",
    help="Requests a second, arriving as a Poisson process; inf sends all at once.",
)
@click.option("--max-concurrency", type=click.IntRange(1), metavar="N", help="Most requests at a time.")
@click.option(
    "--num-prompts", "number", type=click.IntRange(1), default=100, show_default=True, help="Requests."
)
@click.option(
    "--num-warmups",
    "warmups",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Requests before, with prompts of their own.",
)
@click.option(
    "--input-len",
    "input_tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Tokens of a random prompt.",
)
@click.option(
    "--output-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens to ask for."
)
@click.option(
    "--tokenizer",
    type=NameOrPlace(),
    metavar="DIR|ID",
    help="Of random prompts.  [default: the model's, if it is on this machine; else words]",
)
@click.option(
    "--prompts",
    type=Place(path_type=Path, dir_okay=False, exists=True),
    help="Take prompts from a text file, one a line.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Draws prompts and arrivals.")
@click.option(
    "--ignore-eos/--no-ignore-eos",
    default=True,
    show_default=True,
    help="Ask for all output tokens, whatever the model says; where a server refuses that, go on without.",
)
@click.option(
    "--timeout",
    type=float,
    default=600,
    show_default=True,
    callback=parse_positive,
    metavar="SECONDS",
    help="Longest time for one request.",
)
@click.option("-o", "--output", type=Place(path_type=Path), help="Directory to write. Must not exist.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output once this is complete.")
@output_options
def bench_serve(
    url: "Server",
    baseline_url: "Server | None",
    request_rate: float,
    max_concurrency: int | None,
    output_len: int,
    chat: bool,
    seed: int,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **settings: Any,
) -> None:
    """Measure a server with OpenAI's interface under load, alone or beside a baseline.

    Time to the first token, time per output token, time between chunks and of the whole answer, and requests
    and tokens a second, defined as `vllm bench serve` defines them and under the same keys with --json.

    A baseline gets the same requests at the same times, after the server. With -o every request is in
    result.json, and the distributions are in serve.png. A key is read from OPENAI_API_KEY.

    Exit status: 0 measured, 1 a server completed no request, 2 wrong usage, 130 interrupted: what was
    measured until then is printed.
    """
    set_up_logging(quiet, verbose)
    with imports():
        from marlin_convert.bench import latencies
        from marlin_convert.bench import serve as story

    servers = (url, baseline_url) if baseline_url else (url,)
    job = story.Job(
        servers=servers,
        load=latencies.Load(request_rate, max_concurrency, output_len, asks_chat(chat, servers), seed),
        **settings,
    )
    done = story.run(job, request_progress(quiet))
    if as_json:
        click.echo(json.dumps(latencies.as_json(done), indent=2))
    elif not quiet:
        click.echo(latencies.text(done))
    if done.interrupted:
        raise KeyboardInterrupt
    for served in done.servers:
        if not served.answers:
            hint = served.hints[0] if served.hints else None
            raise ConvertError(f"{served.url} completed none of {job.number} requests.", hint)
        for hint in served.hints:
            log.warning("Hint: %s", hint)


@bench.command("latency", context_settings=CONTEXT)
@click.argument("checkpoint", type=NameOrPlace())
@click.option(
    "--baseline", type=NameOrPlace(), metavar="MODEL", help="A directory or Hub id to compare with."
)
@click.option(
    "--batch-sizes",
    default="1,2,4,8,16,32,64,128",
    show_default=True,
    callback=parse_counts,
    metavar="N,N,...",
    help="Sequences at a time.",
)
@click.option(
    "--input-len", type=click.IntRange(1), default=64, show_default=True, help="Tokens of a random prompt."
)
@click.option(
    "--output-len", type=click.IntRange(2), default=64, show_default=True, help="Tokens of an answer."
)
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute."
)
@click.option("-o", "--output", type=Place(path_type=Path), help="Directory to write. Must not exist.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output once this is complete.")
@output_options
def bench_latency(
    checkpoint: str,
    baseline: str | None,
    batch_sizes: tuple[int, ...],
    input_len: int,
    output_len: int,
    device: str,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Measure how long a batch takes through the engine that is installed, without a server.

    Milliseconds to the first token and per token after it, and with a baseline how many times as fast. The
    engine is vLLM on a GPU if it is installed, else transformers, on a GPU with a static cache.
    """
    set_up_logging(quiet, verbose)
    with imports():
        from marlin_convert.bench import batches
        from marlin_convert.bench import latency as story
        from marlin_convert.hub import resolve

    job = story.Job(
        checkpoint=resolve(checkpoint, None).directory,
        baseline=resolve(baseline, None).directory if baseline else None,
        device=pick_device(device),
        batch_sizes=batch_sizes,
        input_len=input_len,
        output_len=output_len,
    )
    done = story.run(job, output, overwrite)
    if as_json:
        click.echo(json.dumps(batches.to_dict(done), indent=2))
    elif not quiet:
        click.echo(batches.table(done))
