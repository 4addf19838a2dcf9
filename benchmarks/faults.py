"""Whatever befalls a run: a message and the right exit code, or a resume to the same bits.

python benchmarks/faults.py                   # every case, some minutes
python benchmarks/faults.py --short           # the cases of `make test`, under a minute
python benchmarks/faults.py --only disk kill  # the cases with one of these words in their names

Runs of a tiny network on drawn images are started through the command line alone and killed, filled
up, cut, flipped and robbed. After each case the run must have ended with the exit code that tells
who is to act (2 a user's mistake, 1 a failure, 130 and 143 an interruption) and a message without a
traceback, and must then resume to the backbone, byte by byte, of a run that nothing befell. No
unfinished file and no process may be left. Linux; full disks need root.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import date
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from threading import Lock

import numpy as np
from measure import RESULTS, machine
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 180  # seconds after which a process counts as hanging
STEPS, EVERY = 80, 4  # steps of a run, and steps between its checkpoints
NETS = '''
"""Waits in each pass, signals its own process in the middle of one, or makes reading hang."""
import os, signal, time
from torch import nn

class Paced(nn.Sequential):
    passes = 0

    def forward(self, x):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            Paced.passes += 1
            time.sleep(float(os.environ.get("PAUSE", 0)))
            if Paced.passes == int(os.environ.get("PASS", 0)):
                os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        return super().forward(x)

def hang_at(number):
    from pixel_level_contrastive_learning.data import reading
    open_regular, files = reading.open_regular, []

    def hanging(path):
        files.append(path)
        if len(files) >= number:
            print("asleep", flush=True)
            time.sleep(999)
        return open_regular(path)

    reading.open_regular = hanging

def tiny(channels=3):
    if "HANG" in os.environ:
        hang_at(int(os.environ["HANG"]))
    return Paced(
        nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
    )
'''
PASSES = 4  # of the backbone a step: two views, online and target
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "two workers": ("--workers", "2"),
    "pixcontrast": ("--loss", "pixcontrast", "--accumulate", "2", "--precision", "bfloat16"),
    "pictures": ("--picture-every", "7", "--loggers", "tensorboard", "csv"),
    "lars": ("--optimizer", "lars", "--instance-weight", "1", "--max-rotation", "20"),
    "few kept": ("--keep-checkpoints", "1", "--checkpoint-every", "1", "--workers", "1"),
    "two processes": ("--devices", "2"),
    "resnet10t": ("--model", "timm/resnet10t", "--image-size", "64", "--steps", "12"),
}


class FaultError(Exception):
    """The package did not do what it promises."""


class SkippedError(Exception):
    """The case cannot be tried here."""


class Command:
    """A command of the package, running in a session of its own."""

    def __init__(
        self, *arguments: object, prefix: Sequence[str] = (), environment: Mapping[str, object] = {}
    ) -> None:
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  # read until the case is judged
        inherited = {name: value for name, value in os.environ.items() if "RANK" not in name}
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT} | dict(environment)
        package = "pixel_level_contrastive_learning"
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", package, *map(str, arguments)],
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=inherited | {name: str(value) for name, value in variables.items()},
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def said(self) -> str:
        """All that it has written so far."""
        size = os.fstat(self.output.fileno()).st_size
        return os.pread(self.output.fileno(), size, 0).decode(errors="replace")

    def until(self, happened: Callable[[], object], seconds: float = PATIENCE) -> bool:
        """Wait until something happened, or the command has ended; whether it happened."""
        end = time.monotonic() + seconds
        while not happened():
            if not self.running or time.monotonic() > end:
                return False
            time.sleep(0.0005)
        return True

    def code(self) -> int:
        """Its exit code, once it and all that it started are gone."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            raise FaultError(f"hangs: {last_line(self.said())}") from None
        end = time.monotonic() + 30  # workers look every few seconds whether their parent lives
        while orphans := session(self.pid):
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise FaultError(f"leaves {len(orphans)} processes behind")
            time.sleep(0.1)
        return code

    def ends(self, *codes: int, says: Sequence[str] = (), traceback: bool = False) -> str:
        """Hold the command to its exit code and message; the message."""
        code, output = self.code(), self.said()
        missing = [text for text in says if not re.search(text, output)]
        if code not in codes:
            raise FaultError(
                f"exit code {code}, not {' or '.join(map(str, codes))}: {last_line(output)}"
            )
        if missing:
            raise FaultError(
                f"exit code {code}, but says nothing of {missing[0]!r}: {last_line(output)}"
            )
        if not traceback and re.search("Traceback|Logging error|Exception ignored", output):
            raise FaultError(f"exit code {code} with a traceback: {last_line(output)}")
        return output


class Ground:
    """Where runs take place: images, networks, and the runs that nothing befell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kills = 0
        self.locks: dict[str, Lock] = {}
        (folder / "nets.py").write_text(NETS)
        self.images = draw_images(folder / "images")

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """A folder that is made when it is first asked for."""
        with self.locks.setdefault(name, Lock()):
            if not (self.folder / name).exists():
                make(self.folder / name)
        return self.folder / name

    def start(
        self,
        run: Path,
        *flags: object,
        images: Path | None = None,
        prefix: Sequence[str] = (),
        **environment: object,
    ) -> Command:
        """Start a run, or resume the one that is there; PAUSE, PASS and SIGNAL are NETS'."""
        options = f"--image-size 32 --batch-size 4 --steps {STEPS} --checkpoint-every {EVERY}"
        options += " --keep-checkpoints 99 --workers 0 --projection-size 16 --picture-every 0"
        options += (
            " --projection-hidden-size 16 --precision float32 --loggers csv --accelerator cpu"
        )
        arguments = [images or self.images, "--out", run, "--model", f"{self.folder}/nets.py:tiny"]
        arguments += [*options.split(), *flags]
        if (run / "config.yaml").exists() and "--overwrite" not in flags:
            arguments = ["--out", run, "--resume"]  # all else stands in the file
        return Command("pretrain", *arguments, prefix=prefix, environment=environment)

    def whole(self, *flags: object, images: Path | None = None) -> Path:
        """The run of these settings that nothing befell."""
        folders = [images.parent.name] if images is not None else []
        name = re.sub(r"\W+", "-", " ".join(map(str, ["whole", *folders, *flags])))
        return self.once(name, lambda run: self.start(run, *flags, images=images).ends(0))

    def half(self) -> Path:
        """A run that was killed in the middle of a step, to be copied."""
        kill = {"PASS": PASSES * 15, "SIGNAL": int(signal.SIGKILL)}
        return self.once("half", lambda run: self.start(run, **kill).ends(-signal.SIGKILL))

    def finish(self, run: Path, *flags: object, images: Path | None = None) -> None:
        """Resume a run, and hold it to the bits of the one that nothing befell."""
        self.start(run, *flags, "--resume", images=images).ends(0)
        self.compare(run, *flags, images=images)

    def compare(
        self, run: Path, *flags: object, images: Path | None = None, bits: bool = True
    ) -> None:
        """Hold a finished run to the bits of the one that nothing befell, and to a clean folder."""
        expected = self.whole(*flags, images=images)
        for name in ("backbone.safetensors", "backbone.json") if bits else ():
            if (run / name).read_bytes() != (expected / name).read_bytes():
                raise FaultError(f"resumes to another {name}, and says nothing")
        try:
            steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
        except ValueError:
            raise FaultError("resumes to a metrics.jsonl with a broken line") from None
        if sorted(set(steps)) != steps:
            raise FaultError("resumes to a metrics.jsonl with steps twice")
        unfinished = [path.name for path in run.rglob("*") if path.suffix in (".part", ".tmp")]
        if unfinished:
            raise FaultError(f"leaves {unfinished[0]} behind")


def draw_images(folder: Path, count: int = 16, scale: int = 1) -> Path:
    """Images of waves, 40 x 56 pixels times ``scale``."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[: 40 * scale, : 56 * scale] // scale
    for n in range(count):
        planes = [(x * (n + 3 * c + 1) + y * (2 * n + c + 3)) % 256 for c in range(3)]
        Image.fromarray(np.stack(planes, -1).astype(np.uint8)).save(folder / f"{n:02d}.png")
    return folder


def last_line(output: str) -> str:
    """The end of what a command said."""
    return output.strip().rpartition("\n")[2][:200] or "(silence)"


def session(leader: int) -> list[int]:
    """The processes of a session that live."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == leader and state != "Z":
                pids.append(int(stat.parent.name))
    return pids


def workers(command: Command) -> list[int]:
    """The loader's worker processes: forks of the command."""
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    command_line = Path(f"/proc/{command.pid}/cmdline").read_bytes()
    return [int(p) for p in children if Path(f"/proc/{p}/cmdline").read_bytes() == command_line]


def saved(run: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(p.stem[5:]) for p in run.glob("checkpoints/step-*.ckpt")), default=0)


# Kills.


MOMENTS = ("in step", "saving", "later", "start")
KILLS = [f"{name} {when}" for when in MOMENTS for name in ("KILL", "TERM", "INT")]


def kills(ground: Ground, folder: Path, variant: str, seed: int, planned: Sequence[str]) -> str:
    """Kill a run again and again, each time by a signal at a moment, and resume it."""
    run, flags = folder / "run", (*VARIANTS[variant], "--seed", seed)
    dice = random.Random(f"{variant} {seed}")
    survived = 0
    for plan in planned:
        name, _, when = plan.partition(" ")
        number = signal.Signals[f"SIG{name}"]
        inside = {"PASS": dice.randint(8, 24), "SIGNAL": int(number)} if when == "in step" else {}
        command = ground.start(run, *flags, "--resume", PAUSE=0.01, **inside)
        has_begun = strike(command, run, number, when, dice)
        length = int(flags[flags.index("--steps") + 1]) if "--steps" in flags else STEPS
        unheard = saved(run) < length // 2 and when != "in step"
        codes = {signal.SIGKILL: -signal.SIGKILL}.get(number, 128 + number)
        # Before the package is loaded, Python itself answers the signal.
        early = () if has_begun else (-number,)
        try:
            command.ends(codes, *early, 0, traceback=not has_begun)
        except FaultError as fault:
            raise FaultError(f"{plan}, kill {survived + 1}: {fault}") from None
        if command.process.returncode == 0 and unheard:
            raise FaultError(f"{plan}, kill {survived + 1}: goes on to the end")
        if command.process.returncode == 0:
            break  # it was done first
        survived += 1
    ground.finish(run, *flags)
    ground.kills += survived
    return f"{survived} kills, the same bits"


def strike(command: Command, run: Path, number: int, when: str, dice: random.Random) -> bool:
    """Send a signal at a moment; whether the command had begun to speak by then."""
    before = saved(run)
    if when == "start":
        time.sleep(dice.uniform(0.1, 3))
    elif when == "saving":
        leftovers = set(run.glob("checkpoints/*.part"))  # of a kill before
        command.until(lambda: saved(run) > before or {*run.glob("checkpoints/*.part")} - leftovers)
    elif when == "later":
        command.until(lambda: saved(run) > before)
        time.sleep(dice.uniform(0, 0.7))
    has_begun = bool(command.said())
    if when == "in step":
        return True
    if command.running:
        os.kill(command.pid, number)
    return has_begun


def worker_killed(ground: Ground, folder: Path, seed: int) -> str:
    """A worker of the loader dies alone, as when the system is out of memory."""
    run, flags = folder / "run", ("--workers", "2", "--seed", seed)
    command = ground.start(run, *flags, PAUSE=0.02)
    command.until(partial(saved, run))
    os.kill(random.Random(seed).choice(workers(command)), signal.SIGKILL)
    command.ends(1, says=["error: .*worker"])
    ground.finish(run, *flags)
    ground.kills += 1
    return "exit 1, then the same bits"


def worker_out_of_memory(ground: Ground, folder: Path) -> str:
    """A worker may take no more memory than it has."""
    images, run = draw_images(folder / "images", scale=40), folder / "run"
    flags = ("--workers", "2", "--steps", "12", "--max-broken", "0", "--cache", "off")
    command = ground.start(run, *flags, images=images, PAUSE=0.02)
    command.until(partial(saved, run))
    for worker in workers(command):
        pages = int(Path(f"/proc/{worker}/statm").read_text().split()[0])
        resource.prlimit(worker, resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)
    command.ends(1, says=[r"error: [\s\S]*memory"])
    ground.finish(run, *flags, images=images)
    return "exit 1, then the same bits"


def reader_hangs(ground: Ground, folder: Path, count: int, file: int) -> str:
    """A file never answers, as on a server that is gone, from a number of files in a process on."""
    run, flags = folder / "run", ("--workers", count, "--cache", "off")
    command = ground.start(run, *flags, HANG=file)
    command.until(lambda: command.said().count("asleep") == max(count, 1))
    time.sleep(1)  # steps of the batches that are there
    stopped_at = time.monotonic()
    os.kill(command.pid, signal.SIGTERM)
    command.ends(143, says=["SIGTERM"])
    if (seconds := time.monotonic() - stopped_at) > 10:  # torch waits 5 s for each worker
        raise FaultError(f"ends only after {seconds:.0f} s")
    if run.exists() != (file > 1):
        raise FaultError("leaves a folder behind" if run.exists() else "saves nothing")
    ground.finish(run, *flags)
    ground.kills += 1
    return "exit 143, then the same bits"


def worker_killed_beside_another(ground: Ground, folder: Path) -> str:
    """A worker of the loader dies while the other hangs, and the run waits."""
    run, flags = folder / "run", ("--workers", "2", "--cache", "off")
    command = ground.start(run, *flags, HANG=20)
    command.until(lambda: command.said().count("asleep") == 2)
    os.kill(workers(command)[0], signal.SIGKILL)
    command.ends(1, says=["error: .*worker"])
    ground.finish(run, *flags)
    return "exit 1, then the same bits"


def stopped_early(ground: Ground, folder: Path, number: signal.Signals) -> str:
    """A new run is told to stop in its first pass, before the first step: it leaves no trace."""
    run = folder / "run"
    ground.start(run, PASS=1, SIGNAL=int(number)).ends(128 + number, says=[number.name])
    if run.exists():
        raise FaultError("leaves a folder behind")
    ground.finish(run)
    return f"exit {128 + number}, then the same bits"


# Files of the run that are no longer what they were.


def half_of(ground: Ground, folder: Path) -> Path:
    """A run that was killed in the middle, to do with what one likes."""
    subprocess.run(["cp", "-a", ground.half(), folder / "run"], check=True)  # keeps hard links
    return folder / "run"


def damaged(content: bytes, how: str) -> bytes:
    """Bytes cut at a share of them or after the line there, or with one bit flipped."""
    verb, _, place = how.partition(" ")
    if re.fullmatch(r"[\d.]+", place):
        position = int(float(place) * (len(content) - 1))
    else:  # right after a text
        position = content.index(place.encode()) + len(place)
    if verb == "lines":
        position = content.index(b"\n", position) + 1
    return content[:position] + (
        b"" if verb != "flip" else bytes([content[position] ^ 1]) + content[position + 1 :]
    )


def damage(ground: Ground, folder: Path, name: str, how: str) -> str:
    """A file of a killed run is damaged: it resumes to the same bits, or is refused by name."""
    run = half_of(ground, folder)
    contents = {path: path.read_bytes() for path in sorted(run.glob(name))}
    for path, content in contents.items():
        path.write_bytes(damaged(content, how))
    command = ground.start(run)
    if command.code() == 0:
        is_warned = "changed: " in command.ends(0)  # other settings, as a user may give them
        ground.compare(run, bits=not is_warned)
        return "told as changed settings" if is_warned else "the same bits"
    pattern = re.escape(Path(name).name) if len(contents) == 1 else "checkpoints"
    # Settings that are gone read as settings that were changed.
    command.ends(1, 2, says=["error: ", f"{pattern}|cannot resume with other weights"])
    for path, content in contents.items():
        path.write_bytes(content)
    ground.finish(run)
    return f"exit {command.process.returncode}, and once mended the same bits"


def damage_of_result(ground: Ground, folder: Path, name: str, how: str) -> str:
    """A file of a finished run is damaged: its export is refused by name, and resuming mends it."""
    run = folder / "run"
    subprocess.run(["cp", "-a", ground.whole(), run], check=True)
    (run / name).write_bytes(damaged((run / name).read_bytes(), how))
    export = Command("export", run, "--format", "safetensors", "--out", folder / "out.safetensors")
    export.ends(1, 2, says=["error: ", re.escape(name)])
    ground.finish(run)
    return f"exit {export.process.returncode}, and mended by --resume"


# Images that are no longer what they were.


def image_lost(ground: Ground, folder: Path, how: str, count: int) -> str:
    """An image vanishes or is cut while a run reads: it stops, and goes on once that is mended."""
    images, run = folder / "images", folder / "run"
    flags = ("--workers", count, "--max-broken", 0)
    shutil.copytree(ground.images, images)
    content = (images / "05.png").read_bytes()
    command = ground.start(run, *flags, images=images, PAUSE=0.02)
    command.until(partial(saved, run))
    if how == "gone":
        (images / "05.png").unlink()
    else:
        (images / "05.png").write_bytes(damaged(content, how))
    command.ends(1, says=["error: 1 of 16 images cannot be used", r"05\.png"])
    (images / "05.png").write_bytes(content)
    ground.finish(run, *flags, images=images)
    return "exit 1, and mended the same bits"


def image_skipped(ground: Ground, folder: Path) -> str:
    """One image vanishes and another becomes a smaller one of another kind: the run goes on."""
    images, run = folder / "images", folder / "run"
    shutil.copytree(ground.images, images)
    command = ground.start(run, images=images, PAUSE=0.02)
    command.until(partial(saved, run))
    (images / "05.png").unlink()
    Image.new("L", (20, 30), 99).save(images / "07.png")
    command.ends(0, says=[r"skipped .*05\.png"])
    if "05.png" not in (run / "skipped.txt").read_text():
        raise FaultError("skipped.txt does not list the image")
    return "exit 0, skipped and listed"


def folder_gone(ground: Ground, folder: Path) -> str:
    """The folder of images is elsewhere when the run resumes."""
    images, run = folder / "images", folder / "run"
    shutil.copytree(ground.images, images)
    kill = {"PASS": PASSES * 15, "SIGNAL": int(signal.SIGKILL)}
    ground.start(run, images=images, **kill).ends(-signal.SIGKILL)
    images.rename(folder / "elsewhere")
    ground.start(run, images=images).ends(2, says=["error: .*images"])
    (folder / "elsewhere").rename(images)
    ground.finish(run, images=images)
    return "exit 2, and back again the same bits"


# Permissions, and a disk that is full.


def without_rights() -> list[str]:
    """What starts a command so that permissions count for root, too."""
    if os.geteuid() != 0:
        return []
    prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    with suppress(OSError):
        if subprocess.run([*prefix, "true"], check=False).returncode == 0:
            return prefix
    raise SkippedError("is root, and setpriv cannot take root's rights away")


def permission(ground: Ground, folder: Path, place: str) -> str:
    """A file or folder of a killed run, or an image of it, may no longer be used."""
    prefix, run = without_rights(), half_of(ground, folder)
    [path] = run.glob(place) if place else [run]
    mode = path.stat().st_mode
    path.chmod(0o500 if path.is_dir() else 0)
    try:
        command = ground.start(run, prefix=prefix)
        command.ends(1, 2, says=["error: ", path.name])
    finally:
        path.chmod(mode)
    ground.finish(run)
    return f"exit {command.process.returncode}, and given back the same bits"


def permission_of_out(ground: Ground, folder: Path) -> str:
    """The run is to be made where nothing may be."""
    (folder / "shut").mkdir(mode=0o500)
    prefix = without_rights()
    ground.start(folder / "shut" / "run", prefix=prefix).ends(2, says=["error: out is .*shut/run"])
    return "exit 2"


def permission_while_running(ground: Ground, folder: Path) -> str:
    """The folder of checkpoints becomes read-only under a run."""
    prefix, run = without_rights(), folder / "run"
    command = ground.start(run, prefix=prefix, PAUSE=0.02)
    command.until(partial(saved, run))
    (run / "checkpoints").chmod(0o500)
    command.ends(1, says=["error: .*could not be written: Permission denied"])
    (run / "checkpoints").chmod(0o755)
    ground.finish(run)
    return "exit 1, and given back the same bits"


@contextmanager
def small_disk(folder: Path, kib: int, loop: bool = False) -> Iterator[Path]:
    """A file system of a size: in memory, or ext4 in a file."""
    disk = folder / "disk"
    disk.mkdir()
    source = ["-t", "tmpfs", "-o", f"size={kib}k", "tmpfs"]
    if loop:
        with (folder / "image").open("wb") as file:
            file.truncate(kib * 1024)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", folder / "image"], check=False)
        source = ["-o", "loop", folder / "image"]
    mounted = subprocess.run(["mount", *source, disk], capture_output=True, check=False)
    if mounted.returncode:
        raise SkippedError("may not mount a small file system (needs root)")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def full_disk(ground: Ground, folder: Path, free: int) -> str:
    """The disk of the run has room for so many KiB."""
    size = 16 * 1024
    with small_disk(folder, size) as disk:
        (disk / "other").write_bytes(bytes((size - free) * 1024))
        command = ground.start(disk / "run")
        command.ends(1, 2, says=["error: ", "disk is full|No space left"])
        (disk / "other").unlink()
        ground.finish(disk / "run")
    return f"exit {command.process.returncode}, and with room the same bits"


def full_large_disk(ground: Ground, folder: Path) -> str:
    """The checkpoints of a real network fill 400 MB, and the oldest ones are removed."""
    flags = ("--model", "timm/resnet10t", "--image-size", "64", "--checkpoint-every", "1")
    flags += ("--steps", "12")
    with small_disk(folder, 400 * 1024, loop=True) as disk:
        run = disk / "run"
        ground.start(run, *flags).ends(1, says=["error: .*the disk is full"])
        for old in sorted(run.glob("checkpoints/step-*.ckpt"))[:-1]:
            old.unlink()
        Command("pretrain", "--out", run, "--resume", "--keep-checkpoints", "1").ends(0)
        ground.compare(run, *flags)
    return "exit 1, and with room the same bits"


# Two at once.


def two_at_once(ground: Ground, folder: Path, resume: bool) -> str:
    """Of two processes with one folder the second is refused, and told who holds it."""
    run = half_of(ground, folder) if resume else folder / "run"
    commands = [ground.start(run, PAUSE=0.01) for _ in "12"]
    codes = [command.code() for command in commands]
    if sorted(codes) != [0, 2]:
        raise FaultError(f"exit codes {codes[0]} and {codes[1]}, not 0 and 2")
    first, second = sorted(commands, key=lambda command: command.code())
    second.ends(2, says=["error: ", rf"\b{first.pid}\b", re.escape(socket.gethostname())])
    first.ends(0)
    ground.compare(run)
    return "exit 0 and 2"


def second_comes_later(ground: Ground, folder: Path) -> str:
    """A resume beside a run is refused while that lives, and not once it was killed."""
    run = folder / "run"
    first = ground.start(run, PAUSE=0.5)
    first.until(partial(saved, run))
    messages = ["error: ", rf"\b{first.pid}\b", re.escape(socket.gethostname())]
    try:
        ground.start(run).ends(2, says=messages)
        ground.start(run, "--overwrite").ends(2, says=messages)
    finally:
        os.kill(first.pid, signal.SIGKILL)
    first.code()
    ground.finish(run)
    return "exit 2, and after a crash the same bits"


# The campaign.

Case = Callable[[Ground, Path], str]
NEWEST = "checkpoints/step-00000012.ckpt"
SHORT = (
    "kills: short",
    "reader hangs at 30, 2 workers",
    f"damage: {NEWEST} cut 0.03",
    "permission: checkpoint",
    "full disk, 700 KiB free",
    "two at once: fresh",
)
"""What `make test` tries."""


def campaign() -> dict[str, Case]:
    """Every case by its name."""
    cases: dict[str, Case] = {}

    def add(name: str, case: Callable[..., str], /, **settings: object) -> None:
        cases[name] = partial(case, **settings)

    soon = ["KILL saving", "TERM in step"]
    add("kills: short", kills, variant="two workers", seed=99, planned=soon)
    plans = cycle(KILLS)
    for seed, variant in enumerate(VARIANTS):
        planned = list(islice(plans, 4 if variant in ("two processes", "resnet10t") else 10))
        add(f"kills: {variant}", kills, variant=variant, seed=seed, planned=planned)
    for seed in range(4):
        add(f"kills: worker alone, {seed}", worker_killed, seed=seed)
    add("worker out of memory", worker_out_of_memory)
    for count in (0, 2):
        for file in (1, 30):
            add(f"reader hangs at {file}, {count} workers", reader_hangs, count=count, file=file)
    add("worker killed beside one that hangs", worker_killed_beside_another)
    for number in (signal.SIGINT, signal.SIGTERM):
        add(f"stopped early by {number.name}", stopped_early, number=number)

    hurts = [f"{verb} {at}" for verb in ("cut", "flip") for at in (0, 0.03, 0.3, 0.5, 0.9, 1)]
    for name in (NEWEST, "config.yaml", "metrics.jsonl", "statistics.json", "backbone.json"):
        for how in hurts:
            add(f"damage: {name} {how}", damage, name=name, how=how)
    for how in ("lines 0.3", "lines 0.7", "flip seed: "):
        add(f"damage: config.yaml {how}", damage, name="config.yaml", how=how)
    add("damage: all checkpoints", damage, name="checkpoints/*.ckpt", how="cut 0.5")
    for name in ("backbone.json", "backbone.safetensors"):
        for how in ("cut 0", "cut 0.5", "cut 0.9", "flip 0", "flip 0.03"):
            add(f"damage: export of {name} {how}", damage_of_result, name=name, how=how)

    for how in ("gone", "cut 0", "cut 0.5"):
        for count in (0, 2):
            add(f"image {how}, {count} workers", image_lost, how=how, count=count)
    add("image skipped", image_skipped)
    add("images elsewhere", folder_gone)

    add("permission: checkpoint", permission, place=NEWEST)
    add("permission: folder of the run", permission, place="")
    for place in ("config.yaml", "metrics.jsonl", "checkpoints"):
        add(f"permission: {place}", permission, place=place)
    add("permission: out", permission_of_out)
    add("permission: while running", permission_while_running)
    for free in (0, 64, 400, 700, 1300, 1800):
        add(f"full disk, {free} KiB free", full_disk, free=free)
    add("full disk, 400 MB", full_large_disk)

    add("two at once: fresh", two_at_once, resume=False)
    add("two at once: resuming", two_at_once, resume=True)
    add("two at once: the second later", second_comes_later)
    return cases


def tried(ground: Ground, name: str, case: Case) -> dict[str, object]:
    """What came out of a case."""
    start = time.monotonic()
    folder = ground.folder / re.sub(r"\W+", "-", name)
    folder.mkdir()
    try:
        passed, outcome = True, case(ground, folder)
    except SkippedError as reason:
        passed, outcome = True, f"skipped: {reason}"
    except FaultError as fault:
        passed, outcome = False, str(fault)
    except Exception as error:  # ours: the other cases are still tried
        passed, outcome = False, f"cannot be judged, {type(error).__name__}: {error}"
    seconds = round(time.monotonic() - start, 1)
    print(f"| {name} | {'' if passed else '**FAULT** '}{outcome} | {seconds} |", flush=True)
    return {"case": name, "passed": passed, "outcome": outcome, "seconds": seconds}


def main() -> int:
    """Try the cases and print the table; 1 if any went wrong."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--short", action="store_true", help="only the cases of `make test`")
    flags.add_argument("--only", nargs="+", default=[""], help="cases with one of these words")
    flags.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases at once")
    flags.add_argument("--save", action="store_true", help="record the table")
    args = flags.parse_args()
    # A shell's background job ignores SIGINT, and would hand that on to the runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cases = campaign()
    names = SHORT if args.short else [name for name in cases if name != "kills: short"]
    names = [name for name in names if any(word in name for word in args.only)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        ground = Ground(Path(folder))
        print("| case | outcome | seconds |\n|---|---|---|", flush=True)
        table = list(pool.map(lambda name: tried(ground, name, cases[name]), names))
    failed = sum(not row["passed"] for row in table)
    summary = f"{len(table)} cases, {ground.kills} kills, {failed} faults"
    print(f"\n{summary}, in {time.monotonic() - start:.0f} s")
    if args.save:
        record = {"machine": machine(), "date": date.today().isoformat(), "summary": summary}
        (RESULTS / "faults.json").write_text(json.dumps(record | {"cases": table}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
