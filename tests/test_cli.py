"""The command line itself: help, exit codes, what goes to stdout and what to stderr, how options are read."""

import errno
import fcntl
import json
import os
import platform
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import click
import pytest
import torch

from marlin_convert import __version__, recipe
from marlin_convert.cli.main import going_on, main
from marlin_convert.commands import quantize
from marlin_convert.errors import ConvertError, OptionError
from marlin_convert.options import pick_device, shard_size

COMMANDS = sorted(main.commands)
DOCS = Path(__file__).parents[1] / "docs"
# every command that does something, by its words: those of a group have two
ALL = {
    (name, *rest): command
    for name, one in main.commands.items()
    for rest, command in (
        [((inner,), found) for inner, found in one.commands.items()]
        if isinstance(one, click.Group)
        else [((), one)]
    )
}


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **variables}
    )


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("command", sorted({(), *((name,) for name in COMMANDS), *ALL}), ids=" ".join)
def test_help(command, option, cli):
    result = cli(*command, option)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    assert result.stderr == ""
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_the_first_help_says_the_commands_and_the_exit_codes(cli):
    text = " ".join(cli("--help").stdout.split())
    assert all(name in text for name in COMMANDS)
    assert "0 done, 1 it could not be done, 2 wrong usage, 3 verify found a difference, 130" in text


@pytest.mark.parametrize("command", ALL.values(), ids=map(" ".join, ALL))
def test_every_option_is_explained_and_spelled_one_way(command):
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help and option.help.endswith((".", "]")), option.opts
            assert all(re.fullmatch(r"-[a-z]|--[a-z]+(-[a-z]+)*", spelling) for spelling in option.opts)


@pytest.mark.parametrize("command", ALL.values(), ids=map(" ".join, ALL))
def test_every_command_has_the_output_options(command):
    spellings = {spelling for option in command.params for spelling in option.opts}
    assert {"--json", "-q", "--quiet", "-v", "--verbose"} <= spellings


def test_starting_up_imports_nothing_heavy():
    heavy = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "yaml", "tqdm")
    code = f"import sys, marlin_convert.cli.main; print([name for name in {heavy} if name in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_python_m_is_the_same_command():
    assert "Commands:" in python("-m", "marlin_convert", "--help").stdout
    assert python("-m", "marlin_convert", "quantize").returncode == 2


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{one.name}" for one in DOCS.glob("*.md"))])
def test_a_page_names_no_option_that_is_not_there(page):
    parameters = [option for command in ALL.values() for option in command.params]
    there = {spelling for option in parameters for spelling in option.opts + option.secondary_opts}
    # the last four of pip, vLLM and lm_eval
    there |= {"--help", "--version", "--no-deps", "--index-url", "--enable-expert-parallel", "--tasks"}
    there |= {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}  # of torchrun
    text = (DOCS.parent / page).read_text("utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", text))
    assert named <= there, named - there


def test_completion():
    code = "from marlin_convert.cli.main import main; main(prog_name='marlin-convert')"
    done = python("-c", code, _MARLIN_CONVERT_COMPLETE="bash_source")
    assert done.returncode == 0
    assert "complete -o nosort -F _marlin_convert_completion marlin-convert" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Commands:"),
        (("quantise",), "No such command"),
        (("quantize",), "MODEL"),
        (("quantize", "model"), "--output"),
        (("quantize", "model", "-o", "out", "--sample", "3"), "--samples"),
        (("quantize", "model", "-o", "out", "--samples", "0"), "--samples"),
        (("quantize", "model", "-o", "out", "--group-size", "16"), "--group-size"),
        (("quantize", "model", "-o", "out", "--format", "awq"), "--format"),
        (("quantize", "model", "-o", "out", "--dtype", "float32"), "--dtype"),
        (("quantize", "model", "-o", "out", "--max-shard-size", "big"), "--max-shard-size"),
        (("quantize", "model", "-o", "out", "two", "models"), "two"),
    ],
)
def test_wrong_usage_is_2(words, said, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cli(*words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["meta", "gpu", "cpu:x", ""])
def test_a_device_that_is_none_is_2(device, cli, tinypy, tmp_path):
    result = cli("quantize", tinypy, "-o", tmp_path / "out", "--device", device, "--dry-run")
    assert result.exit_code == 2
    assert "is not auto, cpu, cuda or cuda:N" in result.stderr


def test_a_gpu_that_is_not_there_is_1(cli, tinypy, tmp_path):
    result = cli("quantize", tinypy, "-o", tmp_path / "out", "--device", "cuda:99", "--dry-run")
    assert result.exit_code == 1
    assert "there is no device 'cuda:99'" in result.stderr
    assert "Hint: pass --device cpu." in result.stderr


def test_cpu_is_a_device():
    assert str(pick_device("cpu")) == "cpu"


@pytest.mark.parametrize(("model", "said"), [("./nothing-here", "nothing-here"), ("README.md", "README.md")])
def test_what_cannot_be_done_is_1_with_a_sentence_and_a_hint(model, said, cli, tmp_path):
    result = cli("quantize", model, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert re.search(rf"^Error: .*{re.escape(said)}", result.stderr, re.MULTILINE)
    assert re.search(r"^Hint: .*\.$", result.stderr, re.MULTILINE)
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_is_1_with_a_sentence_and_a_hint(cli, tinypy, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", "/somewhere")

    monkeypatch.setattr(recipe, "load", fail)
    result = cli("quantize", tinypy, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "\nError: Input/output error ('/somewhere').\nHint: check the disk" in result.stderr


def test_a_bug_is_not_dressed_up_as_an_error(cli, tinypy, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(quantize, "quantize", broken)
    with pytest.raises(ZeroDivisionError):
        cli("quantize", tinypy, "-o", tmp_path / "out")


def test_a_difference_that_verify_finds_is_3(cli, tinypy, tmp_path):
    out = tmp_path / "out"
    small = ("--samples", 4, "--sequence-length", 128, "--recipe", "w4a16-quick", "-q")
    assert cli("quantize", tinypy, "-o", out, *small).exit_code == 0
    assert cli("verify", out, "--checks", "files").exit_code == 0
    weights = out / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    result = cli("verify", out, "--checks", "files")
    assert result.exit_code == 3
    assert "model.safetensors" in result.stdout


@pytest.mark.parametrize(
    ("number", "interrupts", "status"),
    [
        (signal.SIGINT, signal.SIG_DFL, 130),
        (signal.SIGTERM, signal.SIG_IGN, 143),  # as a shell starts what is to run in the background
        (signal.SIGHUP, signal.SIG_DFL, 129),
    ],
)
def test_what_is_interrupted_goes_on_as_it_says(number, interrupts, status, cli, tinypy, tmp_path):
    """A real signal: no traceback, no output, the finished blocks kept, and the command that goes on."""
    out = tmp_path / "a name"
    words = ["quantize", str(tinypy), "-o", str(out), "--samples", "4", "--sequence-length", "128"]
    with subprocess.Popen(
        [sys.executable, "-m", "marlin_convert", *words],
        stderr=subprocess.PIPE,
        text=True,
        # tests that run in the background inherit a SIGINT that is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupts),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("block 1 of 4"):
                process.send_signal(number)
                break
        rest = process.stderr.read()
    assert process.returncode == status
    assert "Interrupted." in rest
    assert "Traceback" not in rest
    assert not out.exists()
    assert (tmp_path / "a name.partial").exists()
    told = re.search("^Hint: go on with: marlin-convert (.*)$", rest, re.MULTILINE)
    assert told and "--resume" in told[1]
    again = cli(*shlex.split(told[1]))
    assert again.exit_code == 0 and "resuming at block" in again.stderr


def test_how_an_interrupted_command_goes_on():
    assert going_on(["quantize", "a b", "-o", "c"]) == (
        "go on with: marlin-convert quantize --resume 'a b' -o c"
    )
    assert going_on(["sparsify", "--resume", "a"]) == "go on with: marlin-convert sparsify --resume a"
    assert "run the same command again" in (going_on(["push", "a", "b/c"]) or "")
    assert going_on(["verify", "a"]) is None and going_on([]) is None


def test_a_second_sigterm_does_not_cut_the_cleaning_up_short():
    """Whoever ends a process may do it twice; nohup has SIGHUP ignored, and so it stays."""
    code = """
import os, signal, sys
from marlin_convert.cli.terminal import Ending
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Ending() as ending:
    os.kill(os.getpid(), signal.SIGHUP)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        print("cleaned up")
        sys.exit(ending.status)
"""
    done = python("-c", code)
    assert (done.stdout, done.returncode) == ("cleaned up\n", 143), done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_lock_turns_into_an_error_is_still_an_interrupt(number):
    """A signal between two lines of Python's own Condition comes out as RuntimeError."""
    code = f"""
import os, signal, threading
from marlin_convert.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)

@main.command()
def wait():
    lock = threading.Condition()
    with lock:
        lock.release()
        os.kill(os.getpid(), {int(number)})

main(["wait"])
"""
    done = python("-c", code)
    assert (done.stderr, done.returncode) == ("Interrupted.\n", 128 + number)


def quantizing(source: Path, output: Path, *options: str) -> list[str]:
    """The command line of a process that quantizes."""
    return [sys.executable, "-m", "marlin_convert", "quantize", str(source), "-o", str(output), *options]


def test_a_terminal_that_is_closed_ends_the_run(tinypy, tmp_path):
    """SIGHUP comes, and what is written to the terminal from then on fails."""
    sizes = ("--samples", "16", "--sequence-length", "256")
    words = quantizing(tinypy, tmp_path / "out", *sizes)
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, words)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    shown = b""
    while b"1/4" not in shown:
        shown += os.read(terminal, 1 << 16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    assert (tmp_path / "out.partial" / "progress.json").exists()


# Every option and argument that may be a path, in whatever command.
PLACES = {
    "model", "checkpoint", "source", "baseline", "output", "report", "recipe", "calibration", "text",
    "tokenizer", "prompts",
}  # fmt: skip


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_a_tilde_that_no_shell_has_seen_is_the_home_directory(words, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_text("")
    command = ALL[words]
    with click.Context(command) as context:
        for one in command.params:
            of_a_server = words == ("bench", "serve") and one.name == "model"
            if one.name in PLACES and not of_a_server:
                assert str(one.type.convert("~/x", one, context)) == str(tmp_path / "x"), one.name
            else:
                assert not isinstance(one.type, click.Path), one.name


def test_a_tilde_in_a_recipe_is_the_home_directory(cli, tinypy, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 200)
    (tmp_path / "mine.yaml").write_text(
        "calibration: ~/text.txt\nsamples: 4\nsequence_length: 64\nsweeps: 0\n"
    )
    done = cli("quantize", tinypy, "--output=~/out", "--recipe=~/mine.yaml", "-q")
    assert done.exit_code == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "mine.yaml", "out"}
    assert (
        json.loads((tmp_path / "out" / "marlin_convert.json").read_text())["calibration"]["text"]
        == "text.txt"
    )


def test_names_that_the_terminal_has_no_letters_for(quantized, tinypy, tmp_path):
    """The terminal's encoding is latin-1, the name is Chinese, or the locale says that all is ASCII."""
    named = tmp_path / "modèle 模型"
    shutil.copytree(quantized("marlin"), named)
    latin = subprocess.run(
        [sys.executable, "-m", "marlin_convert", "inspect", str(named)],
        capture_output=True, encoding="latin-1", env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert latin.returncode == 0, latin.stderr
    assert latin.stdout.startswith(r"modèle \u6a21\u578b: llama")
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for words in (("verify", "-q"), ("inspect", "--json")):
        done = python("-m", "marlin_convert", words[0], str(named), words[1], **ascii_only)
        assert done.returncode == 0, done.stderr
    # the report of verify names the directory as its bytes mean it, and can be read anywhere
    assert json.loads((named / "marlin_convert_verify.json").read_text())["checkpoint"] == "modèle 模型"
    assert json.loads(done.stdout)["verified"]["passed"]
    text = tmp_path / "tëxt.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    sizes = ("--samples", "4", "--sequence-length", "64", "--recipe", "w4a16-quick", "-q")
    words = ("quantize", str(tinypy), "-o", str(tmp_path / "oût"), "--calibration", str(text), *sizes)
    done = python("-m", "marlin_convert", *words, **ascii_only)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "oût" / "marlin_convert.json").read_text())
    assert manifest["calibration"]["text"] == "tëxt.txt"


def test_log_lines_stand_above_the_bar(tinypy, tmp_path):
    """On a terminal, where each line begins at the left and the bar is below it."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    sizes = ("--samples", "4", "--sequence-length", "64", "--recipe", "w4a16-quick", "-v")
    words = quantizing(tinypy, tmp_path / "out", *sizes)
    shown = b""
    with subprocess.Popen(words, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        with suppress(OSError):  # EIO, when the other side is closed
            while part := os.read(ours, 1 << 16):
                shown += part
    os.close(ours)
    assert process.returncode == 0
    lines = re.split("[\r\n]+", shown.decode())
    errors = [line for line in lines if "relative output error" in line]
    assert len(errors) == 28 and all(line.startswith("model.layers.") for line in errors), errors
    assert any("4/4" in line for line in lines)


def test_a_dry_run_prints_the_plan_and_writes_nothing(cli, tinypy, tmp_path):
    result = cli("quantize", tinypy, "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert "28 linears in 4 blocks packed at 4.125 bits per weight" in result.stdout
    assert not list(tmp_path.iterdir())


def planned(cli, tinypy, tmp_path, *options: object) -> dict:
    result = cli("quantize", tinypy, "-o", tmp_path / "out", "--dry-run", "--json", *options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["recipe"]


def test_options_go_over_the_recipe(cli, tinypy, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("format: gptq\nsamples: 7\nseed: 3\nskip: ['*.o_proj']\n")
    assert planned(cli, tinypy, tmp_path) == recipe.load(recipe.DEFAULT).to_dict()
    options = ("--samples", 9, "--seed", 0, "--skip", "*.q_proj", "--skip", "*.[kv]_proj", "--group-size", -1)
    used = planned(cli, tinypy, tmp_path, "--recipe", own, *options)
    expected = {"format": "gptq", "samples": 9, "seed": 0, "skip": ["*.q_proj", "*.[kv]_proj"]}
    assert used == recipe.Recipe().to_dict() | expected | {"group_size": -1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bits: 3\n", "bits = 3 must be 4 or 8"),
        ("group_size: 100\n", "group_size = 100"),
        ("samples: many\n", "samples must be int"),
        ("samples: true\n", "samples must be int"),
        ("skip: o_proj\n", "skip must be a list"),
        ("- samples\n", "not a mapping"),
        ("samples: [\n", "cannot be read as YAML"),
    ],
)
def test_a_wrong_recipe_is_1(text, said, cli, tinypy, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(text)
    result = cli("quantize", tinypy, "-o", tmp_path / "out", "--recipe", own)
    assert result.exit_code == 1
    assert said in result.stderr


def test_an_unknown_recipe_is_1_and_names_those_there_are(cli, tinypy, tmp_path):
    result = cli("quantize", tinypy, "-o", tmp_path / "out", "--recipe", "w2a16")
    assert result.exit_code == 1
    assert all(name in result.stderr for name in recipe.named_recipes())


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("200mb", 2 * 10**8), ("64KB", 64_000), ("4096", 4096), (4096, 4096)],
)
def test_sizes(text, size):
    assert shard_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5TB", "1.5GB", "5 GB", "5GBK"])
def test_what_is_not_a_size(text):
    with pytest.raises(OptionError, match="--max-shard-size"):
        shard_size(text)


def test_results_on_stdout_the_rest_on_stderr(cli, tinypy, tmp_path):
    sizes = ("--samples", 4, "--sequence-length", 128, "--recipe", "w4a16-quick")
    plain = cli("quantize", tinypy, "-o", tmp_path / "plain", *sizes)
    assert plain.exit_code == 0
    assert "block 4 of 4 done" in plain.stderr
    assert plain.stdout.splitlines()[-1].startswith("Next: marlin-convert verify ")

    data = cli("quantize", tinypy, "-o", tmp_path / "json", *sizes, "--json", "-v")
    assert json.loads(data.stdout)["manifest"]["recipe"]["samples"] == 4
    assert "model.layers.0.mlp.down_proj" in data.stderr

    quiet = cli("quantize", tinypy, "-o", tmp_path / "quiet", *sizes, "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    assert (tmp_path / "quiet" / "model.safetensors").is_file()


def test_an_error_without_a_hint_prints_none(cli, tinypy, tmp_path, monkeypatch):
    def failing(*_):
        raise ConvertError("it cannot be done.")

    monkeypatch.setattr(quantize, "quantize", failing)
    result = cli("quantize", tinypy, "-o", tmp_path / "out", "-q")
    assert (result.exit_code, result.stderr) == (1, "Error: it cannot be done.\n")


@pytest.mark.parametrize(
    ("option", "suggested"),
    [("--skp", "--skip"), ("--quite", "--quiet"), ("--bots", "--bits"), ("--q", None)],
)
def test_what_is_suggested_is_like_what_was_meant(option, suggested, cli):
    result = cli("quantize", "model", "-o", "out", option, 8)
    assert result.exit_code == 2 and f"No such option '{option}'." in result.output
    assert ("Did you mean" in result.output) == (suggested is not None)
    assert suggested is None or f"'{suggested}'" in result.output


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_ends_nothing_and_is_no_file_of_ours(closed, quantized, tmp_path):
    """As under some daemons; a file that took its number would get what libraries print."""
    seen = tmp_path / "seen"
    program = (
        "import os, sys, marlin_convert.commands.inspect as story; from marlin_convert.cli.main import main\n"
        "def text(*_, **more): return sys.argv[2][:open(sys.argv[1], 'w').write(str(os.dup(3)))]\n"
        "story.text = text; main(['inspect', sys.argv[2]])"
    )
    command = shlex.join([sys.executable, "-c", program, str(seen), str(quantized("marlin"))])
    done = subprocess.run(["bash", "-c", f"{command} 3</dev/null {closed}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(seen.read_text()) > 3


@pytest.mark.parametrize("ci", ["", "1"])  # where CI is set, transformers hands its lines on to our handler
def test_no_library_moves_the_cursor_with_what_a_file_says(ci, quantized):
    program = (
        "import logging, sys, warnings, transformers, marlin_convert.commands.inspect as story\n"
        "from marlin_convert.cli.main import main\n"
        "def text(*_, **more):\n"
        "    warnings.warn('one\\x1b[2J')\n"
        "    logging.getLogger('transformers').warning('two %s', '\\x1b[2J')\n"
        "    return 'three'\n"
        "story.text = text; main(['inspect', sys.argv[1]])"
    )
    done = python("-c", program, str(quantized("marlin")), CI=ci)
    assert (done.returncode, done.stdout) == (0, "three\n")
    assert "one\\x1b[2J" in done.stderr and "two \\x1b[2J" in done.stderr and "\x1b" not in done.stderr


def test_the_recipes_there_are(cli):
    named = json.loads(cli("recipes", "--json").stdout)
    assert named.keys() == {path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml")}
    assert all(20 < len(said) < 110 and said.endswith(".") for said in named.values())
    assert all(f"{name} " in cli("recipes").stdout for name in named)


def test_env_says_what_a_report_of_a_fault_needs(cli, monkeypatch, tmp_path):
    (tmp_path / "a-cache").mkdir()
    (tmp_path / "a-cache" / "one.cubin").touch()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MARLIN_CONVERT_CACHE", str(tmp_path / "a-cache"))
    found = json.loads(cli("env", "--json").stdout)
    assert found["packages"]["torch"] == torch.__version__ and found["marlin-convert"] == __version__
    assert found["processor"]["cores"] >= 1 and found["memory_bytes"] > 1e9 and found["compiled_kernels"] == 1
    assert len(found["gpus"]) == torch.cuda.device_count()
    said = cli("env").stdout
    assert torch.__version__ in said and f"{platform.machine()}" in said
    for private in ("hf_secret", str(Path.home()), "a-cache", platform.node()):
        assert private not in said + json.dumps(found)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("quantize", "--recipe", "w4a16-h"), ["plain,w4a16-high"]),
        (("quantize", "--recipe", "./own"), ["file,./own"]),
        (("quantize", "./mo"), ["dir,./mo"]),
        (("verify", "--checks", "files,l"), ["plain,files,layout"]),
        (("rec",), ["plain,recipes"]),
    ],
    ids=" ".join,
)
def test_the_shell_completes(words, offered):
    asked = {"COMP_WORDS": shlex.join(("marlin-convert", *words)), "COMP_CWORD": str(len(words))}
    program = "from marlin_convert.cli.main import main; main(prog_name='marlin-convert')"
    done = python("-c", program, _MARLIN_CONVERT_COMPLETE="bash_complete", **asked)
    assert done.stdout.splitlines()[: len(offered)] == offered, done.stderr
