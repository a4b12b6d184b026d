"""Scripts as processes forked from one server that has torch and transformers imported: a start takes 0.2 s, not 5.

`run` and `Popen` take the command lines of `subprocess`: `[python, script, ...]`, `[python, "-c", code]`, and `[python,
"-m", "torch.distributed.run", "--nproc_per_node=N", script, ...]`, for which a stand-in for torchrun starts the ranks.
Tests of a launcher, or of what is decided while torch is imported, start real processes instead.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.spawn
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import torch.multiprocessing

ROOT = Path(__file__).parents[2]
# The libraries that scripts import late are among them, our own modules are not, but for `data`, which keeps torchao
# quiet.
PRELOADED = [
    "data",
    *("torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "accelerate", "safetensors.torch"),
    *("tokenizers", "transformers", "transformers.models.chameleon.modeling_chameleon"),
]
# torchrun gives its ranks so long to end after SIGTERM.
GRACE_S = 30.0


def environment() -> dict[str, str]:
    """For a script of one thread per process that finds the project and asks no hub."""
    names = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | names | {"PYTHONPATH": str(ROOT)}


@functools.cache
def _prepare_server() -> None:
    """The server starts with the first process, and inherits the environment of this moment."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


class Popen(multiprocessing.context.ForkServerProcess):
    """A running script. `stdout` and `stderr` are the paths of what it prints, also while it runs."""

    def __init__(self, command: Sequence[object], env: Mapping[str, str], start_new_session: bool = False) -> None:
        folder = Path(tempfile.mkdtemp(prefix="forked"))
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        # A process that is killed early would not create them.
        self.stdout.touch()
        self.stderr.touch()
        self.args = [str(part) for part in command]
        outputs = (str(self.stdout), str(self.stderr))
        super().__init__(target=_launch, args=(self.args, dict(env), outputs, start_new_session))
        _prepare_server()
        with _without_main():
            self.start()

    @property
    def returncode(self) -> int | None:
        return self.exitcode

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.exitcode

    def wait_for_output(self, text: str, path: Path | None = None, timeout: float = 60) -> str:
        """The content of `stdout`, or of `path`, once `text` is in it."""
        path, deadline = path or self.stdout, time.monotonic() + timeout
        while text not in (content := path.read_text() if path.exists() else ""):
            assert self.poll() is None, f"it ended before it printed {text!r}:\n{self.stderr.read_text()}"
            assert time.monotonic() < deadline, f"it never printed {text!r}"
            time.sleep(0.005)
        return content

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout.read_text(), self.stderr.read_text()


def run(
    command: Sequence[object], env: Mapping[str, str], timeout: float = 300, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with captured text. A script that outlives `timeout` seconds is killed."""
    process = Popen(command, env)
    try:
        printed = process.communicate(timeout)
    finally:
        process.kill()
    done = subprocess.CompletedProcess(process.args, process.poll(), *printed)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def spawn(function: Callable[..., None], args: tuple[object, ...], num_processes: int) -> None:
    """As `torch.multiprocessing.spawn`: each process calls `function` with its number and `args`."""
    _prepare_server()
    with _without_main():
        torch.multiprocessing.start_processes(function, args, num_processes, start_method="forkserver")


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """A script has a main module of its own: pytest's is not imported. The server and its forks have one thread."""
    prepare = multiprocessing.spawn.get_preparation_data

    def prepare_without_main(name: str) -> dict[str, object]:
        return {key: value for key, value in prepare(name).items() if not key.startswith("init_main")}

    with (
        mock.patch("multiprocessing.spawn.get_preparation_data", prepare_without_main),
        mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}),
    ):
        yield


# In the forked process


def _launch(command: list[str], env: dict[str, str], outputs: tuple[str, str], start_new_session: bool) -> None:
    if start_new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    # The server has looked up its own TMPDIR.
    tempfile.tempdir = None
    os.chdir(ROOT)
    for number, path in enumerate(outputs, start=1):
        # In append mode ranks do not overwrite each other's lines.
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)
    # A script is not a child of multiprocessing.
    multiprocessing.process._parent_process = None
    arguments = [part for part in command[1:] if part not in ("-u", "--standalone")]
    if arguments[:2] == ["-m", "torch.distributed.run"]:
        _supervise(int(arguments[2].removeprefix("--nproc_per_node=")), arguments[3:])
    _run_script(arguments)


def _run_script(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


def _supervise(num_ranks: int, arguments: list[str]) -> None:
    """Starts the ranks, and ends all as soon as one fails, like torchrun. Does not return."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks: set[int] = set()
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            variables = shared | {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "forked"}
            os.environ.update({name: str(value) for name, value in variables.items()})
            _end_with_script(arguments)
        ranks.add(pid)

    def signal_all(number: int, _frame: object = None) -> None:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    signal.signal(signal.SIGTERM, signal_all)
    code, deadline = 0, None
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            ranks.remove(pid)
            if status and not code:
                code, deadline = 1, time.monotonic() + GRACE_S
                signal_all(signal.SIGTERM)
        elif deadline and time.monotonic() > deadline:
            signal_all(signal.SIGKILL)
        else:
            time.sleep(0.005)
    os._exit(code)


def _end_with_script(arguments: list[str]) -> None:
    code = 1
    try:
        _run_script(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
